"""Integers for real numbers: sums that cannot overflow, an error that is known, and nothing cut without a count."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import SecureSumRefused, TrainingFailed
from common.secagg.keys import MOST_MEMBERS
from common.secagg.quantise import (
    PIECE,
    counts_to_words,
    dequantise,
    largest_code,
    quantise,
    reals_to_words,
    words_to_counts,
    words_to_reals,
)


def added(vectors):
    total = np.zeros_like(vectors[0])
    for vector in vectors:
        total += vector
    return total


@settings(deadline=None, max_examples=60)
@given(
    num=st.integers(1, MOST_MEMBERS),
    limit=st.floats(1e-6, 1e6),
    seed=st.integers(0, 2**32),
    edge=st.sampled_from([-1, 1]),
)
def test_a_sum_is_the_members_sum_to_half_a_step_each(num, limit, seed, edge):
    """The first element of every member is the limit itself, the largest sum there is."""
    changes = np.random.default_rng(seed).uniform(-limit, limit, (num, 7))
    changes[:, 0] = edge * limit
    words = [quantise(change, num, limit)[0] for change in changes]
    step = limit / largest_code(num)
    error = np.abs(dequantise(added(words), num, limit) - changes.sum(axis=0))
    assert error.max() <= 0.5 * step * num * (1 + 1e-6)


def test_the_step_of_three_members_is_a_few_billionths_of_the_limit():
    """limit * 3 / (2**31 - 1) = 1.4e-9 of it, so a rounded element is 7e-10 off at most."""
    words, saturated = quantise(np.array([1.0, -1.0, 1e-9, 0.0]), 3, 1.0)
    assert words.view(np.int32).tolist() == [715827882, -715827882, 1, 0]
    assert saturated == 0


def test_what_is_beyond_the_limit_is_counted():
    change = np.zeros(PIECE + 3, np.float32)
    change[[0, 5, PIECE]] = [3.0, -2.5, 2.0]  # in two pieces
    words, saturated = quantise(change, 4, 2.0)
    assert saturated == 2
    assert dequantise(words, 4, 2.0)[[0, 5, PIECE]].tolist() == [2.0, -2.0, 2.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_no_integer(bad):
    values = np.array([0.0, bad])
    for code in (
        lambda: quantise(values, 3, 1.0),
        lambda: reals_to_words(values),
    ):
        with pytest.raises(TrainingFailed, match="not finite"):
            code()


@pytest.mark.parametrize("limit", [0.0, -1.0, np.inf, np.nan])
def test_a_limit_is_a_number_above_nothing(limit):
    with pytest.raises(ValueError, match="must be finite and above 0"):
        quantise(np.zeros(1), 3, limit)


@pytest.mark.parametrize("num", [0, MOST_MEMBERS + 1])
def test_more_members_than_fit_are_refused(num):
    with pytest.raises(ValueError, match="1 to 64 are possible"):
        largest_code(num)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 2**48 - 1), min_size=1, max_size=6), st.integers(1, MOST_MEMBERS))
def test_counts_add_exactly(counts, num):
    values = np.array(counts, np.int64).reshape(1, -1)
    total = added([counts_to_words(values)] * num)
    np.testing.assert_array_equal(words_to_counts(total, values.shape), values * num)


def test_a_count_that_no_sum_can_hold_is_refused():
    with pytest.raises(SecureSumRefused, match="more than 48 bits"):
        counts_to_words(np.array([2**48]))
    with pytest.raises(SecureSumRefused, match=r"2\*\*42"):
        reals_to_words(np.array([5e12]))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=MOST_MEMBERS))
def test_real_numbers_add_to_half_a_step_each(numbers):
    total = words_to_reals(added([reals_to_words(np.array([number, 1.5])) for number in numbers]))
    assert abs(total[0] - sum(numbers)) <= len(numbers) * 2**-21 + 1e-6
    assert total[1] == 1.5 * len(numbers)
