"""The audit finds who was trained on where nothing protects them, and nobody where the noise is large."""

import numpy as np
import pytest
import torch
from tiny_federation import SIDE, settings_with, site_settings, task_for

from clients.local_update import state_of_pack, train
from clients.private_state import load_reply
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.metrics.membership import Membership
from common.protocol.codec import decode
from common.protocol.parameters import flatten, load_shared
from common.training.loop import Compute
from simulation.compare.membership import attacked, attacked_reply

pytestmark = pytest.mark.usefixtures("in_a_run", "one_thread")
NUM_TRAINING, NUM_VAL, NUM_TEST, PICTURES = 40, 30, 30, 4
COMPUTE = Compute(device="cpu", precision="float32", memory_format="contiguous", threads=1)


def hard_pack() -> FacePack:
    """A hundred people whom nothing but learning by heart tells apart: each picture is noise with a faint own part."""
    random = np.random.default_rng(3)
    parts = [(Split.TRAIN, NUM_TRAINING), (Split.VAL_PEOPLE, NUM_VAL), (Split.TEST_PEOPLE, NUM_TEST)]
    split = np.repeat([code for code, _ in parts], [PICTURES * number for _, number in parts]).astype(np.int8)
    person = np.repeat(np.arange(NUM_TRAINING + NUM_VAL + NUM_TEST), PICTURES)
    faint = random.integers(-12, 13, (len(person) // PICTURES, SIDE, SIDE, 3))
    pictures = np.clip(128 + faint[person] + random.integers(-80, 81, (len(person), SIDE, SIDE, 3)), 0, 255)
    people = tuple(f"p{number}" for number in range(len(person) // PICTURES))
    return FacePack(
        pictures=pictures.astype(np.uint8),
        person=person,
        people=people,
        split=split,
        key="hard",
        quarantined=(),
        dataset="folder",
    )


def attacked_after_training(folder, rounds=1, **values: object) -> tuple[Membership, Membership]:
    """The attack on the model after one client's rounds; and that of whoever received its last reply."""
    settings = settings_with(
        **{
            "model__pretrained": "weights.safetensors",  # of the server; no client reads it
            "federation__rounds": rounds,
            "federation__local_epochs": 12,
            "training__lr": 0.1,
            "training__warmup_fraction": 0.0,
            "augmentation__crop": 0.0,
            "augmentation__colour": 0.0,
        }
        | values
    )
    pack = hard_pack()
    state = state_of_pack(site_settings("alpha", folder), settings, pack)
    shared = flatten(state.recogniser.state_dict(), state.manifest)
    for server_round in range(1, rounds + 1):
        task = task_for(state.manifest, settings, server_round=server_round, splits="")
        shared = shared + state.part.spread(decode(train(state, task, shared).change))
    with torch.no_grad():
        load_shared(state.recogniser, shared, state.manifest)
    of_model = attacked(state.recogniser, pack, COMPUTE)
    server_round, received, change = load_reply(state.state_folder("run-1"))
    assert server_round == rounds
    return of_model, attacked_reply(state.recogniser, settings, received, change, pack, COMPUTE)


def test_who_was_trained_on_is_seen_without_noise_and_not_with_it(tmp_path):
    for seen in attacked_after_training(tmp_path / "open"):
        assert not seen.is_at_chance
        assert seen.auc.value > 0.75
    for seen in attacked_after_training(
        tmp_path / "private", privacy__unit="person", privacy__epsilon=0.5, privacy__group_people=8
    ):
        assert seen.is_at_chance
        assert seen.auc.value < 0.65


def test_a_late_reply_of_a_part_tells_too_where_it_was_coded(tmp_path):
    """Two rounds of a part, int8: what is kept is what left, and the model before it is taken off."""
    _, of_reply = attacked_after_training(
        tmp_path, rounds=2, training__trainable="last_block", federation__upload_codec="int8"
    )
    assert not of_reply.is_at_chance
