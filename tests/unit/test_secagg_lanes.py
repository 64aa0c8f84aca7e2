"""Words of 16 bits: their sums cannot overflow, a step is the block's own, and what is beyond its range is counted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_round import NAMES, exchanged

from common.errors import SecureSumRefused, TrainingFailed
from common.secagg.keys import MOST_MEMBERS
from common.secagg.lanes import (
    BLOCK,
    HEADROOM,
    MOST_SHIFT,
    by_element,
    dequantise,
    in_text,
    largest_code,
    limits_of,
    num_blocks,
    of_text,
    packed,
    quantise,
    shifts_for,
    unpacked,
)
from common.secagg.masks import PIECE, add_masks, add_words

SIZE = 3 * BLOCK - 5  # of a tensor of two blocks and a part
LIMITS = limits_of(np.array([0, 3, 12], np.uint8), 2.0)


@settings(deadline=None, max_examples=60)
@given(num=st.integers(1, MOST_MEMBERS), seed=st.integers(0, 2**32), edge=st.sampled_from([-1, 1]))
def test_a_sum_is_the_members_sum_to_half_a_step_each_also_at_the_limit(num, seed, edge):
    """The first element of every member is its limit itself, the largest sum there is."""
    limit = by_element(LIMITS, SIZE)
    changes = np.random.default_rng(seed).uniform(-1, 1, (num, SIZE)) * limit
    changes[:, 0] = edge * limit[0]
    total = np.zeros(SIZE, np.uint16)
    for change in changes:
        lanes, saturated = quantise(change, num, LIMITS)
        assert saturated == 0
        total += lanes
    error = np.abs(dequantise(total, num, LIMITS) - changes.sum(axis=0))
    assert (error <= 0.5 * limit / largest_code(num) * num * (1 + 1e-9)).all()


def test_the_codes_of_three_members_are_what_the_block_makes_of_them():
    """(2**15 - 1) / 3 is 10,922: a step of the first block is 2 / 10,922, of the second an eighth of that."""
    change = np.zeros(SIZE)
    change[[0, 1, 2, BLOCK]] = 2.0, 1.0, -2.0 / 10922, 1.0 / 8
    lanes, saturated = quantise(change, 3, LIMITS)
    assert lanes.view(np.int16)[[0, 1, 2, BLOCK]].tolist() == [10922, 5461, -1, 5461]
    assert saturated == 0


def test_what_is_beyond_a_blocks_limit_becomes_it_and_is_counted():
    change = np.zeros(SIZE)
    change[[0, BLOCK, 2 * BLOCK]] = 1.9, -1.9, 1.9  # within the first block's limit alone
    lanes, saturated = quantise(change, 5, LIMITS)
    assert saturated == 2
    assert dequantise(lanes, 5, LIMITS)[[BLOCK, 2 * BLOCK]] == pytest.approx([-0.25, 2.0**-11])


def test_a_shift_leaves_a_change_its_headroom_and_is_the_largest_that_does():
    limit, random = 2.0, np.random.default_rng(0)
    peaks = (10.0 ** random.uniform(-3, 0, 1000)).astype(np.float32)
    shifts = shifts_for(peaks, limit)
    within = limits_of(shifts, limit)
    inside = (shifts > 0) & (shifts < MOST_SHIFT)
    assert inside.sum() > 300
    assert (within[inside] >= HEADROOM * peaks[inside]).all()
    assert (within[inside] < 2 * HEADROOM * peaks[inside]).all()


@pytest.mark.parametrize(("peak", "shift"), [(0.0, MOST_SHIFT), (1e-38, MOST_SHIFT), (1e30, 0), (2.0, 0), (0.125, 1)])
def test_no_change_and_an_endless_one_have_the_last_shifts_there_are(peak, shift):
    assert shifts_for(np.array([peak], np.float32), 2.0).tolist() == [shift]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_no_lane(bad):
    with pytest.raises(TrainingFailed, match="not finite"):
        quantise(np.array([0.0, bad]), 3, LIMITS)


def test_numbers_that_cannot_be_are_refused():
    for num in (0, MOST_MEMBERS + 1):
        with pytest.raises(ValueError, match="1 to 64 are possible"):
            largest_code(num)
    for limit in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="must be finite and above 0"):
            limits_of(np.zeros(1, np.uint8), limit)


def test_shifts_travel_as_a_digit_each():
    shifts = np.arange(MOST_SHIFT + 1, dtype=np.uint8)
    assert in_text(shifts) == "0123456789abc"
    np.testing.assert_array_equal(of_text(in_text(shifts)), shifts)
    for text in ("0d1", "-1", "1 2", "A", "\u0661"):
        with pytest.raises(SecureSumRefused, match="none of ours"):
            of_text(text)


@pytest.mark.parametrize("size", [0, 1, 2, 7, BLOCK])
def test_lanes_lie_two_in_a_word_with_the_first_below(size):
    lanes = np.arange(1, size + 1, dtype=np.uint16)
    words = packed(lanes)
    assert (words.dtype, len(words)) == (np.uint32, -(-size // 2))
    np.testing.assert_array_equal(unpacked(words, size), lanes)
    if size > 1:
        assert int(words[0]) == 1 + 2 * 2**16
    assert num_blocks(size) == -(-size // 512)


# -- lanes and masks ---------------------------------------------------------------------------------------------------

LANES = PIECE + 7  # words that are two lanes, which end within a piece of the masks
WHOLE = 2 * PIECE + 5


def test_nothing_carries_from_a_lane_into_its_neighbour():
    total = np.full(WHOLE, 2**32 - 1, np.uint32)
    add_words(total, np.ones(WHOLE, np.uint32), LANES)
    assert set(total[:LANES].tolist()) == {0xFFFF0000}  # the lower lane went over, the upper one stays
    assert not total[LANES:].any()


def test_masks_on_lanes_cancel_lane_by_lane():
    """A mask that carried would be out by one in the neighbour: both orders of adding give the same."""
    start = np.random.default_rng(0).integers(0, 2**32, WHOLE, dtype=np.uint32)
    vector = start.copy()
    add_masks(vector, [(bytes(32), 1)], lanes=LANES)
    lower, upper = (start ^ vector)[:LANES] & 0xFFFF, (start ^ vector)[:LANES] >> 16
    assert (lower != 0).mean() > 0.999
    assert (upper != 0).mean() > 0.999
    add_masks(vector, [(bytes(32), -1)], lanes=LANES)
    np.testing.assert_array_equal(vector, start)
    stream = np.zeros(WHOLE, np.uint32)
    add_masks(stream, [(bytes(32), 1)])
    add_masks(vector, [(bytes(32), 1)], lanes=LANES)
    for shift in (0, 16):
        lane = ((start >> shift) + (stream >> shift)) & 0xFFFF
        np.testing.assert_array_equal((vector >> shift)[:LANES] & 0xFFFF, lane[:LANES])
    np.testing.assert_array_equal(vector[LANES:], (start + stream)[LANES:])


@pytest.mark.parametrize("lost", [(), ("cyd",)])
def test_the_opened_sum_is_the_survivors_sum_lane_by_lane(lost):
    random = np.random.default_rng(0)
    vectors = {name: random.integers(0, 2**32, WHOLE, dtype=np.uint32) for name in NAMES}
    round_ = exchanged()
    sent = {name: round_.masked(name, vectors[name], lanes=LANES) for name in NAMES if name not in lost}
    opened = round_.unmasked(sent, lanes=LANES)
    pairs = np.sum([vectors[name][:LANES].view(np.uint16) for name in sent], axis=0, dtype=np.uint16)
    np.testing.assert_array_equal(opened[:LANES].view(np.uint16), pairs)
    words = np.sum([vectors[name][LANES:] for name in sent], axis=0, dtype=np.uint32)
    np.testing.assert_array_equal(opened[LANES:], words)
