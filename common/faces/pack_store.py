"""The folder of a pack on disk: written beside its place, renamed when whole, checked whenever it is opened.

    KEY/NNNNN.*         the shards of pictures (`shards.py`)
    KEY/places.npy      PLACE [N]: in which shard each picture lies, and where
    KEY/person.npy      int64 [N]
    KEY/split.npy       int8 [N]
    KEY/origin.json     what the pictures were made of: data set, folder, recipe; later packs of the same take over
    KEY/manifest.json   written last: format, key, people, families, what was quarantined, length and digest of each
                        file above
    .KEY.tmp/           a pack that is not whole yet: a packer that was stopped goes on there

Nothing here is pickled.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import CheckpointError, DataError
from common.faces.decode import JPEG, RAW, Recipe
from common.faces.pack_progress import Progress, read_state
from common.faces.shards import FORMAT, digest
from common.system.files import InUse, bring_to_disk, lock, write_bytes

MANIFEST, PLACES, PERSON, SPLIT = "manifest.json", "places.npy", "person.npy", "split.npy"
ARRAYS = (PLACES, PERSON, SPLIT)
STATE = "state.json"  # of a packer at work, in its folder
_ORIGIN = "origin.json"
_LOOK_EVERY_S = 1.0


class ForeignPack(CheckpointError):
    """The folder holds the pack of another key."""


logger = logging.getLogger("facefed.faces")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What the pictures of a pack were made of; packs of one origin may take over each other's.

    root: the data folder.  recipe: the fields of a `Recipe`.
    """

    dataset: str
    root: str
    recipe: Mapping[str, Any]
    format: int = FORMAT

    @staticmethod
    def of(dataset: str, root: Path, recipe: Recipe) -> "Origin":
        """The origin of pictures below this folder."""
        return Origin(dataset=dataset, root=str(root.resolve()), recipe=dataclasses.asdict(recipe))

    def write(self, folder: Path) -> None:
        """Leave it in a pack's folder."""
        write_bytes(folder / _ORIGIN, json.dumps(dataclasses.asdict(self)).encode())


def origin_of(folder: Path) -> Origin | None:
    """The origin of a pack's folder; None where it says nothing, as in packs of earlier versions."""
    try:
        return Origin(**json.loads((folder / _ORIGIN).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def work_folder(cache_dir: Path, key: str) -> Path:
    """Where the pack of this key grows."""
    return cache_dir / f".{key}.tmp"


@contextlib.contextmanager
def locked(cache_dir: Path, key: str, progress: Progress | None = None) -> Iterator[bool]:
    """Only one process at a time packs one key.  Yields whether the file system knows locks.

    Who waits says so, and sees the progress of the one who works.  Where the file system knows no locks, the final
    rename still lets only one of two packs win.
    """
    with (cache_dir / f".{key}.lock").open("wb") as file:
        told = False
        while True:
            try:
                without_locks = lock(file, within_s=_LOOK_EVERY_S if told else 0.0)
                break
            except InUse:
                state = read_state(work_folder(cache_dir, key) / STATE)
                if not told:
                    far = f" ({state.words()})" if state is not None else ""
                    logger.warning("another program is packing these pictures; waiting for it%s", far)
                told = True
                if state is not None and progress is not None and state.total:
                    progress(state.done, state.total)
        if without_locks:
            logger.warning("%s: the file system has no locks; two processes may pack the same pictures", cache_dir)
        _remove_stale(cache_dir)
        yield not without_locks


@contextlib.contextmanager
def locked_by_nobody(cache_dir: Path, key: str) -> Iterator[bool]:
    """Whether nobody packs this key; nobody can begin while the block lasts."""
    with (cache_dir / f".{key}.lock").open("ab") as file:
        try:
            lock(file)
        except InUse:
            yield False
        else:
            yield True


def _remove_stale(cache_dir: Path) -> None:
    """Remove unfinished packs of earlier versions, and of file systems without locks, that nobody works on."""
    for folder in cache_dir.glob(".*.*.tmp"):
        with (cache_dir / f".{folder.name.split('.')[1]}.lock").open("ab") as file, contextlib.suppress(InUse):
            if lock(file) is None:
                shutil.rmtree(folder, ignore_errors=True)


def remove_taken_over(cache_dir: Path, origin: Origin) -> None:
    """Remove the unfinished packs of this origin that nobody works on; a whole one has what was good in them."""
    for folder in cache_dir.glob(".*.tmp"):
        if origin_of(folder) == origin:
            place = cache_dir / f"{folder.name.removesuffix('.tmp')}.lock"
            with place.open("ab") as file, contextlib.suppress(InUse):
                if lock(file) is None:
                    shutil.rmtree(folder, ignore_errors=True)


def folders_of(cache_dir: Path, origin: Origin) -> list[Path]:
    """The packs of this origin, whole and unfinished."""
    every = sorted(path for path in cache_dir.iterdir() if path.is_dir())
    return [folder for folder in every if origin_of(folder) == origin]


@contextlib.contextmanager
def growing(cache_dir: Path, key: str, origin: Origin, *, has_locks: bool) -> Iterator[Path]:
    """The folder where a pack grows, which becomes cache_dir/key when the block ends well.

    When it does not, what is whole in it stays, so that the next packer goes on.  A damaged pack of this key is taken
    as the beginning.  Raises DataError when the disk becomes full.
    """
    folder = work_folder(cache_dir, key)
    if not has_locks:
        folder = cache_dir / f".{key}.{uuid.uuid4().hex}.tmp"
    try:
        if origin_of(folder) != origin:
            shutil.rmtree(folder, ignore_errors=True)
        if (cache_dir / key).exists() and not folder.exists():
            (cache_dir / key).rename(folder)
            (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(cache_dir / key, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        if origin_of(folder) != origin:
            shutil.rmtree(folder)  # the damaged pack was of an earlier version
            folder.mkdir()
        origin.write(folder)
        yield folder
        bring_to_disk(folder)
        _take_place(folder, cache_dir / key)
        bring_to_disk(cache_dir)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"{cache_dir}: no space left while packing ({shutil.disk_usage(cache_dir).free} bytes are free); free "
                "some and pack again: what is packed so far stays."
            ) from None
        raise DataError(f"{cache_dir}: cannot be written: {error.strerror}; choose another cache folder.") from None
    finally:
        if not has_locks:
            shutil.rmtree(folder, ignore_errors=True)


def require_space(cache_dir: Path, num_pictures: int, picture_bytes: int) -> None:
    """Raise DataError, with the sizes, when so many pictures will not fit.  picture_bytes: of one, at most."""
    need = num_pictures * (picture_bytes + 192) + 2**16
    free = shutil.disk_usage(cache_dir).free
    if free < need:
        raise DataError(
            f"{cache_dir}: no space left: packing needs {need} bytes and {free} are free; free some, or choose another "
            f'cache folder, a smaller data.image_size, fewer people, or data.pack = "{JPEG}" (a sixth of "{RAW}").'
        )


def _take_place(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        # another process was first and had the same key, so its pack holds the same


def write_manifest(folder: Path, shards: Sequence[str], about: Mapping[str, Any]) -> None:
    """Write manifest.json, the last file of a pack; every other file is on the disk before.

    shards: the names of those in use, by number.
    """
    files = {}
    for name in (*ARRAYS, *(f"{shard}.pictures" for shard in shards)):
        bring_to_disk(folder / name)
        files[name] = {"bytes": (folder / name).stat().st_size, "digest": digest(folder / name)}
    content = {"format": FORMAT, **about, "shards": list(shards), "files": files}
    write_bytes(folder / MANIFEST, json.dumps(content).encode())


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
    for name, about in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size != about["bytes"]:
            raise CheckpointError(f"{path}: cut short ({size} bytes, its manifest says {about['bytes']}); {again}.")
        if digest(path) != about["digest"]:
            raise CheckpointError(f"{path}: its content was altered; {again}.")
    return manifest


def _check_form(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless every part of the manifest is of its kind; what it says is used unseen."""
    people, family, quarantined = (manifest.get(name) for name in ("people", "family", "quarantined"))
    sound = (
        _has_files(manifest)
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


def _has_files(manifest: Mapping[str, Any]) -> bool:
    """Whether it names the shards and files there must be, none outside the folder, and says how they are coded."""
    files, shards, size = (manifest.get(name) for name in ("files", "shards", "image_size"))
    return (
        isinstance(files, dict)
        and isinstance(shards, list)
        and all(isinstance(name, str) and name.isascii() and name.isdigit() for name in shards)
        and files.keys() == {*ARRAYS, *(f"{name}.pictures" for name in shards)}
        and all(isinstance(about, dict) and {"bytes", "digest"} <= about.keys() for about in files.values())
        and manifest.get("coding") in (RAW, JPEG)
        and type(size) is int
        and 0 < size <= 2**14
    )


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
