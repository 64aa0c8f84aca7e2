"""Errors at one threshold by groups of people: whether a model that is good on all is as good on each.

False matches of a group are of pairs within it, as face recognition is tested for demographic effects (NIST IR 8280,
Grother et al. 2019): two people of one group are the likeliest to be taken for each other.  Histograms of pairs add up,
so several clients' groups are counted as one client's are, also where nobody sees but the sum (secure aggregation).
"""

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.metrics.figures import judged, wilson
from common.metrics.group_names import group_names
from common.metrics.pairs import pair_histogram
from common.metrics.sums import NUM_BINS, no_twins
from common.metrics.thresholds import Threshold

GROUP_ROW: Final = 2 * NUM_BINS + 3  # numbers of one group as they travel

Histogram = Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True)
class GroupPairs:
    """The pairs within one group, at one client or added over several whose people are others.

    histogram: [2, NUM_BINS] int64.  num_people: with a picture there.  num_people_pairs: of two of them at one client.
    num_sites: that had enough people.
    """

    histogram: NDArray[np.int64]
    num_people: int
    num_people_pairs: int
    num_sites: int = 1

    def __add__(self, other: "GroupPairs") -> "GroupPairs":
        return GroupPairs(
            histogram=self.histogram + other.histogram,
            num_people=self.num_people + other.num_people,
            num_people_pairs=self.num_people_pairs + other.num_people_pairs,
            num_sites=self.num_sites + other.num_sites,
        )

    @property
    def row(self) -> NDArray[np.int64]:
        """[GROUP_ROW] int64: the histogram, and the three counts."""
        counts = np.array([self.num_people, self.num_people_pairs, self.num_sites], dtype=np.int64)
        return np.concatenate([self.histogram.reshape(-1), counts])

    @classmethod
    def of_row(cls, row: NDArray[np.int64]) -> "GroupPairs":
        """The inverse of `row`; of sums of rows too."""
        people, people_pairs, sites = row[2 * NUM_BINS :].tolist()
        histogram = row[: 2 * NUM_BINS].reshape(2, NUM_BINS)
        return cls(histogram=histogram, num_people=people, num_people_pairs=people_pairs, num_sites=sites)


NOBODY: Final = GroupPairs(histogram=no_twins(), num_people=0, num_people_pairs=0, num_sites=0)


@dataclass(frozen=True, kw_only=True)
class GroupErrors:
    """What a threshold does to one group.

    fmr, fnmr: accepted fraction of its impostor pairs, rejected fraction of its genuine pairs, with the ends of their
    95 % intervals (Wilson; of FMR each pair of two people counts once, of FNMR each person).  num_sites: they are of.
    """

    group: str
    num_people: int
    num_sites: int
    num_genuine_pairs: int
    num_impostor_pairs: int
    fmr: float
    fmr_low: float
    fmr_high: float
    fnmr: float
    fnmr_low: float
    fnmr_high: float


def pairs_of_groups(
    embeddings: NDArray[np.float32],
    person: NDArray[np.int64],
    group_of: Mapping[str, Sequence[int]],
    count: Histogram = pair_histogram,
) -> dict[str, GroupPairs]:
    """The pairs within each group at one client: zeros of one without genuine or without impostor pairs.

    embeddings: [N, D] float.  person: [N] int64, who each picture shows.  group_of: group -> its people's numbers.
    count: of the embeddings and people of one group the pairs, [2, NUM_BINS]; `pair_histogram` counts all.
    """
    found = {}
    for group, members in group_of.items():
        inside = np.isin(person, np.asarray(members, dtype=np.int64))
        counts = np.unique(person[inside], return_counts=True)[1]
        has_pairs = len(counts) > 1 and counts.max() > 1
        histogram = count(embeddings[inside], person[inside]) if has_pairs else no_twins()
        number = len(counts)
        found[group] = GroupPairs(histogram=histogram, num_people=number, num_people_pairs=number * (number - 1) // 2)
    return found


def with_enough(
    found: Mapping[str, GroupPairs], attributes: Sequence[str], least_people: int, least_pairs: int
) -> dict[str, GroupPairs]:
    """What may leave a client of its groups: NOBODY in the place of both of an attribute's where either is too small.

    Of both: what all people have less what one group has would tell of the other.
    least_people: test people of a group.  least_pairs: its genuine, and its impostor, pairs.
    """
    leaves: dict[str, GroupPairs] = {}
    for name in attributes:
        both = [found[group] for group in group_names([name])]
        enough = all(
            pairs.num_people >= max(least_people, 2) and pairs.histogram.sum(axis=1).min() >= max(least_pairs, 1)
            for pairs in both
        )
        leaves |= {group: found[group] if enough else NOBODY for group in group_names([name])}
    return leaves


def group_errors(
    by_client: Sequence[Mapping[str, GroupPairs]], threshold: float, least_people: int
) -> tuple[list[GroupErrors], dict[str, int]]:
    """The errors of each group at a cosine, and the groups that are too small, or have no pairs: group -> its people.

    by_client: as `pairs_of_groups` returns them, of clients whose people are others.
    """
    names = dict.fromkeys(name for groups in by_client for name in groups)
    errors, small = [], {}
    for name in names:
        pairs = functools.reduce(operator.add, (groups[name] for groups in by_client if name in groups))
        if pairs.num_people < least_people or not pairs.histogram.any(axis=1).all():
            small[name] = pairs.num_people
        else:
            errors.append(_errors(name, pairs, threshold))
    return errors, small


def _errors(group: str, pairs: GroupPairs, threshold: float) -> GroupErrors:
    (rejected, _), (_, accepted) = judged(pairs.histogram, threshold)
    num_genuine, num_impostor = (int(total) for total in pairs.histogram.sum(axis=1))
    num_people, pairs_of_people = pairs.num_people, pairs.num_people_pairs
    fmr, fnmr = float(accepted / num_impostor), float(rejected / num_genuine)
    fmr_low, fmr_high = wilson(fmr * pairs_of_people, pairs_of_people)
    fnmr_low, fnmr_high = wilson(fnmr * num_people, num_people)
    return GroupErrors(
        group=group,
        num_people=num_people,
        num_sites=pairs.num_sites,
        num_genuine_pairs=num_genuine,
        num_impostor_pairs=num_impostor,
        fmr=fmr,
        fmr_low=fmr_low,
        fmr_high=fmr_high,
        fnmr=fnmr,
        fnmr_low=fnmr_low,
        fnmr_high=fnmr_high,
    )


@dataclass(frozen=True, kw_only=True)
class ByGroup:
    """One model's errors by group.  threshold: None where its validation people support none.

    errors: of each group with enough people.  too_small: group -> its test people.
    """

    model: str
    threshold: Threshold | None
    errors: tuple[GroupErrors, ...]
    too_small: Mapping[str, int]

    @classmethod
    def at(
        cls,
        model: str,
        threshold: Threshold | None,
        by_client: Sequence[Mapping[str, GroupPairs]],
        least_people: int,
    ) -> "ByGroup":
        """Of the pairs of each client, or of all added."""
        errors, small = group_errors(by_client, math.inf if threshold is None else threshold.threshold, least_people)
        return cls(model=model, threshold=threshold, errors=() if threshold is None else tuple(errors), too_small=small)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ByGroup":
        """The inverse of `asdict`."""
        threshold = content["threshold"]
        return cls(
            model=content["model"],
            threshold=None if threshold is None else Threshold(**threshold),
            errors=tuple(GroupErrors(**row) for row in content["errors"]),
            too_small=dict(content["too_small"]),
        )


def worst_to_best(rates: Sequence[float]) -> float:
    """The highest rate over the lowest; infinite where the lowest alone is 0, NaN of fewer than two."""
    if len(rates) < 2:
        return math.nan
    low, high = min(rates), max(rates)
    return 1.0 if high == low else high / low if low > 0.0 else math.inf
