"""Many virtual clients of a few data sets: how many each data set gets, and the settings of each, made on demand."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import overload

from clients.site import Share, SiteSettings
from common.errors import UserError
from common.faces.pack import FacePack
from common.faces.partition import most_clients

IDENTITY, DIRICHLET = "identity", "dirichlet"
SMALLEST_ALPHA, LARGEST_ALPHA = 1e-3, 1e6
NUMBER_WIDTH = 4  # celeba-0001


def parse_partition(text: str) -> float | None:
    """`identity` -> None; `dirichlet:ALPHA` -> alpha, in [0.001, 1e6].  Raises UserError."""
    if text == IDENTITY:
        return None
    kind, _, number = text.partition(":")
    try:
        alpha = float(number)
    except ValueError:
        alpha = math.nan
    if kind != DIRICHLET or not SMALLEST_ALPHA <= alpha <= LARGEST_ALPHA:
        raise UserError(
            f"--partition {text}: write {IDENTITY} or {DIRICHLET}:ALPHA with ALPHA from {SMALLEST_ALPHA:g} to"
            f" {LARGEST_ALPHA:g}, for example {DIRICHLET}:0.5."
        )
    return alpha


def divide(packs: Mapping[str, FacePack], num_clients: int, alpha: float | None) -> dict[str, int]:
    """How many of the clients each data set gets: at least one, and in proportion to how many it could have.

    packs: by the data set's client name.  Raises UserError when they are fewer than the data sets or more than fit.
    """
    most = {name: most_clients(pack, alpha) for name, pack in packs.items()}
    unit = "2 people to train on" if alpha is None else "4 training pictures"
    empty = [name for name, number in most.items() if number < 1]
    if empty or not len(packs) <= num_clients <= sum(most.values()):
        held = ", ".join(f"{name}: {number}" for name, number in most.items())
        raise UserError(
            f"--clients {num_clients}: with {unit} for each client there can be from {len(packs)} to"
            f" {sum(most.values())} ({held}); take another number or larger data sets."
        )
    numbers = dict.fromkeys(packs, 1)
    for _ in range(num_clients - len(packs)):
        # the one that is furthest behind its share; names in order decide between equals
        name = min((n for n in sorted(packs) if numbers[n] < most[n]), key=lambda n: numbers[n] / most[n])
        numbers[name] += 1
    return numbers


class VirtualSites(Sequence[SiteSettings]):
    """The sites of all virtual clients, in order of their names; a few numbers, however many they are."""

    def __init__(
        self, sites: Sequence[SiteSettings], numbers: Mapping[str, int], *, alpha: float | None, seed: int
    ) -> None:
        """sites: of the data sets.  numbers: how many clients each of them gets, by name."""
        self.seed = seed
        self._sites = sorted(sites, key=lambda site: site.name)
        self._numbers, self._alpha = dict(numbers), alpha

    def __len__(self) -> int:
        return sum(self._numbers.values())

    @overload
    def __getitem__(self, number: int, /) -> SiteSettings: ...
    @overload
    def __getitem__(self, number: slice, /) -> Sequence[SiteSettings]: ...
    def __getitem__(self, number: int | slice, /) -> SiteSettings | Sequence[SiteSettings]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        for site in self._sites:
            here = self._numbers[site.name]
            if 0 <= number < here:
                return self._one(site, number, here)
            number -= here
        raise IndexError(number)

    def _one(self, site: SiteSettings, number: int, here: int) -> SiteSettings:
        width = max(NUMBER_WIDTH, len(str(here)))
        name = f"{site.name}-{number + 1:0{width}d}"
        return dataclasses.replace(
            site,
            name=name,
            state_dir=site.state_dir.with_name(name),
            pack_workers=1,
            share=Share(number=number, num_clients=here, alpha=self._alpha, seed=self.seed),
        )
