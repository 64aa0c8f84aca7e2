"""Tracking addresses, checked at the door: what MLflow refuses with a page of text is one line here."""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from common import config
from common.errors import TrackingError
from common.redact import DATABASES, shown_uri
from common.settings import Settings
from common.tracking.tensorboard import OFF

SERVERS = ("http", "https")
ARTIFACTS = "mlruns"  # beside a sqlite file; MLflow's own name for it
# Of each database the drivers, the one that a plain address means first (SQLAlchemy 2.1), and the package to install.
DRIVERS: Final[Mapping[str, tuple[tuple[str, str], ...]]] = {
    "postgresql": (("psycopg", "psycopg"), ("psycopg2", "psycopg2")),
    "mysql": (("mysqldb", "MySQLdb"), ("pymysql", "pymysql")),
}
INSTALL: Final[Mapping[str, str]] = {"postgresql": "psycopg2-binary", "mysql": "pymysql"}
_WHAT_TO_USE = "use sqlite:///mlflow.db, or the address of a running `mlflow server` such as http://127.0.0.1:5000"
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9]*)(\+[A-Za-z0-9]+)?:")


def resolve_uri(uri: str, base: Path) -> str:
    """The tracking address as MLflow takes it from any folder: a relative sqlite path becomes absolute below `base`.

    Accepted: sqlite, http(s), postgresql and mysql; the last two get the driver that is installed.  Raises
    TrackingError for anything else, for example a bare folder, and where a driver is missing.
    """
    text = uri.strip()
    if not text:
        raise TrackingError(f"tracking address is empty; {_WHAT_TO_USE}.")
    found = _SCHEME.match(text)
    if found is None:
        raise TrackingError(f"tracking address {text!r} is a folder, which MLflow no longer writes to; {_WHAT_TO_USE}.")
    scheme = found.group(1).lower()
    if scheme == "file":
        raise TrackingError(f"tracking address {text!r} is a file store, which MLflow refuses; {_WHAT_TO_USE}.")
    if scheme == "sqlite":
        return _resolve_sqlite(text, base)
    if scheme not in SERVERS + DATABASES:
        raise TrackingError(f"tracking address {shown_uri(text)!r} has the unknown scheme {scheme!r}; {_WHAT_TO_USE}.")
    if "://" not in text or not _is_sound(text, needs_host=scheme in SERVERS):
        raise TrackingError(
            f"tracking address {shown_uri(text)!r} names no host or no port that there can be (in a password write / as"
            f" %2F, # as %23, ? as %3F, @ as %40); {_WHAT_TO_USE}."
        )
    return text.rstrip("/") if scheme in SERVERS else with_driver(text)


def _is_sound(uri: str, *, needs_host: bool) -> bool:
    """A database without a host is asked over its socket."""
    try:
        parts = urlsplit(uri)
        return parts.port != 0 and not parts.fragment and bool(parts.hostname or not needs_host)
    except ValueError:  # a port that is no number, or an IPv6 address without its end
        return False


def with_driver(uri: str) -> str:
    """A PostgreSQL or MySQL address with the driver that is installed.  Raises TrackingError when none is."""
    scheme, _, rest = uri.partition(":")
    kind, plus, driver = scheme.lower().partition("+")
    installed = [(name, module) for name, module in DRIVERS[kind] if importlib.util.find_spec(module)]
    if plus:
        modules = dict(DRIVERS[kind])
        if driver in modules and driver not in dict(installed):
            raise TrackingError(f"{shown_uri(uri)} needs the package {modules[driver]}: pip install {modules[driver]}.")
        return f"{scheme.lower()}:{rest}"
    if not installed:
        raise TrackingError(f"{shown_uri(uri)} needs a driver for {kind}: pip install {INSTALL[kind]}.")
    return f"{kind}+{installed[0][0]}:{rest}"


def _resolve_sqlite(uri: str, base: Path) -> str:
    head, _, rest = uri.partition(":///")
    name, mark, query = rest.partition("?")
    if not name or name == ":memory:":
        raise TrackingError(f"tracking address {uri!r} names no database file; {_WHAT_TO_USE}.")
    path = Path(name).expanduser()  # sqlite:////abs/x.db leaves "/abs/x.db" here
    absolute = path if path.is_absolute() else (base.resolve() / path)
    if absolute.is_dir():
        raise TrackingError(
            f"tracking address {uri!r} is a folder; name a file in it, such as {uri.rstrip('/')}/mlflow.db."
        )
    return f"{head}:///{absolute}{mark}{query}"


def sqlite_path(uri: str) -> Path | None:
    """The database file of a resolved sqlite address, or None for every other kind."""
    if not uri.startswith("sqlite"):
        return None
    return Path(uri.partition(":///")[2].partition("?")[0])


def local_files(uri: str) -> list[Path]:
    """What a resolved address has on this machine: a sqlite file and the artifacts beside it."""
    database = sqlite_path(uri)
    return [database, database.parent / ARTIFACTS] if database else []


def with_absolute_tracking(settings: Settings, address: str, base: Path) -> tuple[Settings, str]:
    """The settings and the tracking address as they mean the same in every process: of TensorBoard the folder, too.

    address: as given, with its password.  Raises TrackingError.
    """
    tracking = settings.tracking
    if tracking.tensorboard != OFF:
        folder = str(base.resolve() / Path(tracking.tensorboard).expanduser())
        settings = config.with_value(settings, "tracking", "tensorboard", folder)
    if tracking.enabled:
        address = resolve_uri(address, base)
        settings = config.with_value(settings, "tracking", "uri", address)
    return settings, address
