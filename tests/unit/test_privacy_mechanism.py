"""The Gaussian mechanism: clipping is a bound, noise is what it claims to be, and the claimed epsilon holds."""

import math

import numpy as np
import pytest

from common.privacy.accounting import epsilon_of
from common.privacy.mechanism import GRID, PIECE, add_clipped, norm, released, standard_normal

SEED, OTHER = bytes(range(32)), bytes(range(1, 33))


def noise_of(seed, number):
    values = np.empty(number)
    for where, part in standard_normal(seed, number):
        values[where] = part
    return values


def test_a_clipped_change_is_never_longer_and_a_short_one_stays():
    change = np.array([3.0, 4.0], dtype=np.float32)
    for clip, expected in ((1.0, change / 5.0), (5.0, change), (50.0, change)):
        total = np.zeros(2)
        assert add_clipped(total, change, clip) == pytest.approx(5.0)
        np.testing.assert_allclose(total, expected, rtol=1e-5)
        assert math.hypot(*total) <= clip
    total = np.ones(2)
    add_clipped(total, np.array([np.inf, 1.0], dtype=np.float32), 1.0)
    add_clipped(total, np.zeros(2, dtype=np.float32), 1.0)
    np.testing.assert_array_equal(total, np.ones(2))
    assert norm(np.full(PIECE + 1, 2.0, dtype=np.float32)) == pytest.approx(2.0 * math.sqrt(PIECE + 1))


def test_noise_is_normal_independent_and_of_its_seed():
    """Mean, deviation, quantiles and neighbours' correlation of 500,001 numbers, within five standard errors."""
    number = 500_001
    values = noise_of(SEED, number)
    assert values.shape == (number,)
    assert abs(values.mean()) < 5 / math.sqrt(number)
    assert abs(values.std() - 1.0) < 5 / math.sqrt(2 * number)
    for level, share in ((-2.0, 0.0227501), (0.0, 0.5), (1.0, 0.8413447), (3.0, 0.9986501)):
        assert abs((values <= level).mean() - share) < 5 * math.sqrt(share * (1 - share) / number)
    for apart in (1, 2, PIECE // 2):
        assert abs(np.mean(values[apart:] * values[:-apart])) < 5 / math.sqrt(number - apart)
    np.testing.assert_array_equal(values[:1000], noise_of(SEED, number)[:1000])
    assert abs(np.mean(values * noise_of(OTHER, number))) < 5 / math.sqrt(number)


def test_what_is_released_is_the_sum_with_noise_on_a_grid_in_the_chosen_places_only():
    total = np.full(20_000, 30.0)
    deviation, divisor = 3.0, 4.0
    found = released(total, [slice(0, 8000), slice(12_000, 20_000)], deviation=deviation, divisor=divisor, seed=SEED)
    assert found.dtype == np.float32
    assert not found[8000:12_000].any()
    here = np.concatenate([found[:8000], found[12_000:]]).astype(np.float64) * divisor
    assert here.mean() == pytest.approx(30.0, abs=5 * deviation / math.sqrt(len(here)))
    assert here.std() == pytest.approx(deviation, rel=0.03)
    step = 2.0 ** math.floor(math.log2(deviation / GRID))
    np.testing.assert_array_equal(np.rint(here / step) * step, here)


def lower_bound_of_epsilon(mechanism, *, sensitivity, delta, trials):
    """The largest epsilon that a threshold test on the answers shows, less five standard errors.

    Each element of a buffer is one answer to a query that is 0 on one data set and `sensitivity` on its neighbour: for
    every event, P' <= e^epsilon P + delta (arXiv:1805.10277 tries such events likewise).
    """
    without = mechanism(np.zeros(trials), SEED)
    with_one = mechanism(np.full(trials, sensitivity), OTHER)
    best = 0.0
    for level in np.linspace(-2.0 * sensitivity, 4.0 * sensitivity, 61):
        rare, often = (without > level).mean(), (with_one > level).mean()
        rare += 5 * math.sqrt(rare * (1 - rare) / trials) + 25 / trials
        often -= 5 * math.sqrt(often * (1 - often) / trials)
        if often > delta:
            best = max(best, math.log((often - delta) / rare))
    return best


@pytest.mark.parametrize(("factor", "holds"), [(1.0, True), (0.5, False)])
def test_the_claimed_epsilon_holds_and_would_not_with_half_the_noise(factor, holds):
    clip, multiplier, delta, groups = 0.7, 1.0, 0.05, 8
    sensitivity = 2.0 * clip
    claimed = epsilon_of(1.0 / multiplier, delta)

    def answer(total, seed):
        everything = [slice(0, len(total))]
        found = released(total, everything, deviation=factor * multiplier * sensitivity, divisor=groups, seed=seed)
        return found.astype(np.float64) * groups

    found = lower_bound_of_epsilon(answer, sensitivity=sensitivity, delta=delta, trials=400_000)
    assert (found <= claimed) is holds
    assert found > 0.75 * claimed  # a test that finds nothing would hold for any noise
