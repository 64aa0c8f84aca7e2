"""Group normalisation in the place of every batch normalisation."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common import config
from common.errors import CheckpointError, ConfigError
from common.models.group_norm import num_groups
from common.models.recogniser import build_recogniser, private_names, shared_names
from common.settings import ModelSettings

BACKBONES = ("resnet18", "resnet50", "mobilenet_v2", "cnn", "vit_tiny")
SIDE = 32


def recogniser(backbone, norm="group", **values):
    model = ModelSettings(backbone=backbone, width=0.25, embedding_size=16, patch_size=16, depth=2, norm=norm, **values)
    return build_recogniser(model, num_people=3, image_size=SIDE, backbone_seed=1, head_seed=2)


@pytest.mark.parametrize(("channels", "groups"), [(64, 4), (512, 32), (24, 2), (8, 1), (40, 4), (11, 1), (13 * 17, 17)])
def test_a_group_has_16_channels_or_the_next_smaller_divisor(channels, groups):
    assert num_groups(channels) == groups


@pytest.mark.parametrize("backbone", BACKBONES)
def test_nothing_of_a_batch_is_left(backbone):
    """A picture's embedding in training is the one that it has alone, and the one of evaluation."""
    built = recogniser(backbone).train()
    assert not [m for m in built.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert not list(built.backbone.buffers())
    pictures = torch.rand(3, 3, SIDE, SIDE) * 2 - 1
    with torch.no_grad():
        together = built.embed(pictures)
        alone = torch.cat([built.embed(picture[None]) for picture in pictures])
        evaluated = built.eval().embed(pictures)
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)
    assert torch.equal(together, evaluated)
    other = recogniser(backbone, "batch").train()
    assert not torch.allclose(other.embed(pictures)[:2], other.embed(pictures[:2]))


def test_other_weights_are_drawn_as_with_batch_normalisation():
    one, other = recogniser("resnet18"), recogniser("resnet18", "batch")
    assert torch.equal(one.backbone.trunk.layer4[1].conv2.weight, other.backbone.trunk.layer4[1].conv2.weight)


def test_private_normalisation_keeps_its_scale_and_shift():
    built = recogniser("cnn")
    kept = {name for name in private_names(built, "private") if not name.startswith("head.")}
    layers = [f"trunk.blocks.{number}.1" for number in range(4)] + ["normalisation"]
    assert kept == {f"backbone.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert kept <= set(shared_names(built, "shared"))


@pytest.mark.parametrize("backbone", ["resnet18", "vit_tiny"])
@pytest.mark.parametrize(("norm", "other"), [("batch", "group"), ("group", "batch")])
def test_weights_of_the_other_norm_are_refused_in_one_line(tmp_path, backbone, norm, other):
    file = tmp_path / "w.safetensors"
    save_file(recogniser(backbone, other).state_dict(), file)
    with pytest.raises(CheckpointError, match=rf"its layers have {other} normalisation, and model\.norm = \"{norm}\""):
        recogniser(backbone, norm, pretrained=str(file))
    save_file(recogniser(backbone, norm).state_dict(), file)
    recogniser(backbone, norm, pretrained=str(file))


def test_imagenet_has_no_such_weights():
    with pytest.raises(ConfigError, match=r'model\.norm = "group" has no ImageNet weights'):
        config.from_mapping({"model": {"norm": "group", "pretrained": "imagenet", "width": 1.0}})


def test_with_it_a_freshly_drawn_model_can_be_trained_in_private():
    wanted = {"privacy": {"unit": "person"}, "model": {"backbone": "cnn"}}
    with pytest.raises(ConfigError, match=r'take model\.norm = "group"'):
        config.from_mapping(wanted)
    wanted["model"]["norm"] = "group"
    assert config.from_mapping(wanted).model.norm == "group"
