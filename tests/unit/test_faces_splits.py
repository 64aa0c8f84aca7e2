"""Splits: disjoint people, nobody without training pictures, fractions kept, and decided by hash alone."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from common.faces.index import OFFICIAL_TEST, FaceIndex, build_index
from common.faces.splits import Split, assign_splits
from common.settings import DataSettings

OPEN = (Split.VAL_PEOPLE, Split.TEST_PEOPLE)
CLOSED = (Split.TRAIN, Split.VAL_PICTURES, Split.TEST_PICTURES)


def index_of(counts: list[int], official: list[int] | None = None, order: list[int] | None = None) -> FaceIndex:
    """counts: pictures of each person.  official: the part of each person.  order: how the lines stand in the files."""
    paths = [f"p{person:03d}/{k:03d}.jpg" for person, count in enumerate(counts) for k in range(count)]
    people = [path.split("/")[0] for path in paths]
    parts = np.array([(official or [-1] * len(counts))[int(name[1:])] for name in people], dtype=np.int8)
    order = order or list(range(len(paths)))
    return build_index(
        "folder", Path("x"), [paths[i] for i in order], [people[i] for i in order], official_split=parts[order]
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=20, max_size=60), st.integers(1, 4), st.data())
def test_every_property_of_a_split(counts: list[int], minimum: int, draw: st.DataObject) -> None:
    data = DataSettings(min_pictures_per_person=minimum)
    index = index_of(counts)
    try:
        split = assign_splits(index, data)
    except DataError:
        assert sum(count >= max(2, minimum) for count in counts) < 6
        return
    of_person = [set(split[index.person == person].tolist()) for person in range(len(index.people))]
    for count, codes in zip(counts, of_person, strict=True):
        if count < minimum:
            assert codes == {Split.UNUSED}
        elif codes & set(OPEN):
            assert len(codes) == 1, "an open-set person has all pictures in one part"
            assert count >= 2
        else:
            assert codes <= set(CLOSED)
            assert Split.TRAIN in codes
    assert sum(Split.TEST_PEOPLE in codes for codes in of_person) >= 2
    assert sum(Split.VAL_PEOPLE in codes for codes in of_person) >= 2
    order = draw.draw(st.permutations(range(len(index))))
    np.testing.assert_array_equal(assign_splits(index_of(counts, order=order), data), split)


@pytest.mark.parametrize(("val", "test"), [(0.1, 0.1), (0.05, 0.2), (0.33, 0.17)])
def test_fractions_hold_over_the_set(val: float, test: float) -> None:
    """Rounding is carried, so of the pictures of people with three or more, the counts are right to one picture."""
    counts = [3, 4, 5, 7, 9, 11, 13, 17] * 12
    data = DataSettings(fraction_val_pictures=val, fraction_test_pictures=test)
    split = assign_splits(index_of(counts), data)
    closed = int(np.isin(split, CLOSED).sum())
    assert int((split == Split.VAL_PICTURES).sum()) == pytest.approx(val * closed, abs=1)
    assert int((split == Split.TEST_PICTURES).sum()) == pytest.approx(test * closed, abs=1)


@pytest.mark.parametrize("official", [None, OFFICIAL_TEST], ids=["no lists", "official test"])
def test_many_people_keep_their_part_when_others_are_added(official: int | None) -> None:
    """By number, as few people are dealt, some of these would move."""
    num_old, num_new = 1200, 1500
    parts = None if official is None else [official if k % 10 == 0 else -1 for k in range(num_new)]
    few, many = {}, {}
    for found, count in ((few, num_old), (many, num_new)):
        index = index_of([2] * count, None if parts is None else parts[:count])
        found |= dict(zip(index.paths, assign_splits(index, DataSettings()).tolist(), strict=True))
    for code in OPEN:
        assert [path for path in few if few[path] == code] == [p for p in many if many[p] == code and p in few]
    new = [many[path] for path in many.keys() - few.keys()]
    assert Split.VAL_PEOPLE in new
    free = (num_new if official is None else num_new * 9 // 10) * 2
    assert list(many.values()).count(Split.VAL_PEOPLE) == pytest.approx(0.12 * free, rel=0.25)


def test_pictures_are_chosen_by_hash_not_by_name() -> None:
    """Were it the first by name, VGGFace2's validation would be each person's 0001_01.jpg."""
    index = index_of([10] * 60)
    split = assign_splits(index, DataSettings())
    chosen = [index.paths[i][-7:-4] for i in np.flatnonzero(split == Split.TEST_PICTURES)]
    assert len(set(chosen)) >= 8


def test_small_people_lose_no_training_pictures() -> None:
    split = assign_splits(index_of([2] * 40), DataSettings())
    assert not np.isin(split, [Split.VAL_PICTURES, Split.TEST_PICTURES]).any()


def test_halves_of_everything_still_leave_a_training_picture_each() -> None:
    data = DataSettings(fraction_val_pictures=0.5, fraction_test_pictures=0.5)
    index = index_of([3, 4, 5] * 10)
    split = assign_splits(index, data)
    closed = np.unique(index.person[np.isin(split, CLOSED)])
    assert set(index.person[split == Split.TRAIN]) == set(closed.tolist())


def test_people_fractions_without_an_official_split() -> None:
    split = assign_splits(index_of([4] * 100), DataSettings(fraction_val_people=0.12, fraction_test_people=0.2))
    assert int((split == Split.TEST_PEOPLE).sum()) == 20 * 4
    assert int((split == Split.VAL_PEOPLE).sum()) == 12 * 4


def test_official_parts_are_kept() -> None:
    official = [0] * 10 + [1] * 3 + [2] * 4
    index = index_of([5] * 17, official)
    split = assign_splits(index, DataSettings())
    assert set(index.person[split == Split.VAL_PEOPLE].tolist()) == {10, 11, 12}
    assert set(index.person[split == Split.TEST_PEOPLE].tolist()) == {13, 14, 15, 16}


def test_without_official_validation_it_comes_from_training_people() -> None:
    official = [0] * 40 + [2] * 10
    index = index_of([5] * 50, official)
    split = assign_splits(index, DataSettings(fraction_val_people=0.1))
    assert set(index.person[split == Split.TEST_PEOPLE].tolist()) == set(range(40, 50))
    val = set(index.person[split == Split.VAL_PEOPLE].tolist())
    assert len(val) == 4
    assert val <= set(range(40))


def test_a_person_in_two_official_parts_belongs_to_the_stricter() -> None:
    index = index_of([4] * 12, [0] * 6 + [1] * 3 + [2] * 3)
    parts = index.official_split.copy()
    parts[0], parts[4] = 2, 1  # one picture of person 0 stands under test, one of person 1 under validation
    split = assign_splits(dataclasses.replace(index, official_split=parts), DataSettings())
    assert set(split[index.person == 0].tolist()) == {Split.TEST_PEOPLE}
    assert set(split[index.person == 1].tolist()) == {Split.VAL_PEOPLE}


def test_a_single_picture_is_useless_in_an_open_set() -> None:
    """By hash it trains; where the official split holds it out it is not used at all, least of all in training."""
    data = DataSettings(min_pictures_per_person=1)
    free = index_of([1] * 30 + [4] * 10)
    split = assign_splits(free, data)
    assert set(split[free.person < 30].tolist()) == {Split.TRAIN}
    held = index_of([4] * 10 + [1], [0] * 5 + [1] * 2 + [2] * 4)
    assert assign_splits(held, data)[held.person == 10].tolist() == [Split.UNUSED]


@pytest.mark.parametrize("most", [6, 9, 30, 99])
def test_max_people_keeps_so_many_and_each_parts_share(most: int) -> None:
    index = index_of([5] * 200, [0] * 140 + [1] * 20 + [2] * 40)
    split = assign_splits(index, DataSettings(max_people=most))
    kept = {code: set(index.person[split == code].tolist()) for code in Split}
    sizes = [len(kept[code]) for code in (Split.TRAIN, *OPEN)]
    assert sum(sizes) == most
    assert min(sizes) >= 2
    if most >= 30:
        np.testing.assert_allclose(sizes, [most * 0.7, most * 0.1, most * 0.2], atol=1.5)
    assert kept[Split.TRAIN] != set(range(sizes[0])), "the choice is by hash, not the first by name"


def test_more_people_only_add_to_the_choice() -> None:
    index = index_of([5] * 100, [0] * 70 + [1] * 10 + [2] * 20)
    few = assign_splits(index, DataSettings(max_people=20)) != Split.UNUSED
    many = assign_splits(index, DataSettings(max_people=40)) != Split.UNUSED
    assert not (few & ~many).any()


@pytest.mark.parametrize(
    ("counts", "data", "seen"),
    [
        ([5] * 5, DataSettings(), "1 of 5 people left for training"),
        ([5] * 50, DataSettings(min_pictures_per_person=6), "0 of 50 people left"),
        ([5] * 50, DataSettings(max_people=4), "data.max_people = 4"),
    ],
)
def test_fewer_than_two_people_is_an_error(counts: list[int], data: DataSettings, seen: str) -> None:
    with pytest.raises(DataError, match=seen) as caught:
        assign_splits(index_of(counts), data)
    assert "\n" not in str(caught.value)


def test_a_data_sets_name_is_part_of_the_hash() -> None:
    index = index_of([6] * 40)
    other = dataclasses.replace(index, dataset="other")
    assert (assign_splits(index, DataSettings()) != assign_splits(other, DataSettings())).any()


# ------------------------------------------------------------------------------------------------------------ families


def with_families(index: FaceIndex, sizes: list[int]) -> FaceIndex:
    """Families of the first people by name, each of so many; the rest are alone."""
    family = np.arange(len(index.people))
    start = 0
    for size in sizes:
        family[start : start + size] = start
        start += size
    order = np.random.default_rng(0).permutation(len(family))  # members do not stand side by side
    shuffled = np.full(len(family), len(family))
    np.minimum.at(shuffled, family[order], np.arange(len(family)))
    return dataclasses.replace(index, family=shuffled[family[order]])


def test_an_open_set_of_a_single_family_is_refused() -> None:
    """Two siblings alone are no strangers to each other."""
    index = with_families(index_of([3] * 16), [2] * 8)
    assert index.family is not None
    of_person = np.where(index.family == index.family[0], 2, 0).astype(np.int8)
    index = dataclasses.replace(index, official_split=of_person[index.person])
    with pytest.raises(DataError, match="1 of 8 families left for the test on unseen people"):
        assign_splits(index, DataSettings())


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 3), min_size=8, max_size=25),
    st.integers(0, 10),
    st.sampled_from(["no", "test only", "all", "careless"]),
    st.integers(1, 3),
    st.one_of(st.just("all"), st.integers(2, 70)),
    st.data(),
)
def test_siblings_are_always_on_one_side(
    sizes: list[int], alone: int, official: str, minimum: int, most: int | str, draw: st.DataObject
) -> None:
    """Whatever the official lists say, however many pictures each has and however many people are kept."""
    num = sum(sizes) + alone
    counts = draw.draw(st.lists(st.integers(1, 6), min_size=num, max_size=num))
    parts = {"no": [-1], "test only": [0, 0, 2], "all": [0, 0, 1, 2], "careless": [-1, 0, 1, 2]}[official]
    chosen = draw.draw(st.lists(st.sampled_from(parts), min_size=num, max_size=num))
    index = with_families(index_of(counts), sizes)
    assert index.family is not None
    of_person = np.array(chosen if official == "careless" else [chosen[first] for first in index.family], dtype=np.int8)
    index = dataclasses.replace(index, official_split=of_person[index.person])
    data = DataSettings(min_pictures_per_person=minimum, max_people=most)
    try:
        split = assign_splits(index, data)
    except DataError:
        return
    sides: dict[int, set[object]] = {}
    for who, code in zip(index.person.tolist(), split.tolist(), strict=True):
        if code != Split.UNUSED:
            sides.setdefault(int(index.family[who]), set()).add(code if code in OPEN else "training")
    assert all(len(seen) == 1 for seen in sides.values())
    if most != "all":
        assert len(set(index.person[split != Split.UNUSED].tolist())) <= most
        everyone = assign_splits(index, dataclasses.replace(data, max_people="all"))
        for first in sides:
            family = np.isin(index.person, np.flatnonzero(index.family == first))
            np.testing.assert_array_equal(split[family] == Split.UNUSED, everyone[family] == Split.UNUSED)
    if official == "no":
        for code in OPEN:
            assert len(set(index.family[index.person[split == code]].tolist())) >= 2, "strangers need two families"


def test_a_family_is_held_out_whole_by_the_hash_of_its_first_name() -> None:
    """Twins in one family each, or people alone by the first's name: the same choice."""
    index = with_families(index_of([4] * 100), [2] * 50)
    assert index.family is not None
    split = assign_splits(index, DataSettings(fraction_val_people=0.12, fraction_test_people=0.2))
    assert int((split == Split.TEST_PEOPLE).sum()) == 10 * 2 * 4
    assert int((split == Split.VAL_PEOPLE).sum()) == 6 * 2 * 4
    firsts = np.isin(index.person, index.family)
    alone = build_index(
        "folder",
        Path("x"),
        [index.paths[i] for i in np.flatnonzero(firsts)],
        [index.people[p] for p in index.person[firsts]],
    )
    alone_split = assign_splits(alone, DataSettings(fraction_val_people=0.12, fraction_test_people=0.2))
    for code in OPEN:
        assert {alone.people[p] for p in alone.person[alone_split == code]} == {
            index.people[p] for p in index.family[index.person[split == code]]
        }


GOLDEN = {  # SHA-256 of the codes, made before splits knew of families
    "by hash": "b88195e00243f9e2",
    "official": "3d077cd9710b9e03",
    "max": "68d839e9cf1ff02e",
    "some official": "736adb952f72e6ad",
}


@pytest.mark.parametrize("families", ["none known", "everyone alone"])
@pytest.mark.parametrize("name", GOLDEN)
def test_without_siblings_the_splits_are_those_of_old(name: str, families: str) -> None:
    index, data = {
        "by hash": (index_of([1 + i % 9 for i in range(60)]), DataSettings()),
        "official": (index_of([2 + i % 7 for i in range(60)], [(0, 0, 0, 1, 2)[i % 5] for i in range(60)]), None),
        "max": (index_of([1 + i % 9 for i in range(60)]), DataSettings(max_people=23, min_pictures_per_person=1)),
        "some official": (
            index_of([2 + i % 7 for i in range(60)], [(0, 0, 0, 0, 2)[i % 5] for i in range(60)]),
            DataSettings(max_people=31),
        ),
    }[name]
    if families == "everyone alone":
        index = dataclasses.replace(index, family=np.arange(60))
    codes = assign_splits(index, data or DataSettings())
    assert hashlib.sha256(codes.tobytes()).hexdigest()[:16] == GOLDEN[name]
