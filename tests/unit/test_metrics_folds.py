"""Pairs drawn for ten folds: balanced, each once, repeatable; merging; and accuracies counted by hand."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from common.errors import DataError, TrainingFailed
from common.metrics.folds import (
    FOLD_BINS,
    NUM_FOLDS,
    FoldPairs,
    choose_pairs,
    fold_histogram,
    pair_scores,
    ten_fold_accuracy,
    ten_fold_accuracy_of_scores,
)

PEOPLE = np.random.default_rng(1).integers(0, 20, 200) * 10**12 - 7


def unordered(pairs: FoldPairs) -> list[tuple[int, int]]:
    return [(min(pair), max(pair)) for pair in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)]


def equal(first: FoldPairs, second: FoldPairs) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in vars(first))


@pytest.mark.parametrize("per_fold", [1, 7, 300])
def test_pairs_are_balanced_right_and_each_once(per_fold: int) -> None:
    pairs = choose_pairs(PEOPLE, seed=3, per_fold=per_fold)
    assert len(set(unordered(pairs))) == len(pairs.first)
    np.testing.assert_array_equal(PEOPLE[pairs.first] == PEOPLE[pairs.second], pairs.genuine)
    by_fold = Counter(zip(pairs.fold.tolist(), pairs.genuine.tolist(), strict=True))
    assert len(by_fold) == 2 * NUM_FOLDS
    assert max(by_fold.values()) <= per_fold
    assert max(by_fold.values()) - min(by_fold.values()) <= 1
    for fold in range(NUM_FOLDS):
        assert by_fold[fold, True] == by_fold[fold, False]


def test_few_genuine_pairs_are_all_taken() -> None:
    every = {(i, j) for i, j in combinations(range(len(PEOPLE)), 2) if PEOPLE[i] == PEOPLE[j]}
    assert len(every) < 3000
    pairs = choose_pairs(PEOPLE, seed=3)
    drawn = unordered(pairs)
    assert set(drawn[: len(every)]) == every
    assert len(drawn) == 2 * len(every)


def test_few_impostor_pairs_are_all_taken_and_keep_the_balance() -> None:
    person = np.array([4] * 30 + [2])
    pairs = choose_pairs(person, seed=3)
    assert {pair for pair, genuine in zip(unordered(pairs), pairs.genuine, strict=True) if not genuine} == {
        (i, 30) for i in range(30)
    }
    assert pairs.genuine.sum() == 30


def test_each_pair_is_equally_likely() -> None:
    person = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2])  # 10 genuine, 26 impostor pairs, of which 10 each are drawn
    counts: Counter[tuple[int, int]] = Counter()
    for seed in range(400):
        counts.update(unordered(choose_pairs(person, seed=seed)))
    impostor = [counts[i, j] for i, j in combinations(range(9), 2) if person[i] != person[j]]
    # 400 draws at 10/26: mean 153.8, deviation 9.7; four deviations to each side.
    assert 115 < min(impostor) <= max(impostor) < 193


def test_pairs_follow_from_the_seed() -> None:
    assert equal(choose_pairs(PEOPLE, seed=3), choose_pairs(PEOPLE, seed=3))
    assert not equal(choose_pairs(PEOPLE, seed=3), choose_pairs(PEOPLE, seed=4))


def test_a_large_set_is_not_enumerated() -> None:
    person = np.repeat(np.arange(3), 40_000)  # 2.4e9 genuine pairs
    pairs = choose_pairs(person, seed=1)
    assert len(set(unordered(pairs))) == 6000
    np.testing.assert_array_equal(person[pairs.first] == person[pairs.second], pairs.genuine)


@pytest.mark.parametrize("person", [[], [5], [5, 5, 5], [1, 2, 3]])
def test_people_that_make_one_kind_of_pair_make_none(person: list[int]) -> None:
    pairs = choose_pairs(np.array(person, dtype=np.int64), seed=1)
    assert [len(part) for part in vars(pairs).values()] == [0] * 4
    histogram = fold_histogram(np.zeros(0, dtype=np.float32), pairs)
    assert histogram.sum() == 0
    with pytest.raises(DataError, match="pairs in 0 folds"):
        ten_fold_accuracy(histogram)


def pairs_of(genuine: list[bool], fold: list[int]) -> FoldPairs:
    places = np.arange(len(fold))
    return FoldPairs(places, places + 1, np.array(genuine), np.array(fold))


def test_histogram_by_hand() -> None:
    scores = np.array([-1.0, 1.0, 0.0, -1e-7], dtype=np.float32)
    histogram = fold_histogram(scores, pairs_of([True, True, False, False], [0, 9, 4, 4]))
    assert histogram.shape == (NUM_FOLDS, 2, FOLD_BINS)
    assert histogram.dtype == np.int64
    places = {tuple(place) for place in np.argwhere(histogram).tolist()}
    assert places == {(0, 0, 0), (9, 0, FOLD_BINS - 1), (4, 1, FOLD_BINS // 2), (4, 1, FOLD_BINS // 2 - 1)}
    assert histogram.sum() == 4


def test_the_threshold_comes_from_the_other_folds() -> None:
    # Fold 0 alone would be perfect at 0.15, but the others say 0.5, where its genuine pair is rejected. The others of
    # folds 1 and 2 reach 5 of 6 at 0.5 and 4 of 6 at 0.15.
    scores = np.array([0.2, 0.1, *[0.6, 0.4] * 4], dtype=np.float32)
    genuine, fold = [True, False] * 5, [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    expected = (5 / 6, np.std([0.5, 1, 1], ddof=1))
    assert ten_fold_accuracy_of_scores(scores, np.array(genuine), np.array(fold)) == pytest.approx(expected)
    assert ten_fold_accuracy(fold_histogram(scores, pairs_of(genuine, fold))) == pytest.approx(expected)


def test_a_gap_is_cut_in_its_middle() -> None:
    # The others leave (-0.5, 0.5) open: the middle accepts 0.1 and rejects -0.1.
    scores = np.array([-0.5, 0.5, -0.5, 0.5, -0.1, 0.1], dtype=np.float32)
    genuine, fold = [False, True] * 3, [0, 0, 1, 1, 2, 2]
    assert ten_fold_accuracy_of_scores(scores, np.array(genuine), np.array(fold))[0] == 1.0
    assert ten_fold_accuracy(fold_histogram(scores, pairs_of(genuine, fold))) == (1.0, 0.0)


def test_merged_clients_are_one_set_of_pairs() -> None:
    random = np.random.default_rng(8)
    parts = [choose_pairs(random.integers(0, 5, 40), seed=seed) for seed in (1, 2)]
    scores = [random.uniform(-1, 1, len(part.fold)).astype(np.float32) for part in parts]
    joined = FoldPairs(*(np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])))
    merged = sum(fold_histogram(*each) for each in zip(scores, parts, strict=True))
    np.testing.assert_array_equal(merged, fold_histogram(np.concatenate(scores), joined))


def test_folds_without_pairs_are_left_out() -> None:
    scores = np.array([0.9, 0.1, 0.9, 0.1, 0.2, 0.8], dtype=np.float32)
    pairs = pairs_of([True, False] * 3, [2, 2, 5, 5, 7, 7])
    mean, _ = ten_fold_accuracy(fold_histogram(scores, pairs))
    assert mean == pytest.approx(2 / 3)  # not 2 / 10: fold 7 is upside down, the others right


@pytest.mark.parametrize("fold", [[], [3, 3, 3]])
def test_too_few_folds_are_an_error(fold: list[int]) -> None:
    pairs = pairs_of([True, False, True][: len(fold)], fold)
    scores = np.full(len(fold), 0.5, dtype=np.float32)
    with pytest.raises(DataError, match="give at least two genuine and two impostor pairs"):
        ten_fold_accuracy_of_scores(scores, pairs.genuine, pairs.fold)
    if fold:
        with pytest.raises(DataError, match="pairs in 1 folds"):
            ten_fold_accuracy(fold_histogram(scores, pairs))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_an_error(value: float) -> None:
    scores = np.array([0.5, value], dtype=np.float32)
    pairs = pairs_of([True, False], [0, 1])
    with pytest.raises(TrainingFailed, match="1 of 2 pair scores are not finite"):
        fold_histogram(scores, pairs)
    with pytest.raises(TrainingFailed, match="1 of 2 pair scores are not finite"):
        ten_fold_accuracy_of_scores(scores, pairs.genuine, pairs.fold)


def test_a_zero_vector_has_cosine_zero_and_lengths_do_not_matter() -> None:
    embeddings = np.array([[0, 0], [3, 4], [30, 40]], dtype=np.float32)
    pairs = FoldPairs(np.array([0, 1]), np.array([1, 2]), np.array([False, True]), np.array([0, 1]))
    np.testing.assert_allclose(pair_scores(embeddings, pairs), [0, 1], atol=1e-6)


def test_shape_is_checked() -> None:
    with pytest.raises(ValueError, match="a fold histogram is"):
        ten_fold_accuracy(np.zeros((10, 2, 8192), dtype=np.int64))
