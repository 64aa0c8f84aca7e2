"""Where an MLflow server keeps its data: the database and the artifacts' place, checked before anything starts."""

import importlib.util
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from common.errors import TrackingError
from common.processes import can_connect
from common.redact import DATABASES, shown_uri, without_password
from common.tracking.address import SERVERS, resolve_uri, sqlite_path
from common.tracking.sender import short_reason

DEFAULT_DATABASE: Final = "sqlite:///mlflow.db"
DATABASE_PORTS: Final[Mapping[str, int]] = {"postgresql": 5432, "mysql": 3306}


def check_backend(text: str, base: Path, option: str = "--backend") -> str:
    """A database's address, or "sqlite", as MLflow can use it now; `option` named it.  Raises TrackingError.

    Makes a sqlite database's folder, not the database; a PostgreSQL or MySQL database is logged into.
    """
    if text in DATABASES:
        raise TrackingError(f"{option} {text} names no database; write {text}://USER:PASSWORD@HOST/DATABASE.")
    uri = resolve_uri(DEFAULT_DATABASE if text == "sqlite" else text, base)
    if uri.startswith(SERVERS):
        raise TrackingError(f"{option} {shown_uri(uri)} is a server already; give its database, or use it as it is.")
    database = sqlite_path(uri)
    if database is None:
        return check_database(uri)
    require_folder(database.parent, option)
    _require_sqlite(database, option)
    return uri


def _require_sqlite(database: Path, option: str) -> None:
    """An empty file is a database too."""
    try:
        with database.open("r+b") as file:
            head = file.read(16)
    except FileNotFoundError:
        return
    except OSError as error:
        raise TrackingError(
            f"{option}: {database} cannot be written ({error.strerror}); change its rights, or name another file."
        ) from None
    if head not in (b"", b"SQLite format 3\x00"):
        raise TrackingError(f"{option}: {database} is no sqlite database; name another file.")


def require_folder(folder: Path, option: str) -> None:
    """Make a folder and write in it.  Raises TrackingError."""
    probe = folder / f".facefed-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise TrackingError(
            f"{option}: {folder} cannot be written ({error.strerror}); name another folder, or change its rights."
        ) from None


def check_database(uri: str) -> str:
    """Log into a PostgreSQL or MySQL database and return its address.  Raises TrackingError."""
    parts = urlsplit(uri)
    kind = parts.scheme.partition("+")[0]
    host, port = parts.hostname, parts.port or DATABASE_PORTS[kind]
    if host and not can_connect(host, port, 5.0):
        raise TrackingError(
            f"{shown_uri(uri)}: nothing answers at {host}:{port}; start the database, or correct the address."
        )
    from mlflow.store.db.utils import create_sqlalchemy_engine

    make_engine: Callable[[str], Any] = create_sqlalchemy_engine  # untyped
    try:
        engine = make_engine(uri)
        with engine.connect():
            pass
        engine.dispose()
    except Exception as error:  # each driver has errors of its own
        reason = without_password(short_reason(error), uri)
        raise TrackingError(
            f"{shown_uri(uri)} cannot be opened ({reason}); make the database, or correct user, password and name."
        ) from None
    return uri


def open_client(uri: str) -> Any:  # noqa: ANN401 - MlflowClient
    """MLflow's client of an address from `resolve_uri`, tracking and registry.

    Asks a PostgreSQL or MySQL database first: MLflow would try one that refuses again for 100 s, and hold up every
    other database of this process meanwhile.  Raises TrackingError.
    """
    from mlflow import MlflowClient

    if sqlite_path(uri) is None and not uri.startswith(SERVERS):
        check_database(uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def check_artifacts(text: str, base: Path) -> str:
    """`--artifacts` as MLflow takes it: a folder, which is made, or s3://BUCKET/PREFIX, which is asked for.

    Raises TrackingError.
    """
    scheme, colon, _ = text.partition("://")
    if not colon:
        folder = (base.resolve() / Path(text).expanduser()).resolve()
        require_folder(folder, "--artifacts")
        return str(folder)
    if scheme != "s3":
        raise TrackingError(f"--artifacts {shown_uri(text)} is of the unknown kind {scheme!r}; use a folder or s3://.")
    if not importlib.util.find_spec("boto3"):
        raise TrackingError(f"--artifacts {text} needs the package boto3: pip install boto3.")
    from mlflow.artifacts import list_artifacts

    try:
        list_artifacts(artifact_uri=text)
    except Exception as error:  # boto's own
        raise TrackingError(
            f"--artifacts {text} cannot be listed ({short_reason(error)}); check the bucket, AWS_ACCESS_KEY_ID,"
            " AWS_SECRET_ACCESS_KEY and MLFLOW_S3_ENDPOINT_URL."
        ) from None
    return text
