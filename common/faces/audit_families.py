"""The families of a data set, as the audit counts them: how large they are, and on which side of the split."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.faces.index import FaceIndex
from common.faces.splits import Split

# The closed set's parts are of the people trained on.
_SIDES = {"train": Split.TRAIN, "val_people": Split.VAL_PEOPLE, "test_people": Split.TEST_PEOPLE}


@dataclass(frozen=True, kw_only=True)
class Families:
    """Who belongs together; somebody in no pair is a family of one.

    number, by_size (members -> families), people_without_sibling: of all people that the layout names.
    by_split: side -> families with pictures there.  with_siblings: side -> those of which two or more members have
    pictures there, so that there are pairs of twins.
    """

    number: int
    by_size: dict[int, int]
    people_without_sibling: int
    by_split: dict[str, int]
    with_siblings: dict[str, int]

    def plain(self) -> dict[str, Any]:
        """For JSON, whose keys are text."""
        return dataclasses.asdict(self) | {"by_size": {str(size): number for size, number in self.by_size.items()}}

    def lines(self) -> list[str]:
        """For a terminal."""
        sizes = ", ".join(f"{size}: {number}" for size, number in self.by_size.items())
        sides = ", ".join(f"{side} {number}" for side, number in self.by_split.items())
        twins = ", ".join(f"{side} {number}" for side, number in self.with_siblings.items())
        return [
            f"  families: {self.number}, by members: {sizes}; people without a sibling: {self.people_without_sibling}",
            f"  families by split: {sides}",
            f"    with two siblings or more: {twins}",
        ]


def count_families(named: FaceIndex, used: FaceIndex, split: NDArray[np.int8]) -> Families | None:
    """The families of a data set; None where it knows of none.

    named: all that the layout names.  used: what is left of it.  split: [N] int8 `Split` codes of the pictures in use.
    """
    if named.family is None:
        return None
    people = np.unique(named.person)
    sizes = np.unique(named.family[people], return_counts=True)[1]
    members, number = np.unique(sizes, return_counts=True)
    by_size = dict(zip(members.tolist(), number.tolist(), strict=True))
    sides = {
        side: np.unique(named.family[np.unique(used.person[split == code])], return_counts=True)[1]
        for side, code in _SIDES.items()
    }
    return Families(
        number=len(sizes),
        by_size=by_size,
        people_without_sibling=by_size.get(1, 0),
        by_split={side: len(there) for side, there in sides.items()},
        with_siblings={side: int((there > 1).sum()) for side, there in sides.items()},
    )
