"""The norm of the gradient: PyTorch's own for the whole and for each part, and clipped the same, bit for bit."""

import pytest
import torch
from torch import nn

from common import config
from common.models.recogniser import build_recogniser
from common.training.step import clip_gradient, parameter_groups

VIT = {"embedding", "blocks_early", "blocks_middle", "blocks_late", "closing", "head"}
THIRDS = {"stem", "blocks_early", "blocks_middle", "blocks_late", "closing", "head"}


def recogniser_with(backbone, **model):
    settings = config.from_mapping(
        {
            "model": {"backbone": backbone, "width": 0.25, "embedding_size": 16, "patch_size": 8, **model},
            "data": {"image_size": 32},
        }
    )
    return build_recogniser(settings.model, num_people=5, image_size=32, backbone_seed=1, head_seed=2)


def with_gradients(recogniser):
    stream = torch.Generator().manual_seed(3)
    for parameter in recogniser.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=stream)
    return recogniser


def groups_of(recogniser):
    names = tuple(name for name, _ in recogniser.network_parameters())
    return dict(zip(names, parameter_groups(names), strict=True))


@pytest.mark.parametrize(
    ("backbone", "model", "groups"),
    [
        ("cnn", {}, THIRDS),
        ("mobilenet_v2", {}, THIRDS),
        ("resnet18", {}, {"stem", "layer1", "layer2", "layer3", "layer4", "closing", "head"}),
        ("resnet50", {}, {"stem", "layer1", "layer2", "layer3", "layer4", "closing", "head"}),
        ("vit_tiny", {"depth": 12}, VIT),
        ("vit_tiny", {"depth": 3, "attention": "dcal"}, VIT | {"glca"}),
    ],
)
def test_every_parameter_has_its_group(backbone, model, groups):
    recogniser = recogniser_with(backbone, **model)
    assert set(groups_of(recogniser).values()) == groups
    assert clip_gradient(with_gradients(recogniser).network_parameters(), 1.0)[1].keys() == groups


def test_a_vits_parts():
    groups = groups_of(recogniser_with("vit_tiny", depth=12, attention="dcal"))
    blocks = {int(name.split("encoder_layer_")[1].split(".")[0]): g for name, g in groups.items() if "_layer_" in name}
    thirds = ["blocks_early"] * 4 + ["blocks_middle"] * 4 + ["blocks_late"] * 4
    assert blocks == dict(enumerate(thirds))
    assert [name for name, group in groups.items() if group == "embedding"] == [
        "backbone.trunk.class_token",
        "backbone.trunk.conv_proj.weight",
        "backbone.trunk.conv_proj.bias",
        "backbone.trunk.encoder.pos_embedding",
    ]
    assert groups["backbone.glca_closing.linear.weight"] == "glca"
    assert groups["glca_head.weight"] == groups["head.weight"] == "head"


def test_a_convolutional_networks_blocks_behind_its_stem():
    """MobileNetV2's features: 0 is the stem, 1 to 18 make three times six."""
    groups = groups_of(recogniser_with("mobilenet_v2"))
    blocks = {int(name.split("features.")[1].split(".")[0]): g for name, g in groups.items() if "features." in name}
    assert blocks == {
        0: "stem",
        **dict.fromkeys(range(1, 7), "blocks_early"),
        **dict.fromkeys(range(7, 13), "blocks_middle"),
        **dict.fromkeys(range(13, 19), "blocks_late"),
    }


@pytest.mark.parametrize("clip_norm", [0.5, 1e9])
def test_the_gradient_is_measured_and_clipped_as_pytorch_does_it(clip_norm):
    ours, theirs = (with_gradients(recogniser_with("vit_tiny", depth=2, attention="dcal")) for _ in range(2))
    norm, _ = clip_gradient(ours.network_parameters(), clip_norm)
    wanted = nn.utils.clip_grad_norm_([p for _, p in theirs.network_parameters()], clip_norm)
    assert norm == wanted.item()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_each_groups_norm_is_that_of_its_part():
    recogniser = with_gradients(recogniser_with("resnet18"))
    groups = groups_of(recogniser)
    parts = {}
    for name, parameter in recogniser.network_parameters():
        parts.setdefault(groups[name], []).append(parameter.grad.double().flatten())
    expected = {group: torch.cat(part).norm().item() for group, part in parts.items()}
    norm, norms = clip_gradient(recogniser.network_parameters(), 1.0)
    assert norms == pytest.approx(expected, rel=1e-5)
    assert sum(value**2 for value in norms.values()) == pytest.approx(norm**2, rel=1e-5)


def test_what_has_no_gradient_does_not_count():
    recogniser = with_gradients(recogniser_with("cnn"))
    for parameter in recogniser.backbone.parameters():
        parameter.grad = None
    norm, norms = clip_gradient(recogniser.network_parameters(), 1e9)
    assert norms == {"head": pytest.approx(norm)}
