"""Tracking addresses, checked at the door: what MLflow refuses with a page of text is one line here."""

import re
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from common.errors import TrackingError

SERVERS = ("http", "https")
DATABASES = ("postgresql", "mysql")  # also with a driver, as in mysql+pymysql
_WHAT_TO_USE = "use sqlite:///mlflow.db, or the address of a running `mlflow server` such as http://127.0.0.1:5000"
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9]*)(\+[A-Za-z0-9]+)?:")


def resolve_uri(uri: str, base: Path) -> str:
    """The tracking address as MLflow takes it from any folder: a relative sqlite path becomes absolute below `base`.

    Accepted: sqlite, http(s), postgresql and mysql.  Raises TrackingError for anything else, for example a bare folder.
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
    parts = urlsplit(text)
    if "://" not in text or not (parts.hostname or scheme in DATABASES):
        raise TrackingError(f"tracking address {shown_uri(text)!r} names no host; {_WHAT_TO_USE}.")
    return text.rstrip("/") if scheme in SERVERS else text


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


def shown_uri(uri: str) -> str:
    """The address without a password or user name, fit for logs and files."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc="***@" + parts.netloc.rpartition("@")[2]))
