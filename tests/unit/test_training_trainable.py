"""`training.trainable`: what is learned, and that the rest stays as it was to the bit, statistics included."""

import dataclasses

import numpy as np
import pytest
import torch
from packs_in_memory import CPU, SIDE, memory_pack
from tiny_federation import (
    MANIFEST,
    ScriptedMailbox,
    client,
    enter_run,
    federation_over,
    reply_to,
    settings_with,
    site_named,
    task_for,
    tiny_workplace,
)

from clients.local_update import train
from common import config
from common.errors import ConfigError, ReplyRefused
from common.models.recogniser import build_recogniser, moving_names, trainable_names
from common.protocol.codec import decode, encode
from common.protocol.parameters import Part, flatten
from common.settings import Settings, TrainingSettings
from common.training.loop import make_optimiser, train_epochs
from server.exchange.guard import check_train_reply
from tests.tiny_settings import changed

MODELS = {
    "resnet18": {"model__backbone": "resnet18", "model__width": 0.125},
    "cnn": {"model__backbone": "cnn", "model__width": 0.25},
    "mobilenet_v2": {"model__backbone": "mobilenet_v2", "model__width": 0.125},
    "vit_tiny": {"model__backbone": "vit_tiny", "model__width": 0.125, "model__patch_size": 8, "model__depth": 2},
}
# Of each backbone what moves in training beside the head, as prefixes of names: parameters and statistics.
MOVES = {
    ("resnet18", "last_block"): ("trunk.layer4.1.", "linear.", "normalisation."),
    ("cnn", "last_block"): ("trunk.blocks.3.", "linear.", "normalisation."),
    ("mobilenet_v2", "last_block"): ("trunk.features.17.", "trunk.features.18.", "linear.", "normalisation."),
    ("vit_tiny", "last_block"): ("trunk.encoder.layers.encoder_layer_1.", "trunk.encoder.ln.", "closing."),
    ("resnet18", "head_side"): ("linear.", "normalisation."),
    ("vit_tiny", "head_side"): ("closing.",),
    ("cnn", "norm"): (*(f"trunk.blocks.{number}.1." for number in range(4)), "normalisation."),
}


def settings_of(backbone, trainable):
    tiny = {"model__embedding_size": 16, "data__image_size": SIDE, "training__batch_size": 10, "training__lr": 0.1}
    return changed(Settings(), **tiny, **MODELS[backbone], training__trainable=trainable)


def trained(settings):
    """The state before and after an epoch, and the model."""
    pack = memory_pack()
    recogniser = build_recogniser(
        settings.model, num_people=pack.num_classes, image_size=SIDE, backbone_seed=1, head_seed=2
    )
    before = {name: tensor.clone() for name, tensor in recogniser.state_dict().items()}
    optimiser = make_optimiser(recogniser, settings.training)
    train_epochs(
        recogniser, optimiser, pack, settings=settings, compute=CPU, epochs=range(1), total_epochs=1, stream_name="a"
    )
    return before, recogniser


@pytest.mark.parametrize(("backbone", "trainable"), MOVES)
def test_nothing_else_moves(backbone, trainable):
    before, recogniser = trained(settings_of(backbone, trainable))
    moved = {name for name, tensor in recogniser.state_dict().items() if not torch.equal(tensor, before[name])}
    moving = {
        name for name in before if name.startswith(tuple(f"backbone.{prefix}" for prefix in MOVES[backbone, trainable]))
    }
    assert moved == moving | {"head.weight"}
    statistics = {name for name in moving if name not in dict(recogniser.named_parameters())}
    assert trainable_names(recogniser, trainable) == (moving - statistics) | {"head.weight"}


def test_all_is_everything_as_ever():
    before, recogniser = trained(settings_of("cnn", "all"))
    assert not [name for name, tensor in recogniser.state_dict().items() if torch.equal(tensor, before[name])]
    assert trainable_names(recogniser) == {name for name, _ in recogniser.named_parameters()}


def test_what_was_frozen_can_be_trained_again():
    _, recogniser = trained(settings_of("cnn", "head_side"))
    make_optimiser(recogniser, TrainingSettings())
    recogniser.train()
    assert all(p.requires_grad for p in recogniser.parameters())
    assert all(module.training for module in recogniser.modules())


def test_dropout_of_a_frozen_part_does_nothing_and_that_of_the_head_side_does():
    settings = settings_of("cnn", "head_side")
    one, other = (trained(changed(settings, model__dropout=rate))[1] for rate in (0.0, 0.5))
    assert not torch.equal(one.backbone.linear.weight, other.backbone.linear.weight)


def test_norm_alone_is_nothing_where_norms_are_private():
    with pytest.raises(ConfigError, match=r'training\.trainable = "norm" would train nothing that is shared'):
        config.from_mapping({"model": {"normalisation": "private"}, "training": {"trainable": "norm"}})


# ---- what travels of it


@pytest.mark.parametrize("codec", ["float32", "int8"])
@pytest.mark.usefixtures("in_a_run")
def test_only_what_moves_is_sent_and_the_server_takes_nothing_else(tmp_path, codec):
    """FedProx, two rounds in this process; the change has the length of what moves, and the model's rest its bits."""
    settings = settings_with(
        training__trainable="last_block",
        federation__strategy="fedprox",
        federation__upload_codec=codec,
        federation__rounds=2,
        federation__round_timeout_s=60.0,
        federation__min_clients=1,
    )
    state = tiny_workplace(settings, tmp_path)
    model = flatten(state.recogniser.state_dict(), state.manifest)
    reply = train(state, task_for(state.manifest, settings), model)
    moving = moving_names(state.recogniser, "shared", "last_block")
    sizes = {entry.name: entry.size for entry in state.manifest.entries}
    assert reply.change.size == sum(sizes[name] for name in moving) < 0.8 * state.manifest.size
    check = {"server_round": 1, "manifest": state.manifest, "codec": codec, "site": site_named("alpha")}
    check_train_reply(reply, changes=state.part.part, **check)
    with pytest.raises(ReplyRefused, match=f"{codec} of {state.manifest.size} were asked for"):
        check_train_reply(reply, **check)
    change = state.part.spread(decode(reply.change))
    for entry in state.manifest.entries:
        part = change[entry.offset : entry.offset + entry.size]
        assert bool(part.any()) == (entry.name in moving), entry.name
    assert (state.part.taken(change) == decode(reply.change)).all()


def test_a_federation_changes_nothing_else(tmp_path, monkeypatch):
    """A server with one scripted client whose change is of the second tensor only."""
    settings = settings_with(federation__rounds=2, federation__min_clients=1)
    part = Part.of(MANIFEST, moving={"backbone.b"}, trainable={"backbone.b"})

    def answer(task):
        reply, change = reply_to(task), np.full(4, 0.5, dtype=np.float32)
        return dataclasses.replace(reply, change=encode(change, "float32")) if task.kind == "train" else reply

    federation = federation_over(ScriptedMailbox({1: client("a", answer)}), settings, tmp_path)
    federation.part = part
    federation.__post_init__()
    enter_run(monkeypatch)
    federation.run()
    assert federation.model.received.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
