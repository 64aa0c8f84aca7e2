"""What travels and what stays: the one decision that must never be wrong."""

import pytest
import torch
from torch import nn

from common.models.recogniser import (
    Recogniser,
    build_recogniser,
    named_state,
    private_names,
    shared_names,
    trainable_names,
)
from common.models.table import BACKBONES, HEADS, VITS
from common.settings import ModelSettings

CONVOLUTIONAL = tuple(name for name in BACKBONES if name not in VITS)


def recogniser(backbone: str = "cnn", head: str = "cosface", attention: str = "sa") -> Recogniser:
    model = ModelSettings(backbone=backbone, head=head, embedding_size=16, depth=1, attention=attention)
    return build_recogniser(model, num_people=5, image_size=64, backbone_seed=1, head_seed=2)


def counters(built: Recogniser) -> set[str]:
    return {name for name in built.state_dict() if name.endswith("num_batches_tracked")}


def test_names_of_the_small_net_by_hand() -> None:
    convolutions = [f"backbone.trunk.blocks.{block}.0.weight" for block in range(4)]
    assert shared_names(recogniser(), "private") == (*convolutions, "backbone.linear.weight")
    blocks = [
        f"backbone.trunk.blocks.{block}.{rest}"
        for block in range(4)
        for rest in ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var")
    ]
    closing = ["backbone.normalisation.running_mean", "backbone.normalisation.running_var"]
    assert shared_names(recogniser(), "shared") == (*blocks, "backbone.linear.weight", *closing)
    assert private_names(recogniser(), "shared") == ("head.weight",)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("normalisation", ["shared", "private"])
def test_shared_private_and_counters_are_the_whole_state(backbone: str, head: str, normalisation: str) -> None:
    built = recogniser(backbone, head)
    shared, private = shared_names(built, normalisation), private_names(built, normalisation)
    assert len({*shared, *private}) == len(shared) + len(private)
    assert {*shared, *private} | counters(built) == set(built.state_dict())
    assert counters(built).isdisjoint({*shared, *private})
    order = list(built.state_dict())
    assert list(shared) == sorted(shared, key=order.index)
    assert list(private) == sorted(private, key=order.index)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("normalisation", ["shared", "private"])
def test_no_name_of_the_head_is_shared(backbone: str, normalisation: str) -> None:
    built = recogniser(backbone)
    assert all(name.startswith("backbone.") for name in shared_names(built, normalisation))
    heads = {name for name in built.state_dict() if name.startswith("head.")}
    assert heads
    assert heads <= set(private_names(built, normalisation))


@pytest.mark.parametrize("backbone", CONVOLUTIONAL)
def test_private_normalisation_shares_no_tensor_of_a_normalisation_layer(backbone: str) -> None:
    built = recogniser(backbone)
    shared = [named_state(built)[name] for name in shared_names(built, "private")]
    layers = [module for module in built.modules() if "BatchNorm" in type(module).__name__]
    assert layers
    kept = {tensor.data_ptr() for layer in layers for tensor in layer.state_dict().values()}
    assert kept.isdisjoint(tensor.data_ptr() for tensor in shared)
    convolutions = [module.weight for module in built.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert {tensor.data_ptr() for tensor in shared} == {weight.data_ptr() for weight in convolutions}


@pytest.mark.parametrize("attention", ["sa", "dcal"])
def test_private_normalisation_of_a_vit_keeps_its_layers_and_shares_the_rest(attention: str) -> None:
    """Two layers in each block, one behind them, and the closing one; GLCA has a block, a layer and a closing too."""
    built = recogniser("vit_tiny", attention=attention)
    kept = set(shared_names(built, "shared")) - set(shared_names(built, "private"))
    base = [
        "trunk.encoder.layers.encoder_layer_0.ln_1",
        "trunk.encoder.layers.encoder_layer_0.ln_2",
        "trunk.encoder.ln",
    ]
    local = ["glca.block.ln_1", "glca.block.ln_2", "glca.ln"]
    layers, closings = (base, ["closing"]) if attention == "sa" else (base + local, ["closing", "glca_closing"])
    expected = {f"backbone.{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    expected |= {f"backbone.{c}.normalisation.{part}" for c in closings for part in ("running_mean", "running_var")}
    assert kept == expected


@pytest.mark.parametrize("head", HEADS)
def test_dcal_shares_its_branches_and_keeps_both_heads_and_the_loss_weights(head: str) -> None:
    built = recogniser("vit_tiny", head, "dcal")
    heads = [name for name in recogniser("vit_tiny", head).state_dict() if name.startswith("head.")]
    expected = [*heads, *(f"glca_{name}" for name in heads)]
    expected += [f"loss_weights.{name}" for name in ("glca", "pwca", "sa")]
    assert sorted(private_names(built, "shared")) == sorted(expected)
    shared = shared_names(built, "shared")
    assert {name for name in shared if name.startswith("backbone.glca.")}
    assert {name for name in shared if name.startswith("backbone.glca_closing.")}
    assert shared_names(built.backbone, "shared") == shared


def test_pwca_has_no_tensors_of_its_own() -> None:
    assert shared_names(recogniser("vit_tiny", attention="pwca"), "shared") == shared_names(
        recogniser("vit_tiny"), "shared"
    )


@pytest.mark.parametrize("normalisation", ["shared", "private"])
def test_server_without_a_head_shares_the_same_names(normalisation: str) -> None:
    built = recogniser()
    assert shared_names(built.backbone, normalisation) == shared_names(built, normalisation)


def test_a_lone_backbones_private_names_are_its_normalisation_layers() -> None:
    built = recogniser()
    assert private_names(built.backbone, "shared") == ()
    assert (*private_names(built.backbone, "private"), "head.weight") == private_names(built, "private")


def test_named_state_is_the_models_own_memory() -> None:
    built = recogniser()
    named_state(built.backbone)["backbone.linear.weight"].fill_(7.0)
    assert torch.equal(built.backbone.linear.weight, torch.full_like(built.backbone.linear.weight, 7.0))
    assert list(named_state(built)) == list(built.state_dict())


def test_unknown_normalisation_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'private'"):
        shared_names(recogniser(), "privat")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_what_is_shared_and_not_trainable_are_the_statistics_of_normalisation(backbone: str) -> None:
    built = recogniser(backbone)
    shared = set(shared_names(built, "shared"))
    statistics = {name for name in shared if name.endswith(("running_mean", "running_var"))}
    assert statistics
    assert shared - trainable_names(built) == statistics
    assert set(shared_names(built, "private")) <= trainable_names(built)
    assert trainable_names(built.backbone) == {name for name in trainable_names(built) if name.startswith("backbone.")}
    assert "head.weight" in trainable_names(built)
