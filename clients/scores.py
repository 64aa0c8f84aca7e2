"""Which counts of an evaluation leave this site, as its policy says: all, coarser, noisy, or none.

Fewer pairs than the policy's number have no score: nothing of that split leaves but that they are too few.
"""

import dataclasses
import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from clients.policy import Policy, against_scores
from common.metrics.sums import ClosedSetSums, EvaluationSums

TOO_FEW: Final = "too few"  # what leaves in a split's place
NOT_SHARED: Final = "not shared"
NOISY_BINS: Final = 256  # the most, of noisy counts: each bin's noise counts once


def leaving(
    policy: Policy,
    sums: EvaluationSums,
    seed: int,
    *,
    num_pictures: int,
    asks_confusion: bool,
) -> EvaluationSums | str:
    """What leaves of a split's sums, or the two words that leave in their place.

    seed: of the noise; the same for the same model and split, so that asking again tells nothing more.
    num_pictures: of the site, whose pairs bound what noisy counts may be.
    asks_confusion: whether the run draws pictures of it.
    """
    if policy.scores == "none":
        return NOT_SHARED
    genuine, impostor = (int(number) for number in sums.pairs.sum(axis=1))
    if against_scores(policy, genuine, impostor):
        return TOO_FEW
    if not (policy.confusion and asks_confusion):
        sums = dataclasses.replace(sums, confusion=np.zeros((0, 0), dtype=np.int64))
    if policy.scores == "exact":
        return coarser(sums, int(policy.score_bins))
    num_bins = min(NOISY_BINS, int(policy.score_bins))
    most = num_pictures * (num_pictures - 1) // 2
    return noisy(coarser(sums, num_bins), num_bins, policy.epsilon, most, np.random.default_rng(seed))


def coarser(sums: EvaluationSums, num_bins: int) -> EvaluationSums:
    """The same with the pairs' similarity told to `num_bins` bins: each count stands in the middle of its wider bin."""
    pairs, folds, twins = (merged_bins(counts, num_bins) for counts in (sums.pairs, sums.folds, sums.twins))
    return dataclasses.replace(sums, pairs=pairs, folds=folds, twins=twins)


def merged_bins(counts: NDArray[np.int64], num_bins: int) -> NDArray[np.int64]:
    """counts: [..., B].  B is a multiple of num_bins, or smaller; then they stay as they are."""
    width = counts.shape[-1] // num_bins
    if width <= 1:
        return counts
    whole = counts.reshape(*counts.shape[:-1], num_bins, width)
    merged = np.zeros_like(whole)
    merged[..., width // 2] = whole.sum(axis=-1)
    return merged.reshape(counts.shape)


def geometric_noise(shape: tuple[int, ...], epsilon: float, random: np.random.Generator) -> NDArray[np.int64]:
    """Two-sided geometric noise, int64: P(k) proportional to exp(-epsilon |k|) (Ghosh et al., arXiv:0811.2841).

    Added to a count that one pair changes by one at most, it makes that pair epsilon-differentially private.
    """
    p = -math.expm1(-epsilon)
    return np.asarray(random.geometric(p, shape) - random.geometric(p, shape), dtype=np.int64)


def noisy(
    sums: EvaluationSums, num_bins: int, epsilon: float, most: int, random: np.random.Generator
) -> EvaluationSums:
    """The same with noise on every count, which stays within what is possible: not negative, `most` pairs in all.

    sums: of `coarser` bins.  Where there are no twins and no confusion there are none afterwards: that they are not
    there is no secret.
    """

    def with_noise(counts: NDArray[np.int64], bins: int) -> NDArray[np.int64]:
        """counts: [..., B], of which B / bins stand together."""
        if not counts.any():
            return counts
        width = max(1, counts.shape[-1] // bins)
        drawn = counts.copy()
        here = drawn[..., width // 2 :: width]
        here += geometric_noise(here.shape, epsilon, random)
        return np.maximum(drawn, 0, out=drawn)

    pairs = _at_most(with_noise(sums.pairs, num_bins), most)
    confusion = sums.confusion
    if confusion is not None and confusion.size:
        confusion = _at_most(with_noise(confusion, confusion.shape[-1]), sums.closed.num_examples)
    return dataclasses.replace(
        sums,
        closed=_noisy_closed(sums.closed, epsilon, random),
        pairs=pairs,
        folds=_at_most(with_noise(sums.folds, num_bins), most),
        twins=np.minimum(with_noise(sums.twins, num_bins), pairs),
        confusion=confusion,
    )


def _at_most(counts: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """The counts, or as many times fewer of each as makes `most` of them all: more could not be."""
    total = int(counts.sum())
    return counts if total <= most else np.floor(counts * (most / total)).astype(np.int64)


def _noisy_closed(closed: ClosedSetSums, epsilon: float, random: np.random.Generator) -> ClosedSetSums:
    """Right answers, losses and the sums over classes as whole numbers with noise; how many there are stays."""
    values = np.array([closed.correct, closed.loss_sum, closed.precision_sum, closed.recall_sum, closed.f1_sum])
    drawn = np.round(values).astype(np.int64) + geometric_noise((len(values),), epsilon, random)
    bounds = np.array([closed.num_examples, np.iinfo(np.int64).max, *[closed.num_classes] * 3])
    correct, loss, *by_class = (int(value) for value in np.clip(drawn, 0, bounds))
    names = ("precision_sum", "recall_sum", "f1_sum")
    return dataclasses.replace(closed, correct=correct, loss_sum=float(loss), **dict(zip(names, by_class, strict=True)))
