"""Errors by group are those of the pairs within it, add up over clients, and are not shown of a few people."""

import math

import numpy as np
import pytest
import torch

from common.metrics.figures import wilson
from common.metrics.groups import group_errors, pairs_of_groups, worst_to_best

PEOPLE = np.repeat(np.arange(20), 4)
GROUPS = {"Male": list(range(8)), "not Male": list(range(8, 20)), "nobody": [], "one": [3]}


def embeddings(seed):
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(20, 1, 16))
    return (centres + 0.7 * generator.normal(size=(20, 4, 16))).reshape(-1, 16).astype(np.float32)


def by_hand(vectors, members, threshold):
    """(FMR, FNMR) of the pairs within a group, pair by pair."""
    unit = torch.nn.functional.normalize(torch.from_numpy(vectors)).numpy()
    wrong, total = {True: 0, False: 0}, {True: 0, False: 0}
    rows = [row for row in range(len(PEOPLE)) if PEOPLE[row] in members]
    for at, one in enumerate(rows):
        for other in rows[at + 1 :]:
            same = bool(PEOPLE[one] == PEOPLE[other])
            accepted = unit[one] @ unit[other] >= threshold
            total[same] += 1
            wrong[same] += bool(accepted) != same
    return wrong[False] / total[False], wrong[True] / total[True]


def test_the_errors_are_those_of_the_pairs_within_the_group():
    vectors = embeddings(1)
    found, small = group_errors([pairs_of_groups(vectors, PEOPLE, GROUPS)], 0.25, 5)
    assert [row.group for row in found] == ["Male", "not Male"]
    assert small == {"nobody": 0, "one": 1}
    for row in found:
        fmr, fnmr = by_hand(vectors, GROUPS[row.group], 0.25)
        assert row.fmr == pytest.approx(fmr, abs=2e-3)
        assert row.fnmr == pytest.approx(fnmr, abs=2e-2)
        pairs_of_people = row.num_people * (row.num_people - 1) // 2
        assert (row.fmr_low, row.fmr_high) == wilson(row.fmr * pairs_of_people, pairs_of_people)
        assert (row.fnmr_low, row.fnmr_high) == wilson(row.fnmr * row.num_people, row.num_people)
    assert (found[0].num_people, found[0].num_genuine_pairs, found[0].num_impostor_pairs) == (8, 48, 28 * 16)


def test_clients_add_up():
    parts = [pairs_of_groups(embeddings(seed), PEOPLE, GROUPS) for seed in (1, 2)]
    both, _ = group_errors(parts, 0.25, 5)
    alone = [group_errors([part], 0.25, 5)[0] for part in parts]
    assert both[0].num_people == 16
    assert both[0].num_impostor_pairs == 2 * 28 * 16, "no pair across clients"
    assert both[0].fmr == pytest.approx((alone[0][0].fmr + alone[1][0].fmr) / 2)


def test_a_group_of_few_people_is_not_shown():
    single = dict(zip("abc", ([0], [1], [2]), strict=True))
    assert group_errors([pairs_of_groups(embeddings(1), PEOPLE, single)], 0.25, 1) == ([], dict.fromkeys("abc", 1))
    found, small = group_errors([pairs_of_groups(embeddings(1), PEOPLE, GROUPS)], 0.25, 10)
    assert [row.group for row in found] == ["not Male"]
    assert small == {"Male": 8, "nobody": 0, "one": 1}


@pytest.mark.parametrize(
    ("rates", "ratio"), [([0.02, 0.01], 2.0), ([0.0, 0.0], 1.0), ([0.0, 0.1], math.inf), ([0.3, 0.1, 0.2], 3.0)]
)
def test_worst_to_best(rates, ratio):
    assert worst_to_best(rates) == pytest.approx(ratio)
    assert math.isnan(worst_to_best(rates[:1]))
