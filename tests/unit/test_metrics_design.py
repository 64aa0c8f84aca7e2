"""The stated part of the pairs that a large set is scored by: its size, people, what it tells, its digest."""

import dataclasses
import itertools

import numpy as np
import pytest
from packs_in_memory import CPU, memory_pack, recogniser_for

from common.metrics.design import auc_half_width, most_pairs_of_a_person, num_pairs_of, pair_design
from common.metrics.figures import open_set_scores
from common.metrics.pairs import designed_histogram, pair_histogram
from common.training.evaluation import design_of, evaluate, people_digest

SIZES = np.array([1, 2, 3, 40, 200, 5, 60, 90])
PERSON = np.repeat(np.arange(len(SIZES)), SIZES)


def embeddings_of(person, *, seed=0, spread=1.3):
    random = np.random.default_rng(seed)
    means = random.normal(size=(person.max() + 1, 16))
    return (means[person] + spread * random.normal(size=(len(person), 16))).astype(np.float32)


def pairs_in(person):
    sizes = np.unique(person, return_counts=True)[1]
    return int((sizes * (sizes - 1) // 2).sum())


def test_a_set_that_is_small_enough_is_scored_whole():
    every = num_pairs_of(len(PERSON))
    assert pair_design(PERSON, most=every, seed=1) is None
    assert pair_design(PERSON, most="all", seed=1) is None
    assert pair_design(PERSON, most=every - 1, seed=1) is not None


@pytest.mark.parametrize("most", [1000, 5000, 50_000])
def test_no_more_pairs_are_scored_than_wanted_and_as_many_as_are_told(most):
    design = pair_design(PERSON, most=most, seed=3)
    histogram = designed_histogram(embeddings_of(PERSON), PERSON, design)
    assert histogram.sum() == design.num_pairs <= most
    assert design.num_all == num_pairs_of(len(PERSON))
    assert histogram[0].sum() == pairs_in(PERSON[design.genuine]) > 0.1 * most  # 0.25 at most
    assert histogram[1].sum() == num_pairs_of(len(design.impostor)) - pairs_in(PERSON[design.impostor])
    assert histogram[1].sum() > 0.4 * most
    kept = np.bincount(PERSON[design.genuine], minlength=len(SIZES))
    np.testing.assert_array_equal(kept, np.minimum(SIZES, design.most_each))
    shares = np.bincount(PERSON[design.impostor], minlength=len(SIZES))
    assert (np.abs(shares - SIZES * len(design.impostor) / len(PERSON)) <= 1.01).all()


def test_the_pairs_are_those_of_the_chosen_pictures_and_of_no_order():
    design, embeddings = pair_design(PERSON, most=5000, seed=3), embeddings_of(PERSON)
    whole = [pair_histogram(embeddings[chosen], PERSON[chosen]) for chosen in (design.genuine, design.impostor)]
    expected = np.stack([whole[0][0], whole[1][1]])
    np.testing.assert_array_equal(designed_histogram(embeddings, PERSON, design), expected)
    again = pair_design(PERSON, most=5000, seed=3)
    np.testing.assert_array_equal(again.impostor, design.impostor)
    assert not np.array_equal(pair_design(PERSON, most=5000, seed=4).impostor, design.impostor)


def test_more_people_than_pairs_leave_people_out_and_never_too_many_pairs():
    person = np.repeat(np.arange(2000), 2)
    design = pair_design(person, most=1000, seed=1)
    assert len(design.genuine) == 2 * 250
    assert design.num_pairs <= 1000
    assert 0 < len(np.unique(person[design.impostor])) < 2000


def test_the_drawn_auc_lies_within_its_half_width_of_that_of_all_pairs():
    """The bound is of the worst case, so far more than 95 % of draws keep it; a tenth of it would be broken."""
    random = np.random.default_rng(5)
    person = np.sort(random.integers(0, 40, 1500))
    embeddings = embeddings_of(person, spread=2.0)
    exact = open_set_scores(pair_histogram(embeddings, person))["roc_auc"]
    bound = auc_half_width(exact, 20_000)
    apart = [
        open_set_scores(designed_histogram(embeddings, person, pair_design(person, most=20_000, seed=seed)))["roc_auc"]
        - exact
        for seed in range(40)
    ]
    assert np.mean(np.abs(apart) <= bound) >= 0.95
    assert np.abs(apart).max() > 0.1 * bound
    assert abs(np.mean(apart)) < 0.2 * bound  # and it is drawn to neither side


def test_a_pack_is_scored_by_its_design_and_its_digest_says_so():
    pack = memory_pack()
    assert design_of(pack, "test", 15) is None
    assert people_digest(pack, "test", 15) == people_digest(pack, "test")
    digests = {people_digest(pack, "test", most) for most in ("all", 14, 13)}
    assert len(digests) == 3
    recogniser = recogniser_for(pack)
    assert evaluate(recogniser, pack, "test", CPU, max_pairs=14).pairs.sum() == design_of(pack, "test", 14).num_pairs
    assert evaluate(recogniser, pack, "test", CPU).pairs.sum() == 15
    of_twins = dataclasses.replace(pack, family=np.array([0, 1, 2, 3, 4, 5, 6, 6]))
    sums = evaluate(recogniser, of_twins, "test", CPU, max_pairs=14)
    assert (sums.twins <= sums.pairs).all()
    assert sums.pairs.sum() <= 14


def pairs_of_each(person, design):
    """In how many of the design's pairs each person is, counted a pair at a time."""
    found = np.zeros(person.max() + 1, dtype=int)
    for first, second in itertools.combinations(design.genuine, 2):
        found[person[first]] += person[first] == person[second]
    for first, second in itertools.combinations(design.impostor, 2):
        if person[first] != person[second]:
            found[[person[first], person[second]]] += 1
    return found


@pytest.mark.parametrize(("most", "bound"), [("all", 2000), ("all", 40), (5000, 900), (5000, 4)])
def test_nobody_is_in_more_pairs_than_bounded(most, bound):
    design = pair_design(PERSON, most=most, seed=3, most_of_person=bound)
    each = pairs_of_each(PERSON, design)
    assert design.is_cut
    assert each.max() == most_pairs_of_a_person(PERSON, design) <= max(bound, len(SIZES) - 1)
    assert bound < 40 or each.max() > 0.4 * bound
    histogram = designed_histogram(embeddings_of(PERSON), PERSON, design)
    assert histogram.sum() == design.num_pairs


@pytest.mark.parametrize("most", ["all", 5000])
def test_a_bound_that_nobody_is_above_changes_nothing(most):
    plain = pair_design(PERSON, most=most, seed=3)
    enough = most_pairs_of_a_person(PERSON, plain)
    bounded = pair_design(PERSON, most=most, seed=3, most_of_person=enough)
    assert (bounded is None) == (plain is None) == (most == "all")
    if plain is not None:
        np.testing.assert_array_equal(bounded.impostor, plain.impostor)
    assert pair_design(PERSON, most=most, seed=3, most_of_person=enough - 1).is_cut


def test_one_person_moves_the_counts_by_no_more_than_the_bound():
    design = pair_design(PERSON, most="all", seed=3, most_of_person=600)
    embeddings = embeddings_of(PERSON)
    before = designed_histogram(embeddings, PERSON, design)
    embeddings[PERSON == 4] = embeddings_of(PERSON, seed=9)[PERSON == 4]
    moved = designed_histogram(embeddings, PERSON, design) - before
    assert 0 < np.abs(moved).max() <= moved[moved > 0].sum() <= 600


def test_a_bound_is_part_of_what_is_scored_and_of_its_digest_where_it_cuts():
    pack = memory_pack(people=4)  # two test people of three pictures: a person is in 3 + 9 pairs
    assert people_digest(pack, "test", "all", 12) == people_digest(pack, "test")
    digests = {people_digest(pack, "test", "all", bound) for bound in (0, 11, 4)}
    assert len(digests) == 3
    recogniser = recogniser_for(pack)
    scored = evaluate(recogniser, pack, "test", CPU, person_pairs=4).pairs
    assert scored.sum() == design_of(pack, "test", "all", 4).num_pairs < 15
