"""95 % intervals of open-set scores by drawing people, not pairs: pairs of one person are far from independent.

A replicate draws as many people as there are, with replacement (Efron and Tibshirani, "An Introduction to the
Bootstrap", 1993, percentile intervals, section 13.3; for pairs of people Snijders and Borgatti, "Non-parametric
standard errors and tests for network statistics", Connections 22(2), 1999). A person drawn w times counts w times with
its own pairs, and pairs of two people w_p * w_q times; copies of one person are not paired with each other, for their
"impostor" pairs would be genuine ones. Replicates of different models that use the same weights are paired, so that
gaps between models have intervals too: `interval(scores_a - scores_b)`.

With twins whole families are drawn, not people: siblings are no two independent draws. A family's pairs, of one member
or of two, count as its own.
"""

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import DataError
from common.metrics.twins import KINDS, accepted_from, with_sibling
from common.metrics.verification import NUM_BINS, roc_curve, score_bins, unit_length

MAX_UNITS: Final = 1000  # above so many people, groups of them are drawn instead: the work grows with its square
COARSE_BINS: Final = 512
_FAR_FLOOR: Final = 1e-4  # below it the coarse bins follow the genuine scores only
_BLOCK_PAIRS: Final = 2**21  # scores computed at once: 8 MiB
_FARS: Final = {"tar_at_far_1e-1": 1e-1, "tar_at_far_1e-2": 1e-2, "tar_at_far_1e-3": 1e-3}


def person_weights(num_people: int, num_replicates: int, seed: int) -> NDArray[np.int64]:
    """How often each replicate draws each person: [num_replicates, U] int64 with U = min(num_people, MAX_UNITS).

    num_people: of families, where families are drawn.  Each row adds up to U. For pooled scores give each client a seed
    of its own, the same for every model.
    """
    num_units = min(num_people, MAX_UNITS)
    random = np.random.default_rng(seed)
    drawn = random.integers(0, num_units, (num_replicates, num_units))
    codes = drawn + np.arange(num_replicates)[:, None] * num_units
    return np.bincount(codes.ravel(), minlength=num_replicates * num_units).reshape(num_replicates, num_units)


def coarse_bins(histogram: NDArray[np.int64]) -> NDArray[np.int64]:
    """The coarse bin, in [0, COARSE_BINS), of each of NUM_BINS fine ones, narrow where the curve's figures are read.

    histogram: [2, NUM_BINS] as `pair_histogram` returns it; of all clients together, so that theirs can be added.
    A coarse bin holds at most 1/256 of the genuine pairs, and FAR changes in it by at most 3.7 % of itself down to
    1e-4, unless one fine bin holds more. Raises DataError when there is no genuine or no impostor pair.
    """
    far, tar = (curve[1:][::-1] for curve in roc_curve(histogram))  # at each bin's lower edge
    on_log_scale = np.log(np.maximum(far, _FAR_FLOOR)) / np.log(_FAR_FLOOR)
    place = (on_log_scale + 1 - tar) / 2  # rises from 0 to at most 1
    coarse: NDArray[np.int64] = np.minimum(place * COARSE_BINS, COARSE_BINS - 1).astype(np.int64)
    return coarse


def bootstrap_histograms(
    embeddings: NDArray[np.float32] | Tensor,
    person: NDArray[np.int64],
    weights: NDArray[np.int64],
    bins: NDArray[np.int64],
    *,
    family: NDArray[np.int64] | None = None,
    kind: str = "all",
) -> NDArray[np.float64]:
    """Counts [B, 2, COARSE_BINS] float64 of each replicate: row 0 genuine, row 1 impostor; clients' add up.

    embeddings: [N, D] float, of any length.  person: [N] int64.  weights: [B, U] as `person_weights` returns them;
    column u is the u-th person in rising order, or above MAX_UNITS people the u-th of MAX_UNITS groups, into which
    people are dealt by a hash of their number; a group is drawn like a person, with its pairs of different people.
    bins: [NUM_BINS] as `coarse_bins` returns them, or any with values in [0, COARSE_BINS).
    family: [N] int64, of each picture; families are then drawn instead of people, and column u is the u-th family.
    kind: of twins.KINDS, which pairs are counted; "twins" and "strangers" need families.
    It is computed unit by unit: memory is that of B * COARSE_BINS and U * COARSE_BINS numbers, never U * U.
    Raises TrainingFailed when an embedding is not finite.
    """
    if kind not in KINDS or (family is None and kind != "all"):
        raise ValueError(f"kind = {kind!r} must be of {KINDS}, and all but the first need families")
    families = person if family is None else family
    unit_of = _units(families)
    num_units = int(unit_of.max(initial=-1)) + 1
    if weights.shape[1] != num_units:
        raise ValueError(f"weights {list(weights.shape)} must be [B, {num_units}], one for each person or group")
    chosen = np.flatnonzero(with_sibling(person, families)) if kind == "twins" else np.arange(len(person))
    order = chosen[np.argsort(unit_of[chosen], kind="stable")]
    unit = unit_length(torch.as_tensor(embeddings)).cpu()[torch.from_numpy(order)]
    people, kin = torch.from_numpy(person[order]), torch.from_numpy(families[order])
    columns = torch.from_numpy(unit_of[order]).to(torch.int32) * COARSE_BINS
    ends = np.searchsorted(unit_of[order], np.arange(num_units), side="right").tolist()
    chances = torch.from_numpy(weights.astype(np.float32))
    table = torch.from_numpy(bins.astype(np.int32))
    own = torch.zeros(2, num_units, COARSE_BINS)
    pooled = torch.zeros(2, len(weights), COARSE_BINS, dtype=torch.float64)
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        own[:, number] = _within(unit[start:end], people[start:end], kin[start:end], table, kind)
        if end < len(unit) and kind != "twins":
            later = _against(unit[start:end], unit[end:], columns[end:] - columns[end], table)
            pooled[1] += chances[:, number, None] * (chances[:, number + 1 :] @ later)
    pooled += chances @ own
    return pooled.numpy().transpose(1, 0, 2)


def _units(person: NDArray[np.int64]) -> NDArray[np.int64]:
    """The person (or family), or group of them, of each picture: [N] int64 in [0, MAX_UNITS)."""
    people, numbers = np.unique(person, return_inverse=True)
    if len(people) <= MAX_UNITS:
        return numbers.astype(np.int64)
    # The mixing step of splitmix64 (Steele, Lea and Flood, OOPSLA 2014).
    mixed = people.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    group = np.empty(len(people), dtype=np.int64)
    group[np.argsort(mixed, kind="stable")] = np.arange(len(people)) % MAX_UNITS
    return group[numbers]


def _within(unit: Tensor, people: Tensor, kin: Tensor, table: Tensor, kind: str) -> Tensor:
    """Counts [2, COARSE_BINS] of one unit's own pairs: genuine, then impostor (of its different people).

    kind "twins": pairs of one family only, "strangers": no pairs of two siblings.
    """
    counts = torch.zeros(2 * COARSE_BINS, dtype=torch.int64)
    step = max(1, _BLOCK_PAIRS // max(1, len(unit)))
    places = torch.arange(len(unit))
    for row in range(0, len(unit), step):
        rows = slice(row, row + step)
        codes = table[score_bins(unit[rows] @ unit.T)] + COARSE_BINS * (people[rows, None] != people)
        counted = places[rows, None] < places
        if kind != "all":
            of_family = kin[rows, None] == kin
            counted &= of_family if kind == "twins" else ~of_family | (people[rows, None] == people)
        counts += torch.bincount(codes[counted], minlength=2 * COARSE_BINS)
    return counts.reshape(2, COARSE_BINS).float()


def _against(unit: Tensor, others: Tensor, columns: Tensor, table: Tensor) -> Tensor:
    """Counts [V, COARSE_BINS] float32 of a unit's pairs with each of V later ones; `columns`: where theirs begin."""
    length = int(columns[-1]) + COARSE_BINS
    counts = torch.zeros(length, dtype=torch.int64)
    step = max(1, _BLOCK_PAIRS // len(others))
    for row in range(0, len(unit), step):
        codes = table[score_bins(unit[row : row + step] @ others.T)] + columns
        counts += torch.bincount(codes.flatten(), minlength=length)
    return counts.reshape(-1, COARSE_BINS).float()


def bootstrap_scores(histograms: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """roc_auc, eer, tar_at_far_1e-1, _1e-2, _1e-3 of each replicate: [B] float64 each, defined as in `verification`.

    histograms: [B, 2, K], as `bootstrap_histograms` returns them or a sum of such.
    A replicate without genuine or impostor pairs, such as one person drawn each time, has no score: NaN.
    """
    totals = histograms.sum(axis=2)
    whole = (totals > 0).all(axis=1)
    accepted = np.zeros((len(histograms), 2, histograms.shape[2] + 1))
    np.cumsum(histograms[:, :, ::-1], axis=2, out=accepted[:, :, 1:])
    accepted /= np.where(totals > 0, totals, 1)[:, :, None]
    tar, far = accepted[:, 0], accepted[:, 1]
    scores = {"roc_auc": np.trapezoid(tar, far, axis=1), "eer": _eer(far, tar)}
    for name, level in _FARS.items():
        last = (far <= level).sum(axis=1) - 1  # far rises along the curve
        scores[name] = np.take_along_axis(tar, last[:, None], axis=1)[:, 0]
    return {name: np.where(whole, values, np.nan) for name, values in scores.items()}


def accuracy_bins(threshold: float) -> NDArray[np.int64]:
    """For `bootstrap_histograms`: bin 1 for scores accepted at a threshold, bin 0 for others.  [NUM_BINS] int64."""
    return (np.arange(NUM_BINS) >= accepted_from(threshold)).astype(np.int64)


def bootstrap_accuracy(histograms: NDArray[np.float64]) -> NDArray[np.float64]:
    """`twins.accuracy_at` of each replicate, [B] float64; NaN where it has no genuine or no impostor pair.

    histograms: [B, 2, K], as `bootstrap_histograms` returns them with `accuracy_bins`, or a sum of such.
    """
    totals = histograms.sum(axis=2)
    accepted = histograms[:, :, 1] / np.where(totals > 0, totals, np.nan)
    accuracy: NDArray[np.float64] = (accepted[:, 0] + 1 - accepted[:, 1]) / 2
    return accuracy


def _eer(far: NDArray[np.float64], tar: NDArray[np.float64]) -> NDArray[np.float64]:
    gap = far + tar - 1  # FAR - FRR: rises from -1
    after = np.maximum(np.argmax(gap >= 0, axis=1), 1)[:, None]
    gap_before, gap_after = (np.take_along_axis(gap, place, axis=1) for place in (after - 1, after))
    far_before, far_after = (np.take_along_axis(far, place, axis=1) for place in (after - 1, after))
    rise = np.where(gap_after > gap_before, gap_after - gap_before, 1)  # 0 only where a replicate has no score
    crossing: NDArray[np.float64] = far_before - gap_before / rise * (far_after - far_before)
    return crossing[:, 0]


def interval(values: NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """The percentile interval (low, high) of replicates, or of differences of paired ones; NaN are left out.

    values: [B] float64.  level: in (0, 1).  Raises DataError when no replicate has a score.
    """
    known = values[~np.isnan(values)]
    if len(known) == 0:
        raise DataError(
            f"none of {len(values)} bootstrap replicates has genuine and impostor pairs; "
            "give at least two people, one of them with two pictures."
        )
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
