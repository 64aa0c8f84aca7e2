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
    replicates = {}
    for kind in KINDS:
        bins = coarse_bins(histogram_of(kind, pairs, twins))
        counts = bootstrap_histograms(embeddings, person, weights, bins, family=family, kind=kind)
        judged = bootstrap_histograms(embeddings, person, weights, accuracy_bins(threshold), family=family, kind=kind)
        replicates[kind] = bootstrap_scores(counts) | {"accuracy": bootstrap_accuracy(judged)}
    return replicates
