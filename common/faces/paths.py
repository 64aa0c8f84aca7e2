"""Millions of paths in little memory: one piece of bytes instead of a string each, which takes 50 bytes more.

`Paths` are the pictures of an index, as a sequence of strings that are made when they are asked for; `Folders` are the
names in each folder.  Strings are made by blocks, since one at a time costs ten times as much.
"""

import functools
import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

_BLOCK = 16_384  # paths that are strings at once: what a processor has near by
_FILES = "surrogateescape"  # bytes of a name that are no UTF-8 come back as they were
_HALVES = "surrogatepass"  # half of a surrogate pair, which JSON can hold; no file is called so


class Paths(Sequence[str]):
    """Strings in one piece of memory, equal to any sequence of the same strings.

    10 bytes a string beyond its own: 3.3 million of 25 characters take 112 MB, as a tuple 270 MB.
    """

    def __init__(self, content: bytes | bytearray, starts: NDArray[np.int64], errors: str = _FILES) -> None:
        """content: the strings in UTF-8, a line feed after each.  starts: [N + 1] where each begins; ascending."""
        self._content, self._starts, self._errors = content, starts, errors

    @classmethod
    def of(cls, paths: Iterable[str], errors: str = _FILES) -> "Paths":
        """From strings in this order; of an iterator never more than a block is in memory as strings."""
        if isinstance(paths, Paths):
            return paths
        paths = iter(paths)
        content, lengths = bytearray(), [np.zeros(1, dtype=np.int64)]
        while block := list(itertools.islice(paths, _BLOCK)):
            text = "\n".join(block)
            try:
                encoded = [path.encode("utf-8", errors) for path in block] if not text.isascii() else block
            except UnicodeEncodeError:
                return cls.of(itertools.chain(cls._with(content, lengths, errors), block, paths), _HALVES)
            content += text.encode("utf-8", errors)
            content += b"\n"
            lengths.append(np.fromiter(map(len, encoded), dtype=np.int64, count=len(block)) + 1)
        return cls._with(content, lengths, errors)

    @classmethod
    def _with(cls, content: bytearray, lengths: list[NDArray[np.int64]], errors: str) -> "Paths":
        return cls(content, np.cumsum(np.concatenate(lengths)), errors)

    def __len__(self) -> int:
        """Number of strings N."""
        return len(self._starts) - 1

    @overload
    def __getitem__(self, place: int, /) -> str: ...
    @overload
    def __getitem__(self, place: slice, /) -> tuple[str, ...]: ...
    def __getitem__(self, place: int | slice, /) -> str | tuple[str, ...]:
        """One string, or some as a tuple."""
        if not isinstance(place, slice):
            row = range(len(self))[place]
            return self._text(int(self._starts[row]), int(self._starts[row + 1]))
        start, stop, step = place.indices(len(self))
        if step != 1:
            return tuple(self.at(np.arange(start, stop, step)))
        return tuple(self._texts(start, max(start, stop)))

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(self._blocks())

    def _blocks(self) -> Iterator[list[str]]:
        return (self._texts(start, min(start + _BLOCK, len(self))) for start in range(0, len(self), _BLOCK))

    def _text(self, start: int, end: int) -> str:
        return self._content[start : end - 1].decode("utf-8", self._errors)

    def _texts(self, start: int, stop: int) -> list[str]:
        """The strings start to stop."""
        if start == stop:
            return []
        places = self._starts[start : stop + 1]
        texts = self._text(int(places[0]), int(places[-1])).split("\n")
        if len(texts) != stop - start:  # a name with a line feed in it
            return [self._text(*ends) for ends in itertools.pairwise(places.tolist())]
        return texts

    def __eq__(self, other: object) -> bool:
        """Whether another sequence (a tuple, a list) has the same strings in the same order."""
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        """All of a few, the first of many."""
        more = ", ..." if len(self) > 5 else ""
        return f"<{len(self)} paths: {', '.join(map(repr, self[:5]))}{more}>"

    @property
    def joined(self) -> memoryview:
        """The strings in UTF-8 with a line feed between them, without a copy."""
        return memoryview(self._content)[:-1]

    @functools.cached_property
    def is_ascending(self) -> bool:
        """Whether each string is greater than the one before, so that all are different."""
        last: list[str] = []
        for block in self._blocks():
            if not all(map(operator.lt, [*last, *block], block[1 - len(last) :])):
                return False
            last = block[-1:]
        return True

    def at(self, rows: NDArray[np.int64]) -> Iterator[str]:
        """The strings of these rows, in their order.  rows: [M] in [0, N)."""
        parts = (rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK))
        return itertools.chain.from_iterable(map(self._take, parts))

    def take(self, rows: NDArray[np.int64]) -> "Paths":
        """Some, in the order of `rows`.  rows: [M] int64 in [0, N)."""
        if len(rows) == len(self) and np.array_equal(rows, np.arange(len(self))):
            return self
        if self._errors == _HALVES:
            return Paths.of(self.at(rows))
        content = bytearray()
        for start in range(0, len(rows), _BLOCK):
            content += self._pieces(rows[start : start + _BLOCK])
        lengths = (self._starts[1:] - self._starts[:-1])[rows]
        return Paths._with(content, [np.zeros(1, dtype=np.int64), lengths], self._errors)

    def _take(self, rows: NDArray[np.int64]) -> Iterator[str]:
        lengths = (self._starts[rows + 1] - self._starts[rows]).astype(np.int64)
        return iter(Paths._with(bytearray(self._pieces(rows)), [np.zeros(1, dtype=np.int64), lengths], self._errors))

    def _pieces(self, rows: NDArray[np.int64]) -> bytes:
        """The content of these rows; rows that follow each other are copied together."""
        ends = np.flatnonzero(np.diff(rows) != 1)
        firsts, lasts = rows[np.concatenate(([0], ends + 1))], rows[np.concatenate((ends, [len(rows) - 1]))]
        pieces = zip(self._starts[firsts].tolist(), self._starts[lasts + 1].tolist(), strict=True)
        return b"".join([self._content[start:end] for start, end in pieces])

    def order(self) -> NDArray[np.int64]:
        """The rows in the order of their strings, as `sorted` has it; equal ones in the order of their rows.  [N]."""
        if self.is_ascending:
            return np.arange(len(self))
        width = int((self._starts[1:] - self._starts[:-1]).max())
        if width * len(self) > 4 * len(self._content) or b"\0" in self._content or not self._is_utf_8():
            texts = list(self)
            return np.array(sorted(range(len(texts)), key=texts.__getitem__), dtype=np.int64)
        padded = np.empty(len(self), dtype=f"S{width}")  # UTF-8 sorts as its characters do
        for start in range(0, len(self), _BLOCK):
            padded[start : start + _BLOCK] = [text.encode() for text in self[start : start + _BLOCK]]
        return np.argsort(padded, kind="stable")

    def _is_utf_8(self) -> bool:
        """Whether there are neither bytes that are no UTF-8 nor halves of characters."""
        try:
            for start in range(0, len(self), _BLOCK):
                stop = min(start + _BLOCK, len(self))
                self._content[int(self._starts[start]) : int(self._starts[stop])].decode("utf-8")
        except UnicodeDecodeError:
            return False
        return True


class Folders(Mapping[str, tuple[str, ...]]):
    """Folder -> the names in it, all names in one piece of memory, with slashes between them: no name has one in it."""

    def __init__(self) -> None:
        self._content = bytearray()
        self._ends: dict[str, tuple[int, ...]] = {}  # where the names of a folder begin and end, once for each `add`

    def add(self, folder: str, names: Iterable[str]) -> None:
        """More names in a folder, which is there from now on even without any."""
        start = len(self._content)
        self._content += "/".join(names).encode("utf-8", _HALVES)
        added = (start, len(self._content)) if len(self._content) > start else ()
        self._ends[folder] = self._ends.get(folder, ()) + added

    def __getitem__(self, folder: str, /) -> tuple[str, ...]:
        ends = self._ends[folder]
        joined = b"/".join([self._content[start:end] for start, end in zip(ends[::2], ends[1::2], strict=True)])
        return tuple(joined.decode("utf-8", _HALVES).split("/")) if joined else ()

    def __contains__(self, folder: object) -> bool:
        return folder in self._ends

    def __iter__(self) -> Iterator[str]:
        return iter(self._ends)

    def __len__(self) -> int:
        """Number of folders."""
        return len(self._ends)

    @property
    def num_names(self) -> int:
        """Number of names in all folders together."""
        return self._content.count(b"/") + sum(len(ends) // 2 for ends in self._ends.values())


def by_folder(paths: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """(folder, names) of paths that follow each other in one folder; a folder may come again."""
    folder, names = "", list[str]()
    for path in paths:
        before, _, name = path.rpartition("/")
        if before != folder:
            if names:
                yield folder, names
            folder, names = before, []
        names.append(name)
    if names:
        yield folder, names
