"""Which picture serves what, decided by hashes: never by random state, the order of files, or other data sets.

Closed set: each training person's pictures go to TRAIN, VAL_PICTURES and TEST_PICTURES. Open set: VAL_PEOPLE and
TEST_PEOPLE are people never trained on, by the official split where there is one, else by hash.

From MANY_PEOPLE on, a person's hash alone decides whether they are in an open set, so nobody moves when others are
added, and a model of an earlier run was trained on nobody whom a later one tests. Fewer people are dealt by their
number, since of few people a hash alone would give too few or too many.

Families are never divided: a twin and the sibling stand on one side, for they are nearly the same face.
"""

import enum
import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.faces.index import OFFICIAL_TEST, OFFICIAL_TRAIN, OFFICIAL_VALIDATION, FaceIndex
from common.settings import DataSettings

MIN_PEOPLE = 2  # in training and in each open set: one person alone gives neither a choice nor an impostor pair
MIN_OPEN_PICTURES = 2  # of a person in an open set: a single picture gives no genuine pair
MANY_PEOPLE = 1000  # from so many on, whom a hash puts in an open set does not depend on who else is there
MIN_GIVING_PICTURES = 3  # fewer stay whole in training: with three, one can be left in each of the closed parts


class Split(enum.IntEnum):
    """What a picture is for."""

    TRAIN = 0
    VAL_PICTURES = 1
    TEST_PICTURES = 2
    VAL_PEOPLE = 3
    TEST_PEOPLE = 4
    UNUSED = 5


def assign_splits(index: FaceIndex, data: DataSettings) -> NDArray[np.int8]:
    """The Split code of each picture, [N] int8.

    People with fewer than data.min_pictures_per_person pictures are UNUSED, as are open-set people with a single
    picture; of the rest data.max_people are kept by hash, shared out over training, validation and test as these stand.
    A person or family whom the official lists put in two parts belongs whole to the stricter one (test, then
    validation). What is decided by hash is decided by that of the family's first name, for the whole family.
    Raises DataError when fewer than two people are left in training, validation or test.
    """
    count = np.bincount(index.person, minlength=len(index.people))
    part = _people_parts(index, count, data)
    _require_people(index, part, data)
    if isinstance(data.max_people, int):
        _keep_some(part, _family_of(index), _hashes(f"{index.dataset}/keep", index.people), data.max_people)
        _require_people(index, part, data)
    codes = part[index.person]
    _split_pictures(codes, index, data)
    return codes


def _hashes(salt: str, names: Iterable[str]) -> NDArray[np.uint64]:
    """The first 8 bytes of SHA-256 of `salt/name`."""
    start = hashlib.sha256(f"{salt}/".encode())
    digests = bytearray()
    for name in names:
        one = start.copy()
        one.update(name.encode("utf-8", "surrogateescape"))
        digests += one.digest()[:8]
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64)


def _family_of(index: FaceIndex) -> NDArray[np.int64]:
    """The first member of each person's family, [P] int64; each person their own where the data set has none."""
    return np.arange(len(index.people), dtype=np.int64) if index.family is None else index.family


def _people_parts(index: FaceIndex, count: NDArray[np.int64], data: DataSettings) -> NDArray[np.int8]:
    """Each person's part: TRAIN, VAL_PEOPLE, TEST_PEOPLE or UNUSED.  count: [P] pictures of each person."""
    family = _family_of(index)
    official = np.full(len(index.people), -1, dtype=np.int8)
    np.maximum.at(official, family[index.person], index.official_split)  # test over validation over training over none
    official = official[family]
    part = np.full(len(index.people), Split.TRAIN, dtype=np.int8)
    part[official == OFFICIAL_VALIDATION] = Split.VAL_PEOPLE
    part[official == OFFICIAL_TEST] = Split.TEST_PEOPLE
    part[(count < MIN_OPEN_PICTURES) & (official > OFFICIAL_TRAIN)] = Split.UNUSED
    part[count < max(data.min_pictures_per_person, 1)] = Split.UNUSED
    hashes = _hashes(f"{index.dataset}/people", index.people)
    order = np.argsort(hashes, kind="stable")
    training = np.bincount(family[part == Split.TRAIN], minlength=len(part))
    useless = np.bincount(family[(part == Split.TRAIN) & (count < MIN_OPEN_PICTURES)], minlength=len(part))
    free = order[(training[order] > 0) & (useless[order] == 0)]  # families, by their first member
    total, edge = len(free), 0.0
    for code, known, fraction in (
        (Split.TEST_PEOPLE, OFFICIAL_TEST, data.fraction_test_people),
        (Split.VAL_PEOPLE, OFFICIAL_VALIDATION, data.fraction_val_people),
    ):
        if not (official == known).any():
            edge += fraction
            number = max(MIN_PEOPLE, round(fraction * total))
            if total >= MANY_PEOPLE:  # whoever else is there, a hash below the edge stays below it
                number = int(np.searchsorted(hashes[free], np.uint64(edge * 2.0**64)))
            part[np.isin(family, free[:number]) & (part == Split.TRAIN)] = code
            free = free[number:]
    return part


def _require_people(index: FaceIndex, part: NDArray[np.int8], data: DataSettings) -> None:
    """Raise DataError when a part that needs people has fewer than two, or an open set fewer than two families."""
    family = _family_of(index)
    for code, what in (
        (Split.TRAIN, "training"),
        (Split.TEST_PEOPLE, "the test on unseen people"),
        (Split.VAL_PEOPLE, "the validation on unseen people"),
    ):
        here = part == code
        # One family alone has no strangers; each person is a family where none are known.
        left = int(here.sum()) if code == Split.TRAIN else len(np.unique(family[here]))
        if left < MIN_PEOPLE:
            counts_people = code == Split.TRAIN or index.family is None
            kind, total = ("people", len(index.people)) if counts_people else ("families", len(np.unique(family)))
            raise DataError(
                f"{index.root}: {left} of {total} {kind} left for {what}, and {MIN_PEOPLE} are needed; "
                f"add {kind}{_what_to_relax(data)}. {_what_is_there(index)}"
            )


def _what_to_relax(data: DataSettings) -> str:
    """The settings that leave people out; advice that cannot help is left out."""
    limits = []
    if data.min_pictures_per_person > MIN_OPEN_PICTURES:
        limits.append(f"data.min_pictures_per_person = {data.min_pictures_per_person}")
    if isinstance(data.max_people, int):
        limits.append(f"data.max_people = {data.max_people}")
    return f" or relax {', '.join(limits)}" if limits else ""


def _what_is_there(index: FaceIndex) -> str:
    """What is needed in all, and what the folder has."""
    count = np.bincount(index.person, minlength=len(index.people))
    with_pictures, single = int((count > 0).sum()), int((count == 1).sum())
    alone = f", {single} of them with a single one" if single else ""
    return (
        f"There: {with_pictures} people with pictures{alone}; needed: {3 * MIN_PEOPLE} people (to train on, to "
        f"validate and to test with {MIN_PEOPLE} each) with {MIN_OPEN_PICTURES} pictures or more of each."
    )


def _keep_some(part: NDArray[np.int8], family: NDArray[np.int64], hashes: NDArray[np.uint64], max_people: int) -> None:
    """Leave at most max_people people in use, each part keeping its share and, as far as that goes, at least two.

    Families are kept or left out whole, so with twins one person fewer may be left.
    """
    used = part != Split.UNUSED
    if int(used.sum()) <= max_people:
        return
    size = np.bincount(family[used], minlength=len(part))
    queues: dict[Split, NDArray[np.int64]] = {}
    for code in (Split.TRAIN, Split.TEST_PEOPLE, Split.VAL_PEOPLE):
        firsts = np.unique(family[part == code])
        queues[code] = firsts[np.argsort(hashes[firsts], kind="stable")]
    quota = dict.fromkeys(queues, 0)
    left = max_people
    while True:
        # the part that is furthest behind its share; below two, no share is worth anything
        behind = {
            code: (min(quota[code], MIN_PEOPLE), quota[code] / len(queue))
            for code, queue in queues.items()
            if quota[code] < len(queue)
        }
        code = min(behind, key=lambda code: behind[code])
        left -= int(size[queues[code][quota[code]]])
        if left < 0:
            break
        quota[code] += 1
    kept = np.concatenate([queue[: quota[code]] for code, queue in queues.items()])
    part[~np.isin(family, kept)] = Split.UNUSED


def _split_pictures(codes: NDArray[np.int8], index: FaceIndex, data: DataSettings) -> None:
    """Move some of each training person's pictures to VAL_PICTURES and TEST_PICTURES, in place.

    Whole pictures cannot honour a fraction for each person, so the rounding is carried from person to person, in the
    order of their hashes: over the set the fraction holds to one picture. At least one stays in TRAIN.
    """
    rows = np.flatnonzero(codes == Split.TRAIN)
    hashes = _hashes(f"{index.dataset}/pictures", index.paths.at(rows))
    rows = rows[np.lexsort((hashes, index.person[rows]))]
    people, starts, counts = np.unique(index.person[rows], return_index=True, return_counts=True)
    giving = np.where(counts >= MIN_GIVING_PICTURES, counts, 0)
    order = np.argsort(_hashes(f"{index.dataset}/rounding", (index.people[i] for i in people.tolist())), kind="stable")
    num_val = _carried(giving, order, data.fraction_val_pictures)
    num_test = _carried(giving, order[::-1], data.fraction_test_pictures)
    num_test = np.minimum(num_test, np.maximum(counts - 1, 0))
    num_val = np.minimum(num_val, np.maximum(counts - 1 - num_test, 0))
    place = np.arange(len(rows)) - np.repeat(starts, counts)
    test = place < np.repeat(num_test, counts)
    val = ~test & (place < np.repeat(num_test + num_val, counts))
    codes[rows[test]] = Split.TEST_PICTURES
    codes[rows[val]] = Split.VAL_PICTURES


def _carried(counts: NDArray[np.int64], order: NDArray[np.int64], fraction: float) -> NDArray[np.int64]:
    """The fraction of each count in whole numbers; rounding is carried along `order`, so the sum is right to one."""
    up_to = np.floor(np.cumsum(counts[order]) * fraction + 0.5).astype(np.int64)
    parts = np.zeros(len(counts), dtype=np.int64)
    parts[order] = np.diff(up_to, prepend=0)
    return parts
