"""95 % intervals of open-set figures by drawing people, not pairs: pairs of one person are far from independent.

A replicate draws as many people as there are, with replacement (Efron and Tibshirani, "An Introduction to the
Bootstrap", 1993, percentile intervals, section 13.3; for pairs of people Snijders and Borgatti, "Non-parametric
standard errors and tests for network statistics", Connections 22(2), 1999). A person drawn w times counts w times with
its own pairs, and pairs of two people w_p * w_q times; copies of one person are not paired with each other, for their
"impostor" pairs would be genuine ones. Replicates of different models that use the same weights are paired, so that
gaps between models have intervals too: `interval(scores_a - scores_b)`.

A replicate's impostor pairs need those of each two people, another look at all pairs. Above EXACT_PAIRS each person's
sums serve (`UnitSums`), which one look gives together with the histogram: w_p * w_q is taken as w_p + w_q - 1. What is
left out is of the order of one part in as many as there are people (the U-statistic's linear part; Hoeffding, 1948).

With twins whole families are drawn, not people: siblings are no two independent draws. A family's pairs, of one member
or of two, count as its own.

Intervals tell how far the figures of *these* models would move with other people or families; that another training run
gives another model is not in them. For that, average the gap over models of several seeds, and show the gap of each
seed beside it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import DataError
from common.metrics.design import num_pairs_of
from common.metrics.figures import (
    JUDGED,
    KINDS,
    PAIRS,
    accepted_from,
    figures_of,
    kind_scores,
    roc_curve,
)
from common.metrics.pairs import pair_counts, pair_histograms, score_bins, unit_length, with_sibling
from common.metrics.sums import NUM_BINS, histogram_of

MAX_UNITS: Final = 1000  # above so many people, groups of them are drawn instead: the work grows with its square
COARSE_BINS: Final = 512
_FAR_FLOOR: Final = 1e-4  # below it the coarse bins follow the genuine scores only
_BLOCK_PAIRS: Final = 2**21  # scores computed at once: 8 MiB
_GPU_BLOCK_PAIRS: Final = 2**26
EXACT_PAIRS: Final = 3 * 10**8  # above so many, replicates are made of each person's sums
NUM_GENUINE, NUM_IMPOSTOR = "num_genuine_pairs", "num_impostor_pairs"

Embeddings = NDArray[np.float32] | Tensor


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure, or the gap of two, and its 95 % interval; NaN ends where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan


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


@dataclass(frozen=True, kw_only=True)
class UnitSums:
    """The scores of each unit's pairs, counted: all that replicates of very many pairs need.

    A unit is a person, or above MAX_UNITS people one of as many groups.
    """

    own: NDArray[np.int64]  # [2, U, NUM_BINS]: genuine and impostor pairs within the unit
    others: NDArray[np.int64]  # [U, NUM_BINS]: with pictures of all other units, so each of these pairs is in two rows

    @property
    def histogram(self) -> NDArray[np.int64]:
        """As `pair_histogram` counts them, [2, NUM_BINS]."""
        own, others = self.own.sum(axis=1), self.others.sum(axis=0) // 2
        return np.stack([own[0], own[1] + others])

    def counts(self, weights: NDArray[np.int64], bins: NDArray[np.int64]) -> NDArray[np.float64]:
        """As `bootstrap_histograms` returns them, the pairs of two units in linear approximation."""
        table, chances = torch.from_numpy(bins), torch.from_numpy(weights.astype(np.float64))
        own, others = (
            torch.zeros(*part.shape[:-1], COARSE_BINS, dtype=torch.float64).index_add_(
                part.ndim - 1, table, torch.from_numpy(part.astype(np.float64))
            )
            for part in (self.own, self.others)
        )
        pooled = chances @ own
        pooled[1] += (chances @ others - others.sum(0) / 2).clamp_min_(0.0)
        return pooled.numpy().transpose(1, 0, 2)


def unit_sums(embeddings: Embeddings, person: NDArray[np.int64]) -> UnitSums:
    """Each unit's sums, in one look at each ordered pair, on the embeddings' device.

    embeddings: [N, D] float, of any length.  person: [N] int64.  Memory is that of three matrices [U, NUM_BINS].
    Raises TrainingFailed when an embedding is not finite.
    """
    unit_of = _units(person)
    order = np.argsort(unit_of, kind="stable")
    unit = unit_length(torch.as_tensor(embeddings))
    unit = unit[torch.from_numpy(order).to(unit.device)]
    people = torch.from_numpy(person[order]).to(unit.device)
    ends = np.searchsorted(unit_of[order], np.arange(int(unit_of.max(initial=-1)) + 1), side="right").tolist()
    own = np.zeros((2, len(ends), NUM_BINS), dtype=np.int64)
    others = np.zeros((len(ends), NUM_BINS), dtype=np.int64)
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        mine = slice(start, end)
        table = torch.arange(NUM_BINS, dtype=torch.int32, device=unit.device)
        own[:, number] = _within(unit[mine], people[mine], people[mine], table, "all", num_bins=NUM_BINS).cpu().numpy()
        for columns in (slice(0, start), slice(end, len(unit))):
            others[number] += _scores_between(unit[mine], unit[columns]).cpu().numpy()
    return UnitSums(own=own, others=others)


def _scores_between(unit: Tensor, others: Tensor) -> Tensor:
    """Counts [NUM_BINS] int64 of the scores of a unit's pictures with all others."""
    counts = torch.zeros(NUM_BINS, dtype=torch.int64, device=unit.device)
    block = _GPU_BLOCK_PAIRS if unit.device.type == "cuda" else _BLOCK_PAIRS
    step = max(1, block // max(1, len(unit)))
    for start in range(0, len(others), step):
        codes = score_bins(unit @ others[start : start + step].T)
        counts += torch.bincount(codes.flatten(), minlength=NUM_BINS)
    return counts


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


def _within(
    unit: Tensor, people: Tensor, kin: Tensor, table: Tensor, kind: str, *, num_bins: int = COARSE_BINS
) -> Tensor:
    """Counts [2, num_bins] of one unit's own pairs: genuine, then impostor (of its different people).

    kind "twins": pairs of one family only, "strangers": no pairs of two siblings.
    """
    counts = torch.zeros(2 * num_bins, dtype=torch.int64, device=unit.device)
    step = max(1, _BLOCK_PAIRS // max(1, len(unit)))
    places = torch.arange(len(unit), device=unit.device)
    for row in range(0, len(unit), step):
        rows = slice(row, row + step)
        codes = table[score_bins(unit[rows] @ unit.T)] + num_bins * (people[rows, None] != people)
        counted = places[rows, None] < places
        if kind != "all":
            of_family = kin[rows, None] == kin
            counted &= of_family if kind == "twins" else ~of_family | (people[rows, None] == people)
        counts += torch.bincount(codes[counted], minlength=2 * num_bins)
    return counts.reshape(2, num_bins).float()


def _against(unit: Tensor, others: Tensor, columns: Tensor, table: Tensor) -> Tensor:
    """Counts [V, COARSE_BINS] float32 of a unit's pairs with each of V later ones; `columns`: where theirs begin."""
    length = int(columns[-1]) + COARSE_BINS
    counts = torch.zeros(length, dtype=torch.int64)
    step = max(1, _BLOCK_PAIRS // len(others))
    for row in range(0, len(unit), step):
        codes = table[score_bins(unit[row : row + step] @ others.T)] + columns
        counts += torch.bincount(codes.flatten(), minlength=length)
    return counts.reshape(-1, COARSE_BINS).float()


def accuracy_bins(threshold: float) -> NDArray[np.int64]:
    """For `bootstrap_histograms`: bin 1 for scores accepted at a threshold, bin 0 for others.  [NUM_BINS] int64."""
    return (np.arange(NUM_BINS) >= accepted_from(threshold)).astype(np.int64)


def needs_sums(person: NDArray[np.int64], family: NDArray[np.int64]) -> bool:
    """Whether replicates are made of each person's sums: too many pairs for another look, and each person a family."""
    return num_pairs_of(len(person)) > EXACT_PAIRS and len(np.unique(family)) == len(np.unique(person))


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One holder's test people as a model embeds them, and how often each replicate draws each family."""

    embeddings: Embeddings  # [N, D] float, of any length
    person: NDArray[np.int64]  # [N]
    family: NDArray[np.int64]  # [N]; each person their own where the data set knows of none
    weights: NDArray[np.int64]  # [B, U], as `person_weights` returns them
    sums: UnitSums | None = None  # where there are more than EXACT_PAIRS, and no families

    @classmethod
    def by_seed(
        cls,
        embeddings: Embeddings,
        person: NDArray[np.int64],
        family: NDArray[np.int64],
        *,
        num_replicates: int,
        seed: int,
    ) -> "Drawn":
        """With the same seed and families the replicates of two models are paired."""
        weights = person_weights(len(np.unique(family)), num_replicates, seed)
        sums = unit_sums(embeddings, person) if needs_sums(person, family) else None
        return cls(embeddings=embeddings, person=person, family=family, weights=weights, sums=sums)

    def counts(
        self, kind: str, histogram: NDArray[np.int64], threshold: float | None
    ) -> dict[str, NDArray[np.float64]]:
        """PAIRS and JUDGED -> `bootstrap_histograms` of one kind of pairs; those of several holders add up.

        histogram: [2, NUM_BINS], that kind's pairs of all holders together.  threshold: cosine, from validation;
        None: nothing is judged, in half the time.
        """
        bins = {PAIRS: coarse_bins(histogram)} | ({} if threshold is None else {JUDGED: accuracy_bins(threshold)})
        if self.sums is not None and kind == "all":
            return {of: self.sums.counts(self.weights, own) for of, own in bins.items()}
        return {
            of: bootstrap_histograms(self.embeddings, self.person, self.weights, own, family=self.family, kind=kind)
            for of, own in bins.items()
        }


def replicates(counts: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """Figure -> its replicates, [B] float64, of every figure of what was counted.

    counts: as `Drawn.counts` returns them, or sums of such.  A replicate without genuine or impostor pairs, such as one
    person drawn each time, has no figure: NaN.
    """
    return {figure.name: figure.values(counts[figure.of]) for figure in figures_of(*counts)}


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


def twin_figures(drawn: Drawn, threshold: float) -> dict[str, dict[str, dict[str, float]]]:
    """Kind of pairs -> figure -> value, low and high, for all KINDS and all figures of PAIRS and JUDGED.

    threshold: cosine, from validation (`figures.threshold_at_best_accuracy`).
    Beside the figures a kind has "num_genuine_pairs" and "num_impostor_pairs", with a value and no interval.
    Raises DataError, naming the kind, when one has no genuine or no impostor pair; TrainingFailed when an embedding is
    not finite.
    """
    numbers = pair_counts(drawn.person, drawn.family)
    for kind in KINDS:
        _require_pairs(kind, numbers)
    histograms = pair_histograms(drawn.embeddings, drawn.person, drawn.family)
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for kind in KINDS:
        histogram = histogram_of(kind, *histograms)
        own = replicates(drawn.counts(kind, histogram, threshold))
        figures[kind] = {}
        for name, value in kind_scores(histogram, kind, threshold).items():
            low, high = interval(own[name])
            figures[kind][name] = {"value": value, "low": low, "high": high}
        genuine, impostor = numbers[kind]
        figures[kind] |= {NUM_GENUINE: {"value": float(genuine)}, NUM_IMPOSTOR: {"value": float(impostor)}}
    return figures


def paired_gap(
    ones: Sequence[Embeddings],
    others: Sequence[Embeddings],
    person: NDArray[np.int64],
    family: NDArray[np.int64],
    kind: str,
    figure: str,
    *,
    num_replicates: int,
    seed: int,
    thresholds: Sequence[tuple[float, float]] | None = None,
) -> Estimate:
    """One model's figure minus another's on the same pictures, with the interval of its paired replicates.

    It is averaged over pairs of models, such as those of several seeds: ones[k] minus others[k].  The mean over the
    pairs is taken within each replicate, so all models see the same families.
    ones, others: [N, D] float each, of any length; the models' D may differ.  person, family: [N] int64, of each
    picture.  kind: of KINDS.  figure: of PAIRS or JUDGED; the latter needs both models' thresholds, from validation, of
    each pair of models.
    Raises DataError, naming the kind, when it has no genuine or no impostor pair; TrainingFailed as `twin_figures`.
    """
    if not ones or len(ones) != len(others):
        raise ValueError(f"{len(ones)} models against {len(others)}; give one or more pairs of them")
    of = {row.name: row.of for row in figures_of(PAIRS, JUDGED)}
    if kind not in KINDS or figure not in of:
        raise ValueError(f"kind = {kind!r} must be of {KINDS} and figure = {figure!r} of {tuple(of)}")
    if of[figure] == JUDGED and thresholds is None:
        raise ValueError(f"{figure} needs the thresholds of both models")
    _require_pairs(kind, pair_counts(person, family))

    def values(embeddings: Embeddings, threshold: float | None) -> tuple[float, NDArray[np.float64]]:
        """One model's figure, and its replicates [B]."""
        drawn = Drawn.by_seed(embeddings, person, family, num_replicates=num_replicates, seed=seed)
        histogram = histogram_of(kind, *pair_histograms(embeddings, person, family))
        own = replicates(drawn.counts(kind, histogram, threshold))
        return kind_scores(histogram, kind, threshold)[figure], own[figure]

    gaps: list[float] = []
    drawn_gaps = np.zeros(num_replicates)
    judged = thresholds if of[figure] == JUDGED and thresholds else [(None, None)] * len(ones)
    for one, other, (own, theirs) in zip(ones, others, judged, strict=True):
        (first, first_drawn), (second, second_drawn) = values(one, own), values(other, theirs)
        gaps.append(first - second)
        drawn_gaps += (first_drawn - second_drawn) / len(ones)
    low, high = interval(drawn_gaps)
    return Estimate(value=float(np.mean(gaps)), low=low, high=high)


def _require_pairs(kind: str, numbers: Mapping[str, tuple[int, int]]) -> None:
    genuine, impostor = numbers[kind]
    if genuine == 0 or impostor == 0:
        raise DataError(
            f"{kind}: {genuine} genuine and {impostor} impostor pairs, so there is no figure; twins need two siblings "
            "with pictures, strangers two families, and somebody two pictures."
        )
