"""Drawing people: weights, groups of people, replicates without a score, percentiles."""

import numpy as np
import pytest

from common.errors import DataError, TrainingFailed
from common.metrics.bootstrap import (
    COARSE_BINS,
    MAX_UNITS,
    _units,
    bootstrap_histograms,
    coarse_bins,
    interval,
    person_weights,
    replicates,
)
from common.metrics.figures import PAIRS
from common.metrics.sums import NUM_BINS

EVEN = np.arange(NUM_BINS) * COARSE_BINS // NUM_BINS


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("num_people", [1, 7, 37, MAX_UNITS + 1])
def test_each_replicate_draws_as_many_people_as_there_are(num_people: int) -> None:
    weights = person_weights(num_people, 50, seed=1)
    num_units = min(num_people, MAX_UNITS)
    assert weights.shape == (50, num_units)
    assert weights.min() >= 0
    assert (weights.sum(axis=1) == num_units).all()


def test_weights_are_multinomial() -> None:
    weights = person_weights(20, 20_000, seed=1)
    # Binomial(20, 1/20): mean 1, variance 0.95; of the mean of 20,000 the deviation is 0.007.
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.035)
    np.testing.assert_allclose(weights.var(axis=0), 0.95, atol=0.06)
    # Two people's counts: covariance -1/20.
    assert np.cov(weights[:, 3], weights[:, 11])[0, 1] == pytest.approx(-0.05, abs=0.035)


def test_weights_follow_from_the_seed() -> None:
    np.testing.assert_array_equal(person_weights(9, 8, seed=3), person_weights(9, 8, seed=3))
    assert not np.array_equal(person_weights(9, 8, seed=3), person_weights(9, 8, seed=4))


def test_many_people_are_dealt_into_equal_groups_by_their_number_alone() -> None:
    people = np.arange(2500) * 37 + 5
    groups = _units(people)
    sizes = np.bincount(groups)
    assert len(sizes) == MAX_UNITS
    assert set(sizes.tolist()) == {2, 3}
    order = np.random.default_rng(1).permutation(2500)
    np.testing.assert_array_equal(_units(people[order]), groups[order])
    assert (np.diff(groups) == 1).mean() < 0.1  # not simply in order, where neighbours may be alike


def test_a_group_is_drawn_with_the_pairs_of_its_different_people() -> None:
    """MAX_UNITS + 1 people in two pictures each: one group holds two people."""
    random = np.random.default_rng(2)
    person = np.repeat(np.arange(MAX_UNITS + 1), 2)
    embeddings = random.normal(size=(len(person), 8)).astype(np.float32)
    weights = np.zeros((2, MAX_UNITS), dtype=np.int64)
    shared = int(np.bincount(_units(np.arange(MAX_UNITS + 1))).argmax())
    weights[0, shared] = 3
    weights[1, [shared, (shared + 1) % MAX_UNITS]] = [2, 1]
    counts = bootstrap_histograms(embeddings, person, weights, EVEN).sum(axis=2)
    # Alone: 3 times 2 genuine and 4 impostor pairs. With another: 2 x 2 + 1 genuine; 2 x 4 own, 2 x 1 x 4 x 2 across.
    assert counts.tolist() == [[6, 12], [5, 24]]


def test_a_replicate_of_one_person_has_no_score_and_is_left_out() -> None:
    random = np.random.default_rng(3)
    person = np.repeat([0, 1, 2], 4)
    embeddings = random.normal(size=(12, 8)).astype(np.float32)
    weights = np.array([[3, 0, 0], [2, 1, 0], [1, 1, 1]])
    scores = replicates({PAIRS: bootstrap_histograms(embeddings, person, weights, EVEN)})
    for values in scores.values():
        assert np.isnan(values).tolist() == [True, False, False]
        low, high = interval(values)
        assert min(values[1:]) <= low <= high <= max(values[1:])


def test_a_replicate_without_genuine_pairs_has_no_score() -> None:
    histograms = np.zeros((1, 2, COARSE_BINS))
    histograms[0, 1, 5] = 10
    assert all(np.isnan(values).all() for values in replicates({PAIRS: histograms}).values())


def test_no_replicate_with_a_score_is_an_error() -> None:
    with pytest.raises(DataError, match="none of 3 bootstrap replicates has genuine and impostor pairs"):
        interval(np.full(3, np.nan))


def test_interval_takes_percentiles() -> None:
    values = np.random.default_rng(4).permutation(np.append(np.arange(1001) / 1000, [np.nan] * 5))
    assert interval(values) == pytest.approx((0.025, 0.975))
    assert interval(values, level=0.5) == pytest.approx((0.25, 0.75))


def test_perfect_and_inverted_replicates() -> None:
    histograms = np.zeros((2, 2, COARSE_BINS))
    histograms[0, 0, 400] = histograms[1, 0, 10] = 5
    histograms[0, 1, 10] = histograms[1, 1, 400] = 7
    scores = replicates({PAIRS: histograms})
    assert scores["roc_auc"].tolist() == [1.0, 0.0]
    assert scores["eer"].tolist() == [0.0, 1.0]
    assert scores["tar_at_far_1e-3"].tolist() == [1.0, 0.0]


def test_a_far_that_is_exactly_reached_counts() -> None:
    # 10 impostors; from the top: 2 of 4 genuine, 1 impostor, 1 genuine, 9 impostors, 1 genuine.
    histograms = np.zeros((1, 2, COARSE_BINS))
    histograms[0, 0, [400, 200, 10]] = [2, 1, 1]
    histograms[0, 1, [300, 100]] = [1, 9]
    scores = {name: float(values[0]) for name, values in replicates({PAIRS: histograms}).items()}
    assert scores == {
        "roc_auc": pytest.approx(0.1 * 0.5 + 0.9 * 0.75),
        "eer": pytest.approx(0.25),
        "tar_at_far_1e-1": 0.75,
        "tar_at_far_1e-2": 0.5,
        "tar_at_far_1e-3": 0.5,
    }


def test_weights_of_another_number_of_people_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[B, 3\], one for each person or group"):
        bootstrap_histograms(np.ones((6, 4), np.float32), np.repeat([1, 5, 9], 2), person_weights(4, 2, 1), EVEN)


def test_embeddings_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(TrainingFailed, match="1 of 2 embeddings are not finite"):
        bootstrap_histograms(np.array([[1.0], [np.nan]], np.float32), np.array([0, 1]), person_weights(2, 2, 1), EVEN)


def test_coarse_bins_of_no_pairs_are_an_error() -> None:
    with pytest.raises(DataError, match="0 genuine and 0 impostor"):
        coarse_bins(np.zeros((2, NUM_BINS), dtype=np.int64))
