"""A site's state folder: one program at a time works in it, and all that it holds is of one site."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from common.errors import UserError
from common.system.events import RUN_FILE
from common.system.files import InUse, lock

SITE_FILE: Final = "site"  # in the folder: whose it is
LOCK: Final = "lock"


@contextmanager
def state_folder_held(
    folder: Path,
    name: str,
    *,
    flag: str = "--state-dir",
    within_s: float = 0.0,
    say: Callable[[str], object],
) -> Iterator[None]:
    """Make the folder, keep other clients out of it while the block lasts, and write the site's name into it.

    flag: how its user names it.  within_s: for how long to wait for another client.  say: is told where the file system
    has no locks; it goes on then, as two clients of one folder have one name, and a server lets one member of a name
    take part.  Raises UserError where it cannot be written, another client is in it, or it is another site's.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written: {error.strerror}; choose another.") from None
    with file:
        try:
            without_locks = lock(file, within_s)
        except InUse:
            raise UserError(f"{flag} {folder} is in use by another client; give each a name of its own.") from None
        if without_locks:
            say(f"{flag} {folder} cannot be locked ({without_locks}); see to it yourself that no other client uses it")
        _claim(folder, name, flag)
        yield


def _claim(folder: Path, name: str, flag: str) -> None:
    """Write the site's name into its folder.  Raises UserError where the folder is another's."""
    if (folder / RUN_FILE).exists():
        raise UserError(f"{flag} {folder} is a run's folder; give the site one of its own, or leave it out.")
    mark = folder / SITE_FILE
    known = mark.read_text(encoding="utf-8", errors="replace") if mark.is_file() else ""
    if known not in ("", name):
        raise UserError(
            f"{flag} {folder} is of the site {known!r}: its heads and its ledger are there. Give {name!r} a folder of"
            " its own."
        )
    mark.write_text(name, encoding="utf-8")
