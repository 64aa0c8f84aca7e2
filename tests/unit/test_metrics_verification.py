"""Histograms of pair scores: every pair counted once, merging, and the curve's figures by hand."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from common.errors import DataError, TrainingFailed
from common.metrics.figures import eer, open_set_scores, roc_auc, roc_curve, tar_at_far
from common.metrics.pairs import pair_histogram, score_histogram
from common.metrics.sums import NUM_BINS

Histogram = NDArray[np.int64]


def signs(num: int, seed: int) -> NDArray[np.float32]:
    """Vectors of 64 signs: their length is 8 and their cosines are multiples of 1/32, all exact in float32."""
    return np.random.default_rng(seed).choice(np.array([-1.0, 1.0], dtype=np.float32), size=(num, 64))


def people(num: int, num_people: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, num_people, size=num)


def counted_one_by_one(embeddings: NDArray[np.float32], person: NDArray[np.int64]) -> Histogram:
    """The definition, with no blocks and no sorting."""
    cosine = (embeddings.astype(np.float64) @ embeddings.T.astype(np.float64)) / 64
    first, second = np.triu_indices(len(person), k=1)
    bins = np.minimum(np.floor((cosine[first, second] + 1) * NUM_BINS / 2).astype(np.int64), NUM_BINS - 1)
    genuine = person[first] == person[second]
    return np.stack([np.bincount(bins[rows], minlength=NUM_BINS) for rows in (genuine, ~genuine)])


def histogram_of(genuine: dict[int, int], impostor: dict[int, int]) -> Histogram:
    """A histogram from {bin: count}."""
    histogram = np.zeros((2, NUM_BINS), dtype=np.int64)
    for row, counts in enumerate((genuine, impostor)):
        histogram[row, list(counts)] = list(counts.values())
    return histogram


# 4 genuine and 10 impostor pairs; from the top: 2 genuine, 1 impostor, 1 genuine, 9 impostor, 1 genuine.
# (FAR, TAR): (0, 0) (0, .5) (.1, .5) (.1, .75) (1, .75) (1, 1).
BY_HAND = histogram_of({7000: 2, 5500: 1, 500: 1}, {6000: 1, 1000: 9})


@pytest.mark.parametrize("num", [3, 511, 512, 513, 1300])
@pytest.mark.parametrize("num_people", [2, 40])
def test_every_pair_is_counted_once(num: int, num_people: int) -> None:
    embeddings, person = signs(num, 1), people(num, num_people, 2)
    person[:3] = [7, 7, 0]  # so that both kinds exist
    histogram = pair_histogram(embeddings, person)
    assert histogram.dtype == np.int64
    assert histogram.sum() == num * (num - 1) // 2
    np.testing.assert_array_equal(histogram, counted_one_by_one(embeddings, person))


def test_a_person_over_several_blocks_is_genuine_everywhere() -> None:
    embeddings, person = signs(1200, 3), np.repeat([5, 9], [1150, 50])
    histogram = pair_histogram(embeddings, person)
    assert histogram[0].sum() == 1150 * 1149 // 2 + 50 * 49 // 2
    np.testing.assert_array_equal(histogram, counted_one_by_one(embeddings, person))


def test_order_and_names_of_people_do_not_matter() -> None:
    embeddings, person = signs(700, 4), people(700, 30, 5)
    order = np.random.default_rng(6).permutation(700)
    expected = pair_histogram(embeddings, person)
    np.testing.assert_array_equal(pair_histogram(embeddings[order], person[order] * 10**12 - 5), expected)


def test_lengths_do_not_matter_and_tensors_are_taken() -> None:
    embeddings, person = signs(50, 7), people(50, 5, 8)
    scaled = torch.from_numpy(embeddings) * 2.0 ** torch.randint(-8, 8, (50, 1))
    expected = pair_histogram(embeddings, person)
    np.testing.assert_array_equal(pair_histogram(scaled.requires_grad_(), torch.from_numpy(person)), expected)


def test_autocast_around_it_changes_nothing() -> None:
    embeddings = np.random.default_rng(9).normal(size=(60, 64)).astype(np.float32)
    person = people(60, 6, 10)
    expected = pair_histogram(embeddings, person)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(pair_histogram(embeddings, person), expected)


def test_ends_of_the_scale_fall_into_the_first_and_last_bin() -> None:
    up, down = np.full((1, 64), 1.0, dtype=np.float32), np.full((1, 64), -1.0, dtype=np.float32)
    histogram = pair_histogram(np.concatenate([up, up, down]), np.array([0, 0, 1]))
    expected = histogram_of({NUM_BINS - 1: 1}, {0: 2})
    np.testing.assert_array_equal(histogram, expected)


def test_merged_histograms_are_those_of_the_union_of_pairs() -> None:
    parts = [(signs(600, 11), people(600, 20, 12)), (signs(90, 13), people(90, 9, 14))]
    merged = sum((pair_histogram(*part) for part in parts), start=np.zeros((2, NUM_BINS), dtype=np.int64))
    union = sum((counted_one_by_one(*part) for part in parts), start=np.zeros((2, NUM_BINS), dtype=np.int64))
    np.testing.assert_array_equal(merged, union)


def test_given_scores_are_counted_as_pairs_are_and_left_as_they_were() -> None:
    embeddings, person = signs(60, 15), people(60, 6, 16)
    first, second = np.triu_indices(60, k=1)
    scores = ((embeddings @ embeddings.T)[first, second] / 64).astype(np.float32)
    before = scores.copy()
    histogram = score_histogram(scores, person[first] == person[second])
    np.testing.assert_array_equal(histogram, counted_one_by_one(embeddings, person))
    np.testing.assert_array_equal(scores, before)


def test_curve_by_hand() -> None:
    far, tar = roc_curve(BY_HAND)
    assert far.shape == tar.shape == (NUM_BINS + 1,)
    points = list(dict.fromkeys(zip(far.tolist(), tar.tolist(), strict=True)))
    assert points == [(0.0, 0.0), (0.0, 0.5), (0.1, 0.5), (0.1, 0.75), (1.0, 0.75), (1.0, 1.0)]


def test_auc_by_hand() -> None:
    assert roc_auc(BY_HAND) == pytest.approx(0.1 * 0.5 + 0.9 * 0.75, abs=1e-12)


def test_ties_within_a_bin_count_half() -> None:
    # 2 x 4 comparisons: the genuine pair above wins 4, the one that ties 3 of 4 wins 1 + 3 / 2.
    histogram = histogram_of({6000: 1, 5000: 1}, {5000: 3, 10: 1})
    assert roc_auc(histogram) == pytest.approx((4 + 1 + 1.5) / 8, abs=1e-12)


def test_eer_by_hand() -> None:
    # Between (.1, .75) and (1, .75) FRR is .25, so FAR = FRR at .25.
    assert eer(BY_HAND) == pytest.approx(0.25, abs=1e-12)


def test_eer_of_perfect_and_of_inverted_scores() -> None:
    assert eer(histogram_of({8000: 5}, {10: 7})) == 0.0
    assert eer(histogram_of({10: 5}, {8000: 7})) == 1.0
    assert eer(histogram_of({4000: 5}, {4000: 7})) == pytest.approx(0.5)


@pytest.mark.parametrize(("far", "tar"), [(0.0, 0.5), (0.05, 0.5), (0.1, 0.75), (0.99, 0.75), (1.0, 1.0)])
def test_tar_at_far_by_hand_takes_a_threshold_that_exists(far: float, tar: float) -> None:
    assert tar_at_far(BY_HAND, far) == tar


@pytest.mark.parametrize("far", [-0.1, 1.1, float("nan")])
def test_far_must_be_a_fraction(far: float) -> None:
    with pytest.raises(ValueError, match="must be in"):
        tar_at_far(BY_HAND, far)


def test_open_set_scores_by_hand() -> None:
    assert open_set_scores(BY_HAND) == {
        "roc_auc": pytest.approx(0.725),
        "eer": pytest.approx(0.25),
        "tar_at_far_1e-1": 0.75,
        "tar_at_far_1e-2": 0.5,
        "tar_at_far_1e-3": 0.5,
    }


@pytest.mark.parametrize("person", [[0, 1, 2, 3], [0, 0, 0, 0]])
def test_pairs_of_one_kind_only_are_an_error(person: list[int]) -> None:
    with pytest.raises(DataError, match="give at least two people, one of them with two pictures"):
        pair_histogram(signs(4, 1), np.array(person))


@pytest.mark.parametrize("num", [0, 1])
def test_no_pairs_are_an_error(num: int) -> None:
    with pytest.raises(DataError, match="0 genuine and 0 impostor pairs"):
        pair_histogram(signs(num, 1), np.zeros(num, dtype=np.int64))


@pytest.mark.parametrize("score", [roc_auc, eer, roc_curve, open_set_scores])
@pytest.mark.parametrize("row", [0, 1])
def test_scores_of_an_empty_row_are_an_error(score: object, row: int) -> None:
    histogram = BY_HAND.copy()
    histogram[row] = 0
    assert callable(score)
    with pytest.raises(DataError, match=("0 genuine", "0 impostor")[row]):
        score(histogram)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_embeddings_that_are_not_finite_are_named(value: float) -> None:
    embeddings = signs(6, 1)
    embeddings[2, 5] = embeddings[4, 0] = value
    with pytest.raises(TrainingFailed, match="2 of 6 embeddings are not finite"):
        pair_histogram(embeddings, np.array([0, 0, 1, 1, 2, 2]))


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="must name each of the 6 embeddings"):
        pair_histogram(signs(6, 1), np.zeros(5, dtype=np.int64))
    with pytest.raises(ValueError, match=r"must be \[N, D\]"):
        pair_histogram(signs(6, 1)[0], np.zeros(64, dtype=np.int64))
    with pytest.raises(ValueError, match=r"is \[2, 8192\], not \[2, 100\]"):
        roc_auc(np.ones((2, 100), dtype=np.int64))
