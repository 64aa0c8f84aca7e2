"""Aligned pictures in shards: files of many pictures one after the other, written once and never changed.

    NNNNN.pictures    the pictures: raw uint8 RGB, or a JPEG file each
    NNNNN.rows.npy    ROW for each picture looked at: which file it was made from, where it lies, the file's SHA-256
    NNNNN.json        written last, the shard counts from then on: format, sizes and digests of both, and why some of
                      its pictures cannot be used

So a packer that is killed loses the shard that was open, a damaged shard is made anew alone, and a later pack of the
same data set takes over whole shards by links.
"""

import functools
import hashlib
import io
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.errors import CheckpointError
from common.faces.decode import RAW
from common.system.files import bring_to_disk, write_bytes
from common.system.runtime import num_cores

FORMAT = 3  # 3: shards, and pictures sampled by Keys' kernel
# entry: what the picture was made of, see `entries_of`.  size: bytes; 0: it cannot be used.
ROW = np.dtype([("entry", "<u8", (2,)), ("start", "<u8"), ("size", "<u4"), ("file", "u1", (32,))])
PLACE = np.dtype([("shard", "<u4"), ("size", "<u4"), ("start", "<u8")])  # where a picture of a pack lies
SHARD_S = 45.0  # an open shard is closed after so long: what a packer that is killed loses at most
SHARD_BYTES = 192 * 2**20
_DIGEST_BLOCKS, _BLOCK = 8, 2**16  # what is read of a shard when its pack is opened


def entries_of(
    paths: Sequence[str], stamps: NDArray[np.int64], points: NDArray[np.float32] | None
) -> NDArray[np.uint64]:
    """What decides each aligned picture beside the recipe: its path, size and time, its landmarks or box.  [N, 2].

    stamps: [N, 2] size in bytes and time in ns.  points: [N, ...] or None.
    """
    entries = np.empty((len(paths), 2), dtype=np.uint64)
    hashed = hashlib.blake2b
    for row, path in enumerate(paths):
        one = hashed(path.encode("utf-8", "surrogateescape"), digest_size=16)
        one.update(stamps[row].tobytes())
        if points is not None:
            one.update(points[row].tobytes())
        entries[row] = np.frombuffer(one.digest(), dtype="<u8")
    return entries


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A whole shard on disk.  notes, reasons: row of the shard -> what was done to the picture, why it is not used."""

    folder: Path
    name: str
    about: Mapping[str, Any]

    @property
    def pictures(self) -> Path:
        """The file of pictures."""
        return self.folder / f"{self.name}.pictures"

    def rows(self) -> NDArray[np.void]:
        """Of each picture looked at, ROW [M]."""
        return np.asarray(np.load(self.folder / f"{self.name}.rows.npy", allow_pickle=False))

    def texts(self, kind: str) -> dict[int, str]:
        """kind: `reasons` or `notes`; row -> text."""
        return {int(row): text for row, text in self.about[kind].items()}

    def files(self) -> list[Path]:
        """What it consists of, the file that makes it whole last."""
        return [self.folder / f"{self.name}{ending}" for ending in (".pictures", ".rows.npy", ".json")]

    def is_same(self) -> bool:
        """Whether every byte is as it was written; reads all of it."""
        total = 0
        with self.pictures.open("rb") as file:
            while block := file.read(2**22):
                total = zlib.crc32(block, total)
        return bool(total == self.about["crc32"])


def shards_in(folder: Path) -> Iterator[Shard]:
    """The whole and sound shards of a folder, by name; those that are not are passed over."""
    for path in sorted(folder.glob("*.json")):
        if path.stem.isdigit() and (shard := open_shard(folder, path.stem)) is not None:
            yield shard


def open_shard(folder: Path, name: str) -> Shard | None:
    """A shard by its name; None where it is not whole, of another version, cut or altered."""
    try:
        about = json.loads((folder / f"{name}.json").read_bytes())
        shard = Shard(folder=folder, name=name, about=about)
        sound = (
            about["format"] == FORMAT
            and [digest(path) for path in shard.files()[:2]] == about["digests"]
            and len(shard.rows()) == about["num_rows"]
            and shard.rows().dtype == ROW
            and all(isinstance(text, str) for kind in ("reasons", "notes") for text in shard.texts(kind).values())
            and isinstance(about["crc32"], int)
        )
    except Exception:  # whatever lies there is no shard of ours; for an odd header NumPy raises even SyntaxError
        return None
    return shard if sound else None


def digest(path: Path) -> str:
    """SHA-256 hex of a file's length and content; of a file above 512 KiB, of 8 blocks of 64 KiB spread over it."""
    size = path.stat().st_size
    blocks = -(-size // _BLOCK)
    chosen = np.unique(np.linspace(0, max(blocks - 1, 0), min(blocks, _DIGEST_BLOCKS)).astype(np.int64)).tolist()
    total = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for block in chosen:
            file.seek(block * _BLOCK)
            total.update(file.read(_BLOCK))
    return total.hexdigest()


class ShardWriter:
    """Writes pictures into new shards of a folder, each closed when it is large or old enough."""

    def __init__(self, folder: Path, first: int, *, now: Callable[[], float] = time.monotonic) -> None:
        """first: the number of the first new shard."""
        self.folder, self.number, self._now = folder, first, now
        self._begin()

    @property
    def is_used(self) -> bool:
        """Whether the shard of this number holds something."""
        return self._num > 0

    def restart(self, number: int) -> None:
        """Go on with a shard of this number, after `close`."""
        self.number = number
        self._begin()

    def _begin(self) -> None:
        self._rows: list[NDArray[np.void]] = []
        self._reasons: dict[int, str] = {}
        self._notes: dict[int, str] = {}
        self._num = self._size = self._crc = 0
        self._began = self._now()
        self._path = self.folder / f"{self.number:05d}.pictures"
        self._file = self._path.open("wb")

    def add(
        self,
        entries: NDArray[np.uint64],
        pictures: Sequence[bytes],
        files: Sequence[bytes],
        reasons: Sequence[str],
        notes: Sequence[str],
    ) -> None:
        """Pictures in order.  entries: [M, 2].  pictures: the usable ones.  The others: one for each of M."""
        rows = np.zeros(len(reasons), dtype=ROW)
        rows["entry"] = entries
        usable = iter(pictures)
        start = self._size
        for row, (file, reason, note) in enumerate(zip(files, reasons, notes, strict=True)):
            if file:
                rows["file"][row] = np.frombuffer(file, dtype=np.uint8)
            if reason:
                self._reasons[self._num + row] = reason
                continue
            if note:
                self._notes[self._num + row] = note
            size = len(next(usable))
            rows["start"][row], rows["size"][row] = start, size
            start += size
        content = b"".join(pictures)
        self._file.write(content)
        self._crc = zlib.crc32(content, self._crc)
        self._rows.append(rows)
        self._num += len(rows)
        self._size = start
        if self._size >= SHARD_BYTES or self._now() - self._began >= SHARD_S:
            self.close()
            self.restart(self.number + 1)

    def close(self) -> None:
        """Make the open shard whole, on disk; without a picture looked at it vanishes."""
        if self._file.closed:
            return
        self._file.close()
        if not self._num:
            self._path.unlink()
            return
        bring_to_disk(self._path)
        name = self._path.stem
        rows = self.folder / f"{name}.rows.npy"
        np.save(rows, np.concatenate(self._rows), allow_pickle=False)
        bring_to_disk(rows)
        about = {
            "format": FORMAT,
            "num_rows": self._num,
            "crc32": self._crc,
            "digests": [digest(self._path), digest(rows)],
            "reasons": self._reasons,
            "notes": self._notes,
        }
        write_bytes(self.folder / f"{name}.json", json.dumps(about).encode())


def take_over(shard: Shard, folder: Path, number: int) -> None:
    """Make a shard of another pack one of this folder: by links, or copies where the file system has none."""
    name = f"{number:05d}"
    for path in shard.files()[:2]:
        place = folder / path.name.replace(shard.name, name, 1)
        place.unlink(missing_ok=True)
        try:
            place.hardlink_to(path)
        except OSError:
            shutil.copyfile(path, place)
            bring_to_disk(place)
    write_bytes(folder / f"{name}.json", json.dumps(shard.about).encode())


_THREADS = 8  # that read and decode for one process; a cold disk answers several at once
_MOST_AT_ONCE = 4096  # pictures handed to the threads together


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="facefed-pictures")


_Place = tuple[int, int, int]  # shard, size, start


def _each(work: Callable[..., None], part: Sequence[tuple[NDArray[np.uint8], _Place]]) -> None:
    for picture, place in part:
        work(picture, place)


class StoredPictures:
    """The pictures of a pack, read and decoded when they are asked for; nothing is kept.

    Each is read by itself, without the system's reading ahead: of 8 MiB read for 38 kB, a cold disk's random reads
    took 82 times their bytes.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], places: NDArray[np.void], image_size: int, coding: str
    ) -> None:
        """names: of the shards, by number.  places: PLACE [N].  image_size: px.  coding: RAW or JPEG."""
        self._folder, self._names, self._places = folder, tuple(names), places
        self._side, self._coding = image_size, coding
        self._files = [os.open(folder / f"{name}.pictures", os.O_RDONLY | os.O_CLOEXEC) for name in names]
        for file in self._files:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        for file in getattr(self, "_files", ()):
            os.close(file)

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredPictures, (self._folder, self._names, np.asarray(self._places), self._side, self._coding)

    def __len__(self) -> int:
        return len(self._places)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:  # noqa: ANN401, FBT001 - NumPy's own
        return self[np.arange(len(self))].astype(dtype or np.uint8)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, S, S, 3)."""
        return (len(self._places), self._side, self._side, 3)

    def __getitem__(self, rows: NDArray[np.int64], /) -> NDArray[np.uint8]:
        """The pictures of these rows, in their order: [len(rows), S, S, 3] uint8.

        Raises CheckpointError where one cannot be read or is no picture any more.
        """
        places = np.atleast_1d(self._places[rows])
        pictures = np.empty((len(places), self._side, self._side, 3), dtype=np.uint8)
        todo = list(zip(pictures, places.tolist(), strict=True))
        if self._coding == RAW:
            todo = [one for one in todo if not self._is_at_hand(*one)]
            work: Callable[..., None] = self._read_raw
        else:
            work = self._decode
        if len(todo) < 2:
            for one in todo:
                work(*one)
        else:
            step = max(1, min(_MOST_AT_ONCE, -(-len(todo) // min(_THREADS, max(num_cores(), 4)))))
            parts = [todo[start : start + step] for start in range(0, len(todo), step)]
            list(_threads().map(functools.partial(_each, work), parts))
        return pictures if np.ndim(self._places[rows]) else pictures[0]

    def _is_at_hand(self, picture: NDArray[np.uint8], place: _Place) -> bool:
        """Read a picture that the system has in memory; False where the disk would have to be asked."""
        if not hasattr(os, "RWF_NOWAIT"):
            return False
        shard, size, start = place
        try:
            return os.preadv(self._files[shard], [picture.data], start, os.RWF_NOWAIT) == size
        except OSError:  # would wait, or the file system cannot say
            return False

    def _read_raw(self, picture: NDArray[np.uint8], place: _Place) -> None:
        shard, size, start = place
        if os.preadv(self._files[shard], [picture.data], start) != size or size != picture.size:
            raise self._damaged(shard)

    def _decode(self, picture: NDArray[np.uint8], place: _Place) -> None:
        shard, size, start = place
        try:
            with Image.open(io.BytesIO(os.pread(self._files[shard], size, start)), formats=("JPEG",)) as opened:
                picture[:] = np.asarray(opened)
        except Exception as error:  # a decoder may raise anything for a broken file
            raise self._damaged(shard) from error

    def _damaged(self, shard: int) -> CheckpointError:
        return CheckpointError(
            f"{self._folder / self._names[shard]}.pictures: a picture in it cannot be read; facefed data prepare "
            "--verify looks at all and packs what is damaged anew."
        )
