"""FaceIndex: every picture that a data set's layout names, before anything is decoded."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError

OFFICIAL_TRAIN, OFFICIAL_VALIDATION, OFFICIAL_TEST, OFFICIAL_NONE = 0, 1, 2, -1


@dataclass(frozen=True, kw_only=True)
class FaceIndex:
    """The pictures of one data set, sorted by path, so that the order of lines or folders on disk does not matter.

    root: the folder that paths are relative to.
    paths: [N] POSIX paths.
    person: [N] int64, index into people.
    people: sorted identifiers (CelebA's number, VGGFace2's n000001, the folder's name).
    official_split: [N] int8: 0 train, 1 validation, 2 test, -1 none.
    landmarks: [N, 5, 2] float32, px (x, y) from the centre of the top left pixel: left eye, right eye, nose, left mouth
        corner, right mouth corner, left and right as seen in the picture; a row of NaN is absent.  None: no such file.
    boxes: [N, 4] float32, px x, y, width, height of the face; a row of NaN is absent.  None: no such file.
    names: the people's real names where the data set has them, in the order of people; else None.
    family: [P] int64, for each person the number in people of the first person of their family (its own for one without
        siblings), so that people[family[p]] names the family of person p.  None: every person is their own family.
    """

    dataset: str
    root: Path
    paths: tuple[str, ...]
    person: NDArray[np.int64]
    people: tuple[str, ...]
    official_split: NDArray[np.int8]
    landmarks: NDArray[np.float32] | None
    boxes: NDArray[np.float32] | None
    names: tuple[str, ...] | None = None
    family: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        """Number of pictures N."""
        return len(self.paths)


def build_index(
    dataset: str,
    root: Path,
    paths: list[str],
    people_of: list[str],
    *,
    official_split: NDArray[np.int8] | None = None,
    landmarks: NDArray[np.float32] | None = None,
    boxes: NDArray[np.float32] | None = None,
    names: dict[str, str] | None = None,
    siblings: Iterable[tuple[str, str]] | None = None,
) -> FaceIndex:
    """A FaceIndex from parallel columns in any order: sorted by path, people numbered in sorted order.

    people_of: [N] identifier of each picture's person.  names: identifier -> real name.
    siblings: pairs of people of one family, each with pictures; None: the data set knows of no families.
    Raises DataError for a picture named twice or a data set without pictures.
    """
    if not paths:
        raise DataError(f"{root}: no pictures found; give the folder that holds the {dataset} layout.")
    order = np.array(sorted(range(len(paths)), key=paths.__getitem__), dtype=np.int64)
    ordered = [paths[i] for i in order.tolist()]
    for first, second in itertools.pairwise(ordered):
        if first == second:
            raise DataError(f"{root}: picture {first} is named twice; each picture needs exactly one line.")
    people = tuple(sorted(set(people_of)))
    number = {name: i for i, name in enumerate(people)}
    person = np.fromiter((number[name] for name in people_of), dtype=np.int64, count=len(paths))
    if official_split is None:
        official_split = np.full(len(paths), OFFICIAL_NONE, dtype=np.int8)
    return FaceIndex(
        dataset=dataset,
        root=root,
        paths=tuple(ordered),
        person=person[order],
        people=people,
        official_split=official_split[order],
        landmarks=None if landmarks is None else landmarks[order],
        boxes=None if boxes is None else boxes[order],
        names=None if names is None else tuple(names.get(identifier, identifier) for identifier in people),
        family=None if siblings is None else _families(len(people), [(number[a], number[b]) for a, b in siblings]),
    )


def _families(num_people: int, siblings: list[tuple[int, int]]) -> NDArray[np.int64]:
    """The first member of each person's family, [num_people] int64: families grow together along pairs of siblings."""
    first = np.arange(num_people, dtype=np.int64)
    members = {person: [person] for person in range(num_people)}
    for one, other in siblings:
        kept, gone = sorted((int(first[one]), int(first[other])))
        if kept != gone:
            joined = members.pop(gone)
            first[joined] = kept
            members[kept] += joined
    return first


def take(index: FaceIndex, rows: NDArray[np.int64]) -> FaceIndex:
    """The index of some pictures only; people keep their numbers.  rows: [M] int64, ascending."""
    return FaceIndex(
        dataset=index.dataset,
        root=index.root,
        paths=tuple(index.paths[i] for i in rows.tolist()),
        person=index.person[rows],
        people=index.people,
        official_split=index.official_split[rows],
        landmarks=None if index.landmarks is None else index.landmarks[rows],
        boxes=None if index.boxes is None else index.boxes[rows],
        names=index.names,
        family=index.family,
    )
