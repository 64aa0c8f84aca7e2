"""What two servers must not use at once: a run's folder, and the database of the SuperLink."""

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from common.errors import UserError
from common.system.files import InUse, lock

LOCK = "lock"  # in the run's folder; beside the database it ends the database's name
OF_FLOWER = "node"  # a table of each database of a SuperLink
LOCKED_WITHIN_S = 0.5

log = logging.getLogger("facefed.server")


@contextmanager
def _held(path: Path, refusal: str) -> Iterator[None]:
    """Hold a lock file while the block lasts.  Raises UserError when another process does, or it cannot be made."""
    try:
        file = path.open("a")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; give another place.") from None
    with file:
        try:
            without_locks = lock(file)
        except InUse:
            raise UserError(refusal) from None
        if without_locks:
            log.warning(
                "%s cannot be locked (%s); see to it yourself that no other server uses it", path, without_locks
            )
        yield


@contextmanager
def run_held(folder: Path) -> Iterator[None]:
    """Hold a run's folder while the block lasts.  Raises UserError when another server does."""
    refusal = f"{folder}: another flower-server is at work on that run; wait until it has ended, or end it."
    with _held(folder / LOCK, refusal):
        yield


@contextmanager
def database_held(path: Path) -> Iterator[None]:
    """Hold the SuperLink's database while the block lasts.

    Raises UserError: another server or program holds it, it is no file of a SuperLink, or cannot be written.
    """
    if path.is_dir():
        raise UserError(f"--database {path} is a folder; give a file, which is made where it is missing.")
    if not path.parent.is_dir():
        raise UserError(f"--database {path}: there is no folder {path.parent}; make it, or give another file.")
    refusal = f"--database {path} is in use by another flower-server; give each a file of its own."
    with _held(path.with_name(f"{path.name}.{LOCK}"), refusal):
        _check_database(path)
        yield


def _check_database(path: Path) -> None:
    """Raises UserError unless a SuperLink can go on with it, or begin it."""
    if not path.exists() or path.stat().st_size == 0:
        return
    try:
        with closing(sqlite3.connect(path, timeout=LOCKED_WITHIN_S, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            database.execute("ROLLBACK")
    except sqlite3.OperationalError as error:
        what = "is locked by another program; end that" if "locked" in str(error) else f"cannot be written ({error})"
        raise UserError(f"--database {path} {what}, or give another file.") from None
    except sqlite3.DatabaseError:
        raise UserError(f"--database {path} is no SQLite database; give another file.") from None
    if tables and OF_FLOWER not in tables:
        raise UserError(f"--database {path} is another program's database, not a SuperLink's; give another file.")
