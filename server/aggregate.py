"""From the clients' changes to one: added in place as they come, or kept on disk for rules that need all of them.

In neither case does memory grow with the number of clients. The rules themselves are rows of common/strategies.py.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import NotEnoughClients
from common.protocol.codec import PIECE, Coded, add_to, pieces
from common.settings import FederationSettings
from common.strategies import STRATEGIES, Changes, fewest_clients, needs

Buffer = NDArray[np.float32]


class Aggregate(Protocol):
    """The changes of one round on their way to one."""

    def add(self, change: Coded, num_examples: int, name: str = "") -> None:
        """Take one client's change."""
        ...

    def outliers(self) -> Mapping[str, str]:
        """Clients whose change is left out beside the others', with the reason; asked once, after the last `add`."""
        ...

    def mean(self) -> Buffer:
        """The aggregate, [size] float32; nothing may be added afterwards."""
        ...

    def close(self) -> None:
        """The round is over, whatever became of it."""
        ...


class WeightedChange:
    """The running sum of num_examples * change over clients, in float32.

    Holds one buffer whatever the number of clients. Added in a fixed client order, the sum does not depend on who
    answered first.
    """

    def __init__(self, size: int) -> None:
        """size: number of float32 elements of the flat model."""
        self._sum = torch.zeros(size)
        self.num_examples = 0
        self.num_clients = 0

    def add(self, change: Coded, num_examples: int, name: str = "") -> None:  # noqa: ARG002
        """Add one client's change of `size` elements with its weight; it is decoded piece by piece as it is added."""
        add_to(self._sum, change, float(num_examples))
        self.num_examples += num_examples
        self.num_clients += 1

    def outliers(self) -> Mapping[str, str]:
        """None: a change is compared with others only where all are kept."""
        return {}

    def close(self) -> None:
        """Nothing is kept."""

    def mean(self) -> NDArray[np.float32]:
        """The weighted mean change, [size] float32 (FedAvg, arXiv:1602.05629, algorithm 1).

        Divides in place; nothing may be added afterwards.  Raises ValueError when nothing was added.
        """
        if self.num_examples == 0:
            raise ValueError("no reply was added, so there is no mean")
        mean: NDArray[np.float32] = self._sum.div_(float(self.num_examples)).numpy()
        return mean


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


class KeptChanges:
    """All changes of a round on disk, in the order of `add`, read twice: for those that stand out, and for the rule."""

    def __init__(self, folder: Path, federation: FederationSettings, size: int) -> None:
        """folder: is made, and what an earlier round left there is removed.  size: elements of the flat model."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._folder, self._federation, self.size = folder, federation, size
        self.changes: list[Stored] = []

    def __len__(self) -> int:
        """Number of clients."""
        return len(self.changes)

    def add(self, change: Coded, num_examples: int, name: str = "") -> None:
        """Write one client's change; its bytes may be forgotten afterwards."""
        path = self._folder / f"{len(self.changes):06d}.bin"
        path.write_bytes(change.data)
        self.changes.append(
            Stored(name=name, num_examples=num_examples, codec=change.codec, size=change.size, path=path)
        )

    def pieces(self, chosen: Sequence[int] | None = None) -> Iterator[tuple[slice, Tensor]]:
        """All or the chosen changes side by side, piece by piece: (where, [clients, piece] float32)."""
        stored = self.changes if chosen is None else [self.changes[index] for index in chosen]
        readers = [_in_pieces(change.coded()) for change in stored]
        for start in range(0, self.size, PIECE):
            where = slice(start, min(start + PIECE, self.size))
            yield where, torch.stack([next(reader) for reader in readers])

    def outliers(self) -> Mapping[str, str]:
        """Those whose norm is more than `federation.norm_factor` times the median's, from four clients on."""
        factor = self._federation.norm_factor
        if isinstance(factor, str) or len(self) < 4:
            return {}
        lengths = norms(self)
        usual = float(np.median(lengths))
        found = {
            change.name: f"its change has the norm {length:.4g}, more than {factor:g} times the clients' median"
            f" {usual:.4g}"
            for change, length in zip(self.changes, lengths, strict=True)
            if length > factor * usual
        }
        self.changes = [change for change in self.changes if change.name not in found]
        return found

    def mean(self) -> Buffer:
        """The strategy's aggregate.  Raises NotEnoughClients when too few changes are left for its rule."""
        rule = STRATEGIES[self._federation.strategy].rule
        if rule is not None and len(self) < fewest_clients(self._federation):
            raise NotEnoughClients(f"{needs(self._federation)} usable replies, and {len(self)} are here.")
        if rule is not None:
            return rule(self, self._federation).numpy()
        total = WeightedChange(self.size)  # the same bits as if they had been added as they came
        for change in self.changes:
            total.add(change.coded(), change.num_examples)
        return total.mean()

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _in_pieces(change: Coded) -> Iterator[Tensor]:
    """Pieces of PIECE elements, whatever the codec's own are."""
    for _, values in pieces(change):
        for start in range(0, len(values), PIECE):
            yield values[start : start + PIECE]


def norms(changes: Changes) -> list[float]:
    """The Euclidean norm of each change."""
    squares = torch.zeros(len(changes), dtype=torch.float64)
    for _, values in changes.pieces():
        squares += values.double().square().sum(dim=1)
    return squares.sqrt().tolist()


def aggregate_for(federation: FederationSettings, size: int, folder: Path) -> Aggregate:
    """Where a round's changes go.  folder: for those that have to be kept."""
    if STRATEGIES[federation.strategy].rule is not None or federation.norm_factor != "off":
        return KeptChanges(folder, federation, size)
    return WeightedChange(size)
