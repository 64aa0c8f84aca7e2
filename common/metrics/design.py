"""Which pairs of an open set are scored: all of them, or a stated part of a set that has too many for every round.

A set with more than `verification.max_pairs` pairs is scored by a design, drawn once by hash from who is on which
picture, so that it is the same for every round, machine and model:

    genuine pairs    all of each person's first K pictures in drawn order, with the largest K whose pairs are a quarter
                     of max_pairs at most (VGGFace2's people have fewer pictures, so all of theirs count)
    impostor pairs   all between so many pictures as have three quarters of max_pairs, each person giving its share of
                     its own; who has a share below one picture is drawn or left out, so people are sampled there

Pictures are drawn, not pairs: pairs of few pictures are cheap, and each is as likely as any, so the impostors' curve is
an estimate of that of all. How far off it may be: `auc_half_width`.

Where one person would be in more pairs than may be, pictures are left out of whoever has the most: a quarter of the
bound is for the genuine pairs, the rest for those with others.  Folds and the closed set are beside it.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

_OF_GENUINE: Final = 0.25  # of max_pairs
_Z: Final = 1.96  # 95 %, two-sided
PAIRS_PER_CPU_S: Final = 4e7  # of 512 numbers each, on one core; measured: 42 to 59 million


@dataclass(frozen=True, kw_only=True)
class PairDesign:
    """The part of a set's pairs that is scored; pictures by position, ascending."""

    genuine: NDArray[np.int64]  # pictures whose genuine pairs count
    impostor: NDArray[np.int64]  # pictures whose impostor pairs count
    most_each: int  # K, pictures of a person among `genuine`
    num_pairs: int  # that are counted
    num_all: int  # that there are
    is_cut: bool = False  # because one person would have been in too many


def num_pairs_of(num_pictures: int) -> int:
    """All pairs of so many pictures, each once."""
    return num_pictures * (num_pictures - 1) // 2


def most_pairs_of_a_person(person: NDArray[np.int64], design: PairDesign | None) -> int:
    """In how many of the counted pairs the person is who is in the most.  person: [N] int64.  design: None: all are."""
    genuine, impostor = (person, person) if design is None else (person[design.genuine], person[design.impostor])
    num_people = int(person.max(initial=-1)) + 1
    own, shown = np.bincount(genuine, minlength=num_people), np.bincount(impostor, minlength=num_people)
    return int((own * (own - 1) // 2 + shown * (len(impostor) - shown)).max(initial=0))


def pair_design(person: NDArray[np.int64], *, most: int | str, seed: int, most_of_person: int = 0) -> PairDesign | None:
    """The design for a set of which at most `most` pairs may be scored; None: all of them are.

    person: [N] int64, who each picture shows.  most: at least 1, or "all".  most_of_person: pairs that one person may
    be in, 4 or more; 0: any number.  The same arguments give the same pairs.
    """
    design = _drawn(person, most, seed)
    if not 0 < most_of_person < most_pairs_of_a_person(person, design):
        return design
    every = np.arange(len(person))
    genuine, impostor = (every, every) if design is None else (design.genuine, design.impostor)
    of_genuine = int(most_of_person * _OF_GENUINE)
    most_each = (1 + math.isqrt(1 + 8 * of_genuine)) // 2  # n pictures have n (n - 1) / 2 pairs
    random = np.random.default_rng(seed)
    genuine = _first_of_each(person, genuine, most_each, random)
    impostor = _first_of_each(person, impostor, _pictures_each(person[impostor], most_of_person - of_genuine), random)
    own, shown = np.bincount(person[genuine]), np.bincount(person[impostor])
    return PairDesign(
        genuine=genuine,
        impostor=impostor,
        most_each=int(own.max(initial=0)),
        num_pairs=_sum_of_pairs(own) + num_pairs_of(len(impostor)) - _sum_of_pairs(shown),
        num_all=num_pairs_of(len(person)),
        is_cut=True,
    )


def _first_of_each(
    person: NDArray[np.int64], chosen: NDArray[np.int64], most_each: int, random: np.random.Generator
) -> NDArray[np.int64]:
    """So many of each person's chosen pictures, at random; ascending."""
    order = random.permutation(chosen)
    order = order[np.argsort(person[order], kind="stable")]
    sizes = np.unique(person[order], return_counts=True)[1]
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(order[place < most_each])


def _pictures_each(shown: NDArray[np.int64], most: int) -> int:
    """How many pictures of each person make no more than `most` pairs of one person with others; at least 1.

    shown: [n] int64, who is on each picture.
    """
    sizes = np.unique(shown, return_counts=True)[1]
    low, high = 1, int(sizes.max(initial=1))
    while low < high:
        each = (low + high + 1) // 2
        cut = np.minimum(sizes, each)
        is_within = int((cut * (cut.sum() - cut)).max()) <= most
        low, high = (each, high) if is_within else (low, each - 1)
    return low


def _drawn(person: NDArray[np.int64], most: int | str, seed: int) -> PairDesign | None:
    """The design that no bound of a person's pairs cuts."""
    num_all = num_pairs_of(len(person))
    if isinstance(most, str) or num_all <= most:
        return None
    random = np.random.default_rng(seed)
    order = random.permutation(len(person))
    order = order[np.argsort(person[order], kind="stable")]  # person by person, each one's pictures in drawn order
    sizes = np.unique(person, return_counts=True)[1]
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    most_each = _largest_share(sizes, int(most * _OF_GENUINE))
    # n pictures have n (n - 1) / 2 pairs, so n = sqrt(2 pairs) has no more.
    wanted = math.isqrt(2 * (most - int(most * _OF_GENUINE)))
    drawn = random.permutation(len(sizes))
    shares = np.zeros(len(sizes), dtype=np.int64)
    up_to = np.floor(np.cumsum(sizes[drawn]) * (wanted / len(person))).astype(np.int64)
    shares[drawn] = np.diff(up_to, prepend=0)
    counted = np.minimum(sizes, most_each)
    if _sum_of_pairs(counted) > int(most * _OF_GENUINE):  # two pictures of each are too many: fewer people
        with_pair = drawn[sizes[drawn] > 1]
        counted[with_pair[int(most * _OF_GENUINE) :]] = 0
    genuine = np.sort(order[place < np.repeat(counted, sizes)])
    impostor = np.sort(order[place < np.repeat(shares, sizes)])
    return PairDesign(
        genuine=genuine,
        impostor=impostor,
        most_each=most_each,
        num_pairs=_sum_of_pairs(counted) + num_pairs_of(len(impostor)) - _sum_of_pairs(shares),
        num_all=num_all,
    )


def _sum_of_pairs(sizes: NDArray[np.int64]) -> int:
    return int((sizes * (sizes - 1) // 2).sum())


def _largest_share(sizes: NDArray[np.int64], most: int) -> int:
    """The largest number of pictures each person may give so that their pairs are `most` at most; at least 2."""
    low, high = 2, max(2, int(sizes.max(initial=2)))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _sum_of_pairs(np.minimum(sizes, middle)) <= most else (low, middle - 1)
    return low


def auc_half_width(auc: float, most: int) -> float:
    """Half of the 95 % interval of an AUC that comes of drawing the impostors' pictures; never less than it is.

    The drawn AUC is a mean over pairs of n pictures of values in [0, 1] with the mean `auc`, a U-statistic of degree 2
    (Hoeffding, "A class of statistics with asymptotically normal distribution", 1948, eq. 5.13): its variance is at
    most 2 / n times that of one value, which is auc (1 - auc) at most. Giving each person its share makes it smaller.
    auc: in [0, 1].  most: verification.max_pairs.  Other people are not in it: that is `common.metrics.bootstrap`'s.
    """
    num_pictures = max(1, math.isqrt(2 * (most - int(most * _OF_GENUINE))))
    return _Z * math.sqrt(2.0 * auc * (1.0 - auc) / num_pictures)
