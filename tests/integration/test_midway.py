"""A round that is cut off between two epochs goes on after the last whole one, to the bits of one that was not."""

import dataclasses
import json

import pytest
import torch
from tiny_federation import enter_run, settings_with, site_settings, task_for, tiny_workplace

from clients import local_update
from clients.local_update import MIDWAY, train
from common.models.recogniser import build_recogniser
from common.protocol.parameters import flatten
from common.system.checkpoints import read_sealed, write_sealed
from common.training import loop
from common.training.midway import Midway
from common.training.step import halve_from_now, is_halved

PLAIN = {"federation__local_epochs": 3, "training__checkpoint_minutes": 1e-6, "model__dropout": 0.2}
SETTINGS = {
    "plain": PLAIN,
    "adamw, fedprox, a warm-up": PLAIN
    | {"training__optimiser": "adamw", "federation__strategy": "fedprox", "federation__proximal_mu": 0.5}
    | {"training__head_warmup_epochs": 1, "training__lr": 0.002},
    "steps": PLAIN | {"federation__local_epochs": "off", "federation__local_steps": 8},
    "watched": PLAIN,
}


class Killed(BaseException):
    """As a process ends that is killed: nothing after it is done."""


@pytest.fixture(autouse=True)
def in_a_run(monkeypatch):
    enter_run(monkeypatch)


@pytest.fixture
def epochs(monkeypatch):
    """The epochs that are trained, in order."""
    begun = []
    usual = loop.epoch_batches

    def watched(*given, stream_name, epoch, **named):
        if "/" not in stream_name:
            begun.append(epoch)
        return usual(*given, stream_name=stream_name, epoch=epoch, **named)

    monkeypatch.setattr(loop, "epoch_batches", watched)
    return begun


def place(folder, case, **more):
    """A site that has never trained, its task of round 1, and the model that comes with it."""
    settings = settings_with(**(SETTINGS[case] | more))
    state = tiny_workplace(settings, folder)
    if case == "watched":
        policy = dataclasses.replace(state.site.policy, max_person_share=0.99)
        state = dataclasses.replace(state, site=dataclasses.replace(state.site, policy=policy))
        state = dataclasses.replace(state, watch=NoWatch())
    first = build_recogniser(settings.model, num_people=2, image_size=32, backbone_seed=7, head_seed=0)
    return state, task_for(state.manifest, settings, splits=""), flatten(first.state_dict(), state.manifest)


class NoWatch:
    """Looks at no model; that it is there makes the site count whose gradients they are."""

    def admit(self, *_):
        """Nothing."""

    def trained(self, _):
        """Nothing."""


def cut_off_after(monkeypatch, done):
    """The process is killed when so many stretches are written."""
    usual = Midway.after_stretch

    def after(self, training, number):
        usual(self, training, number)
        if number == done:
            raise Killed

    monkeypatch.setattr(Midway, "after_stretch", after)


def results(state, reply):
    """All that a round leaves and answers, but seconds."""
    private, _ = read_sealed(state.state_folder("run-1") / "round-000001.safetensors")
    counted = {name: value for name, value in reply.train.items() if not name.endswith("seconds")}
    return bytes(reply.change.data), {name: tensor.numpy().tobytes() for name, tensor in private.items()}, counted


@pytest.mark.parametrize("case", SETTINGS)
def test_it_goes_on_to_the_same_bits(case, tmp_path, monkeypatch, epochs):
    seen = []
    monkeypatch.setattr(local_update, "against_share", lambda _policy, largest: seen.append(largest.num_pictures) or [])
    state, task, model = place(tmp_path / "whole", case)
    whole = results(state, train(state, task, model))
    every = list(epochs)
    state, task, model = place(tmp_path / "cut", case)
    with monkeypatch.context() as patch:
        cut_off_after(patch, len(every) - 1)
        with pytest.raises(Killed):
            train(state, task, model)
    epochs.clear()

    state, task, model = place(tmp_path / "cut", case)  # another process: nothing but the disk is left
    torch.manual_seed(99)
    again = results(state, train(state, task, model))

    assert again == whole
    assert epochs == every[-1:]
    assert seen == ([again[2]["num_pictures"]] * 2 if case == "watched" else [])  # of all epochs, not of the last alone
    assert not (state.state_folder("run-1") / MIDWAY).exists()


def cut(folder, monkeypatch, done=1, **more):
    state, task, model = place(folder, "plain", **more)
    with monkeypatch.context() as patch:
        cut_off_after(patch, done)
        with pytest.raises(Killed):
            train(state, task, model)
    return state.state_folder("run-1") / MIDWAY


def test_of_another_question_it_is_no_part(tmp_path, monkeypatch, epochs):
    cut(tmp_path, monkeypatch)
    state, task, model = place(tmp_path, "plain")
    epochs.clear()
    train(state, task, model + 1e-3)
    assert epochs == [0, 1, 2]


def test_a_damaged_file_is_none_and_is_told_of(tmp_path, monkeypatch, epochs, caplog):
    file = cut(tmp_path, monkeypatch)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    state, task, model = place(tmp_path, "plain")
    epochs.clear()
    train(state, task, model)
    assert epochs == [0, 1, 2]
    assert "The round is trained from its beginning." in caplog.text


@pytest.mark.parametrize("minutes", ["off", 60.0])
def test_off_and_in_short_rounds_nothing_is_written(minutes, tmp_path, monkeypatch):
    file = cut(tmp_path, monkeypatch, training__checkpoint_minutes=minutes) if minutes != "off" else None
    if file is None:
        written = []
        monkeypatch.setattr("common.training.midway.write_sealed", lambda path, *_: written.append(path))
        state, task, model = place(tmp_path, "plain", training__checkpoint_minutes=minutes)
        assert local_update._midway(state, task, dataclasses.replace(loop_compute(), others=()), model) is None
        train(state, task, model)
        assert written == []
    else:
        assert not file.exists()


def loop_compute():
    return loop.Compute(device="cpu", precision="float32", memory_format="contiguous", threads=1)


def test_several_devices_and_virtual_clients_and_groups_begin_anew(tmp_path):
    state, task, model = place(tmp_path, "plain")
    two = dataclasses.replace(loop_compute(), others=("cpu",))
    assert local_update._midway(state, task, loop_compute(), model) is not None
    assert local_update._midway(state, task, two, model) is None
    virtual = dataclasses.replace(state, site=dataclasses.replace(site_settings("alpha", tmp_path), share=object()))
    assert local_update._midway(virtual, task, loop_compute(), model) is None


def test_a_full_disk_costs_a_warning_and_not_the_round(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("common.training.midway.write_sealed", full)
    state, task, model = place(tmp_path, "plain")
    assert train(state, task, model).change is not None
    assert "a training that is cut off begins anew" in caplog.text


def test_seconds_before_the_cut_count_and_halved_batches_stay_halved(tmp_path, monkeypatch):
    file = cut(tmp_path, monkeypatch, done=2)
    tensors, notes = read_sealed(file)
    assert float(notes["seconds"]) > 0.0
    assert json.loads(notes["sums"])["num_steps"] > 0
    write_sealed(file, tensors, notes | {"seconds": "1000.0", "halved": "yes"})
    state, task, model = place(tmp_path, "plain")
    reply = train(state, task, model)
    assert 1000.0 < reply.train["seconds"] < 2000.0
    assert is_halved(state.recogniser)
    other = tiny_workplace(settings_with(**PLAIN), tmp_path / "other").recogniser
    assert not is_halved(other)
    halve_from_now(other)
    assert is_halved(other)
