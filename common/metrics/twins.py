"""Verification of twins: the pairs of two siblings apart from those of strangers, as histograms that merge by addition.

    kind        genuine pairs                 impostor pairs
    all         all                           all
    twins       of people with a sibling      two siblings
    strangers   all                           two people of different families

Siblings are the hardest impostors there are, and so few among all pairs that figures over all hide them.
"""

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import DataError
from common.metrics.verification import (
    BLOCK,
    NUM_BINS,
    check_both_kinds,
    open_set_scores,
    roc_curve,
    score_bins,
    unit_length,
)

KINDS: Final = ("all", "twins", "strangers")


def no_twins() -> NDArray[np.int64]:
    """The counts of a data set without families: [2, NUM_BINS] zeros."""
    return np.zeros((2, NUM_BINS), dtype=np.int64)


def with_sibling(person: NDArray[np.int64], family: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which pictures show somebody of whose family another member is among the pictures too.

    person, family: [N] int64, of each picture.  Returns [N] bool.
    """
    pairs = np.unique(np.stack([family, person]), axis=1)
    families, members = np.unique(pairs[0], return_counts=True)
    return np.isin(family, families[members > 1])


def pair_histograms(
    embeddings: NDArray[np.float32] | Tensor, person: NDArray[np.int64], family: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The histograms of all pairs and of the twins' pairs, [2, NUM_BINS] int64 each, as `pair_histogram` counts them.

    embeddings: [N, D] float, of any length.  person, family: [N] int64, of each picture.
    The second one holds the genuine pairs of people with a sibling and the pairs of two siblings; every score is worked
    out once, so it is nowhere more than the first; it may be empty.
    Raises TrainingFailed when an embedding is not finite, DataError when there is no genuine or no impostor pair.
    """
    order = np.argsort(person, kind="stable")  # as `pair_histogram` takes them, for equal sums of products
    unit = unit_length(torch.as_tensor(embeddings))[torch.from_numpy(order)]
    people = torch.from_numpy(person[order]).to(unit.device)
    twins = np.where(with_sibling(person, family), np.unique(family, return_inverse=True)[1], -1)
    families = torch.from_numpy(twins[order]).to(unit.device)
    counts = torch.zeros(4 * NUM_BINS, dtype=torch.int64, device=unit.device)
    with torch.autocast(unit.device.type, enabled=False):
        for start in range(0, len(unit), BLOCK):
            for other in range(start, len(unit), BLOCK):
                rows, columns = slice(start, start + BLOCK), slice(other, other + BLOCK)
                codes = score_bins(unit[rows] @ unit[columns].T)
                codes += NUM_BINS * (people[rows, None] != people[columns])
                of_twins = (families[rows, None] == families[columns]) & (families[rows, None] >= 0)
                codes += 2 * NUM_BINS * of_twins
                if start == other:
                    codes.masked_fill_(torch.ones_like(codes, dtype=torch.bool).tril_(), 4 * NUM_BINS)
                counts += torch.bincount(codes.flatten(), minlength=4 * NUM_BINS + 1)[: 4 * NUM_BINS]
    others, siblings = counts.reshape(2, 2, NUM_BINS).cpu().numpy()
    check_both_kinds(others + siblings)
    return others + siblings, siblings


def twin_histogram(
    embeddings: NDArray[np.float32] | Tensor, person: NDArray[np.int64], family: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Counts [2, NUM_BINS] int64 of the twins' pairs alone: see `pair_histograms`."""
    return pair_histograms(embeddings, person, family)[1]


def stranger_histogram(pairs: NDArray[np.int64], twins: NDArray[np.int64]) -> NDArray[np.int64]:
    """All genuine pairs, and the impostor pairs of strangers: [2, NUM_BINS] int64.

    pairs, twins: as `pair_histograms` returns them, or sums of such.
    """
    return np.stack([pairs[0], pairs[1] - twins[1]])


def histogram_of(kind: str, pairs: NDArray[np.int64], twins: NDArray[np.int64]) -> NDArray[np.int64]:
    """The histogram of one of KINDS, [2, NUM_BINS] int64, from that of all pairs and that of the twins' pairs."""
    return {"all": pairs, "twins": twins, "strangers": stranger_histogram(pairs, twins)}[kind]


def kind_scores(histogram: NDArray[np.int64], kind: str, threshold: float | None = None) -> dict[str, float]:
    """roc_auc, eer, tar_at_far_1e-1, _1e-2, _1e-3, and accuracy where a threshold is given, of one kind's histogram.

    threshold: a cosine, from validation.  Raises DataError, naming the kind, when there is no genuine or no impostor
    pair of it.
    """
    _require_pairs(histogram, f"{kind}: ")
    scores = open_set_scores(histogram)
    return scores if threshold is None else scores | {"accuracy": accuracy_at(histogram, threshold)}


def threshold_at_best_accuracy(histogram: NDArray[np.int64]) -> float:
    """The cosine, a bin's lower edge, from which on pairs are best taken for genuine ones.

    histogram: [2, NUM_BINS], of all pairs of *validation* people: a threshold chosen on the pairs it is then tried on
    flatters. Best is by the accuracy of `accuracy_at`; of equally good edges the middle one is taken, so a gap is cut
    in its middle.  Raises DataError when there is no genuine or no impostor pair.
    """
    _require_pairs(histogram)
    far, tar = roc_curve(histogram)
    accuracy = (tar + 1.0 - far) / 2.0
    best = np.flatnonzero(accuracy >= accuracy.max() - 1e-12)
    accepted_bins = int(best[(len(best) - 1) // 2])
    return 1.0 - 2.0 * accepted_bins / NUM_BINS


def accuracy_at(histogram: NDArray[np.int64], threshold: float) -> float:
    """Accuracy where both kinds of pairs weigh alike: the mean of accepted genuine and of rejected impostor pairs.

    (As with LFW's as many of one as of the other. Of all pairs nearly all are impostors, and "always different" would
    be right for nearly all.)  histogram: [2, NUM_BINS].  threshold: cosine; a bin is accepted when its lower edge is
    not below.  Raises DataError when there is no genuine or no impostor pair.
    """
    _require_pairs(histogram)
    accepted = histogram[:, accepted_from(threshold) :].sum(axis=1) / histogram.sum(axis=1)
    return float((accepted[0] + 1.0 - accepted[1]) / 2.0)


def accepted_from(threshold: float) -> int:
    """The first bin, in [0, NUM_BINS], whose scores are all at or above a threshold."""
    return int(np.clip(np.ceil((threshold + 1.0) * NUM_BINS / 2.0 - 1e-6), 0, NUM_BINS))


def _require_pairs(histogram: NDArray[np.int64], what: str = "") -> None:
    num_genuine, num_impostor = (int(total) for total in histogram.sum(axis=1))
    if num_genuine == 0 or num_impostor == 0:
        raise DataError(
            f"{what}scores of {num_genuine} genuine and {num_impostor} impostor pairs; twins need two siblings with "
            "pictures, strangers two families, and somebody two pictures."
        )
