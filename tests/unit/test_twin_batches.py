"""Batches of pairs: every picture once, in the wanted shares, the twin where it is said to be, epochs that differ."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.config import from_mapping
from common.errors import ConfigError
from common.faces import batches
from common.faces.batches import NO_TWIN, augment, num_batches, pair_up, to_float, twin_batches
from common.settings import AugmentationSettings, TwinSettings

OFF = AugmentationSettings(flip=0.0, crop=0.0, rotation_rad=0.0, colour=0.0)
EVEN = TwinSettings(genuine=1.0, stranger=1.0, twin=1.0)
FAMILIES = 20
PERSON = np.repeat(np.arange(2 * FAMILIES), 12)
FAMILY = PERSON // 2


def batches_of(
    chosen=None, *, person=PERSON, family=FAMILY, twins=EVEN, batch_size=32, seed=0, augmentation=OFF
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(pictures, partners) of each batch of one epoch; pictures are found again by their labels."""
    rows = np.arange(len(person))
    flat = np.broadcast_to((rows % 251)[:, None, None, None], (len(person), 8, 8, 3)).astype(np.uint8)
    found = []
    for pictures, labels, partners in twin_batches(
        flat,
        rows,
        person=person,
        family=family,
        chosen=rows if chosen is None else np.asarray(chosen),
        batch_size=batch_size,
        augmentation=augmentation,
        twins=twins,
        stream=torch.Generator().manual_seed(seed),
        device="cpu",
    ):
        assert pictures.shape == (len(labels), 3, 8, 8)
        expected = (labels % 251).float() / 127.5 - 1.0
        if augmentation is OFF:
            torch.testing.assert_close(pictures.mean((1, 2, 3)), expected, atol=1e-5, rtol=0)
        found.append((labels.numpy(), partners.numpy()))
    return found


def pairs_of(twins: TwinSettings, *, person=PERSON, family=FAMILY, chosen=None, seed=0) -> list[list[int]]:
    rows = np.arange(len(person)) if chosen is None else chosen
    return pair_up(rows, person, family, twins, np.random.default_rng(seed))


def kind(pair: list[int], person=PERSON, family=FAMILY) -> str:
    one, other = pair
    return "genuine" if person[one] == person[other] else "twin" if family[one] == family[other] else "stranger"


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(2, 40))
def test_every_picture_once_and_no_batch_too_large(draw, batch_size):
    """Whatever the people have: families of one to three, one to nine pictures each, any shares."""
    sizes = draw.draw(st.lists(st.integers(1, 3), min_size=1, max_size=8))
    family_of = np.repeat(np.arange(len(sizes)), sizes)
    counts = draw.draw(st.lists(st.integers(1, 9), min_size=len(family_of), max_size=len(family_of)))
    person = np.repeat(np.arange(len(family_of)), counts)
    chosen = np.sort(np.random.default_rng(1).permutation(len(person))[: max(2, len(person) - 3)])
    if len(chosen) < 2 or len(person) < 2:
        return
    shares = draw.draw(st.tuples(*[st.sampled_from([1e-9, 0.1, 1.0])] * 3))
    twins = TwinSettings(genuine=shares[0], stranger=shares[1], twin=shares[2])
    batches = batches_of(chosen, person=person, family=family_of[person], twins=twins, batch_size=batch_size)
    assert sorted(row for rows, _ in batches for row in rows.tolist()) == chosen.tolist()
    assert len(batches) == num_batches(len(chosen), batch_size)
    lengths = [len(rows) for rows, _ in batches]
    assert max(lengths) - min(lengths) <= 2
    assert max(lengths) <= max(batch_size + batch_size % 2, 3)
    assert min(lengths) >= 2
    for rows, partners in batches:
        assert (np.diff(rows) > 0).all(), "in file order"
        for place, partner in enumerate(partners.tolist()):
            who, family = person[rows], family_of[person[rows]]
            siblings = np.flatnonzero((family == family[place]) & (who != who[place])).tolist()
            assert (partner == NO_TWIN) == (not siblings)
            assert partner == NO_TWIN or partner in siblings


@pytest.mark.parametrize(
    ("genuine", "stranger", "twin"), [(1.0, 1.0, 1.0), (0.5, 0.25, 0.25), (0.2, 0.0, 0.8), (1e-9, 1.0, 0.0)]
)
def test_the_shares_are_those_asked_for(genuine, stranger, twin):
    pairs = pairs_of(TwinSettings(genuine=genuine, stranger=stranger, twin=twin))
    assert len(pairs) == 240
    total = genuine + stranger + twin
    found = [kind(pair) for pair in pairs]
    for name, share in (("genuine", genuine), ("stranger", stranger), ("twin", twin)):
        assert found.count(name) == pytest.approx(240 * share / total, abs=1)


def test_what_the_pictures_do_not_allow_becomes_pairs_of_strangers():
    person = np.repeat(np.arange(30), 3)  # nobody has a twin, and of three pictures one is left over
    pairs = pairs_of(TwinSettings(genuine=0.9, stranger=0.0, twin=0.1), person=person, family=person)
    found = [kind(pair, person, person) for pair in pairs]
    assert found.count("twin") == 0
    assert found.count("genuine") == 30
    assert found.count("stranger") == 15
    odd = pairs_of(EVEN, chosen=np.arange(101))
    assert sorted(len(pair) for pair in odd) == [1] + [2] * 50


def test_every_family_takes_part_in_twin_pairs_and_every_person_in_genuine_ones():
    pairs = pairs_of(EVEN)
    assert {FAMILY[pair[0]] for pair in pairs if kind(pair) == "twin"} == set(range(FAMILIES))
    assert len({PERSON[pair[0]] for pair in pairs if kind(pair) == "genuine"}) >= 25


def test_epochs_differ_and_runs_repeat():
    """Seeding inside the sampler made every epoch's pairs the same in earlier systems."""
    first, again, second = batches_of(seed=1), batches_of(seed=1), batches_of(seed=2)
    for (rows, partners), (same_rows, same_partners) in zip(first, again, strict=True):
        np.testing.assert_array_equal(rows, same_rows)
        np.testing.assert_array_equal(partners, same_partners)
    assert any(not np.array_equal(one[0], other[0]) for one, other in zip(first, second, strict=True))
    pairs = [{frozenset(pair) for pair in pairs_of(EVEN, seed=seed)} for seed in (1, 2)]
    assert len(pairs[0] & pairs[1]) < 0.2 * len(pairs[0])


def siblings_met() -> float:
    """Fraction of pictures in genuine pairs, with no twin pairs asked for, whose twin is in the batch."""
    twins = TwinSettings(genuine=1.0, stranger=0.0, twin=0.0)
    met = [partners != NO_TWIN for _, partners in batches_of(twins=twins, batch_size=16)]
    return float(np.concatenate(met).mean())


def test_hard_negatives_bring_siblings_into_one_batch(monkeypatch):
    assert siblings_met() > 0.9
    monkeypatch.setattr(batches, "_beside_twins", lambda pairs, *_: [[pair] for pair in pairs])
    assert siblings_met() < 0.6


def test_partners_are_drawn_from_all_pictures_of_the_sibling():
    """One batch of one family: over the epochs each of the sibling's 12 pictures is somebody's partner."""
    chosen = np.arange(24)
    seen = {(rows[p]) for seed in range(20) for rows, partners in batches_of(chosen, seed=seed) for p in partners}
    assert seen == set(range(24))


def test_pictures_are_augmented_as_in_other_batches():
    """The stream first gives the pairing's seed and then augments, picture by picture, as `training_batches` does."""
    augmentation = dataclasses.replace(OFF, flip=0.5, crop=0.2)
    rows = np.arange(8)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    stream = torch.Generator().manual_seed(3)
    ((pictures, labels, _),) = twin_batches(
        pixels, rows, person=rows // 2, family=rows // 4, chosen=rows, batch_size=8, augmentation=augmentation,
        twins=EVEN, stream=stream, device="cpu",
    )  # fmt: skip
    other = torch.Generator().manual_seed(3)
    torch.randint(2**62, (1,), generator=other)
    expected = augment(to_float(torch.from_numpy(pixels[labels.numpy()])), augmentation, other)
    torch.testing.assert_close(pictures, expected)


def test_there_is_always_a_share_of_genuine_pairs():
    with pytest.raises(ConfigError, match=r"twins\.genuine = 0\.0 must be greater than 0"):
        from_mapping({"twins": {"genuine": 0.0}})
