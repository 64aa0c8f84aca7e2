"""One site's words of a masked sum: what goes in comes out of the sum, each number in its place."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from common.errors import SecureSumRefused, TrainingFailed
from common.metrics.group_names import GROUPS, attributes_of, group_names
from common.metrics.groups import GROUP_ROW
from common.metrics.sums import COUNTS, ClosedSetSums, EvaluationSums, pooled
from common.protocol.parameters import Part, manifest_of
from common.protocol.secure_vector import CONTENT, Layout, Sums, layout_of, ranges
from common.secagg.quantise import COUNT_WORDS

STATE = {"conv": torch.zeros(3), "bn.running_var": torch.zeros(2, 2), "fc": torch.zeros(2)}
PART = Part.of(manifest_of(STATE), moving=set(STATE), trainable={"conv", "fc"})
RECEIVED = np.array([0.5, -0.7, 0.0, 3.0, 1.0, 0.0, -3.0, 0.0, 0.01], dtype=np.float32)
LIMITS = [4.0, 256.0, 1.0]  # the powers of two at and above 4 * 0.7, 64 * 3.0, 4 * 0.25
ROUND = Layout(change=PART, splits=("val", "test"), num_members=3)
STEP = 1 / ((2**31 - 1) // 3)


def sums_of(number):
    """Sums of which no two numbers are equal, another for each number."""
    random = np.random.default_rng(number)
    closed = {f.name: f.type(100 * number + place + 0.5) for place, f in enumerate(fields(ClosedSetSums))}
    arrays = {name: random.integers(0, 2**36, shape) for name, shape in COUNTS.items() if shape}
    return EvaluationSums(closed=ClosedSetSums(**closed), **arrays)


def in_words(change, received, share, sums):
    """A site's words of a round, and how many elements were cut."""
    coded = ROUND.in_words(change, received, share)
    return ROUND.words(coded, sums), coded.saturated


def content_of(number):
    return {name: number + place / 4 for place, name in enumerate(CONTENT)}


def test_the_sum_of_three_sites_words_is_all_their_sums_each_in_its_place():
    given = [Sums(evaluations={"val": sums_of(n), "test": sums_of(n + 3)}, content=content_of(n)) for n in (1, 2, 3)]
    changes = [np.full(PART.part.size, 0.001 * n, dtype=np.float32) for n in (1, 2, 3)]
    total = np.zeros(ROUND.size, dtype=np.uint32)
    for change, share, own in zip(changes, (1.0, 0.5, 0.25), given, strict=True):
        words, saturated = in_words(change, RECEIVED, share, own)
        assert (words.dtype, words.shape, saturated) == (np.uint32, (ROUND.size,), 0)
        total += words
    found = ROUND.sums(total)
    assert list(found.evaluations) == ["val", "test"]
    for split, first in (("val", 1), ("test", 4)):
        wanted = pooled({str(n): sums_of(n) for n in range(first, first + 3)})
        assert found.evaluations[split].closed == wanted.closed
        for name, shape in COUNTS.items():
            if shape:
                assert np.array_equal(getattr(found.evaluations[split], name), getattr(wanted, name)), name
    assert found.content == {"correct": 6.0, "loss_sum": 6.75, "gradient_norm_sum": 7.5}
    assert found.saturated == 0
    mean = ROUND.mean(total, RECEIVED, shares=1.75)
    limits = np.repeat(LIMITS, [3, 4, 2])
    exact = (0.001 + 0.5 * 0.002 + 0.25 * 0.003) / 1.75
    assert mean.dtype == np.float32
    assert (np.abs(mean - exact) <= limits * STEP * 1.5 / 1.75 + 1e-10).all()


def test_each_tensors_range_is_the_power_of_two_at_or_above_so_many_times_its_largest_number():
    found = ranges(PART, RECEIVED)
    assert found == list(zip([slice(0, 3), slice(3, 7), slice(7, 9)], LIMITS, strict=True))
    at_a_power = np.array([0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0, -0.25], dtype=np.float32)
    assert [limit for _, limit in ranges(PART, at_a_power)] == [4.0, 128.0, 1.0]
    assert [limit for _, limit in ranges(PART, np.zeros(9, np.float32))] == [1.0, 64.0, 1.0]


def test_what_is_beyond_the_range_becomes_it_and_is_counted_in_the_sum():
    change = np.array([5.0, -4.5, 4.0, 300.0, 0.0, 256.0, 0.0, 1.1, -1.0], dtype=np.float32)
    nothing = Sums(evaluations={}, content={})
    words, saturated = in_words(change, RECEIVED, 1.0, nothing)
    assert saturated == 4
    other, none = in_words(change, RECEIVED, 0.5, nothing)  # by its weight it is in it
    assert none == 0
    total = words + other
    assert ROUND.sums(total).saturated == 4
    clipped = np.array([4.0, -4.0, 4.0, 256.0, 0.0, 256.0, 0.0, 1.0, -1.0])
    np.testing.assert_allclose(ROUND.mean(total, RECEIVED, 1.5), (clipped + change * 0.5) / 1.5, rtol=1e-7)


def test_a_split_that_a_site_keeps_to_itself_adds_nothing():
    empty, _ = in_words(np.zeros(9, np.float32), RECEIVED, 1.0, Sums(evaluations={}, content={}))
    assert not empty.any()
    words, _ = in_words(
        np.zeros(9, np.float32), RECEIVED, 1.0, Sums(evaluations={"test": sums_of(1)}, content={"loss_sum": 2.0})
    )
    found = ROUND.sums(words)
    assert found.evaluations["test"].closed == sums_of(1).closed
    assert found.evaluations["val"].closed.num_examples == 0
    assert not any(counts.any() for counts in found.evaluations["val"].arrays().values())
    assert found.content == {"correct": 0.0, "loss_sum": 2.0, "gradient_norm_sum": 0.0}


def test_an_evaluation_has_no_change_and_no_sums_of_training():
    layout = Layout(change=None, splits=("val",), num_members=64)
    counts = 4 * 8192 + int(np.prod(COUNTS["folds"])) + 3 + 1  # pairs and twins, folds, whole numbers, the saturated
    assert layout.size == 2 * counts + 3 * 4
    words = layout.words(None, Sums(evaluations={"val": sums_of(2)}, content=content_of(1)))
    found = layout.sums(words)
    assert (found.saturated, found.content) == (0, {})
    assert found.evaluations["val"].closed == sums_of(2).closed
    with pytest.raises(ValueError, match="no change was sent"):
        layout.mean(words, RECEIVED, 1.0)
    assert Layout(change=PART, splits=("val",), num_members=3).size == layout.size + 9 + 3 * len(CONTENT)
    assert Layout(change=PART, splits=(), num_members=3).size == 9 + 2 + 3 * len(CONTENT)


def test_groups_have_words_where_they_are_asked_for_and_come_out_of_the_sum():
    by, splits = "Male,Young", ("val", GROUPS)
    layout, without = (layout_of(None, given, num_members=3, by=by) for given in (splits, splits[:1]))
    shape = (len(group_names(attributes_of(by))), GROUP_ROW)
    assert (layout.splits, layout.num_groups, without.num_groups) == (("val",), shape[0], 0)
    assert layout.size - without.size == COUNT_WORDS * shape[0] * shape[1]
    groups = np.arange(1, 1 + shape[0] * shape[1]).reshape(shape)
    own = Sums(evaluations={"val": sums_of(1)}, content={}, groups=groups)
    total = layout.words(None, own) + layout.words(None, own) + layout.words(None, replace(own, groups=None))
    found = layout.sums(total)
    assert np.array_equal(found.groups, 2 * groups)
    assert found.evaluations["val"].closed == pooled({name: sums_of(1) for name in "abc"}).closed
    assert without.sums(without.words(None, replace(own, groups=None))).groups is None


def test_what_cannot_be_added_is_refused():
    good = Sums(evaluations={"val": sums_of(1)}, content={})
    with pytest.raises(TrainingFailed, match="not finite"):
        in_words(np.full(9, np.nan, np.float32), RECEIVED, 1.0, good)
    with pytest.raises(TrainingFailed, match="not finite"):
        in_words(np.zeros(9, np.float32), RECEIVED, 1.0, replace(good, content={"loss_sum": np.inf}))
    many = replace(sums_of(1), pairs=sums_of(1).pairs + 2**48)
    with pytest.raises(SecureSumRefused, match="more than 48 bits"):
        in_words(np.zeros(9, np.float32), RECEIVED, 1.0, Sums(evaluations={"val": many}, content={}))
