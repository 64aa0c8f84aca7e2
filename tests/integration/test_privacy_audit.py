"""The audit finds who was trained on where nothing protects them, and nobody where the noise is large.

Groups, fresh heads and clipping are no protection by themselves: a site that learns by heart in groups is seen as well,
as long as the noise is left out of the very release that hides it otherwise.
"""

import numpy as np
import pytest
import torch
from tiny_federation import SIDE, settings_with, site_settings, task_for

import clients.group_training
import clients.private_round
from clients.local_update import state_of_pack, train
from clients.private_state import load_reply
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.metrics.membership import Membership
from common.privacy.mechanism import SEED_BYTES
from common.protocol.codec import decode
from common.protocol.parameters import flatten, load_shared
from common.system import site_secret
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
    settings = settings_with(**values)
    pack, site = hard_pack(), site_settings("alpha", folder)
    site.cache_dir.mkdir(parents=True)
    (site.cache_dir / site_secret.FILE).write_bytes(bytes(site_secret.NUM_BYTES))  # the same groups each time
    state = state_of_pack(site, settings, pack)
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


OPEN = {
    "federation__local_epochs": 12,
    "training__lr": 0.1,
    "training__warmup_fraction": 0.0,
    "augmentation__crop": 0.0,
    "augmentation__colour": 0.0,
}
# What learns by heart behind statistics that stay: two groups of twenty, and a clip that shortens neither's change.
IN_GROUPS = OPEN | {
    "model__norm": "group",
    "training__optimiser": "adamw",
    "training__lr": 0.003,
    "training__batch_size": 16,
    "training__head_warmup_epochs": 5,
    "federation__local_epochs": 50,
    "federation__max_change_factor": "off",  # so that a useless model is attacked too
    "privacy__unit": "person",
    "privacy__epsilon": 8.0,
    "privacy__clip": 20.0,
    "privacy__group_people": 20,
}


def test_who_was_trained_on_is_seen_where_nothing_protects_them(tmp_path):
    for seen in attacked_after_training(tmp_path, **OPEN):
        assert not seen.is_at_chance
        assert seen.auc.value > 0.75


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_it_is_the_noise_that_hides_who_was_trained_on(tmp_path, monkeypatch, noise):
    """The same groups, heads and clip, and the same release with its noise and all but without it."""
    release, add, lengths = clients.private_round.released, clients.group_training.add_clipped, []

    def with_so_much(total, spans, *, deviation, divisor, seed):
        return release(total, spans, deviation=max(noise, 1e-9) * deviation, divisor=divisor, seed=seed)

    monkeypatch.setattr(clients.private_round, "released", with_so_much)
    monkeypatch.setattr(clients.group_training, "add_clipped", lambda *change: lengths.append(add(*change)))
    monkeypatch.setattr(clients.private_round.secrets, "token_bytes", lambda _: bytes([2] * SEED_BYTES))
    for seen in attacked_after_training(tmp_path, **IN_GROUPS):
        assert seen.is_at_chance == (noise == 1.0), seen
        assert seen.auc.value < 0.65 if noise else seen.auc.value > 0.7, seen
    assert len(lengths) == 2
    assert max(lengths) < IN_GROUPS["privacy__clip"], "a clip that shortens hides people as well"


def test_a_late_reply_of_a_part_tells_too_where_it_was_coded(tmp_path):
    """Two rounds of a part, int8: what is kept is what left, and the model before it is taken off."""
    _, of_reply = attacked_after_training(
        tmp_path, rounds=2, **(OPEN | {"training__trainable": "last_block", "federation__upload_codec": "int8"})
    )
    assert not of_reply.is_at_chance
