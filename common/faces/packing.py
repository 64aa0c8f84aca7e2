"""Fills a pack's folder with shards: takes over what earlier packs hold, decodes the rest, finds out what is where."""

import contextlib
import os
import stat
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.faces.decode import JPEG_BYTES_PER_PIXEL, RAW, Recipe, scan
from common.faces.index import FaceIndex, take
from common.faces.pack_progress import Progress
from common.faces.pack_store import require_space
from common.faces.paths import by_folder
from common.faces.shards import PLACE, Shard, ShardWriter, entries_of, shards_in, take_over

_LIVE = 0.5  # a shard with less of its bytes still in use is not linked: what is in use is copied out of it


class Changed(Exception):
    """Pictures changed between their listing and the end of their packing.  args: how many, and one path."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to pack.  stamps: as `stamps_of`.  points: landmarks or boxes [N, ...] or None, as the recipe needs."""

    index: FaceIndex
    stamps: NDArray[np.int64]
    recipe: Recipe
    points: NDArray[np.float32] | None


@dataclass
class Filled:
    """What is in a folder of shards, for each of N pictures.

    shards: names by number, "" where a number is not in use.  places: PLACE [N].  files: uint8 [N, 32], SHA-256 of each
    file, zeros where none was read.  looked: [N] bool.  reasons: row -> why it cannot be used.  notes: what was done to
    values -> pictures.
    """

    places: NDArray[np.void]
    files: NDArray[np.uint8]
    looked: NDArray[np.bool_]
    shards: list[str] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)


def stamps_of(index: FaceIndex, rows: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Size in bytes and modification time in ns of each picture, [N, 2] int64; -1 where it is missing.

    rows: of these only, in their order.
    """
    found = array("q")
    for folder, names in by_folder(index.paths if rows is None else index.paths.at(rows)):
        _look_at(f"{index.root}{os.sep}{folder}", names, found)
    return np.frombuffer(found, dtype=np.int64).reshape(-1, 2)


def _look_at(folder: str, names: Sequence[str], found: "array[int]") -> None:
    """Append size and time of each file in a folder; of 3 million, those of one folder are looked at from within it."""
    with contextlib.ExitStack() as opened:
        within: int | None = None
        with contextlib.suppress(OSError):
            within = os.open(folder, getattr(os, "O_PATH", os.O_RDONLY))
            opened.callback(os.close, within)
        for name in names:
            try:
                about = os.stat(name if within is not None else f"{folder}{os.sep}{name}", dir_fd=within)
            except OSError:
                found.extend((-1, -1))
                continue
            found.append(about.st_size if stat.S_ISREG(about.st_mode) else 0)
            found.append(about.st_mtime_ns)


def fill(folder: Path, task: Task, others: Sequence[Path], *, workers: int, progress: Progress | None) -> Filled:
    """Bring every picture of the task into shards of `folder`, where some may be already.

    others: folders of packs of the same origin.  progress: called with (pictures done, pictures in all); what was
    taken over is done from the start.  Whatever ends this early, what is decoded stays, but for the shard that is open
    in a process that is killed.  Raises DataError when the disk will be too small, Changed when the data did.
    """
    total = len(task.index)
    entries = _Entries(entries_of(task.index.paths, task.stamps, task.points))
    looked = np.zeros(total, dtype=np.bool_)
    for shard in list(shards_in(folder)):
        if not entries.mark(shard, looked):
            remove_shard(shard)
    writer = ShardWriter(folder, _next_number(folder))
    with _closed_whatever_happens(writer):
        for other in others:
            for shard in shards_in(other):
                _adopt(shard, entries, looked, writer)
        todo = np.flatnonzero(~looked)
        side = task.recipe.image_size
        picture_bytes = side**2 * 3 if task.recipe.coding == RAW else int(side**2 * JPEG_BYTES_PER_PIXEL)
        require_space(folder.parent, len(todo), picture_bytes)
        if len(todo) and progress is not None:
            progress(total - len(todo), total)
        if len(todo):
            _decode(task, todo, entries, writer, workers=workers, progress=progress)
    again = stamps_of(task.index, todo)
    if len(changed := np.flatnonzero((again != task.stamps[todo]).any(axis=1))):
        raise Changed(len(changed), task.index.paths[int(todo[changed[0]])])
    return _what_is_there(folder, entries)


@contextlib.contextmanager
def _closed_whatever_happens(writer: ShardWriter) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # the error that stopped it is told
            writer.close()
        raise
    writer.close()


def _decode(
    task: Task,
    todo: NDArray[np.int64],
    entries: "_Entries",
    writer: ShardWriter,
    *,
    workers: int,
    progress: Progress | None,
) -> None:
    total = len(task.index)

    def tell(done: int, _: int) -> None:
        if progress is not None:
            progress(total - len(todo) + done, total)

    index = task.index if len(todo) == total else take(task.index, todo)
    points = None if task.points is None else task.points[todo]
    at = 0
    with contextlib.closing(scan(index, task.recipe, points, workers=workers, progress=tell)) as results:
        for done in results:
            rows = todo[at : at + len(done.reasons)]
            at += len(rows)
            writer.add(entries.values[rows], done.pictures, done.digests, done.reasons, done.notes)


class _Entries:
    """The entries of the task's pictures, and which row has which."""

    def __init__(self, values: NDArray[np.uint64]) -> None:
        """values: [N, 2], see `entries_of`."""
        self.values = values
        self._order = np.argsort(values[:, 0], kind="stable")
        self._sorted = values[self._order, 0]

    def rows_of(self, found: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The row of each entry [M, 2], -1 where the task has none such.  [M] int64."""
        place = np.searchsorted(self._sorted, found[:, 0]).clip(max=max(len(self._sorted) - 1, 0))
        rows = self._order[place] if len(self._order) else np.zeros(len(found), dtype=np.int64)
        same = (self.values[rows] == found).all(axis=1) if len(self._order) else np.zeros(len(found), dtype=np.bool_)
        return np.where(same, rows, -1).astype(np.int64)

    def mark(self, shard: Shard, looked: NDArray[np.bool_]) -> bool:
        """Mark what a shard holds as looked at; whether there was anything new in it."""
        rows = self.rows_of(shard.rows()["entry"])
        rows = rows[rows >= 0]
        is_new = not looked[rows].all()
        looked[rows] = True
        return is_new


def _adopt(shard: Shard, entries: _Entries, looked: NDArray[np.bool_], writer: ShardWriter) -> None:
    """Take what the task needs of another pack's shard: by a link to the whole, or by copying a smaller part out."""
    rows = shard.rows()
    wanted = entries.rows_of(rows["entry"])
    wanted[wanted >= 0] = np.where(looked[wanted[wanted >= 0]], -1, wanted[wanted >= 0])
    chosen = np.flatnonzero(wanted >= 0)
    if not len(chosen):
        return
    live = int(rows["size"][chosen].sum())
    if live >= _LIVE * shard.pictures.stat().st_size:
        writer.close()
        number = writer.number + writer.is_used
        take_over(shard, writer.folder, number)
        writer.restart(number + 1)
    else:
        reasons, notes = shard.texts("reasons"), shard.texts("notes")
        with shard.pictures.open("rb") as file:
            for row in chosen.tolist():
                file.seek(int(rows["start"][row]))
                picture = file.read(int(rows["size"][row]))
                writer.add(
                    rows["entry"][row][None],
                    [] if row in reasons else [picture],
                    [rows["file"][row].tobytes()],
                    [reasons.get(row, "")],
                    [notes.get(row, "")],
                )
    looked[wanted[chosen]] = True


def _next_number(folder: Path) -> int:
    return 1 + max((int(path.stem) for path in folder.glob("*.json") if path.stem.isdigit()), default=-1)


def damaged_in(folder: Path) -> list[Shard]:
    """The shards of a folder that are not what was written; every byte is read."""
    return [shard for shard in shards_in(folder) if not shard.is_same()]


def remove_shard(shard: Shard) -> None:
    """Remove a shard's files."""
    for path in reversed(shard.files()):  # what makes it whole first
        path.unlink(missing_ok=True)


def _what_is_there(folder: Path, entries: _Entries) -> Filled:
    """What the whole shards of a folder hold of the task; whatever else lies there of shards is removed."""
    total = len(entries.values)
    filled = Filled(
        places=np.zeros(total, dtype=PLACE),
        files=np.zeros((total, 32), dtype=np.uint8),
        looked=np.zeros(total, dtype=np.bool_),
    )
    for shard in shards_in(folder):
        content = shard.rows()
        rows = entries.rows_of(content["entry"])
        mine = rows >= 0
        reasons, notes = shard.texts("reasons"), shard.texts("notes")
        filled.places["shard"][rows[mine]] = len(filled.shards)
        for name in ("start", "size"):
            filled.places[name][rows[mine]] = content[name][mine]
        filled.files[rows[mine]] = content["file"][mine]
        filled.looked[rows[mine]] = True
        filled.reasons |= {int(rows[row]): text for row, text in reasons.items() if rows[row] >= 0}
        filled.notes.update(text for row, text in notes.items() if rows[row] >= 0)
        filled.shards.append(shard.name)
    if not filled.looked.all():
        raise DataError(
            f"{folder}: shards were changed while it was filled; pack again, and let no other program write there."
        )
    known = set(filled.shards)
    for path in folder.glob("[0-9]*.*"):
        if path.name.split(".")[0] not in known:
            path.unlink(missing_ok=True)
    return filled
