"""Decode and align once: a data set on disk -> its pictures in shards that every epoch reads, and what each is for."""

import dataclasses
import functools
import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from common.cuts import CUTS
from common.errors import CheckpointError, DataError
from common.faces import pack_store
from common.faces.account import NOTHING, Account, PassedOver
from common.faces.decode import DETECT, RAW, alignment_note, check_quarantine, cut_of, plan, quarantine, with_duplicates
from common.faces.index import read_index, take, without_missing
from common.faces.pack_progress import Progress, StateFile
from common.faces.packing import Changed, Task, damaged_in, fill, remove_shard, stamps_of
from common.faces.reopen import LOOK_AT_EACH, NOTE, key_by_folders, remember
from common.faces.shards import FORMAT, PLACE, StoredPictures
from common.faces.splits import Split, assign_splits
from common.settings import DataSettings

_VALUES = "values: "  # how a line begins that says what was done to the values of pictures
_CLOSED_SET = (Split.TRAIN, Split.VAL_PICTURES, Split.TEST_PICTURES)
logger = logging.getLogger("facefed.faces")


class Pictures(Protocol):
    """What batches need of a pack's pictures: an array of them, or several behind one face."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, S, S, 3)."""

    def __getitem__(self, rows: NDArray[np.int64], /) -> NDArray[np.uint8]:
        """The pictures of these rows, [len(rows), S, S, 3] uint8."""


@dataclass(frozen=True, kw_only=True)
class FacePack:
    """The aligned pictures of one data set, ready for training.

    pictures: uint8 RGB [N, S, S, 3], read when they are asked for; quarantined pictures and unused people are left out.
    person: [N] int64, index into people (all people of the data set).  split: [N] int8 `Split` codes; UNUSED is rare:
    people that fell below the limits through quarantine.  key: SHA-256 hex of index and settings.
    quarantined: (path, reason), sorted by path.  family: [P] int64, as in FaceIndex; None: everyone their own.
    account: what became of everything below the data folder, missing pictures aside (those are quarantined).
    cut: how the pictures were cut out in truth, of `cuts.CUTS`; "": of several packs, or nobody wrote it down.
    """

    pictures: Pictures
    person: NDArray[np.int64]
    people: tuple[str, ...]
    split: NDArray[np.int8]
    key: str
    quarantined: tuple[tuple[str, str], ...]
    dataset: str
    family: NDArray[np.int64] | None = None
    account: Account = NOTHING
    cut: str = ""

    def __len__(self) -> int:
        """Number of pictures N."""
        return len(self.person)

    @property
    def image_size(self) -> int:
        """Width and height of the pictures in px."""
        return int(self.pictures.shape[1])

    @functools.cached_property
    def training_people(self) -> NDArray[np.int64]:
        """The people with TRAIN pictures, ascending; label k is training_people[k].  [K] int64."""
        return np.unique(self.person[self.split == Split.TRAIN])

    @property
    def num_classes(self) -> int:
        """Number of training people K."""
        return len(self.training_people)

    @functools.cached_property
    def training_labels(self) -> NDArray[np.int64]:
        """Labels 0..K-1 of the closed set's pictures (TRAIN, VAL_PICTURES, TEST_PICTURES), -1 elsewhere.  [N] int64."""
        label = np.full(len(self.people), -1, dtype=np.int64)
        label[self.training_people] = np.arange(self.num_classes)
        return np.where(np.isin(self.split, _CLOSED_SET), label[self.person], -1)

    @property
    def families(self) -> NDArray[np.int64]:
        """The family of each person, [P] int64: the number of its first member; each their own where none are known."""
        return np.arange(len(self.people), dtype=np.int64) if self.family is None else self.family

    def indices(self, split: Split) -> NDArray[np.int64]:
        """Which pictures serve `split`, ascending.  [M] int64."""
        return np.flatnonzero(self.split == split)

    def shown_in(self, split: Split) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The pictures that serve `split`, as `indices` has them, and of each the person and the family: [M] int64."""
        indices = self.indices(split)
        person = self.person[indices]
        return indices, person, self.families[person]


_TRIES = 3  # to pack a data folder that changes meanwhile


def open_pack(
    dataset: str,
    root: Path,
    data: DataSettings,
    cache_dir: Path,
    *,
    workers: int,
    progress: Progress | None = None,
    verify: bool = False,
) -> FacePack:
    """The pack of a data set: found in cache_dir/KEY, or made there by `workers` processes (1: in this one).

    progress: called with (pictures done, pictures in all) while packing, or while another program packs the same.  The
    key covers paths, people, families, landmarks, boxes, splits, sizes and times of the pictures, and the settings. A
    change of any of them makes a new pack, which takes over every picture that did not change.  verify: a pack that is
    there is read whole, and what is damaged in it is made anew.
    Raises DataError: as read_index and assign_splits; too many quarantined pictures; no space; a cache folder that
    cannot be written; data that change all the while. Raises CheckpointError when cache_dir/KEY holds a pack of another
    key.
    """
    if not verify and (key := key_by_folders(dataset, root, data, cache_dir)) is not None:
        pack = _load_whole(cache_dir / key)
        if pack is not None and pack.cut:  # an earlier version's pack does not say
            account = dataclasses.replace(pack.account, notes=(*pack.account.notes, NOTE))
            return dataclasses.replace(pack, account=account)
    began = time.time()
    for _ in range(_TRIES):
        try:
            pack = _open_once(dataset, root, data, cache_dir, workers=workers, progress=progress, verify=verify)
        except Changed as error:
            number, first = error.args
            logger.warning("%s: %d pictures changed while they were packed, such as %s", root, number, first)
        else:
            if len(pack) >= LOOK_AT_EACH:
                remember(dataset, root, data, cache_dir, pack.key, began=began)
            return pack
    raise DataError(
        f"{root}: {number} pictures changed while they were packed, such as {first}, {_TRIES} times running; wait "
        "until nothing writes there and pack again: what is packed stays."
    )


def _open_once(
    dataset: str,
    root: Path,
    data: DataSettings,
    cache_dir: Path,
    *,
    workers: int,
    progress: Progress | None,
    verify: bool,
) -> FacePack:
    index = read_index(dataset, root)
    missing = index.account.missing
    check_quarantine(index, missing, len(index), data.max_quarantined_fraction)
    index = without_missing(index)
    split = assign_splits(index, data)
    rows = np.flatnonzero(split != Split.UNUSED)
    index, split = take(index, rows), split[rows]
    recipe, points = plan(index, data)
    account = dataclasses.replace(index.account, notes=(*index.account.notes, *alignment_note(index, recipe, data)))
    index = dataclasses.replace(index, account=account)
    task = Task(index=index, stamps=stamps_of(index), recipe=recipe, points=points)
    key = _key(task, split, data)
    for shard in damaged_in(cache_dir / key) if verify else ():
        logger.warning("%s: its content was altered; it is packed anew", shard.pictures)
        (cache_dir / key / pack_store.MANIFEST).unlink(missing_ok=True)
        remove_shard(shard)
    pack = _load_whole(cache_dir / key)
    if pack is None:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with pack_store.locked(cache_dir, key, progress) as has_locks:
                pack = _load_whole(cache_dir / key)
                if pack is None:
                    _write(task, split, data, cache_dir, key, workers=workers, progress=progress, has_locks=has_locks)
        except OSError as error:
            raise DataError(f"{cache_dir}: cannot be written: {error.strerror}; choose another cache folder.") from None
        pack = pack or load_pack(cache_dir / key)
    check_quarantine(index, pack.quarantined, len(index) + len(missing), data.max_quarantined_fraction)
    # what lies beside the pictures may have changed since they were packed
    values = tuple(note for note in pack.account.notes if note.startswith(_VALUES))
    account = dataclasses.replace(account, notes=account.notes + values)
    return dataclasses.replace(pack, account=account, cut=cut_of(index, recipe))


def load_pack(folder: Path, key: str | None = None) -> FacePack:
    """A pack by its folder, which is named after its key.

    key: what the caller wants; None: the folder's name.  Raises CheckpointError when the folder holds no pack, one that
    is cut short or altered, or one of another key.
    """
    manifest = pack_store.read_manifest(folder, key or folder.name)
    try:
        places, person, split = (np.load(folder / name, allow_pickle=False) for name in pack_store.ARRAYS)
    except Exception as error:  # digests were altered with the files; for an odd header NumPy raises even SyntaxError
        raise CheckpointError(f"{folder}: cannot be read ({error}); delete the folder and pack again.") from None
    if not all(isinstance(one, np.ndarray) for one in (places, person, split)):  # a zip, which NumPy opens too
        raise CheckpointError(f"{folder}: cannot be read as arrays; delete the folder and pack again.")
    if (
        not len(places) == len(person) == len(split)
        or not _fit(places, manifest)
        or (len(person) and not 0 <= person.min() <= person.max() < len(manifest["people"]))
    ):
        raise CheckpointError(f"{folder}: its files do not go together; delete the folder and pack again.")
    return FacePack(
        pictures=StoredPictures(folder, manifest["shards"], places, manifest["image_size"], manifest["coding"]),
        person=person,
        people=tuple(manifest["people"]),
        split=split,
        key=manifest["key"],
        quarantined=tuple((path, reason) for path, reason in manifest["quarantined"]),
        dataset=manifest["dataset"],
        account=_account_in(manifest),
        cut=manifest["cut"] if manifest.get("cut") in CUTS else "",
        family=None if manifest["family"] is None else np.array(manifest["family"], dtype=np.int64),
    )


def _fit(places: NDArray[np.void], manifest: Mapping[str, Any]) -> bool:
    """Whether every picture lies inside its shard."""
    if places.dtype != PLACE:
        return False
    if not len(places):
        return True
    if int(places["shard"].max()) >= len(manifest["shards"]):
        return False
    sizes = np.array([manifest["files"][f"{name}.pictures"]["bytes"] for name in manifest["shards"]], dtype=np.uint64)
    inside = places["start"] + places["size"] <= sizes[places["shard"]]
    raw = manifest["image_size"] ** 2 * 3
    return bool(inside.all() and (manifest["coding"] != RAW or (places["size"] == raw).all()))


def _account_in(manifest: Mapping[str, Any]) -> Account:
    """The account in a manifest; packs made before there was one have none."""
    kept = manifest.get("account", {})
    return Account(
        num_found=kept.get("num_found", 0),
        passed_over=tuple(PassedOver(**one) for one in kept.get("passed_over", ())),
        notes=tuple(kept.get("notes", ())),
    )


def _load_whole(folder: Path) -> FacePack | None:
    """The pack in `folder`, or None when there is none or it is damaged."""
    if not folder.exists():
        return None
    try:
        return load_pack(folder)
    except pack_store.ForeignPack:
        raise
    except CheckpointError as error:
        logger.warning("%s", error)
        return None


def _key(task: Task, split: NDArray[np.int8], data: DataSettings) -> str:
    """SHA-256 hex over all that decides the pack's content; each part goes in with its length."""
    index, recipe = task.index, task.recipe
    settings = dataclasses.asdict(data) | dataclasses.asdict(recipe)
    del settings["max_quarantined_fraction"], settings["pack"]  # checked at each opening; the recipe says its coding
    if recipe.alignment != "box":
        del settings["box_margin"]
    if recipe.alignment == DETECT:
        from common.models.mtcnn import weights_digest  # with torch

        settings["detector"] = weights_digest()
    arrays = [index.person, index.landmarks, index.boxes, split, task.stamps, index.family]
    parts = [
        json.dumps([FORMAT, index.dataset, settings], sort_keys=True).encode(),
        "\n".join(index.people).encode("utf-8", "surrogateescape"),
        index.paths.joined,
        *(b"" if array is None else np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for array in arrays),
    ]
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "big"))
        total.update(part)
    return total.hexdigest()


def _write(
    task: Task,
    split: NDArray[np.int8],
    data: DataSettings,
    cache_dir: Path,
    key: str,
    *,
    workers: int,
    progress: Progress | None,
    has_locks: bool,
) -> None:
    """Make the pack cache_dir/key: take over what there is, decode the rest, leave out what cannot be used."""
    index, missing = task.index, task.index.account.missing
    origin = pack_store.Origin.of(index.dataset, index.root, task.recipe)
    with pack_store.growing(cache_dir, key, origin, has_locks=has_locks) as folder:
        state = StateFile(folder / pack_store.STATE, progress)
        others = [other for other in pack_store.folders_of(cache_dir, origin) if other != folder]
        filled = fill(folder, task, others, workers=workers, progress=state)
        kept, unusable = quarantine(index, with_duplicates(index, split, filled.reasons, filled.files))
        quarantined = tuple(sorted((*unusable, *missing)))
        check_quarantine(index, quarantined, len(index) + len(missing), data.max_quarantined_fraction)
        if unusable:
            # one picture less may leave a person without a training picture: decide again, on what is left
            index = take(index, np.flatnonzero(kept))
            split = assign_splits(index, data)
        arrays: tuple[NDArray[Any], ...] = (filled.places[kept], index.person, split)
        for name, array in zip(pack_store.ARRAYS, arrays, strict=True):
            np.save(folder / name, array, allow_pickle=False)
        about = {
            "key": key,
            "dataset": index.dataset,
            "people": index.people,
            "quarantined": quarantined,
            "family": None if index.family is None else index.family.tolist(),
            "image_size": task.recipe.image_size,
            "coding": task.recipe.coding,
            "cut": cut_of(index, task.recipe),
            "num_pictures": len(index),
            "account": {
                "num_found": index.account.num_found,
                "passed_over": [vars(one) for one in index.account.passed_over],
                "notes": [*index.account.notes, *value_notes(filled.notes)],
            },
        }
        state.close()
        pack_store.write_manifest(folder, filled.shards, about)
    pack_store.remove_taken_over(cache_dir, origin)


def value_notes(values: Mapping[str, int]) -> tuple[str, ...]:
    """The lines on pictures whose values were scaled.  values: what was done -> pictures."""
    return tuple(f"{_VALUES}{number:,} x {what}" for what, number in sorted(values.items()))


class StackedPictures:
    """Memory-mapped arrays of pictures, one after the other."""

    def __init__(self, parts: Sequence[Pictures]) -> None:
        """parts: each [N_i, S, S, 3] uint8, of one size S."""
        self._parts = tuple(parts)
        self._starts = np.cumsum([0, *(part.shape[0] for part in parts)])

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, S, S, 3)."""
        return (int(self._starts[-1]), *self._parts[0].shape[1:])

    def __getitem__(self, rows: NDArray[np.int64], /) -> NDArray[np.uint8]:
        """The pictures of these rows, in their order: [len(rows), S, S, 3] uint8."""
        gathered = np.empty((len(rows), *self.shape[1:]), dtype=np.uint8)
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        for number, part in enumerate(self._parts):
            mine = owner == number
            if mine.any():
                gathered[mine] = part[rows[mine] - self._starts[number]]
        return gathered


def union_pack(packs: Mapping[str, FacePack]) -> FacePack:
    """One pack of all pictures, in the mapping's order.

    packs: client -> pack, at least one, of one picture size.  A person is called CLIENT/PERSON.
    Raises DataError when the sizes differ.
    """
    sizes = {name: pack.image_size for name, pack in packs.items()}
    if len(set(sizes.values())) != 1:
        raise DataError(f"the pictures have different sizes ({sizes}); pack them with one data.image_size.")
    offsets = np.cumsum([0, *(len(pack.people) for pack in packs.values())]).tolist()
    digest = hashlib.sha256()
    for name, pack in packs.items():
        digest.update(f"{name}={pack.key}\n".encode())
    return FacePack(
        pictures=StackedPictures([pack.pictures for pack in packs.values()]),
        person=np.concatenate([pack.person + offset for pack, offset in zip(packs.values(), offsets, strict=False)]),
        people=tuple(f"{name}/{person}" for name, pack in packs.items() for person in pack.people),
        split=np.concatenate([pack.split for pack in packs.values()]),
        key=digest.hexdigest(),
        quarantined=tuple((f"{name}/{path}", why) for name, pack in packs.items() for path, why in pack.quarantined),
        dataset="+".join(packs),
        account=Account(
            num_found=sum(pack.account.num_found for pack in packs.values()),
            passed_over=tuple(one for pack in packs.values() for one in pack.account.passed_over),
            notes=tuple(f"{name}: {note}" for name, pack in packs.items() for note in pack.account.notes),
        ),
        family=np.concatenate([pack.families + start for pack, start in zip(packs.values(), offsets, strict=False)])
        if any(pack.family is not None for pack in packs.values())
        else None,
    )


def labels_of(packs: Mapping[str, FacePack]) -> dict[str, slice]:
    """Which labels of `union_pack(packs)` are each client's own training people: client -> slice."""
    ends = np.cumsum([pack.num_classes for pack in packs.values()]).tolist()
    return {name: slice(end - pack.num_classes, end) for (name, pack), end in zip(packs.items(), ends, strict=True)}
