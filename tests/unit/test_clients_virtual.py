"""Virtual clients in one process: one backbone in turn, and the same replies as each would give alone."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_federation import enter_run, settings_with, site_settings, task_for, tiny_pack

import clients.message_handler
import clients.packs
from clients.local_update import join, open_client_state
from clients.message_handler import answer
from clients.private_state import prune, rounds_here
from clients.secure_sum import FILE, _Attempt
from clients.site import Share
from common.faces.splits import Split
from common.protocol import wire
from common.protocol.codec import decode, encode
from common.protocol.parameters import flatten, manifest_of
from common.system.files import read_sealed_json, write_sealed_json


@pytest.fixture
def sites(tmp_path, monkeypatch):
    """Three virtual clients of one pack in memory; only one of them has an open set."""
    enter_run(monkeypatch)
    monkeypatch.setattr(clients.message_handler, "_workplaces", {})
    opened = []
    monkeypatch.setattr(clients.packs, "open_pack", lambda *_, **__: opened.append(1) or tiny_pack("alpha"))
    for cached in (clients.packs._whole, clients.packs._parts):
        cached.cache_clear()
    site = site_settings("alpha", tmp_path)
    yield (
        [
            dataclasses.replace(
                site,
                name=f"alpha-{number}",
                state_dir=tmp_path / f"alpha-{number}",
                share=Share(number=number, num_clients=3, alpha=None, seed=1),
            )
            for number in range(3)
        ],
        opened,
    )
    for cached in (clients.packs._whole, clients.packs._parts):
        cached.cache_clear()


NORMALISATIONS = pytest.mark.parametrize("normalisation", ["shared", "private"])


def changes(sites, settings, rounds):
    """Each client's change in each round, from one model that is sent to all."""
    place = open_client_state(sites[0], settings)
    shared = encode(flatten(place.recogniser.state_dict(), place.manifest), "float32")
    found = {}
    for number in rounds:
        for site in sites:
            task = task_for(place.manifest, settings, server_round=number)
            content = wire.task_message(task, wire.pack_shared(shared), node_id=1, ttl_s=60.0).content
            reply = answer(site, content)
            assert not isinstance(reply, str), reply
            found[site.name, number] = reply
    return found


def arrays(content):
    return {key: bytes(value.data) for key, value in content[wire.ARRAYS].items()}


@NORMALISATIONS
def test_taking_turns_at_one_model_gives_the_bytes_that_each_alone_would(sites, tmp_path, monkeypatch, normalisation):
    sites, opened = sites
    settings = settings_with(model__normalisation=normalisation)
    together = changes(sites, settings, (1, 2))
    assert len(clients.message_handler._workplaces) == 1  # and not three
    assert opened == [1]
    for site in sites:
        monkeypatch.setattr(clients.message_handler, "_workplaces", {})
        apart = dataclasses.replace(site, state_dir=tmp_path / "apart" / site.name)
        alone = changes([apart], settings, (1, 2))
        for key, content in alone.items():
            assert arrays(content) == arrays(together[key])


def test_the_next_client_gets_the_same_backbone_and_its_own_head(sites):
    sites, _ = sites
    settings = settings_with()
    first = open_client_state(sites[0], settings)
    second = open_client_state(sites[1], settings, first)
    built = open_client_state(sites[1], settings)
    assert second.recogniser.backbone is first.recogniser.backbone
    assert torch.equal(second.recogniser.head.weight, built.recogniser.head.weight)
    assert second.fresh.keys() == built.fresh.keys()


def test_an_empty_open_set_is_zeros_and_no_refusal(sites):
    sites, _ = sites
    settings = settings_with()
    empty = [
        site for site in sites if not len(clients.packs.open_site_pack(site, settings.data).indices(Split.VAL_PEOPLE))
    ]
    assert len(empty) == 2
    replies = changes(empty[:1], settings, (1,))
    [content] = replies.values()
    reply = wire.read_reply(wire.Message(content, 1, "train"), "val")
    assert not reply.evaluations["val"].pairs.any()
    assert reply.evaluations["val"].closed.num_examples > 0
    assert np.isfinite(decode(reply.change)).all()


def test_joining_builds_no_model(sites, monkeypatch):
    sites, _ = sites
    monkeypatch.setattr("clients.run_state.build_recogniser", lambda *_, **__: pytest.fail("a model was built"))
    told = [join(site, settings_with()) for site in sites]
    assert [site.name for site in told] == ["alpha-0", "alpha-1", "alpha-2"]
    assert sum(site.num_training_people for site in told) == 6
    assert len({site.val_people for site in told}) == 3


def test_a_virtual_client_too_forgets_what_a_killed_runs_masks_were_made_of(sites):
    """A simulation that is killed leaves the secrets of its last attempt; the next run's join takes them away."""
    (site, *_), _ = sites
    paths = [site.state_dir / "private" / run / FILE for run in ("run-0", "run-1")]
    for path in paths:
        path.parent.mkdir(parents=True)
        write_sealed_json(path, vars(_Attempt(number=3, secrets="of the attempt", before={"round 1": "ab"})))
    task = task_for(manifest_of({}), settings_with(), kind="join", server_round=0, splits="")
    answer(site, wire.task_message(task, None, node_id=1, ttl_s=60.0).content)
    left = [_Attempt(**read_sealed_json(path)) for path in paths]
    assert [one.secrets for one in left] == ["", "of the attempt"]  # this run's own stays
    assert (left[0].number, left[0].before) == (3, {"round 1": "ab"})


def test_a_client_that_pauses_keeps_what_a_repeated_round_or_the_best_one_needs(tmp_path):
    """Trained in rounds 3 and 10 only; 5 is the best: its head is that of 3, and so is that before 10."""
    for number in (0, 3, 10):
        (tmp_path / f"round-{number:06d}.safetensors").touch()
    prune(tmp_path, {0, 5, 8, 9, 10})
    assert rounds_here(tmp_path) == [0, 3, 10]
    prune(tmp_path, {0, 11, 12})
    assert rounds_here(tmp_path) == [0, 10]
