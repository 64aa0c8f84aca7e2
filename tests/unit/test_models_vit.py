"""The vision transformer: torchvision's layout and numbers, its maps, and sizes that do not fit."""

import pytest
import torch
import torchvision
from torch import Tensor
from torchvision.models.vision_transformer import VisionTransformer

from common import config
from common.errors import ConfigError
from common.models.recogniser import build_backbone
from common.models.vit import Attention, VitTrunk
from common.settings import ModelSettings

HEADS = {"vit_tiny": (192, 3), "vit_small": (384, 6), "vit_base": (768, 12)}


def pictures(num: int, side: int = 32) -> Tensor:
    return torch.rand(num, 3, side, side, generator=torch.Generator().manual_seed(3)) * 2 - 1


def shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


@pytest.mark.parametrize("name", HEADS)
def test_a_trunk_computes_what_torchvision_computes(name: str) -> None:
    dim, heads = HEADS[name]
    theirs = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=heads, hidden_dim=dim, mlp_dim=4 * dim, num_classes=1
    )
    theirs.heads = torch.nn.Identity()
    ours = VitTrunk(name, image_size=32, patch_size=8, depth=2)
    with torch.no_grad():
        for parameter in theirs.parameters():  # class token, biases and scales too, which begin as 0 and 1
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(pictures(3)), theirs.eval()(pictures(3)), rtol=1e-4, atol=1e-5)


def test_the_base_size_has_the_layout_of_vit_b_16() -> None:
    with torch.device("meta"):
        ours = VitTrunk("vit_base", image_size=224, patch_size=16, depth=12).state_dict()
        theirs = torchvision.models.vit_b_16().state_dict()
    assert shapes(ours) == {name: shape for name, shape in shapes(theirs).items() if not name.startswith("heads.")}


def test_settings_reach_the_trunk() -> None:
    model = ModelSettings(backbone="vit_tiny", patch_size=8, depth=3, width=0.25)
    trunk = build_backbone(model, 32).trunk
    assert trunk.encoder.pos_embedding.shape == (1, 17, 48)
    assert trunk.conv_proj.kernel_size == (8, 8)
    assert len(trunk.blocks) == 3


def test_position_and_class_token_matter() -> None:
    trunk = VitTrunk("vit_tiny", image_size=32, patch_size=8, depth=1)
    turned = pictures(2).flip(3)
    assert not torch.allclose(trunk(pictures(2)), trunk(turned), atol=1e-4)
    before = trunk(pictures(2))
    with torch.no_grad():
        trunk.class_token.add_(torch.randn_like(trunk.class_token))
    assert not torch.allclose(trunk(pictures(2)), before, atol=1e-3)


def test_maps_are_those_of_the_forward_pass() -> None:
    trunk = VitTrunk("vit_tiny", image_size=32, patch_size=8, depth=2)
    maps = trunk.attention_maps(pictures(2))
    assert [each.shape for each in maps] == [(2, 3, 17, 17)] * 2
    tokens = trunk.embed(pictures(2))
    for block, seen in zip(trunk.blocks, maps, strict=True):
        torch.testing.assert_close(seen.sum(-1), torch.ones(2, 3, 17))
        tokens = block.add(tokens, seen @ block.project(tokens)[2])
    torch.testing.assert_close(trunk.close(tokens), trunk(pictures(2)), rtol=1e-4, atol=1e-5)


def test_asking_apart_is_asking_together() -> None:
    attention, tokens = Attention(12, 3), torch.randn(2, 5, 12)
    for apart, whole in zip(attention.project_apart(tokens, tokens), attention.project(tokens), strict=True):
        torch.testing.assert_close(apart, whole)


def test_a_patch_that_does_not_divide_the_picture_is_one_line() -> None:
    raw = {"data": {"image_size": 100}, "model": {"backbone": "vit_tiny"}}
    with pytest.raises(ConfigError) as caught:
        config.from_mapping(raw)
    (line,) = caught.value.problems
    assert "data.image_size = 100 is not divisible by model.patch_size = 16; use 96 px" in line
    assert config.from_mapping({"data": {"image_size": 100}}).model.patch_size == 16  # nobody else has patches
    with pytest.raises(ValueError, match="image_size = 100 is not divisible by patch_size = 16"):
        VitTrunk("vit_tiny", image_size=100, patch_size=16, depth=1)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"attention": "dcal"}, 'model.attention = "dcal" needs a ViT, and model.backbone = "resnet18" is none'),
        (
            {"backbone": "vit_tiny", "inference": "both"},
            'model.inference = "both" needs a GLCA branch, and model.attention = "sa" has none',
        ),
        ({"backbone": "vit_tiny", "attention": "pwca", "inference": "glca"}, "needs a GLCA branch"),
        ({"backbone": "vit_tiny", "attention": "glca", "glca_fraction": 0.0}, "must be greater than 0"),
        ({"backbone": "vit_tiny", "attention": "glca", "glca_fraction": 1.5}, "must be at most 1"),
        ({"backbone": "vit_tiny", "depth": 0}, "must be at least 1"),
        ({"backbone": "vit_base", "pretrained": "imagenet", "depth": 6}, "vit_base's ImageNet weights"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(model: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.from_mapping({"model": model})
    (line,) = caught.value.problems
    assert expected in line
