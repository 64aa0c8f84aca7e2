"""The files that a run keeps in its folder: whole or not there, and on the disk before the record speaks of them."""

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Protocol

_log = logging.getLogger("facefed.tracking")


class SavesFigure(Protocol):
    """What a matplotlib Figure offers; matplotlib itself stays in common.plots."""

    def savefig(self, fname: Path, *, format: str) -> None:  # noqa: A002 - matplotlib's word
        """Write the picture."""


class KeptFiles:
    """Writes the artifacts of one run, or of one nested run, below the run's folder."""

    def __init__(self, folder: Path, name: str) -> None:
        """name: "" for the run itself, else the nested run's."""
        self._folder = folder
        self._name = name
        self.missing: dict[str, None] = {}  # names that could not be written, in that order

    def place(self, name: str) -> Path:
        """Where an artifact lies in the run's folder; a nested run's in a folder of its name, plots/celeba/roc.png."""
        target = PurePosixPath(name)
        if target.is_absolute() or ".." in target.parts:
            raise ValueError(f"artifact name {name!r} leaves the run's folder")
        return self._folder / target.parent / self._name / target.name

    def write(self, name: str, write: Callable[[Path], object]) -> bool:
        """Have `write` make the artifact at a path that it gets; False, with one warning, when the disk is full."""
        path = self.place(name)
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(part)
            bring_to_disk(part)
            part.replace(path)
            bring_to_disk(path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            if not self.missing:
                _log.warning("Tracking: %s cannot be written (%s); the run goes on without it.", path, error)
            self.missing[name] = None
            return False
        self.missing.pop(name, None)
        return True


def bring_to_disk(path: Path) -> None:
    """Return once a file's content, or a folder's list of names, survives a power cut."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
