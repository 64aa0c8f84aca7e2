"""Thresholds do what they say on the pairs they were chosen on, are stated only where there are pairs, and survive."""

import json

import numpy as np
import pytest

from common.errors import DataError
from common.metrics.figures import accepted_from, eer, judged, wilson
from common.metrics.pairs import pair_histogram
from common.metrics.sums import NUM_BINS
from common.metrics.thresholds import FARS, LEAST_FALSE_ACCEPTS, Thresholds, thresholds_from


def people(seed, num_people=30, pictures=6, spread=0.8):
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(num_people, 1, 32))
    embeddings = (centres + spread * generator.normal(size=(num_people, pictures, 32))).reshape(-1, 32)
    return embeddings.astype(np.float32), np.repeat(np.arange(num_people), pictures)


def scores_of(embeddings, person):
    """All cosines, by brute force: (genuine, impostor)."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosine, same = unit @ unit.T, person[:, None] == person[None]
    above = np.triu(np.ones_like(same), k=1)
    return cosine[same & above], cosine[~same & above]


def test_each_threshold_does_on_the_scores_what_it_says():
    """Against the scores themselves, without histograms; a bin holds 0.000244 of cosine."""
    drawn = people(1)
    genuine, impostor = scores_of(*drawn)
    found = thresholds_from([pair_histogram(*drawn)])
    assert [row.far for row in found.rows] == [1e-1, 1e-2, 1e-3]
    for row in found.rows:
        assert row.measured_far <= row.far
        assert row.measured_far == pytest.approx((impostor >= row.threshold).mean(), abs=1e-4)
        assert row.measured_tar == pytest.approx((genuine >= row.threshold).mean(), abs=2e-3)
        one_bin_lower = row.threshold - 2.0 / NUM_BINS
        assert (impostor >= one_bin_lower).mean() > row.far - 1e-4, "no lower threshold keeps the FAR"
        assert row.far_low <= row.measured_far <= row.far_high
        assert row.tar_low <= row.measured_tar <= row.tar_high
    assert [row.threshold for row in found.rows] == sorted(row.threshold for row in found.rows)


def test_the_counts_and_the_eer_are_those_of_the_pairs():
    drawn = people(2)
    histogram = pair_histogram(*drawn)
    found = thresholds_from([histogram])
    assert (found.num_genuine_pairs, found.num_impostor_pairs) == tuple(histogram.sum(axis=1))
    assert found.num_people == 30
    assert found.eer == float(eer(histogram))
    rejected, accepted = judged(histogram, found.eer_threshold)[0, 0], judged(histogram, found.eer_threshold)[1, 1]
    fnmr, fmr = rejected / found.num_genuine_pairs, accepted / found.num_impostor_pairs
    assert abs(fnmr - fmr) < 0.01
    assert sum(found.genuine) == found.num_genuine_pairs
    assert sum(found.impostor) == found.num_impostor_pairs


@pytest.mark.parametrize(("num_impostor", "supported"), [(99, 0), (100, 1), (9_999, 2), (10_000, 3), (100_000, 4)])
def test_a_far_is_stated_only_with_enough_impostor_pairs(num_impostor, supported):
    """LEAST_FALSE_ACCEPTS are expected: 10 / 1e-3 = 10,000 pairs for FAR 1e-3."""
    histogram = np.zeros((2, NUM_BINS), dtype=np.int64)
    histogram[0, 8000], histogram[1, 4000] = 10, num_impostor
    found = thresholds_from([histogram])
    assert len(found.rows) == supported
    assert found.unsupported == FARS[supported:]
    for far in found.unsupported:
        with pytest.raises(DataError, match=f"impostor pairs of validation people are needed, {num_impostor:,} there"):
            found.at(far)
    for row in found.rows:
        assert found.at(row.far) is row
        assert accepted_from(row.threshold) == 4001
    with pytest.raises(DataError, match=r"no threshold at FAR 0\.5; choose one of"):
        found.at(0.5)
    assert LEAST_FALSE_ACCEPTS == 10


def test_clients_pool_by_addition_and_their_people_add_up():
    one, other = (pair_histogram(*people(seed, num_people=n)) for seed, n in ((3, 12), (4, 20)))
    found, as_one = thresholds_from([one, other]), thresholds_from([one + other])
    assert found.num_people == 32
    assert [row.threshold for row in found.rows] == [row.threshold for row in as_one.rows]
    row, pairs_of_people = found.at(0.1), 12 * 11 // 2 + 20 * 19 // 2
    assert (row.far_low, row.far_high) == pytest.approx(wilson(row.measured_far * pairs_of_people, pairs_of_people))
    assert (row.tar_low, row.tar_high) == pytest.approx(wilson(row.measured_tar * 32, 32))


def test_what_is_kept_as_json_comes_back():
    found = thresholds_from([pair_histogram(*people(5))], {"landmarks": 2, "centre square": 1})
    again = Thresholds.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    former = {name: value for name, value in found.to_json().items() if name != "cuts"}
    assert Thresholds.from_json(former).cuts == {}
    with pytest.raises(ValueError, match="cuts are landmarks, box"):
        Thresholds.from_json(found.to_json() | {"cuts": {"by hand": 1}})


@pytest.mark.parametrize("content", [{}, {"rows": []}, {"rows": [{"far": "x"}], "genuine": [], "impostor": []}])
def test_other_json_is_refused(content):
    with pytest.raises((KeyError, TypeError, ValueError)):
        Thresholds.from_json(content)


def test_without_pairs_of_both_sorts_there_are_none():
    with pytest.raises(DataError, match="0 genuine and 0 impostor"):
        thresholds_from([np.zeros((2, NUM_BINS), dtype=np.int64)])
