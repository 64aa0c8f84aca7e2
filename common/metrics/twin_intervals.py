"""Replicates of every figure of every kind of pairs, from one set of draws of families."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from common.metrics.bootstrap import (
    accuracy_bins,
    bootstrap_accuracy,
    bootstrap_histograms,
    bootstrap_scores,
    coarse_bins,
    person_weights,
)
from common.metrics.twins import KINDS, histogram_of, pair_histograms


def kind_replicates(
    embeddings: NDArray[np.float32] | Tensor,
    person: NDArray[np.int64],
    family: NDArray[np.int64],
    *,
    threshold: float,
    num_replicates: int,
    seed: int,
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Kind of pairs -> figure -> its replicates, [num_replicates] float64, for `bootstrap.interval`.

    embeddings: [N, D] float, of any length.  person, family: [N] int64, of each picture.  The figures are those of
    `twins.kind_scores`; threshold: cosine, from validation.  seed: with the same one the replicates of two models on
    the same pictures are paired, and `interval(a - b)` is that of the gap.
    Raises TrainingFailed when an embedding is not finite, DataError when a kind has no genuine or no impostor pair.
    """
    pairs, twins = pair_histograms(embeddings, person, family)
    weights = person_weights(len(np.unique(family)), num_replicates, seed)
    return {
        kind: replicates_of(
            kind,
            histogram_of(kind, pairs, twins),
            embeddings,
            person,
            family,
            weights=weights,
            threshold=threshold,
        )
        for kind in KINDS
    }


def replicates_of(
    kind: str,
    histogram: NDArray[np.int64],
    embeddings: NDArray[np.float32] | Tensor,
    person: NDArray[np.int64],
    family: NDArray[np.int64],
    *,
    weights: NDArray[np.int64],
    threshold: float | None,
) -> dict[str, NDArray[np.float64]]:
    """Figure -> its replicates, [B] float64, of one kind of pairs.

    histogram: [2, NUM_BINS], that kind's, as `twins.histogram_of` returns it.  weights: [B, U], of the families, as
    `bootstrap.person_weights` returns them.  threshold: cosine, from validation; None: no accuracy, in half the time.
    """
    bins = coarse_bins(histogram)
    counts = bootstrap_histograms(embeddings, person, weights, bins, family=family, kind=kind)
    if threshold is None:
        return bootstrap_scores(counts)
    judged = bootstrap_histograms(embeddings, person, weights, accuracy_bins(threshold), family=family, kind=kind)
    return bootstrap_scores(counts) | {"accuracy": bootstrap_accuracy(judged)}
