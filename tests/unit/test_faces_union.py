"""Several packs seen as one: nothing is lost, mixed up or copied."""

import dataclasses

import numpy as np
import pytest
import torch
from packs_in_memory import CPU, SIDE, memory_pack, recogniser_for

from common.errors import DataError
from common.faces.pack import StackedPictures, labels_of, union_pack
from common.faces.splits import Split
from common.models.recogniser import for_people
from common.training.evaluation import evaluate


def two_packs():
    return {"alpha": memory_pack(people=4, seed=1), "beta": memory_pack(people=3, train=6, seed=2)}


def test_rows_come_from_the_right_pack_in_the_order_asked():
    packs = two_packs()
    stacked = StackedPictures([pack.pictures for pack in packs.values()])
    plain = np.concatenate([pack.pictures for pack in packs.values()])
    assert stacked.shape == plain.shape
    rows = np.random.default_rng(0).permutation(len(plain))
    np.testing.assert_array_equal(stacked[rows], plain[rows])
    assert stacked[rows[:0]].shape == (0, SIDE, SIDE, 3)


def test_people_of_two_packs_stay_different_people():
    packs = two_packs()
    union = union_pack(packs)
    assert len(union) == sum(map(len, packs.values()))
    assert union.people == tuple(f"{name}/{one}" for name, pack in packs.items() for one in pack.people)
    assert union.num_classes == 7
    first = len(packs["alpha"])
    assert not set(union.person[:first]) & set(union.person[first:])
    assert set(union.training_labels[union.indices(Split.TRAIN)].tolist()) == set(range(7))


def test_each_clients_labels_are_its_own_moved_up():
    packs = two_packs()
    union, labels = union_pack(packs), labels_of(packs)
    assert labels == {"alpha": slice(0, 4), "beta": slice(4, 7)}
    start = 0
    for name, pack in packs.items():
        own = union.training_labels[start : start + len(pack)]
        closed = pack.training_labels >= 0
        np.testing.assert_array_equal(own[closed], pack.training_labels[closed] + labels[name].start)
        assert (own[~closed] == -1).all()
        start += len(pack)


def test_pictures_of_two_sizes_do_not_fit():
    small = dataclasses.replace(memory_pack(), pictures=np.zeros((40, 16, 16, 3), dtype=np.uint8))
    with pytest.raises(DataError, match="different sizes"):
        union_pack({"alpha": memory_pack(), "beta": small})


def test_another_order_or_pack_gives_another_key():
    packs = two_packs()
    changed = packs | {"beta": dataclasses.replace(packs["beta"], key="other")}
    assert len({union_pack(packs).key, union_pack(changed).key, union_pack(dict(reversed(packs.items()))).key}) == 3


def test_a_clients_view_of_the_common_head_judges_among_its_own_people_only():
    """The common head may take one of beta's people for one of alpha's; beta's own accuracy does not know alpha."""
    packs = two_packs()
    union = union_pack(packs)
    recogniser = recogniser_for(union)
    own = for_people(recogniser, labels_of(packs)["beta"])
    assert own.backbone is recogniser.backbone
    embeddings = torch.randn(5, 16)
    torch.testing.assert_close(own.class_logits(embeddings), recogniser.class_logits(embeddings)[:, 4:7])
    assert evaluate(own, packs["beta"], "test", CPU).closed.num_examples == len(
        packs["beta"].indices(Split.TEST_PICTURES)
    )
    assert recogniser.head.weight.shape[0] == 7, "the common head itself is untouched"
