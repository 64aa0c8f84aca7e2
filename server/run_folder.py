"""The folder of a run, runs/<run-id>."""

import secrets
from datetime import UTC, datetime
from pathlib import Path

from common import config
from common.errors import UserError
from common.files import write_bytes
from common.settings import Settings
from common.tracking.settings import without_secrets

CONFIG_FILE = "config.toml"  # its settings, resolved
_SHOWN_CONFIG_FILE = "config.shown.toml"  # the same as others may see it, where that differs
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


def write_config_file(folder: Path, settings: Settings) -> None:
    """Write the resolved settings as RUN/config.toml.

    Where the tracking address has a password, that file is for this user alone, and another is without it.
    """
    shown, own = shown_config_file(folder, settings), folder / CONFIG_FILE
    write_bytes(own, config.to_toml(settings).encode(), mode=0o666 if shown == own else 0o600)
    if shown != own:
        write_bytes(shown, config.to_toml(without_secrets(settings)).encode())


def shown_config_file(folder: Path, settings: Settings) -> Path:
    """The file of the settings that others may see."""
    return folder / (CONFIG_FILE if without_secrets(settings) == settings else _SHOWN_CONFIG_FILE)
