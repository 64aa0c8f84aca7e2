"""A large data set's pack found again by the times of its folders, without a look at each of its files.

A folder's time changes when a name in it comes, goes or is replaced. A picture that is written anew in place, under its
old name, changes no folder: below LOOK_AT_EACH pictures each file's size and time are looked at, above only with
`facefed data prepare --verify`, and a line says so.
"""

import dataclasses
import hashlib
import json
import logging
import os
from pathlib import Path

from common.errors import DataError
from common.faces.account import is_picture, walk
from common.faces.shards import FORMAT
from common.settings import DataSettings
from common.system.files import write_bytes

LOOK_AT_EACH = 100_000  # pictures; their stat takes half a CPU-second
NOTE = "no folder changed since it was packed, so no file was looked at; facefed data prepare --verify looks at each"
_MOST_OTHERS = 10_000  # files that are no pictures, such as lists; with more of them nothing is remembered
_SETTLED_S = 2.0  # a folder that changed so shortly ago may change again within its time's resolution
logger = logging.getLogger("facefed.faces")


def _record(dataset: str, root: Path, data: DataSettings, cache_dir: Path) -> Path:
    """Where it is remembered; another name for other settings."""
    asked = json.dumps([FORMAT, dataset, str(root.resolve()), dataclasses.asdict(data)], sort_keys=True)
    return cache_dir / f".{hashlib.sha256(asked.encode()).hexdigest()}.opened"


def remember(dataset: str, root: Path, data: DataSettings, cache_dir: Path, key: str, *, began: float) -> None:
    """Remember that this data folder's pack is `key`.  began: when its reading began, seconds since 1970.

    Nothing is remembered of a folder that changed since, or just before.
    """
    try:
        listing = walk(root)
        others = [
            f"{folder}/{name}" if folder else name
            for folder, names in listing.names.items()
            for name in names
            if not is_picture(name)
        ]
        if len(others) > _MOST_OTHERS:
            return
        folders = {folder: os.stat(root / folder).st_mtime_ns for folder in listing.names}  # noqa: PTH116
        if max(folders.values()) > (began - _SETTLED_S) * 1e9:
            return
        content = {"key": key, "folders": folders, "files": {name: _stamp(root / name) for name in others}}
        write_bytes(_record(dataset, root, data, cache_dir), json.dumps(content).encode())
    except (OSError, DataError, UnicodeEncodeError) as error:
        logger.info("%s: the next opening reads the index again: %s", root, error)


def _stamp(path: Path) -> list[int]:
    about = path.lstat()
    return [about.st_size, about.st_mtime_ns]


def key_by_folders(dataset: str, root: Path, data: DataSettings, cache_dir: Path) -> str | None:
    """The key of this data folder's pack, where no folder and no list below it changed; None: read the index."""
    try:
        found = json.loads(_record(dataset, root, data, cache_dir).read_bytes())
        prefix = str(root)
        same = all(
            os.stat(f"{prefix}/{folder}").st_mtime_ns == changed  # noqa: PTH116 - a Path each is slow
            for folder, changed in found["folders"].items()
        ) and all(_stamp(root / name) == stamp for name, stamp in found["files"].items())
        return str(found["key"]) if same else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
