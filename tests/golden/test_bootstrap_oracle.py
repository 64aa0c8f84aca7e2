"""Bootstrap over people against replicates built pair by pair, and weights of one against the plain scores."""

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from common.metrics.bootstrap import (
    COARSE_BINS,
    MAX_UNITS,
    bootstrap_histograms,
    coarse_bins,
    interval,
    person_weights,
    replicates,
    unit_sums,
)
from common.metrics.figures import PAIRS, eer, open_set_scores, roc_auc, tar_at_far
from common.metrics.pairs import pair_histogram
from common.metrics.sums import NUM_BINS

pytestmark = pytest.mark.usefixtures("one_thread")


def signs(num: int, seed: int) -> NDArray[np.float32]:
    """Vectors of 64 signs: their cosines are multiples of 1/32, exact in float32."""
    return np.random.default_rng(seed).choice(np.array([-1.0, 1.0], dtype=np.float32), size=(num, 64))


def faces(num_people: int, num: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    random = np.random.default_rng(seed)
    person = random.integers(0, num_people, num)
    means = random.normal(size=(num_people, 64)) * 0.5
    return (means[person] + random.normal(size=(num, 64))).astype(np.float32), person


def drawn_pair_by_pair(
    embeddings: NDArray[np.float32], person: NDArray[np.int64], weights: NDArray[np.int64], bins: NDArray[np.int64]
) -> NDArray[np.int64]:
    """One replicate: every drawn copy's own pairs, and the pairs of copies of different people."""
    people = np.unique(person).tolist()
    copies = [who for who, times in zip(people, weights.tolist(), strict=True) for _ in range(times)]
    pictures = {who: np.flatnonzero(person == who).tolist() for who in people}
    pairs = [(0, i, j) for who in copies for i, j in combinations(pictures[who], 2)]
    for one, other in combinations(copies, 2):
        pairs += [(1, i, j) for i in pictures[one] for j in pictures[other] if one != other]
    counts = np.zeros((2, COARSE_BINS), dtype=np.int64)
    for row, i, j in pairs:
        cosine = float(embeddings[i].astype(np.float64) @ embeddings[j]) / 64
        counts[row, bins[min(int((cosine + 1) * NUM_BINS / 2), NUM_BINS - 1)]] += 1
    return counts


def test_replicates_are_those_drawn_pair_by_pair() -> None:
    embeddings = signs(40, 1)
    person = np.random.default_rng(2).integers(0, 9, 40) * 10**12 - 3
    bins = coarse_bins(pair_histogram(embeddings, person))
    weights = person_weights(9, 6, seed=4)
    assert (weights > 1).any()
    assert (weights == 0).any()
    expected = [drawn_pair_by_pair(embeddings, person, row, bins) for row in weights]
    order = np.random.default_rng(3).permutation(40)
    np.testing.assert_array_equal(bootstrap_histograms(embeddings, person, weights, bins), expected)
    np.testing.assert_array_equal(bootstrap_histograms(embeddings[order] * 3, person[order], weights, bins), expected)


def test_a_person_with_more_pictures_than_a_block_is_counted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, person = signs(90, 5), np.repeat([0, 1, 2], [50, 30, 10])
    bins = coarse_bins(pair_histogram(embeddings, person))
    weights = person_weights(3, 5, seed=1)
    expected = bootstrap_histograms(embeddings, person, weights, bins)
    monkeypatch.setattr("common.metrics.bootstrap._BLOCK_PAIRS", 70)
    np.testing.assert_array_equal(bootstrap_histograms(embeddings, person, weights, bins), expected)


@pytest.mark.parametrize(("num_people", "num"), [(37, 500), (MAX_UNITS + 200, 2600)])
def test_weights_of_one_give_the_plain_scores(num_people: int, num: int) -> None:
    embeddings, person = faces(num_people, num, 6)
    fine = pair_histogram(embeddings, person)
    bins = coarse_bins(fine)
    ones = np.ones((1, min(len(np.unique(person)), MAX_UNITS)), dtype=np.int64)
    own = bootstrap_histograms(embeddings, person, ones, bins)
    # The same pairs, whether people are drawn or groups; float32 products may move a score over a fine bin's edge.
    assert own.sum(axis=2).tolist() == [fine.sum(axis=1).tolist()]
    merged = np.stack([np.bincount(bins, row, COARSE_BINS) for row in fine])
    assert np.abs(own[0] - merged).sum() <= 1e-3 * fine.sum()
    scores = {name: float(values[0]) for name, values in replicates({PAIRS: own}).items()}
    expected = open_set_scores(fine)
    assert 0.8 < expected["roc_auc"] < 0.999
    assert scores.keys() == expected.keys()
    assert scores["roc_auc"] == pytest.approx(expected["roc_auc"], abs=2e-4)  # a curve of 512 chords
    assert scores["eer"] == pytest.approx(expected["eer"], abs=1e-3)
    for name in ("tar_at_far_1e-1", "tar_at_far_1e-2", "tar_at_far_1e-3"):
        assert expected[name] - 5e-3 <= scores[name] <= expected[name] + 1e-3


def test_scores_of_every_replicate_are_those_of_verification() -> None:
    random = np.random.default_rng(7)
    fine = random.poisson(random.random((5, 2, NUM_BINS)) * np.array([[0.02], [3.0]]))
    scores = replicates({PAIRS: fine.astype(np.float64)})
    for row, histogram in enumerate(fine):
        assert scores["roc_auc"][row] == pytest.approx(roc_auc(histogram), abs=1e-12)
        assert scores["eer"][row] == pytest.approx(eer(histogram), abs=1e-12)
        assert scores["tar_at_far_1e-2"][row] == pytest.approx(tar_at_far(histogram, 1e-2), abs=1e-12)
        assert scores["tar_at_far_1e-3"][row] == pytest.approx(tar_at_far(histogram, 1e-3), abs=1e-12)


@pytest.mark.parametrize("apart", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("deviation", [0.005, 0.15])
def test_coarse_bins_lose_little_wherever_the_scores_lie(deviation: float, apart: float) -> None:
    random = np.random.default_rng(8)
    scores = [random.normal(0.4 + apart * deviation * 4, deviation, 20_000), random.normal(0.4, deviation, 200_000)]
    fine = np.stack([np.histogram(np.clip(row, -1, 1), bins=NUM_BINS, range=(-1, 1))[0] for row in scores])
    bins = coarse_bins(fine)
    assert bins.min() >= 0
    assert bins.max() < COARSE_BINS
    assert (np.diff(bins) >= 0).all()
    merged = np.stack([np.bincount(bins, row, COARSE_BINS) for row in fine])
    own = {name: float(values[0]) for name, values in replicates({PAIRS: merged[None]}).items()}
    expected = open_set_scores(fine)
    assert own["roc_auc"] == pytest.approx(expected["roc_auc"], abs=2e-4)
    for name in ("tar_at_far_1e-1", "tar_at_far_1e-2", "tar_at_far_1e-3"):
        widest = merged[0].max() / merged[0].sum()  # a fine bin of narrow scores may itself hold more than 1/256
        assert expected[name] - max(1 / 256, widest) <= own[name] <= expected[name] + 1e-12


def test_the_interval_of_paired_replicates_is_narrower_than_that_of_independent_ones() -> None:
    """Two models that differ little: the gap is known far better than either score."""
    embeddings, person = faces(40, 400, 9)
    other = embeddings + np.random.default_rng(10).normal(size=embeddings.shape).astype(np.float32) * 0.2
    drawn = []
    for model, seed in ((embeddings, 1), (other, 1), (other, 2)):
        bins = coarse_bins(pair_histogram(model, person))
        weights = person_weights(40, 300, seed)
        drawn.append(replicates({PAIRS: bootstrap_histograms(model, person, weights, bins)})["roc_auc"])
    paired, apart = (interval(drawn[0] - drawn[k]) for k in (1, 2))
    assert paired[1] - paired[0] < 0.6 * (apart[1] - apart[0])


def test_each_persons_sums_hold_the_histogram_and_the_pairs_of_each_person() -> None:
    embeddings = signs(40, 1)
    person = np.random.default_rng(2).integers(0, 9, 40) * 10**12 - 3
    sums = unit_sums(embeddings, person)
    np.testing.assert_array_equal(sums.histogram, pair_histogram(embeddings, person))
    for number, who in enumerate(np.unique(person)):
        own, other = embeddings[person == who], embeddings[person != who]
        scores = (own.astype(np.float64) @ other.T / 64).ravel()
        bins = np.minimum(((scores + 1) * NUM_BINS / 2).astype(int), NUM_BINS - 1)
        np.testing.assert_array_equal(sums.others[number], np.bincount(bins, minlength=NUM_BINS))
        assert sums.own[:, number].sum() == len(own) * (len(own) - 1) // 2


def test_replicates_of_sums_are_the_genuine_pairs_exactly_and_intervals_nearly() -> None:
    """120 people: what the linear part leaves out is of the order of 1/120; sums of all weights 1 leave out nothing."""
    embeddings, person = faces(120, 1500, 3)
    histogram = pair_histogram(embeddings, person)
    bins, sums = coarse_bins(histogram), unit_sums(embeddings, person)
    weights = person_weights(120, 400, seed=4)
    exact = bootstrap_histograms(embeddings, person, weights, bins)
    linear = sums.counts(weights, bins)
    np.testing.assert_array_equal(linear[:, 0], exact[:, 0])
    once = sums.counts(np.ones((1, 120), dtype=np.int64), bins)
    assert replicates({PAIRS: once})["roc_auc"][0] == pytest.approx(open_set_scores(histogram)["roc_auc"], abs=1e-4)
    for name, values in replicates({PAIRS: linear}).items():
        wanted = interval(replicates({PAIRS: exact})[name])
        width = wanted[1] - wanted[0]
        assert interval(values) == pytest.approx(wanted, abs=0.1 * width), name
