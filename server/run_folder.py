"""The folder of a run, runs/<run-id>."""

import secrets
from datetime import UTC, datetime
from pathlib import Path

from common.config import Settings


def new_run_folder(settings: Settings) -> Path:
    """Make the folder of a new run, absolute; the id sorts by time and is unique."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = Path(settings.run.out).expanduser().resolve() / f"{stamp}-{secrets.token_hex(3)}"
    folder.mkdir(parents=True)
    return folder
