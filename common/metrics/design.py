"""Which pairs of an open set are scored: all of them, or a stated part of a set that has too many for every round.

A set with more than `verification.max_pairs` pairs is scored by a design, drawn once by hash from who is on which
picture, so that it is the same for every round, machine and model:

    genuine pairs    all of each person's first K pictures in drawn order, with the largest K whose pairs are a quarter
                     of max_pairs at most (VGGFace2's people have fewer pictures, so all of theirs count)
    impostor pairs   all between so many pictures as have three quarters of max_pairs, each person giving its share of
                     its own; who has a share below one picture is drawn or left out, so people are sampled there

Pictures are drawn, not pairs: pairs of few pictures are cheap, and each is as likely as any, so the impostors' curve is
an estimate of that of all. How far off it may be: `auc_half_width`.
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


def num_pairs_of(num_pictures: int) -> int:
    """All pairs of so many pictures, each once."""
    return num_pictures * (num_pictures - 1) // 2


def pair_design(person: NDArray[np.int64], *, most: int | str, seed: int) -> PairDesign | None:
    """The design for a set of which at most `most` pairs may be scored; None: all of them are.

    person: [N] int64, who each picture shows.  most: at least 1, or "all".  The same arguments give the same pairs.
    """
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
