"""From the clients' changes to one: added in place as they come, or kept on disk for rules that need all of them.

In neither case does memory grow with the number of clients.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from common.codec import Coded, add_to
from common.errors import NotEnoughClients, UserError
from common.settings import ROBUST, FederationSettings
from server import robust
from server.stored_changes import Stored, StoredChanges

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


class KeptChanges:
    """All changes of a round on disk, read twice: for those that stand out, and for the rule."""

    def __init__(self, folder: Path, federation: FederationSettings, size: int) -> None:
        """folder: for the files, which `close` removes.  size: number of elements of the flat model."""
        self._store, self._federation, self._size = StoredChanges(folder), federation, size

    def add(self, change: Coded, num_examples: int, name: str = "") -> None:
        """Write one client's change."""
        self._store.put(name, change, num_examples)

    def outliers(self) -> Mapping[str, str]:
        """Those whose norm is more than `federation.norm_factor` times the median's, from four clients on."""
        factor = self._federation.norm_factor
        if isinstance(factor, str):
            return {}
        found = robust.norm_outliers(self._store.changes, factor)
        self._store.leave_out(set(found))
        return found

    def mean(self) -> Buffer:
        """The strategy's aggregate.  Raises NotEnoughClients when too few changes are left for krum."""
        rule = _RULES.get(self._federation.strategy)
        return self._weighted() if rule is None else rule(self._store.changes, self._federation)

    def close(self) -> None:
        """Remove the files."""
        self._store.close()

    def _weighted(self) -> Buffer:
        """As `WeightedChange`, to the same bits."""
        total = WeightedChange(self._size)
        for change in self._store.changes:
            total.add(change.coded(), change.num_examples)
        return total.mean()


def _krum(changes: list[Stored], federation: FederationSettings) -> Buffer:
    needed = fewest_clients(federation)
    if len(changes) < needed:
        raise NotEnoughClients(
            f"{federation.strategy} with federation.num_malicious = {federation.num_malicious} needs {needed} usable"
            f" replies, and {len(changes)} are here."
        )
    order = robust.krum_order(changes, federation.num_malicious)
    number = 1 if federation.strategy == "krum" else len(changes) - federation.num_malicious
    return robust.mean_of(changes, order[:number])


_RULES: Mapping[str, Callable[[list[Stored], FederationSettings], Buffer]] = {
    "fedmedian": lambda changes, _: robust.median(changes),
    "fedtrimmedavg": lambda changes, federation: robust.trimmed_mean(changes, federation.trim_fraction),
    "krum": _krum,
    "multikrum": _krum,
}


def fewest_clients(federation: FederationSettings) -> int:
    """How many changes the strategy needs: 2 f + 3 for krum, else one."""
    return 2 * federation.num_malicious + 3 if "krum" in federation.strategy else 1


def check_number(federation: FederationSettings, num_clients: int) -> None:
    """Raises UserError when so many clients a round can never be enough for the strategy."""
    needed = fewest_clients(federation)
    if num_clients < needed:
        raise UserError(
            f"{federation.strategy} with federation.num_malicious = {federation.num_malicious} needs {needed} clients"
            f" in each round, and there are {num_clients}; start more, lower it, or choose fedmedian."
        )


def aggregate_for(federation: FederationSettings, size: int, folder: Path) -> Aggregate:
    """Where a round's changes go.  folder: for those that have to be kept."""
    if federation.strategy in ROBUST or federation.norm_factor != "off":
        return KeptChanges(folder, federation, size)
    return WeightedChange(size)
