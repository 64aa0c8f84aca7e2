"""Open-set scores (identities never trained on) from histograms of pair scores, which merge by addition.

A client scores every pair of its own pictures by cosine and sends only two rows of counts, so neither embeddings nor
scores travel; the pooled ROC curve of several clients is that of the summed histograms.
"""

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from common.errors import DataError, TrainingFailed

NUM_BINS: Final = 8192  # over cosine in [-1, 1]: 0.000244 each
BLOCK: Final = 512  # pictures on each side of a block of pairs: its scores take 1 MiB and stay in the cache
_NOT_A_PAIR: Final = 2 * NUM_BINS


def pair_histogram(embeddings: NDArray[np.float32] | Tensor, person: NDArray[np.int64] | Tensor) -> NDArray[np.int64]:
    """Counts of the cosine scores of all pairs i < j, each scored once.

    embeddings: [N, D] float, of any length (they are normalised here; a zero vector has cosine 0 with everything).
    person: [N] int64, who each picture shows.
    Returns [2, NUM_BINS] int64: row 0 genuine pairs (the same person), row 1 impostor pairs; bin k counts scores in
    [-1 + 2 k / NUM_BINS, -1 + 2 (k + 1) / NUM_BINS), the last one 1.0 too. It is computed on the embeddings' device
    in blocks, so memory does not grow with N squared.
    The AUC of the bins is within 1e-4 of that of the scores while these spread over more than about 0.005 (standard
    deviation); at 0.002, narrower than any untrained backbone here, it is off by 3e-4 to 5e-4.
    Raises TrainingFailed when an embedding is not finite, DataError when there is no genuine or no impostor pair.
    """
    unit = unit_length(torch.as_tensor(embeddings))
    people = torch.as_tensor(person)
    if people.shape != unit.shape[:1]:
        raise ValueError(f"person {tuple(people.shape)} must name each of the {unit.shape[0]} embeddings")
    # Sorted, the genuine pairs lie next to the diagonal, and most blocks need not look for any.
    numbers = torch.unique(people, return_inverse=True)[1].to(device=unit.device, dtype=torch.int32)
    numbers, order = torch.sort(numbers, stable=True)
    unit = unit[order]
    counts = torch.zeros(2 * NUM_BINS, dtype=torch.int64, device=unit.device)
    with torch.autocast(unit.device.type, enabled=False):  # bfloat16 would round scores to a few hundred values
        for row in range(0, len(unit), BLOCK):
            for column in range(row, len(unit), BLOCK):
                counts += _block_counts(unit, numbers, slice(row, row + BLOCK), slice(column, column + BLOCK))
    histogram = counts.reshape(2, NUM_BINS).flip(0).cpu().numpy()
    check_both_kinds(histogram)
    return histogram


def unit_length(embeddings: Tensor) -> Tensor:
    """Embeddings [N, D] float at length 1, float32 [N, D]; a zero vector stays zero.

    Raises TrainingFailed when one is not finite.
    """
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings {tuple(embeddings.shape)} must be [N, D]")
    finite = torch.isfinite(embeddings).all(dim=1)
    if not bool(finite.all()):
        raise TrainingFailed(
            f"{int((~finite).sum())} of {len(finite)} embeddings are not finite (NaN or infinity), so no pair can be "
            "scored; the model has diverged: lower training.lr or raise training.warmup_fraction."
        )
    return F.normalize(embeddings.detach().float(), dim=1)


def score_bins(scores: Tensor) -> Tensor:
    """The bin of each cosine, int32 in [0, NUM_BINS); overwrites `scores`, float32 of any shape."""
    return scores.add_(1.0).mul_(NUM_BINS / 2).to(torch.int32).clamp_(0, NUM_BINS - 1)


def score_histogram(scores: NDArray[np.float32], genuine: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Counts of given cosines, as `pair_histogram` makes them.  scores, genuine: [M].  Returns [2, NUM_BINS] int64."""
    codes = score_bins(torch.from_numpy(scores.astype(np.float32))).numpy() + NUM_BINS * ~genuine
    return np.bincount(codes, minlength=2 * NUM_BINS).reshape(2, NUM_BINS)


def _block_counts(unit: Tensor, numbers: Tensor, rows: slice, columns: slice) -> Tensor:
    """Counts [2 * NUM_BINS] of the pairs (row, column) with row < column: impostors, the common case, then genuine."""
    codes = score_bins(unit[rows] @ unit[columns].T)
    if numbers[rows][-1] >= numbers[columns][0]:  # sorted, so only here can a person be on both sides
        codes += NUM_BINS * (numbers[rows, None] == numbers[None, columns])
    if rows.start == columns.start:
        codes.masked_fill_(torch.ones_like(codes, dtype=torch.bool).tril_(), _NOT_A_PAIR)
    return torch.bincount(codes.flatten(), minlength=_NOT_A_PAIR)[:_NOT_A_PAIR]


def check_both_kinds(histogram: NDArray[np.int64]) -> tuple[int, int]:
    """How many genuine and impostor pairs a histogram [2, NUM_BINS] holds.  Raises DataError when one is none."""
    if histogram.shape != (2, NUM_BINS):
        raise ValueError(f"a pair histogram is [2, {NUM_BINS}], not {list(histogram.shape)}")
    num_genuine, num_impostor = (int(total) for total in histogram.sum(axis=1))
    if num_genuine == 0 or num_impostor == 0:
        raise DataError(
            f"open-set scores of {num_genuine} genuine and {num_impostor} impostor pairs; "
            "give at least two people, one of them with two pictures."
        )
    return num_genuine, num_impostor


def roc_curve(histogram: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The ROC curve at every bin's lower edge, thresholds descending.

    histogram: [2, NUM_BINS] as `pair_histogram` returns it, or a sum of such.
    Returns (far, tar), each [NUM_BINS + 1] float64 from 0 to 1: the accepted fraction of impostor and genuine pairs.
    Raises DataError when there is no genuine or no impostor pair.
    """
    totals = check_both_kinds(histogram)
    accepted = np.zeros((2, NUM_BINS + 1))
    accepted[:, 1:] = np.cumsum(histogram[:, ::-1], axis=1)
    tar, far = accepted / np.asarray(totals)[:, None]
    return far, tar


def roc_auc(histogram: NDArray[np.int64]) -> float:
    """Probability that a genuine pair scores above an impostor pair; pairs in one bin count half.

    Raises DataError when there is no genuine or no impostor pair.
    """
    far, tar = roc_curve(histogram)
    return float(np.trapezoid(tar, far))


def eer(histogram: NDArray[np.int64]) -> float:
    """Equal error rate: where FAR = 1 - TAR on the ROC curve, linear between two bins' points.

    Raises DataError when there is no genuine or no impostor pair.
    """
    far, tar = roc_curve(histogram)
    gap = far + tar - 1.0  # FAR - FRR: rises from -1 to 1
    after = int(np.argmax(gap >= 0.0))
    before = after - 1
    share = -gap[before] / (gap[after] - gap[before])
    return float(far[before] + share * (far[after] - far[before]))


def tar_at_far(histogram: NDArray[np.int64], far: float) -> float:
    """The largest TAR that a threshold (a bin's edge) reaches with FAR <= far. Nothing is interpolated.

    So the figure is one that was reached, and with fewer than 1 / far impostor pairs it is the TAR at FAR 0.
    far: in [0, 1].  Raises DataError when there is no genuine or no impostor pair, ValueError when far is no fraction.
    """
    if not 0.0 <= far <= 1.0:
        raise ValueError(f"far = {far} must be in [0, 1]")
    fars, tars = roc_curve(histogram)
    return float(tars[int(np.searchsorted(fars, far, side="right")) - 1])


def open_set_scores(histogram: NDArray[np.int64]) -> dict[str, float]:
    """roc_auc, eer and tar_at_far_1e-1, _1e-2, _1e-3 of one histogram.

    Raises DataError when there is no genuine or no impostor pair.
    """
    scores = {"roc_auc": roc_auc(histogram), "eer": eer(histogram)}
    return scores | {f"tar_at_far_1e-{digits}": tar_at_far(histogram, 10.0**-digits) for digits in (1, 2, 3)}
