"""A data set divided among virtual clients: everybody has enough, nobody has another's, open sets stay unseen."""

import dataclasses

import numpy as np
import pytest

from common.errors import DataError
from common.faces.pack import FacePack
from common.faces.partition import MIN_TRAINING_PICTURES, most_clients, part_of, partition
from common.faces.splits import Split

KINDS = [Split.TRAIN] * 5 + [Split.VAL_PICTURES, Split.TEST_PICTURES]


def pack_of(num_training=40, num_open=11, family=None):
    """Training people of seven pictures, then validation and test people of three; the picture holds its row."""
    rows = [(who, kind) for who in range(num_training) for kind in KINDS]
    for start, code in ((num_training, Split.VAL_PEOPLE), (num_training + num_open, Split.TEST_PEOPLE)):
        rows += [(who, code) for who in range(start, start + num_open) for _ in range(3)]
    num_people = num_training + 2 * num_open
    return FacePack(
        pictures=np.broadcast_to(np.arange(len(rows)).astype(np.uint8)[:, None, None, None], (len(rows), 2, 2, 3)),
        person=np.array([who for who, _ in rows], dtype=np.int64),
        people=tuple(f"p{number:03d}" for number in range(num_people)),
        split=np.array([kind for _, kind in rows], dtype=np.int8),
        key="k",
        quarantined=(("bad.jpg", "cut short"),),
        dataset="folder",
        family=family,
    )


WAYS = pytest.mark.parametrize("alpha", [None, 0.1, 1.0, 100.0])


@WAYS
def test_no_picture_is_used_twice_and_every_training_picture_is_used(alpha):
    pack = pack_of()
    parts = partition(pack, 13, alpha=alpha, seed=1)
    rows = np.concatenate(parts)
    assert len(parts) == 13
    assert len(np.unique(rows)) == len(rows)
    assert all((np.diff(part) > 0).all() for part in parts)
    left_out = np.setdiff1d(np.arange(len(pack)), rows)
    assert len(left_out) == 0


@WAYS
def test_everybody_has_enough_to_train_even_where_it_is_as_tight_as_can_be(alpha):
    pack = pack_of()
    for number in (1, 7, most_clients(pack, alpha)):
        for rows in partition(pack, number, alpha=alpha, seed=3):
            part = part_of(pack, rows)
            assert part.num_classes >= 2
            assert len(part.indices(Split.TRAIN)) >= MIN_TRAINING_PICTURES
            assert part.training_labels[part.indices(Split.TRAIN)].max() == part.num_classes - 1


@WAYS
def test_open_people_are_whole_at_one_client_and_trained_on_nowhere(alpha):
    pack = pack_of()
    parts = [part_of(pack, rows) for rows in partition(pack, 20, alpha=alpha, seed=1)]
    trained = set(np.concatenate([part.person[part.indices(Split.TRAIN)] for part in parts]).tolist())
    for code in (Split.VAL_PEOPLE, Split.TEST_PEOPLE):
        held = [set(part.person[part.indices(code)].tolist()) for part in parts]
        assert sum(len(people) for people in held) == len(set.union(*held)) == 11
        assert not trained & set.union(*held)
        # 11 people are enough for five clients, of at least two each: no client has a lone one
        assert sorted(len(people) for people in held if people) == [2, 2, 2, 2, 3]


def test_by_identity_people_are_whole_and_evenly_dealt():
    pack = pack_of()
    parts = [part_of(pack, rows) for rows in partition(pack, 12, alpha=None, seed=1)]
    people = [set(part.training_people.tolist()) for part in parts]
    assert len(set.union(*people)) == sum(map(len, people)) == 40
    assert {len(those) for those in people} == {3, 4}
    for part in parts:
        for code in (Split.VAL_PICTURES, Split.TEST_PICTURES):
            assert set(part.person[part.indices(code)].tolist()) == set(part.training_people.tolist())
            assert part.training_labels[part.indices(code)].min() >= 0


def test_by_dirichlet_people_are_shared_the_more_the_larger_alpha():
    pack = pack_of()

    def holders(alpha):
        parts = [part_of(pack, rows) for rows in partition(pack, 10, alpha=alpha, seed=1)]
        for part in parts:  # a person's other pictures are only where the person is trained on
            assert part.training_labels[part.indices(Split.TEST_PICTURES)].min(initial=0) >= 0
        return sum(part.num_classes for part in parts) / 40

    few, many = holders(0.05), holders(100.0)
    assert 1.0 <= few < 2.5
    assert 4.0 < many <= 5.0


@WAYS
def test_the_same_seed_gives_the_same_parts_and_another_others(alpha):
    pack = pack_of()
    one, again, other = (partition(pack, 9, alpha=alpha, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_families_stay_whole():
    family = np.arange(62) // 2 * 2
    pack = pack_of(num_open=11, family=family)
    pack = dataclasses.replace(pack, split=np.where(pack.person == 51, Split.UNUSED, pack.split).astype(np.int8))
    for rows in partition(pack, 8, alpha=None, seed=1):
        part = part_of(pack, rows)
        assert len(part.training_people) % 2 == 0
        assert len(np.unique(family[part.training_people])) == len(part.training_people) // 2


def test_a_part_is_a_view_of_its_rows_under_a_key_of_its_own():
    pack = pack_of()
    first, second = (part_of(pack, rows) for rows in partition(pack, 2, alpha=None, seed=1))
    assert {first.key, second.key, pack.key} == {first.key, second.key, "k"}
    assert len({first.key, second.key, pack.key}) == 3
    rows = partition(pack, 2, alpha=None, seed=1)[1]
    assert second.pictures.shape == (len(rows), 2, 2, 3)
    assert np.array_equal(second.pictures[np.array([4, 0])][:, 0, 0, 0], rows[[4, 0]].astype(np.uint8))
    assert second.quarantined == ()


@pytest.mark.parametrize(
    ("alpha", "number", "line"),
    [
        (None, 21, r"40 people to train on, 2 for each client, are too few for 21 clients \(at most 20\)"),
        (0.5, 51, r"200 training pictures, 4 for each client, are too few for 51 clients \(at most 50\)"),
        (None, 0, r"too few for 0 clients"),
    ],
)
def test_what_cannot_be_divided_is_refused(alpha, number, line):
    with pytest.raises(DataError, match=line):
        partition(pack_of(), number, alpha=alpha, seed=1)


def test_without_open_people_nobody_has_an_open_set():
    pack = pack_of(num_open=1)  # one person alone would give no impostor pair
    parts = [part_of(pack, rows) for rows in partition(pack, 4, alpha=None, seed=1)]
    assert not any(len(part.indices(code)) for part in parts for code in (Split.VAL_PEOPLE, Split.TEST_PEOPLE))
