"""Pairs of pictures scored and counted, as histograms that merge by addition: all pairs, and those of twins apart.

A client scores every pair of its own pictures by cosine and sends only two rows of counts, so neither embeddings nor
scores travel; the pooled ROC curve of several clients is that of the summed histograms.

    kind        genuine pairs                 impostor pairs
    all         all                           all
    twins       of people with a sibling      two siblings
    strangers   all                           two people of different families

Siblings are the hardest impostors there are, and so few among all pairs that figures over all hide them.
"""

from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from common.errors import TrainingFailed
from common.metrics.design import PairDesign
from common.metrics.figures import check_both_kinds
from common.metrics.sums import NUM_BINS

BLOCK: Final = 512  # pictures on each side of a block of pairs: its scores take 1 MiB and stay in the cache
GPU_BLOCK: Final = 4096  # on a GPU, which small blocks would keep waiting: 64 MiB, and a few times that


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

    def add_class(codes: Tensor, rows: slice, columns: slice) -> None:
        if numbers[rows][-1] >= numbers[columns][0]:  # sorted, so only here can a person be on both sides
            codes += NUM_BINS * (numbers[rows, None] == numbers[None, columns])

    histogram = _counted(unit[order], 2, add_class)[::-1].copy()
    check_both_kinds(histogram)
    return histogram


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

    def add_class(codes: Tensor, rows: slice, columns: slice) -> None:
        codes += NUM_BINS * (people[rows, None] != people[columns])
        of_twins = (families[rows, None] == families[columns]) & (families[rows, None] >= 0)
        codes += 2 * NUM_BINS * of_twins

    others, siblings = _counted(unit, 4, add_class).reshape(2, 2, NUM_BINS)
    check_both_kinds(others + siblings)
    return others + siblings, siblings


def designed_histogram(
    embeddings: NDArray[np.float32] | Tensor, person: NDArray[np.int64], design: PairDesign
) -> NDArray[np.int64]:
    """`pair_histogram` of the pairs of a design only.

    embeddings: [N, D] float.  person: [N] int64.  Raises TrainingFailed and DataError as `pair_histogram` does.
    """
    unit = unit_length(torch.as_tensor(embeddings))
    rows = []
    for chosen, is_genuine in ((design.genuine, True), (design.impostor, False)):
        order = chosen[np.argsort(person[chosen], kind="stable")]
        people = torch.from_numpy(person[order]).to(unit.device)
        # Sorted, so beside the diagonal alone there are genuine pairs.
        wanted = partial(_may_share_a_person, people) if is_genuine else _any_block
        add_class = partial(_add_other_person, people)
        counts = _counted(unit[torch.from_numpy(order).to(unit.device)], 2, add_class, wanted)
        rows.append(counts[0 if is_genuine else 1])
    histogram = np.stack(rows)
    check_both_kinds(histogram)
    return histogram


def _add_other_person(people: Tensor, codes: Tensor, rows: slice, columns: slice) -> None:
    codes += NUM_BINS * (people[rows, None] != people[None, columns])


def _may_share_a_person(people: Tensor, rows: slice, columns: slice) -> bool:
    return bool(people[rows][-1] >= people[columns][0])


def _any_block(_rows: slice, _columns: slice) -> bool:
    return True


def _counted(
    unit: Tensor,
    num_classes: int,
    add_class: Callable[[Tensor, slice, slice], None],
    wanted: Callable[[slice, slice], bool] = _any_block,
) -> NDArray[np.int64]:
    """Counts [num_classes, NUM_BINS] of the scores of the pairs (row, column) with row < column.

    unit: [N, D] of length 1.  add_class: adds NUM_BINS times each pair's class to a block's bins.  wanted: whether a
    block of rows and columns counts, and with it all blocks between the two.
    """
    not_a_pair, side = num_classes * NUM_BINS, GPU_BLOCK if unit.device.type == "cuda" else BLOCK
    counts = torch.zeros(not_a_pair, dtype=torch.int64, device=unit.device)
    with torch.autocast(unit.device.type, enabled=False):  # bfloat16 would round scores to a few hundred values
        for start in range(0, len(unit), side):
            for other in range(start, len(unit), side):
                rows, columns = slice(start, start + side), slice(other, other + side)
                if not wanted(rows, columns):
                    break
                codes = score_bins(unit[rows] @ unit[columns].T)
                add_class(codes, rows, columns)
                if start == other:
                    codes.masked_fill_(torch.ones_like(codes, dtype=torch.bool).tril_(), not_a_pair)
                counts += torch.bincount(codes.flatten(), minlength=not_a_pair + 1)[:not_a_pair]
    return counts.reshape(num_classes, NUM_BINS).cpu().numpy()


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


def with_sibling(person: NDArray[np.int64], family: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which pictures show somebody of whose family another member is among the pictures too.

    person, family: [N] int64, of each picture.  Returns [N] bool.
    """
    pairs = np.unique(np.stack([family, person]), axis=1)
    families, members = np.unique(pairs[0], return_counts=True)
    return np.isin(family, families[members > 1])


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


def _num_pairs(group: NDArray[np.int64]) -> int:
    sizes = np.unique(group, return_counts=True)[1]
    return int((sizes * (sizes - 1) // 2).sum())
