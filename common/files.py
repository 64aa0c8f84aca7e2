"""Files that survive a crash: written aside, synced, renamed; bytes, and JSON, which cannot run code.

Apart from `common/checkpoints.py`, so that programs without a model do not import torch for them.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.errors import CheckpointError


def write_bytes(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Replace a file in one step: readers see the old or the new content, never a part of it.

    mode: of the file, less what the user's umask takes.
    """
    write_parts(path, (content,), mode)


def write_parts(path: Path, parts: Iterable[bytes | memoryview], mode: int = 0o666) -> None:
    """`write_bytes` of a content that comes in parts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # without it a power cut may take the rename back
    finally:
        os.close(folder)


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.  Raises CheckpointError when it is missing, cut short or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); it is cut short or damaged.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; it is not a file of ours.")
    return value
