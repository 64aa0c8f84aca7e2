"""Errors at one threshold by groups of people: whether a model that is good on all is as good on each.

False matches of a group are of pairs within it, as face recognition is tested for demographic effects (NIST IR 8280,
Grother et al. 2019): two people of one group are the likeliest to be taken for each other.  Histograms of pairs add up,
so several clients' groups are counted as one client's are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.metrics.figures import judged, wilson
from common.metrics.pairs import pair_histogram
from common.metrics.sums import no_twins


@dataclass(frozen=True, kw_only=True)
class GroupPairs:
    """The pairs within one group at one client.  histogram: [2, NUM_BINS] int64.  num_people: with a picture there."""

    histogram: NDArray[np.int64]
    num_people: int


@dataclass(frozen=True, kw_only=True)
class GroupErrors:
    """What a threshold does to one group.

    fmr, fnmr: accepted fraction of its impostor pairs, rejected fraction of its genuine pairs, with the ends of their
    95 % intervals (Wilson; of FMR each pair of two people counts once, of FNMR each person).
    """

    group: str
    num_people: int
    num_genuine_pairs: int
    num_impostor_pairs: int
    fmr: float
    fmr_low: float
    fmr_high: float
    fnmr: float
    fnmr_low: float
    fnmr_high: float


def pairs_of_groups(
    embeddings: NDArray[np.float32], person: NDArray[np.int64], group_of: Mapping[str, Sequence[int]]
) -> dict[str, GroupPairs]:
    """The pairs within each group at one client: zeros of one without genuine or without impostor pairs.

    embeddings: [N, D] float.  person: [N] int64, who each picture shows.  group_of: group -> its people's numbers.
    """
    found = {}
    for group, members in group_of.items():
        inside = np.isin(person, np.asarray(members, dtype=np.int64))
        counts = np.unique(person[inside], return_counts=True)[1]
        has_pairs = len(counts) > 1 and counts.max() > 1
        histogram = pair_histogram(embeddings[inside], person[inside]) if has_pairs else no_twins()
        found[group] = GroupPairs(histogram=histogram, num_people=len(counts))
    return found


def group_errors(
    by_client: Sequence[Mapping[str, GroupPairs]], threshold: float, least_people: int
) -> tuple[list[GroupErrors], dict[str, int]]:
    """The errors of each group at a cosine, and the groups that are too small, or have no pairs: group -> its people.

    by_client: as `pairs_of_groups` returns them, of clients whose people are others.
    """
    names = dict.fromkeys(name for groups in by_client for name in groups)
    errors, small = [], {}
    for name in names:
        parts = [groups[name] for groups in by_client if name in groups]
        num_people = sum(part.num_people for part in parts)
        has_pairs = np.sum([part.histogram for part in parts], axis=0).any(axis=1).all()
        if num_people < least_people or not has_pairs:
            small[name] = num_people
        else:
            errors.append(_errors(name, parts, threshold))
    return errors, small


def _errors(group: str, parts: Sequence[GroupPairs], threshold: float) -> GroupErrors:
    histogram = np.sum([part.histogram for part in parts], axis=0)
    (rejected, _), (_, accepted) = judged(histogram, threshold)
    num_genuine, num_impostor = (int(total) for total in histogram.sum(axis=1))
    num_people = sum(part.num_people for part in parts)
    pairs_of_people = sum(part.num_people * (part.num_people - 1) // 2 for part in parts)
    fmr, fnmr = float(accepted / num_impostor), float(rejected / num_genuine)
    fmr_low, fmr_high = wilson(fmr * pairs_of_people, pairs_of_people)
    fnmr_low, fnmr_high = wilson(fnmr * num_people, num_people)
    return GroupErrors(
        group=group,
        num_people=num_people,
        num_genuine_pairs=num_genuine,
        num_impostor_pairs=num_impostor,
        fmr=fmr,
        fmr_low=fmr_low,
        fmr_high=fmr_high,
        fnmr=fnmr,
        fnmr_low=fnmr_low,
        fnmr_high=fnmr_high,
    )


def worst_to_best(rates: Sequence[float]) -> float:
    """The highest rate over the lowest; infinite where the lowest alone is 0, NaN of fewer than two."""
    if len(rates) < 2:
        return math.nan
    low, high = min(rates), max(rates)
    return 1.0 if high == low else high / low if low > 0.0 else math.inf
