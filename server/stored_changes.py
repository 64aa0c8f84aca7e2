"""The changes of a round on disk, for rules that need all of them at once: read piece by piece, never all in memory."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.codec import PIECE, Coded, pieces


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One client's change in a file."""

    name: str
    num_examples: int
    codec: str
    size: int
    path: Path

    def coded(self) -> Coded:
        """The change, mapped: what is not looked at is not read."""
        data = np.memmap(self.path, dtype=np.uint8, mode="r") if self.path.stat().st_size else b""
        return Coded(codec=self.codec, size=self.size, data=memoryview(data))  # type: ignore[arg-type]


class StoredChanges:
    """Keeps what clients sent in a folder of its own until it is closed; in the order of `put`."""

    def __init__(self, folder: Path) -> None:
        """folder: is made, and what an earlier round left there is removed."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._folder = folder
        self.changes: list[Stored] = []

    def put(self, name: str, change: Coded, num_examples: int) -> None:
        """Write one client's change; its bytes may be forgotten afterwards."""
        path = self._folder / f"{len(self.changes):06d}.bin"
        path.write_bytes(change.data)
        self.changes.append(
            Stored(name=name, num_examples=num_examples, codec=change.codec, size=change.size, path=path)
        )

    def leave_out(self, names: set[str]) -> None:
        """Forget these clients' changes."""
        self.changes = [change for change in self.changes if change.name not in names]

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self._folder, ignore_errors=True)


def stacked(changes: list[Stored]) -> Iterator[tuple[slice, Tensor]]:
    """All changes side by side, piece by piece: (where, [clients, piece] float32), in the order of `changes`."""
    size = changes[0].size
    readers = [_in_pieces(change.coded()) for change in changes]
    for start in range(0, size, PIECE):
        yield slice(start, min(start + PIECE, size)), torch.stack([next(reader) for reader in readers])


def _in_pieces(change: Coded) -> Iterator[Tensor]:
    """Pieces of PIECE elements, whatever the codec's own are."""
    for _, values in pieces(change):
        for start in range(0, len(values), PIECE):
            yield values[start : start + PIECE]
