"""Ten-fold verification accuracy: in each fold the threshold is the one best on the other nine (LFW's protocol).

Labeled Faces in the Wild, UMass Amherst technical report 07-49, "View 2". A client draws balanced pairs of its own
pictures, scores them by cosine and sends counts by fold, which merge over clients by addition; a list of pairs that
is given, such as LFW's pairs.txt, is scored exactly. Other than in LFW, one person's pairs may lie in several of the
folds drawn here: only a threshold crosses from fold to fold, and a client may have fewer than ten people.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError, TrainingFailed

NUM_FOLDS: Final = 10
FOLD_BINS: Final = 1024  # over cosine in [-1, 1]: 0.00195 each


@dataclass(frozen=True)
class FoldPairs:
    """Pairs of pictures by position, each once; `first` and `second` never the same picture."""

    first: NDArray[np.int64]  # [M]
    second: NDArray[np.int64]  # [M]
    genuine: NDArray[np.bool_]  # [M], whether both show one person
    fold: NDArray[np.int64]  # [M] in [0, NUM_FOLDS)


def choose_pairs(person: NDArray[np.int64], *, seed: int, per_fold: int = 300) -> FoldPairs:
    """As many genuine as impostor pairs, drawn without repetition and dealt evenly to ten folds.

    person: [N] int64, who each picture shows.  per_fold: the most pairs of each kind in a fold; where there are fewer
    than 10 * per_fold of one kind, all of that kind are taken and as many of the other, so that guessing always gives
    0.5. Each pair of a kind is equally likely, so people with many pictures weigh more, as in all-pairs scores.
    The same arguments give the same pairs; with no genuine or no impostor pair there are none of either.
    Returns genuine pairs first, then impostors; fold f holds at most one pair of a kind more than any other.
    """
    people, sizes = np.unique(person, return_counts=True)
    order = np.argsort(np.searchsorted(people, person), kind="stable")  # positions of the pictures, person by person
    ends = np.cumsum(sizes)
    num_later = len(order) - np.repeat(ends, sizes)  # impostor partners of each picture among people after its own
    num_genuine, num_impostor = int((sizes * (sizes - 1) // 2).sum()), int(num_later.sum())
    num = min(num_genuine, num_impostor, NUM_FOLDS * per_fold)
    if num == 0:
        nothing = np.zeros(0, dtype=np.int64)
        return FoldPairs(nothing, nothing, nothing.astype(np.bool_), nothing)
    random = np.random.default_rng(seed)
    genuine = _genuine(random.choice(num_genuine, num, replace=False), sizes, ends)
    impostor = _impostor(random.choice(num_impostor, num, replace=False), num_later)
    first, second = np.concatenate([genuine, impostor], axis=1)
    dealt = np.arange(num) % NUM_FOLDS  # the draw is in random order
    return FoldPairs(order[first], order[second], np.arange(2 * num) < num, np.concatenate([dealt, dealt]))


def _genuine(numbers: NDArray[np.int64], sizes: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places [2, M] of the genuine pairs with these numbers, counting person by person, (0,1) (0,2) (1,2) (0,3) ..."""
    until = np.cumsum(sizes * (sizes - 1) // 2)
    who = np.searchsorted(until, numbers, side="right")
    within = numbers - (until - sizes * (sizes - 1) // 2)[who]
    later = ((1 + np.sqrt(1 + 8 * within.astype(np.float64))) / 2).astype(np.int64)
    later -= later * (later - 1) // 2 > within  # the root may be rounded up
    earlier = within - later * (later - 1) // 2
    places: NDArray[np.int64] = np.stack([earlier, later]) + (ends - sizes)[who]
    return places


def _impostor(numbers: NDArray[np.int64], num_later: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places [2, M] of the impostor pairs with these numbers, counting picture by picture its partners to the end."""
    until = np.cumsum(num_later)
    first = np.searchsorted(until, numbers, side="right")
    return np.stack([first, len(num_later) - (until[first] - numbers)])


def pair_scores(embeddings: NDArray[np.float32], pairs: FoldPairs) -> NDArray[np.float32]:
    """Cosines [M] float32 of the pairs, from embeddings [N, D] of any length (a zero vector has cosine 0)."""
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = embeddings / np.where(lengths > 0, lengths, 1)
    scores: NDArray[np.float32] = np.einsum("md,md->m", unit[pairs.first], unit[pairs.second]).astype(np.float32)
    return scores


def fold_histogram(scores: NDArray[np.float32], pairs: FoldPairs) -> NDArray[np.int64]:
    """Counts [NUM_FOLDS, 2, FOLD_BINS] int64 of cosine scores: row 0 genuine, row 1 impostor; clients' add up.

    scores: [M] cosines of `pairs`. Bin k counts [-1 + 2 k / FOLD_BINS, -1 + 2 (k + 1) / FOLD_BINS), the last 1.0 too.
    Raises TrainingFailed when a score is not finite.
    """
    _check_finite(scores)
    bins = ((scores.astype(np.float64) + 1) * (FOLD_BINS / 2)).astype(np.int64).clip(0, FOLD_BINS - 1)
    codes = (pairs.fold * 2 + ~pairs.genuine) * FOLD_BINS + bins
    return np.bincount(codes, minlength=NUM_FOLDS * 2 * FOLD_BINS).reshape(NUM_FOLDS, 2, FOLD_BINS)


def _check_finite(scores: NDArray[Any]) -> None:
    num_bad = int((~np.isfinite(scores)).sum())
    if num_bad:
        raise TrainingFailed(
            f"{num_bad} of {len(scores)} pair scores are not finite (NaN or infinity), so there is no accuracy; "
            "the model has diverged: lower training.lr or raise training.warmup_fraction."
        )


def ten_fold_accuracy(histogram: NDArray[np.int64]) -> tuple[float, float]:
    """Mean and standard deviation over folds of the accuracy at the threshold best on the other folds.

    histogram: [NUM_FOLDS, 2, FOLD_BINS] as `fold_histogram` returns it, or a sum of such. A threshold is a bin's edge,
    scores at or above it are accepted; of equally good ones the middle one is taken, so a gap is cut in its middle.
    Folds without pairs are left out. The deviation is that of a sample (n - 1), as in LFW's report.
    Raises DataError when fewer than two folds have pairs.
    """
    if histogram.shape != (NUM_FOLDS, 2, FOLD_BINS):
        raise ValueError(f"a fold histogram is [{NUM_FOLDS}, 2, {FOLD_BINS}], not {list(histogram.shape)}")
    totals = histogram.sum(axis=(1, 2))
    # At edge k the genuine pairs in bins k and above are right, and the impostors below; edge FOLD_BINS takes none.
    correct = np.zeros((NUM_FOLDS, FOLD_BINS + 1), dtype=np.int64)
    correct[:, 1:] = np.cumsum(histogram[:, 1] - histogram[:, 0], axis=1)
    correct += histogram[:, 0].sum(axis=1, keepdims=True)
    others = correct.sum(axis=0) - correct
    rates = [correct[fold, _middle_best(others[fold])] / totals[fold] for fold in np.flatnonzero(totals)]
    return _mean_and_deviation(rates)


def ten_fold_accuracy_of_scores(
    scores: NDArray[np.float32], genuine: NDArray[np.bool_], fold: NDArray[np.int64]
) -> tuple[float, float]:
    """`ten_fold_accuracy` with exact thresholds, half-way between two neighbouring scores of the other folds.

    scores, genuine, fold: [M] each; any scale of scores, and any number of folds from two up.
    Raises TrainingFailed when a score is not finite, DataError when fewer than two folds have pairs.
    """
    _check_finite(scores)
    folds = np.unique(fold)
    return _mean_and_deviation([_rate_of_fold(scores, genuine, fold == one) for one in folds] if len(folds) > 1 else [])


def _rate_of_fold(scores: NDArray[Any], genuine: NDArray[np.bool_], held_out: NDArray[np.bool_]) -> float:
    """Accuracy on the held-out pairs at the threshold best on the others."""
    values, which = np.unique(scores[~held_out].astype(np.float64), return_inverse=True)
    is_genuine = genuine[~held_out]
    below = np.zeros((2, len(values) + 1), dtype=np.int64)  # impostor and genuine pairs under the k-th threshold
    for row, chosen in enumerate((~is_genuine, is_genuine)):
        below[row, 1:] = np.cumsum(np.bincount(which[chosen], minlength=len(values)))
    best = _middle_best(below[0] - below[1])
    thresholds = np.concatenate([[-np.inf], (values[:-1] + values[1:]) / 2, [np.inf]])
    return float(np.mean((scores[held_out] >= thresholds[best]) == genuine[held_out]))


def _middle_best(correct: NDArray[np.int64]) -> int:
    """The middle one of the places of the largest value; the lower of two middles."""
    best = np.flatnonzero(correct == correct.max())
    return int(best[(len(best) - 1) // 2])


def _mean_and_deviation(rates: Sequence[float]) -> tuple[float, float]:
    if len(rates) < 2:
        raise DataError(
            f"ten-fold accuracy over pairs in {len(rates)} folds: a threshold comes from the other folds; "
            "give at least two genuine and two impostor pairs."
        )
    return float(np.mean(rates)), float(np.std(rates, ddof=1))
