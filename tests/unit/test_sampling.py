"""Who works in a round: drawn by name, the same anywhere, all of them over time; and nobody asked twice in a wave."""

import dataclasses

import numpy as np
import pytest
from tiny_federation import settings_with

from server.exchange.roster import is_sampled, replies_needed, sample, waves

NAMES = {f"c-{number:04d}": number for number in range(200)}


def federation(wanted, **values):
    return dataclasses.replace(settings_with(federation__clients_per_round=wanted).federation, **values)


def test_a_sample_is_of_that_size_in_order_of_names_and_new_each_round():
    first, second = (sample(NAMES, federation(20), seed=1, server_round=r) for r in (1, 2))
    assert len(first) == 20
    assert list(first) == sorted(first)
    assert all(NAMES[name] == value for name, value in first.items())
    assert first != second
    assert sample(dict(reversed(NAMES.items())), federation(20), seed=1, server_round=1) == first
    assert sample(NAMES, federation(20), seed=2, server_round=1) != first


def test_everybody_works_where_all_are_wanted_or_fewer_are_here():
    for wanted in ("all", 200, 500):
        assert sample(NAMES, federation(wanted), seed=1, server_round=1) == NAMES
        assert not is_sampled(NAMES, federation(wanted))
    assert is_sampled(NAMES, federation(199))


def test_one_member_that_comes_changes_the_sample_by_one_at_most():
    before = set(sample(NAMES, federation(20), seed=1, server_round=7))
    after = set(sample(NAMES | {"late": 0}, federation(20), seed=1, server_round=7))
    assert len(before - after) <= 1


def test_each_member_is_drawn_equally_often():
    """2,000 rounds of 20 of 200: each 200 times on average; the standard deviation of a binomial is 13.4."""
    counts = dict.fromkeys(NAMES, 0)
    for server_round in range(2000):
        for name in sample(NAMES, federation(20), seed=5, server_round=server_round):
            counts[name] += 1
    drawn = np.array(list(counts.values()))
    assert drawn.sum() == 40_000
    assert 10 < drawn.std() < 17
    assert drawn.min() > 140


@pytest.mark.parametrize(("wanted", "sizes"), [("all", [200]), (90, [90, 90, 20]), (200, [200])])
def test_waves_ask_everybody_once(wanted, sizes):
    found = list(waves(NAMES, federation(wanted)))
    assert [len(wave) for wave in found] == sizes
    assert [name for wave in found for name in wave] == list(NAMES)
    assert list(waves({}, federation(wanted))) == []


def test_a_small_sample_needs_all_of_its_replies_and_no_more():
    assert replies_needed(federation("all", min_clients=5)) == 5
    assert replies_needed(federation(3, min_clients=5)) == 3
    assert replies_needed(federation(8, min_clients=5)) == 5
