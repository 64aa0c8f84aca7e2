"""A model's figures on twins with their intervals, and the gap of two models: what a table or a run's record shows.

Intervals are of 95 %, from drawing families (`common.metrics.bootstrap`). They tell how far the figures of *these*
models would move with other families; that another training run gives another model is not in them. For that, average
the gap over models of several seeds, and show the gap of each seed beside it.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from common.errors import DataError
from common.metrics.bootstrap import interval, person_weights
from common.metrics.twin_intervals import kind_replicates, replicates_of
from common.metrics.twins import KINDS, histogram_of, kind_scores, pair_histograms, with_sibling

ACCURACY: Final = "accuracy"
FIGURES: Final = ("roc_auc", "eer", "tar_at_far_1e-1", "tar_at_far_1e-2", "tar_at_far_1e-3", ACCURACY)
NUM_GENUINE, NUM_IMPOSTOR = "num_genuine_pairs", "num_impostor_pairs"

Embeddings = NDArray[np.float32] | Tensor


class Gap(NamedTuple):
    """How much higher one model's figure is than another's, with its 95 % interval; positive: the first is higher."""

    gap: float
    low: float
    high: float


def pair_counts(person: NDArray[np.int64], family: NDArray[np.int64]) -> dict[str, tuple[int, int]]:
    """Kind of pairs -> (genuine, impostor): how many there are, without scoring any.

    person, family: [N] int64, of each picture.
    """
    genuine = _num_pairs(person)
    twins = with_sibling(person, family)
    siblings = _num_pairs(family) - genuine  # the pairs within a family that are not of one person
    impostor = len(person) * (len(person) - 1) // 2 - genuine
    return {
        "all": (genuine, impostor),
        "twins": (_num_pairs(person[twins]), siblings),
        "strangers": (genuine, impostor - siblings),
    }


def twin_figures(
    embeddings: Embeddings,
    person: NDArray[np.int64],
    family: NDArray[np.int64],
    *,
    threshold: float,
    num_replicates: int,
    seed: int,
) -> dict[str, dict[str, dict[str, float]]]:
    """Kind of pairs -> figure -> value, low and high, for all KINDS and FIGURES.

    embeddings: [N, D] float, of any length.  person, family: [N] int64, of each picture.
    threshold: cosine, from validation (`twins.threshold_at_best_accuracy`).  seed: of the draws of families.
    Beside the figures a kind has "num_genuine_pairs" and "num_impostor_pairs", with a value and no interval.
    Raises DataError, naming the kind, when one has no genuine or no impostor pair; TrainingFailed when an embedding is
    not finite.
    """
    counts = pair_counts(person, family)
    for kind in KINDS:
        _require_pairs(kind, counts)
    pairs, twins = pair_histograms(embeddings, person, family)
    replicates = kind_replicates(
        embeddings, person, family, threshold=threshold, num_replicates=num_replicates, seed=seed
    )
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for kind in KINDS:
        figures[kind] = {}
        for name, value in kind_scores(histogram_of(kind, pairs, twins), kind, threshold).items():
            low, high = interval(replicates[kind][name])
            figures[kind][name] = {"value": value, "low": low, "high": high}
        genuine, impostor = counts[kind]
        figures[kind] |= {NUM_GENUINE: {"value": float(genuine)}, NUM_IMPOSTOR: {"value": float(impostor)}}
    return figures


def paired_gap(
    one: Embeddings,
    other: Embeddings,
    person: NDArray[np.int64],
    family: NDArray[np.int64],
    kind: str,
    figure: str,
    *,
    num_replicates: int,
    seed: int,
    thresholds: tuple[float, float] | None = None,
) -> Gap:
    """One model's figure minus another's on the same pictures, with the interval of its paired replicates.

    one, other: [N, D] float each, of any length; the models' D may differ.  person, family: [N] int64, of each picture.
    kind: of KINDS.  figure: of FIGURES; "accuracy" needs both models' thresholds, from validation.
    Raises DataError, naming the kind, when it has no genuine or no impostor pair; TrainingFailed as `twin_figures`.
    """
    return mean_paired_gap(
        [one],
        [other],
        person,
        family,
        kind,
        figure,
        num_replicates=num_replicates,
        seed=seed,
        thresholds=None if thresholds is None else [thresholds],
    )


def mean_paired_gap(
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
) -> Gap:
    """`paired_gap` averaged over pairs of models, such as those of several seeds: ones[k] minus others[k].

    The mean over the pairs is taken within each replicate, so all models see the same families. thresholds: of each
    pair of models.
    """
    if not ones or len(ones) != len(others):
        raise ValueError(f"{len(ones)} models against {len(others)}; give one or more pairs of them")
    if kind not in KINDS or figure not in FIGURES:
        raise ValueError(f"kind = {kind!r} must be of {KINDS} and figure = {figure!r} of {FIGURES}")
    if figure == ACCURACY and thresholds is None:
        raise ValueError("accuracy needs the thresholds of both models")
    _require_pairs(kind, pair_counts(person, family))
    judged = thresholds or [(0.0, 0.0)] * len(ones)  # other figures than accuracy have none
    weights = person_weights(len(np.unique(family)), num_replicates, seed)
    gaps: list[float] = []
    drawn = np.zeros(num_replicates)
    for models in zip(ones, others, judged, strict=True):
        first, second = (
            _figure(embeddings, person, family, kind, figure, weights=weights, threshold=threshold)
            for embeddings, threshold in zip(models[:2], models[2], strict=True)
        )
        gaps.append(first[0] - second[0])
        drawn += (first[1] - second[1]) / len(ones)
    return Gap(float(np.mean(gaps)), *interval(drawn))


def _figure(
    embeddings: Embeddings,
    person: NDArray[np.int64],
    family: NDArray[np.int64],
    kind: str,
    figure: str,
    *,
    weights: NDArray[np.int64],
    threshold: float,
) -> tuple[float, NDArray[np.float64]]:
    """One figure of one kind, and its replicates [B]."""
    histogram = histogram_of(kind, *pair_histograms(embeddings, person, family))
    replicates = replicates_of(
        kind,
        histogram,
        embeddings,
        person,
        family,
        weights=weights,
        threshold=threshold if figure == ACCURACY else None,
    )
    return kind_scores(histogram, kind, threshold)[figure], replicates[figure]


def _num_pairs(group: NDArray[np.int64]) -> int:
    sizes = np.unique(group, return_counts=True)[1]
    return int((sizes * (sizes - 1) // 2).sum())


def _require_pairs(kind: str, counts: dict[str, tuple[int, int]]) -> None:
    genuine, impostor = counts[kind]
    if genuine == 0 or impostor == 0:
        raise DataError(
            f"{kind}: {genuine} genuine and {impostor} impostor pairs, so there is no figure; twins need two siblings "
            "with pictures, strangers two families, and somebody two pictures."
        )
