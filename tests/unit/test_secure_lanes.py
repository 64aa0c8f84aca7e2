"""A change in lanes of 16 bits: the mean to the bit, and what the words lack of a change is kept for the next."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from secagg_round import exchanged

from common.errors import SecureSumRefused, TrainingFailed
from common.protocol.parameters import Part, manifest_of, trainable_spans
from common.protocol.secure_vector import Layout, Sums, num_shifts, peaks_of, shifts_after
from common.protocol.secure_words import WorkAsked, digest_of_work, read, write
from common.secagg.lanes import BLOCK, MOST_SHIFT
from common.secagg.masks import add_words

SIZES = {"backbone.a": BLOCK + 3, "backbone.b": 5, "backbone.running_mean": 7}
MANIFEST = manifest_of({name: torch.zeros(size) for name, size in SIZES.items()})
PART = Part(whole=MANIFEST, part=MANIFEST, spans=trainable_spans(MANIFEST, {"backbone.a", "backbone.b"}))
SIZE = BLOCK + 15
BLOCKS = [slice(0, BLOCK), slice(BLOCK, BLOCK + 3), slice(BLOCK + 3, BLOCK + 8), slice(BLOCK + 8, SIZE)]
RECEIVED = np.full(SIZE, 0.25, np.float32)
LIMITS = [1.0, 1.0, 1.0, 64.0]  # of the tensors: 4 * 0.25, and of statistics 64 * 1
NOTHING = Sums(evaluations={}, content={})
SHIFTS = "0396"


def layout_of(num, shifts=SHIFTS):
    return Layout(change=PART, splits=(), num_members=num, shifts=shifts)


def steps_of(num, shifts=SHIFTS):
    """The oracle's steps, [size]."""
    steps = np.empty(SIZE)
    for where, limit, digit in zip(BLOCKS, LIMITS, shifts, strict=True):
        steps[where] = limit * 2.0 ** -int(digit, 16) / ((2**15 - 1) // num)
    return steps


def changes_of(num):
    random = np.random.default_rng(num)
    return [(random.normal(0, 0.3, SIZE) * steps_of(num) * 2**15 / num).astype(np.float32) for _ in range(num)]


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("num", [3, 5, 10, 30])
def test_the_opened_sum_is_the_unmasked_sum_to_the_bit(num, lost):
    """Of 3, 5, 10 and 30 sites, with masks, in any order; also where a site's words never come."""
    changes, shares = changes_of(num), [(1 + index) / num for index in range(num)]
    layout, steps, largest = layout_of(num), steps_of(num), (2**15 - 1) // num
    names = tuple(f"site-{index:02d}" for index in range(num))
    round_ = exchanged(names, threshold=num - lost)
    sent = {}
    for name, change, share in list(zip(names, changes, shares, strict=True))[lost:]:
        coded = layout.in_words(change, RECEIVED, share)
        sent[name] = round_.masked(name, layout.words(coded, NOTHING), lanes=layout.lanes)
    opened = round_.unmasked(dict(reversed(sent.items())), lanes=layout.lanes)
    codes = [
        np.clip(np.rint(change.astype(np.float64) * share / steps), -largest, largest)
        for change, share in zip(changes[lost:], shares[lost:], strict=True)
    ]
    whole = sum(shares[lost:])
    assert np.array_equal(layout.mean(opened, RECEIVED, whole), (sum(codes) * steps / whole).astype(np.float32))
    saturated = sum(
        int((np.abs(np.rint(change.astype(np.float64) * share / steps)) > largest).sum())
        for change, share in zip(changes[lost:], shares[lost:], strict=True)
    )
    assert layout.sums(opened).saturated == saturated


def test_every_site_at_its_limit_does_not_go_over():
    num = 30
    layout = layout_of(num)
    total = np.zeros(layout.size, np.uint32)
    for _ in range(num):
        add_words(
            total, layout.words(layout.in_words(np.full(SIZE, 1e9, np.float32), RECEIVED, 1.0), NOTHING), layout.lanes
        )
    limits = np.concatenate([np.full(len(range(*w.indices(SIZE))), lim * 2.0 ** -int(d, 16))
                             for w, lim, d in zip(BLOCKS, LIMITS, SHIFTS, strict=True)])  # fmt: skip
    np.testing.assert_allclose(layout.mean(total, RECEIVED, float(num)), limits, rtol=1e-6)
    assert layout.sums(total).saturated == num * SIZE


def test_what_is_sent_and_what_is_lost_are_the_change():
    change, share = changes_of(3)[0], 0.4
    layout = layout_of(3)
    coded = layout.in_words(change, RECEIVED, share)
    lost, num_cut = layout.lost(change, coded, RECEIVED, share)
    sent = layout.mean(layout.words(coded, NOTHING), RECEIVED, share)
    np.testing.assert_allclose(sent + lost, change, rtol=1e-5, atol=1e-7)
    assert num_cut == 0
    inside = np.abs(change * share) < steps_of(3) * 10922
    assert (np.abs(lost)[inside] <= 0.5001 * steps_of(3)[inside] / share).all()


def test_a_change_that_is_too_large_is_carried_along_for_one_range_and_no_more():
    change = np.zeros(SIZE, np.float32)
    change[[0, BLOCK]] = 1.75, 1.0  # limits 1 and an eighth
    layout = layout_of(3)
    coded = layout.in_words(change, RECEIVED, 1.0)
    lost, num_cut = layout.lost(change, coded, RECEIVED, 1.0)
    assert (coded.saturated, num_cut) == (2, 1)
    assert lost[[0, BLOCK]].tolist() == [0.75, 0.125]
    assert not lost[1:BLOCK].any()
    change[0] = 5.0  # of a site that counts for a half: its range is twice as wide
    lost, num_cut = layout.lost(change, layout.in_words(change, RECEIVED, 0.5), RECEIVED, 0.5)
    assert (lost[0], num_cut) == (2.0, 2)


def test_words_of_32_bits_lose_next_to_nothing_and_say_it():
    """The first round's, where no change was before."""
    change = np.random.default_rng(0).normal(0, 0.1, SIZE).astype(np.float32)
    layout = layout_of(3, shifts="")
    coded = layout.in_words(change, RECEIVED, 1.0)
    lost, num_cut = layout.lost(change, coded, RECEIVED, 1.0)
    assert (layout.lanes, layout.num_change_words, coded.saturated, num_cut) == (0, SIZE, 0, 0)
    assert np.abs(lost[: BLOCK + 8]).max() < 1e-9


def test_lanes_take_half_the_words_and_counts_the_same():
    lanes, words = layout_of(3), layout_of(3, shifts="")
    assert lanes.lanes == lanes.num_change_words == -(-SIZE // 2)
    assert words.size - lanes.size == SIZE // 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_change_that_is_not_finite_has_no_words(bad):
    change = np.zeros(SIZE, np.float32)
    change[-1] = bad
    with pytest.raises(TrainingFailed, match="not finite"):
        layout_of(3).in_words(change, RECEIVED, 1.0)


def test_no_block_reaches_over_two_tensors_and_each_has_the_shift_of_its_largest_element():
    change = np.zeros(SIZE, np.float32)
    change[[0, BLOCK - 1]] = 1e-3, -0.01
    change[BLOCK + 3] = 0.5
    peaks = peaks_of(PART, change)
    assert peaks.tolist() == [np.float32(0.01), 0.0, 0.5, 0.0]
    assert num_shifts(PART) == 4
    # 8 * 0.01 within 1 / 8; nothing moved; 8 * 0.5 is more than the tensor's own limit; of statistics nothing moved
    assert shifts_after(PART, RECEIVED, peaks) == f"3{MOST_SHIFT:x}0{MOST_SHIFT:x}"
    peaks[3] = 2.0  # of the last tensor, whose limit is another: 64 = 2**2 * 8 * 2
    assert shifts_after(PART, RECEIVED, peaks) == f"3{MOST_SHIFT:x}02"


def test_steps_of_another_model_are_refused():
    for shifts in ("0", SHIFTS + "0"):
        with pytest.raises(SecureSumRefused, match=r"steps came, and the change has 4 blocks"):
            layout_of(3, shifts=shifts)
    with pytest.raises(SecureSumRefused, match="none of ours"):
        layout_of(3, shifts="00x0").in_words(np.zeros(SIZE, np.float32), RECEIVED, 1.0)


WORK = WorkAsked(attempt=1, members=("a", "b", "c"), shares={}, most_examples=9, most_pictures=0, shifts=SHIFTS)


def test_steps_travel_with_the_work_and_masks_follow_from_them():
    assert read(WorkAsked, write(WORK)) == WORK
    others = SimpleNamespace(**(vars(WORK) | {"shifts": "0397"}))
    told = [digest_of_work(work, words={}, model_sha256="00") for work in (WORK, others)]
    assert told[0] != told[1]


@pytest.mark.parametrize("shifts", [7, None, "\u0661", ["0"]])
def test_steps_that_are_no_text_are_malformed(shifts):
    text = write(vars(WORK) | {"shifts": shifts})
    with pytest.raises(SecureSumRefused, match="malformed"):
        read(WorkAsked, text)
