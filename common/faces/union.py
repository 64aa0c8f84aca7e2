"""Several packs seen as one, for training that has all pictures in one place; nothing is copied.

People of different packs stay different people: their numbers, and so the labels, are put one pack after the other.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.faces.pack import FacePack, Pictures


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
        family=np.concatenate([pack.families + start for pack, start in zip(packs.values(), offsets, strict=False)])
        if any(pack.family is not None for pack in packs.values())
        else None,
    )


def labels_of(packs: Mapping[str, FacePack]) -> dict[str, slice]:
    """Which labels of `union_pack(packs)` are each client's own training people: client -> slice."""
    ends = np.cumsum([pack.num_classes for pack in packs.values()]).tolist()
    return {name: slice(end - pack.num_classes, end) for (name, pack), end in zip(packs.items(), ends, strict=True)}
