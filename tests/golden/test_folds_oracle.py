"""Ten-fold accuracy against a naive implementation, written from LFW's report with loops over pairs and thresholds."""

import statistics
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from common.metrics.folds import (
    FOLD_BINS,
    NUM_FOLDS,
    choose_pairs,
    fold_histogram,
    pair_scores,
    ten_fold_accuracy,
    ten_fold_accuracy_of_scores,
)

EDGES = [-1 + 2 * k / FOLD_BINS for k in range(FOLD_BINS)] + [float("inf")]


def num_correct(pairs: list[tuple[float, bool]], threshold: float) -> int:
    return sum((score >= threshold) == genuine for score, genuine in pairs)


def naive(scores: list[float], genuine: list[bool], fold: list[int], edges: list[float] | None) -> list[float]:
    """Accuracy of each fold; edges None: half-way between neighbours among the training scores."""
    rates = []
    for held_out in sorted(set(fold)):
        train = [(s, g) for s, g, f in zip(scores, genuine, fold, strict=True) if f != held_out]
        test = [(s, g) for s, g, f in zip(scores, genuine, fold, strict=True) if f == held_out]
        candidates = edges
        if candidates is None:
            seen = sorted({s for s, _ in train})
            between = [(low + high) / 2 for low, high in pairwise(seen)]
            candidates = [-float("inf"), *between, float("inf")]
        reached = [num_correct(train, threshold) for threshold in candidates]
        tied = [t for t, right in zip(candidates, reached, strict=True) if right == max(reached)]
        rates.append(num_correct(test, tied[(len(tied) - 1) // 2]) / len(test))
    return rates


def drawn(seed: int, num: int, gap: float) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.int64]]:
    random = np.random.default_rng(seed)
    genuine = random.random(num) < 0.5
    scores = np.clip(random.normal(0.1, 0.15, num) + gap * genuine, -1, 1).astype(np.float32)
    return scores, genuine, random.integers(0, NUM_FOLDS, num)


def histogram_of(scores: NDArray[np.float32], genuine: NDArray[np.bool_], fold: NDArray[np.int64]) -> NDArray[np.int64]:
    rows = [
        [np.histogram(scores[(fold == f) & (genuine == kind)], FOLD_BINS, (-1, 1))[0] for kind in (True, False)]
        for f in range(NUM_FOLDS)
    ]
    return np.array(rows)


@pytest.mark.parametrize(("seed", "num", "gap"), [(0, 150, 0.2), (1, 400, 0.05), (2, 60, 1.0), (3, 25, 0.1)])
def test_both_versions_equal_the_naive_one(seed: int, num: int, gap: float) -> None:
    scores, genuine, fold = drawn(seed, num, gap)
    lists = (scores.tolist(), genuine.tolist(), fold.tolist())
    exact = naive(*lists, edges=None)
    binned = naive(*lists, edges=EDGES)
    assert ten_fold_accuracy_of_scores(scores, genuine, fold) == pytest.approx(
        (statistics.mean(exact), statistics.stdev(exact)), abs=1e-12
    )
    assert ten_fold_accuracy(histogram_of(scores, genuine, fold)) == pytest.approx(
        (statistics.mean(binned), statistics.stdev(binned)), abs=1e-12
    )


@pytest.mark.parametrize("deviation", [0.01, 0.1])
def test_bins_cost_little_even_on_the_narrow_scores_of_an_untrained_net(deviation: float) -> None:
    random = np.random.default_rng(5)
    genuine = np.arange(6000) < 3000
    scores = np.clip(random.normal(0.9 - 5 * deviation, deviation, 6000) + deviation * genuine, -1, 1)
    fold = np.arange(6000) % NUM_FOLDS
    exact, _ = ten_fold_accuracy_of_scores(scores.astype(np.float32), genuine, fold)
    binned, _ = ten_fold_accuracy(histogram_of(scores.astype(np.float32), genuine, fold))
    assert exact == pytest.approx(0.69, abs=0.02)  # two normals one deviation apart: Phi(1/2) = 0.691
    assert binned == pytest.approx(exact, abs=5e-3)


def test_the_whole_way_from_embeddings() -> None:
    random = np.random.default_rng(6)
    person = random.integers(0, 30, 300)
    embeddings = (random.normal(size=(30, 32))[person] * 0.5 + random.normal(size=(300, 32))).astype(np.float32)
    pairs = choose_pairs(person, seed=1, per_fold=40)
    scores = pair_scores(embeddings, pairs)
    expected = [
        float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        for a, b in zip(embeddings[pairs.first], embeddings[pairs.second], strict=True)
    ]
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    histogram = fold_histogram(scores, pairs)
    np.testing.assert_array_equal(histogram, histogram_of(scores, pairs.genuine, pairs.fold))
    rates = naive(scores.tolist(), pairs.genuine.tolist(), pairs.fold.tolist(), edges=EDGES)
    assert 0.6 < statistics.mean(rates) < 0.95
    assert ten_fold_accuracy(histogram)[0] == pytest.approx(statistics.mean(rates), abs=1e-12)
