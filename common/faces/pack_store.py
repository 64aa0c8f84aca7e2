"""The folder of a pack on disk: written beside its place, renamed when whole, checked whenever it is opened.

    KEY/pictures.npy    uint8 [N, S, S, 3], memory-mapped
    KEY/person.npy      int64 [N]
    KEY/split.npy       int8 [N]
    KEY/manifest.json   written last: format, key, people, families, what was quarantined, length and digest of each
                        file above

Nothing here is pickled.
"""

import contextlib
import errno
import hashlib
import json
import logging
import math
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from common.errors import CheckpointError, DataError
from common.system.files import InUse, bring_to_disk, lock, write_bytes

FORMAT = 2  # 2: families of people
MANIFEST, PICTURES, PERSON, SPLIT = "manifest.json", "pictures.npy", "person.npy", "split.npy"


class ForeignPack(CheckpointError):
    """The folder holds the pack of another key."""


_BLOCK = 2**20
_MAX_BLOCKS = 256  # a digest reads at most so many blocks: a pack of 7.6 GB must open in under a second
logger = logging.getLogger("facefed.faces")


@contextlib.contextmanager
def locked(cache_dir: Path, key: str) -> Iterator[None]:
    """Only one process at a time packs one key; also clears what processes that died have left behind.

    Where the file system knows no locks, the final rename still lets only one of two packs win.
    """
    with (cache_dir / f".{key}.lock").open("wb") as file:
        try:
            without_locks = lock(file)
        except InUse:
            logger.info("another process is packing these pictures; waiting for it")
            without_locks = lock(file, within_s=math.inf)
        if without_locks:
            logger.warning("%s: the file system has no locks; two processes may pack the same pictures", cache_dir)
        _remove_stale(cache_dir, key)
        yield


def _remove_stale(cache_dir: Path, key: str) -> None:
    """Remove temporary folders that no process holds the lock of; `key` is the one that this process holds."""
    for folder in cache_dir.glob(".*.tmp"):
        other = folder.name.split(".")[1]
        if other == key:
            shutil.rmtree(folder, ignore_errors=True)
            continue
        with (cache_dir / f".{other}.lock").open("wb") as file, contextlib.suppress(InUse):
            if lock(file) is None:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def new_folder(cache_dir: Path, key: str, need_bytes: int) -> Iterator[Path]:
    """A temporary folder that becomes cache_dir/key when the block ends well and vanishes when it does not.

    Raises DataError, with the bytes that are needed, when the disk is or becomes full.
    """
    free = shutil.disk_usage(cache_dir).free
    if free < need_bytes:
        raise DataError(_no_space(cache_dir, need_bytes, free))
    temporary = cache_dir / f".{key}.{uuid.uuid4().hex}.tmp"
    try:
        temporary.mkdir()
        yield temporary
        bring_to_disk(temporary)
        _take_place(temporary, cache_dir / key)
        bring_to_disk(cache_dir)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            shutil.rmtree(temporary, ignore_errors=True)
            raise DataError(_no_space(cache_dir, need_bytes, shutil.disk_usage(cache_dir).free)) from None
        raise DataError(f"{cache_dir}: cannot be written: {error.strerror}; choose another cache folder.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _no_space(cache_dir: Path, need_bytes: int, free: int) -> str:
    return (
        f"{cache_dir}: no space left: packing needs {need_bytes} bytes and {free} are free; free some, or choose "
        "another cache folder, a smaller data.image_size or fewer people."
    )


def _take_place(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        # another process was first and had the same key, so its pack holds the same


def write_header(file: BinaryIO, num_pictures: int, image_size: int) -> None:
    """The .npy header of uint8 [num_pictures, image_size, image_size, 3]; NumPy pads it to one length for any count."""
    shape = (num_pictures, image_size, image_size, 3)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def keep_rows(path: Path, kept: NDArray[np.bool_], image_size: int) -> None:
    """Drop pictures from pictures.npy, in place, and correct its header.  kept: [number of pictures in the file]."""
    rows = np.flatnonzero(kept)
    one = image_size * image_size * 3
    offset = path.stat().st_size - len(kept) * one
    pictures = np.memmap(path, dtype=np.uint8, mode="r+", offset=offset, shape=(len(kept), one))
    step = max(1, 2**26 // one)
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        if block[0] != start or block[-1] != start + len(block) - 1:  # up to the first dropped one, all stay in place
            pictures[start : start + len(block)] = pictures[block]  # indexing by an array copies first
    pictures.flush()
    del pictures
    with path.open("r+b") as file:
        write_header(file, len(rows), image_size)
        file.truncate(offset + len(rows) * one)


def write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    """Write manifest.json, the last file of a pack; every other file is on the disk before."""
    files = {}
    for name in (PICTURES, PERSON, SPLIT):
        bring_to_disk(folder / name)
        files[name] = {"bytes": (folder / name).stat().st_size, "digest": digest(folder / name)}
    write_bytes(folder / MANIFEST, json.dumps({"format": FORMAT, **about, "files": files}).encode())


def read_manifest(folder: Path, key: str) -> dict[str, Any]:
    """The manifest of a whole pack.

    Raises CheckpointError when the folder is no pack, is cut short or altered, or belongs to another key.
    """
    again = "delete the folder and pack again"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: not a whole pack ({MANIFEST} is missing); {again}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: cannot be read ({error}); {again}.") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: not a pack of format {FORMAT}; {again}.")
    if manifest.get("key") != key:
        raise ForeignPack(
            f"{folder}: this pack belongs to another configuration or state of the data (key "
            f"{manifest.get('key')!s:.12}, wanted {key:.12}); pack again with these settings."
        )
    _check_form(folder, manifest)
    for name in (PICTURES, PERSON, SPLIT):
        about, path = manifest["files"][name], folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size != about["bytes"]:
            raise CheckpointError(f"{path}: cut short ({size} bytes, its manifest says {about['bytes']}); {again}.")
        if digest(path) != about["digest"]:
            raise CheckpointError(f"{path}: its content was altered; {again}.")
    return manifest


def _check_form(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless every part of the manifest is of its kind; what it says is used unseen."""
    people, family, quarantined = (manifest.get(name) for name in ("people", "family", "quarantined"))
    files = manifest.get("files")
    sound = (
        isinstance(files, dict)
        and all(isinstance(files.get(name), dict) for name in (PICTURES, PERSON, SPLIT))
        and all({"bytes", "digest"} <= files[name].keys() for name in (PICTURES, PERSON, SPLIT))
        and isinstance(manifest.get("dataset"), str)
        and isinstance(people, list)
        and all(isinstance(one, str) for one in people)
        and "family" in manifest
        and (family is None or _is_family(family, len(people)))
        and _is_account(manifest.get("account", {}))
        and isinstance(quarantined, list)
        and all(isinstance(row, list) and len(row) == 2 for row in quarantined)
    )
    if not sound:
        raise CheckpointError(f"{folder / MANIFEST}: is not one of ours; delete the folder and pack again.")


def _is_account(account: object) -> bool:
    """Whether this is what `pack` writes of an account; {} in packs of before there was one."""
    fields = {"words": str, "number": int, "first": str, "weight": str}
    return isinstance(account, dict) and (
        not account
        or (
            type(account.get("num_found")) is int
            and isinstance(account.get("notes"), list)
            and all(isinstance(note, str) for note in account["notes"])
            and isinstance(account.get("passed_over"), list)
            and all(
                isinstance(one, dict)
                and one.keys() == fields.keys()
                and all(type(one[name]) is kind for name, kind in fields.items())
                for one in account["passed_over"]
            )
        )
    )


def _is_family(family: object, num_people: int) -> bool:
    return (
        isinstance(family, list)
        and len(family) == num_people
        and all(type(one) is int and 0 <= one < num_people for one in family)
    )


def digest(path: Path) -> str:
    """SHA-256 hex of a file's length and content; of a file above 256 MiB, of 256 blocks of 1 MiB spread over it."""
    size = path.stat().st_size
    blocks = -(-size // _BLOCK)
    chosen = np.unique(np.linspace(0, max(blocks - 1, 0), min(blocks, _MAX_BLOCKS)).astype(np.int64)).tolist()
    total = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for block in chosen:
            file.seek(block * _BLOCK)
            total.update(file.read(_BLOCK))
    return total.hexdigest()
