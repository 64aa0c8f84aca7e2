"""Pairs of twins apart from those of strangers: counted one by one, scored by hand, drawn family by family."""

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from common.errors import DataError, TrainingFailed
from common.metrics import pairs as module
from common.metrics.bootstrap import (
    COARSE_BINS,
    Drawn,
    accuracy_bins,
    bootstrap_histograms,
    coarse_bins,
    interval,
    person_weights,
    replicates,
)
from common.metrics.figures import JUDGED, KINDS, accuracy_at, kind_scores, threshold_at_best_accuracy
from common.metrics.pairs import pair_histogram, pair_histograms
from common.metrics.sums import NUM_BINS, histogram_of, no_twins

Sample = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]


pytestmark = pytest.mark.usefixtures("one_thread")


def signs(num: int, seed: int) -> NDArray[np.float32]:
    """Vectors of 64 signs: their cosines are multiples of 1/32, exact in float32."""
    return np.random.default_rng(seed).choice(np.array([-1.0, 1.0], dtype=np.float32), size=(num, 64))


def sample(num: int = 90, seed: int = 1) -> Sample:
    """People 0 .. 8 in shuffled order; families (0, 4), (1, 7), (2, 3, 5); 6 and 8 are alone."""
    person = np.random.default_rng(seed).integers(0, 9, num)
    family = np.array([0, 1, 2, 2, 0, 2, 6, 1, 8])[person] * 10**12 - 3
    return signs(num, seed), person, family


def kinds_of(person: NDArray[np.int64], family: NDArray[np.int64], i: int, j: int) -> set[str]:
    """By hand: the kinds of pairs that a pair counts for."""
    mates = {int(who) for who in person[family == family[i]]}
    if person[i] == person[j]:
        return {"all", "strangers"} | ({"twins"} if len(mates) > 1 else set())
    return {"all", "twins" if family[i] == family[j] else "strangers"}


def one_by_one(sampled: Sample, kind: str) -> NDArray[np.int64]:
    embeddings, person, family = sampled
    counts = np.zeros((2, NUM_BINS), dtype=np.int64)
    for i, j in combinations(range(len(person)), 2):
        if kind in kinds_of(person, family, i, j):
            cosine = float(embeddings[i].astype(np.float64) @ embeddings[j]) / 64
            counts[int(person[i] != person[j]), min(int((cosine + 1) * NUM_BINS / 2), NUM_BINS - 1)] += 1
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_holds_its_pairs_counted_one_by_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = sample()
    expected = one_by_one(sampled, kind)
    assert expected.sum(axis=1).min() > 0
    for block in (7, 512):
        monkeypatch.setattr(module, "BLOCK", block)
        np.testing.assert_array_equal(histogram_of(kind, *pair_histograms(*sampled)), expected)


def test_all_pairs_are_those_of_verification_and_twins_are_among_them() -> None:
    random = np.random.default_rng(3)
    person = random.integers(0, 60, 1300)
    embeddings = random.normal(size=(1300, 48)).astype(np.float32)
    pairs, twins = pair_histograms(embeddings, person, person // 2)
    np.testing.assert_array_equal(pairs, pair_histogram(embeddings, person))
    assert (twins <= pairs).all()
    np.testing.assert_array_equal(pair_histograms(embeddings, person, person // 2)[1], twins)
    assert twins[0].sum() == pairs[0].sum()
    assert not pair_histograms(embeddings, person, person)[1].any(), "nobody has a twin"


def test_a_twin_whose_sibling_has_no_picture_is_a_stranger() -> None:
    embeddings, person, family = signs(6, 2), np.array([0, 0, 1, 1, 2, 2]), np.array([0, 0, 5, 5, 7, 7])
    assert not pair_histograms(embeddings, person, family)[1].any()
    assert pair_histograms(embeddings, person, np.array([0, 0, 5, 5, 5, 5]))[1].sum(axis=1).tolist() == [2, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_a_kind_are_those_of_its_pairs(kind: str) -> None:
    sampled = sample(200)
    embeddings, person, family = sampled
    chosen = [(i, j) for i, j in combinations(range(200), 2) if kind in kinds_of(person, family, i, j)]
    first, second = np.array(chosen).T
    cosine = (embeddings[first].astype(np.float64) * embeddings[second]).sum(axis=1) / 64
    genuine = person[first] == person[second]
    scores = kind_scores(histogram_of(kind, *pair_histograms(*sampled)), kind, threshold=0.125)
    assert scores["roc_auc"] == pytest.approx(roc_auc_score(genuine, cosine), abs=1e-12)
    assert scores["accuracy"] == pytest.approx(balanced_accuracy_score(genuine, cosine >= 0.125), abs=1e-12)
    assert set(scores) == {"roc_auc", "eer", "tar_at_far_1e-1", "tar_at_far_1e-2", "tar_at_far_1e-3", "accuracy"}
    assert "accuracy" not in kind_scores(histogram_of(kind, *pair_histograms(*sampled)), kind)


def test_a_score_over_no_pairs_is_an_error() -> None:
    embeddings, person, _ = sample()
    pairs, twins = pair_histograms(embeddings, person, person)
    with pytest.raises(DataError, match="twins: scores of 0 genuine and 0 impostor pairs") as caught:
        kind_scores(twins, "twins")
    assert "\n" not in str(caught.value)
    one_family = pair_histograms(embeddings, person, np.zeros_like(person))
    with pytest.raises(DataError, match=r"strangers: scores of \d+ genuine and 0 impostor pairs"):
        kind_scores(histogram_of("strangers", *one_family), "strangers")
    for function in (threshold_at_best_accuracy, lambda histogram: accuracy_at(histogram, 0.0)):
        with pytest.raises(DataError, match="scores of 0 genuine"):
            function(no_twins())
    assert kind_scores(histogram_of("strangers", pairs, twins), "strangers")["roc_auc"] > 0
    with pytest.raises(DataError, match="0 impostor"):
        pair_histograms(signs(3, 1), np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64))


def test_embeddings_that_are_not_finite_stop_it() -> None:
    embeddings, person, family = sample()
    embeddings[3, 0] = np.nan
    with pytest.raises(TrainingFailed, match="not finite"):
        pair_histograms(embeddings, person, family)


# ---------------------------------------------------------------------------------------------------------- threshold


def at(genuine: dict[float, int], impostor: dict[float, int]) -> NDArray[np.int64]:
    histogram = np.zeros((2, NUM_BINS), dtype=np.int64)
    for row, counts in enumerate((genuine, impostor)):
        for cosine, number in counts.items():
            histogram[row, int((cosine + 1) * NUM_BINS / 2)] += number
    return histogram


def test_the_threshold_cuts_a_gap_in_its_middle_and_weighs_both_kinds_alike() -> None:
    # A hundred impostors for each genuine pair: by plain counts "always different" would win.
    histogram = at({0.5: 9, 0.1: 1}, {0.0: 700, 0.3: 300})
    threshold = threshold_at_best_accuracy(histogram)
    # Above 0.3: 9/10 and 1000/1000 are right, so 0.95; above 0.0: 10/10 and 700/1000, so 0.85.
    assert threshold == pytest.approx(0.4, abs=2 / NUM_BINS)
    assert accuracy_at(histogram, threshold) == pytest.approx(0.95)
    assert accuracy_at(histogram, 0.05) == pytest.approx(0.85)
    assert accuracy_at(histogram, -1.0) == pytest.approx(0.5)
    assert accuracy_at(histogram, 1.0) == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_threshold_is_better_and_each_says_which_scores_it_accepts(seed: int) -> None:
    pairs, _ = pair_histograms(*sample(120, seed))
    best = accuracy_at(pairs, threshold_at_best_accuracy(pairs))
    edges = -1 + 2 * np.arange(NUM_BINS + 1) / NUM_BINS
    assert best == pytest.approx(max(accuracy_at(pairs, float(edge)) for edge in edges[::16]), abs=1e-12)
    edge = float(edges[5000])
    assert accuracy_at(at({edge: 1}, {-0.9: 1}), edge) == 1.0
    assert accuracy_at(at({edge: 1}, {-0.9: 1}), edge + 1e-4) == 0.5


# --------------------------------------------------------------------------------------------------------- replicates


def drawn_family_by_family(sampled: Sample, weights: NDArray[np.int64], bins: NDArray[np.int64], kind: str):
    """One replicate: every drawn copy's own pairs, and the pairs of copies of different families."""
    embeddings, person, family = sampled
    families = np.unique(family).tolist()
    copies = [one for one, times in zip(families, weights.tolist(), strict=True) for _ in range(times)]
    pictures = {one: np.flatnonzero(family == one).tolist() for one in families}
    pairs = [(i, j) for one in copies for i, j in combinations(pictures[one], 2)]
    for one, other in combinations(copies, 2):
        pairs += [(i, j) for i in pictures[one] for j in pictures[other] if one != other]
    counts = np.zeros((2, COARSE_BINS), dtype=np.int64)
    for i, j in pairs:
        if kind in kinds_of(person, family, i, j):
            cosine = float(embeddings[i].astype(np.float64) @ embeddings[j]) / 64
            counts[int(person[i] != person[j]), bins[min(int((cosine + 1) * NUM_BINS / 2), NUM_BINS - 1)]] += 1
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_replicates_are_those_drawn_family_by_family(kind: str) -> None:
    sampled = sample(60)
    embeddings, person, family = sampled
    bins = coarse_bins(histogram_of(kind, *pair_histograms(*sampled)))
    weights = person_weights(5, 6, seed=4)
    assert (weights > 1).any()
    expected = [drawn_family_by_family(sampled, row, bins, kind) for row in weights]
    own = bootstrap_histograms(embeddings, person, weights, bins, family=family, kind=kind)
    np.testing.assert_array_equal(own, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_families_count_the_same_pairs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights of one each pair counts once, though three families share a group."""
    sampled = sample(80)
    bins = coarse_bins(histogram_of(kind, *pair_histograms(*sampled)))
    monkeypatch.setattr("common.metrics.bootstrap.MAX_UNITS", 2)
    embeddings, person, family = sampled
    own = bootstrap_histograms(embeddings, person, np.ones((1, 2), dtype=np.int64), bins, family=family, kind=kind)
    expected = one_by_one(sampled, kind)
    np.testing.assert_array_equal(own[0], [np.bincount(bins, row, COARSE_BINS) for row in expected])


def test_families_are_needed_for_kinds_and_weights_are_theirs() -> None:
    embeddings, person, family = sample()
    bins = np.zeros(NUM_BINS, dtype=np.int64)
    with pytest.raises(ValueError, match="need families"):
        bootstrap_histograms(embeddings, person, person_weights(9, 2, 1), bins, kind="twins")
    with pytest.raises(ValueError, match="kind = 'siblings'"):
        bootstrap_histograms(embeddings, person, person_weights(5, 2, 1), bins, family=family, kind="siblings")
    with pytest.raises(ValueError, match=r"must be \[B, 5\]"):
        bootstrap_histograms(embeddings, person, person_weights(9, 2, 1), bins, family=family)


def test_accuracy_of_replicates_is_exact_at_the_threshold() -> None:
    sampled = sample(60)
    embeddings, person, family = sampled
    for kind in KINDS:
        ones = np.ones((1, 5), dtype=np.int64)
        counts = bootstrap_histograms(embeddings, person, ones, accuracy_bins(0.125), family=family, kind=kind)
        expected = accuracy_at(histogram_of(kind, *pair_histograms(*sampled)), 0.125)
        assert replicates({JUDGED: counts})["accuracy"][0] == pytest.approx(expected, abs=1e-12)
    assert np.isnan(replicates({JUDGED: np.zeros((1, 2, COARSE_BINS))})["accuracy"]).all()


def faces(noise: float, seed: int) -> Sample:
    """40 families of two siblings with 6 pictures each; a sibling is near the family's mean."""
    random = np.random.default_rng(7)
    person = np.repeat(np.arange(80), 6)
    means = random.normal(size=(40, 32))[np.arange(80) // 2] + 0.35 * random.normal(size=(80, 32))
    shots = np.random.default_rng(seed).normal(size=(480, 32))
    return (means[person] + noise * shots).astype(np.float32), person, person // 2


def test_the_interval_of_the_twins_gap_is_paired_over_families() -> None:
    """Drawing pairs or people instead would make twins' intervals too narrow; pairing makes the gap's narrower."""
    one, other = faces(0.6, 1), faces(0.62, 1)

    def drawn_of(sampled: Sample, seed: int) -> dict[str, dict[str, NDArray[np.float64]]]:
        drawn, histograms = Drawn.by_seed(*sampled, num_replicates=200, seed=seed), pair_histograms(*sampled)
        return {kind: replicates(drawn.counts(kind, histogram_of(kind, *histograms), 0.8)) for kind in KINDS}

    drawn = [drawn_of(sampled, 3) for sampled in (one, other)]
    apart = drawn_of(other, 4)
    for kind in KINDS:
        expected = kind_scores(histogram_of(kind, *pair_histograms(*one)), kind, threshold=0.8)
        assert drawn[0][kind].keys() == expected.keys()
        for name, values in drawn[0][kind].items():
            low, high = interval(values)
            assert low - 0.01 <= expected[name] <= high + 0.01
    widths = []
    for theirs in (drawn[1], apart):
        low, high = interval(drawn[0]["twins"]["roc_auc"] - theirs["twins"]["roc_auc"])
        widths.append(high - low)
    assert widths[0] < 0.6 * widths[1]
    assert np.mean(drawn[0]["twins"]["roc_auc"]) < np.mean(drawn[0]["strangers"]["roc_auc"]) - 0.02
