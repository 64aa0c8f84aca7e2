"""The folder of a run, runs/<run-id>."""

import secrets
from datetime import UTC, datetime
from pathlib import Path

from common.errors import UserError
from common.settings import Settings

CHECKPOINTS = "checkpoints"  # in the run's folder
STATE_FILE = "state.json"  # in that one, written last


def new_run_folder(settings: Settings) -> Path:
    """Make the folder of a new run, absolute; the id sorts by time and is unique.

    Raises UserError when it cannot be made.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = Path(settings.run.out).expanduser().resolve() / f"{stamp}-{secrets.token_hex(3)}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {settings.run.out}: no folder can be made there: {error.strerror}.") from None
    return folder


def has_checkpoint(folder: Path) -> bool:
    """Whether the run can go on from something."""
    return (folder / CHECKPOINTS / STATE_FILE).is_file()
