"""Finds offline runs of Weights & Biases below folders, and the files of each; links that lead out are not followed."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from common.errors import TrackingError, escaped

METADATA_FILE: Final = "wandb-metadata.json"
FILES_ABOUT_PEOPLE: Final = (METADATA_FILE, "config.yaml", "conda-environment.yaml")  # wandb's own, not the user's

_log = logging.getLogger("facefed.tracking")


def find_logs(paths: Iterable[Path], *, follow_links: bool = False) -> tuple[list[Path], list[str]]:
    """The .wandb files that `paths` mean: such files, run folders, folders of run folders, or what holds `wandb/`.

    Beside them a line for each that is a link out of its path: it would bring in a run of somebody else.  Raises
    TrackingError when one of the paths has none.
    """
    logs, outside = dict[Path, None](), list[str]()
    for path in paths:
        found = [path] if path.is_file() else _logs_below(path)
        if not found:
            what = "holds no .wandb file" if path.is_dir() else "does not exist"
            raise TrackingError(f"{path} {what}; name wandb's folder, or an offline-run-* folder in it.")
        within = path.parent if path.is_file() else path
        for log in found:
            if follow_links or log == path or is_below(log, within):
                logs[log.resolve()] = None  # wandb/latest-run is a link to one of the others
            else:
                outside.append(f"{log} leads out of {within}; --follow-links takes it, if you trust who made the link.")
    return list(logs), outside


def _logs_below(folder: Path) -> list[Path]:
    for pattern in ("*.wandb", "*run-*/*.wandb", "wandb/*run-*/*.wandb"):
        found = sorted(folder.glob(pattern))
        if found:
            return found
    return []


def files_of(log: Path, *, follow_links: bool) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The run's files by their place among the artifacts, and the places of links that lead out of the run's folder.

    Whoever made the folder chose where its links lead: to a private key of whoever imports it, for example.  So what
    lies outside is taken with `follow_links` only.  A link that leads nowhere, or to a folder, is told.

    Not wandb's own files that say who trained it, on which host and in which folders.
    """
    folder, files, outside = log.parent / "files", dict[str, Path](), list[str]()
    if not follow_links and folder.exists() and not is_below(folder, log.parent):
        return {}, (folder.name,)
    for place, folders, names in os.walk(folder):
        for path in sorted(Path(place) / name for name in (*names, *folders)):
            if path.parent == folder and path.name in FILES_ABOUT_PEOPLE:
                continue
            if not follow_links and path.is_symlink() and path.exists() and not is_below(path, log.parent):
                outside.append(escaped(path.relative_to(folder).as_posix()))
            elif path.is_file():
                files[path.relative_to(folder).as_posix()] = path
            elif path.is_symlink() and path.is_dir():
                _log.warning("Import: %s is a link to a folder; it is left out.", path)
            elif not path.is_dir():
                _log.warning("Import: %s leads to a file that is gone; it is left out.", path)
    return files, tuple(outside)


def is_below(path: Path, folder: Path) -> bool:
    """Whether a path, wherever links lead, is in that folder; a link that leads round in circles is not."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):
        return False


def digest_of(files: Mapping[str, Path]) -> str:
    """Tells whether any file is new or another one than before, from names, sizes and times."""
    seen = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in sorted(files.items())]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]
