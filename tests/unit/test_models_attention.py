"""Where a ViT looks: the maps are those that the model works with, and each value stands at its patch's place."""

import pytest
import torch
from torch import Tensor, nn

from common.models.dcal import GlobalLocal, VitBackbone, attention_of, joined, rollout
from common.models.recogniser import build_backbone
from common.models.vit import Block
from common.settings import ModelSettings

SIDE, PATCH, GRID = 32, 8, 4
BRIGHT, DARK = (1, 3), (2, 0)  # row and column; neither is on the diagonal, nor one the other's mirror image


def backbone_of(**changes: object) -> VitBackbone:
    values = {"width": 0.125, "depth": 3, "patch_size": PATCH, "embedding_size": 8, "glca_fraction": 0.25}
    made = build_backbone(ModelSettings(backbone="vit_tiny", **{**values, **changes}), SIDE)
    assert isinstance(made, VitBackbone)
    return made


def shaken(backbone: VitBackbone) -> VitBackbone:
    """Attention that is far from even, with biases and scales that are not the initial ones."""
    stream = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=stream))
    return backbone


def noise(num: int) -> Tensor:
    return torch.rand(num, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)) * 2 - 1


def spots() -> Tensor:
    """A grey picture with one bright and one dark patch."""
    picture = torch.zeros(1, 3, SIDE, SIDE)
    for (row, column), value in ((BRIGHT, 1.0), (DARK, -1.0)):
        picture[..., row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = value
    return picture


def look_for(block: Block, brightness: float) -> None:
    """Make a block attend to what is bright (30) or dark (-30): queries are constant, keys read feature 0."""
    attention, size = block.self_attention, 8
    dim = attention.out_proj.in_features
    for parameter in (attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight):
        parameter.zero_()
    for layer in block.mlp:
        if isinstance(layer, nn.Linear):
            layer.weight.zero_()
            layer.bias.zero_()
    for head in range(attention.num_heads):
        attention.in_proj_bias[head * size] = brightness
        attention.in_proj_weight[dim + head * size, 0] = 1.0


@torch.no_grad()
def looking_for_spots() -> VitBackbone:
    """Self-attention looks at the brightest patch, GLCA at the darkest: by construction, without training."""
    backbone = backbone_of(depth=1, attention="glca")
    trunk = backbone.trunk
    trunk.conv_proj.weight.zero_()
    trunk.conv_proj.weight[0] = 1.0 / (3 * PATCH**2)  # feature 0 is a patch's mean
    trunk.encoder.pos_embedding.zero_()
    trunk.encoder.pos_embedding[..., 1] = 3.0  # the same for all, so that a grey patch has something to normalise
    look_for(trunk.blocks[0], 30.0)
    assert backbone.glca is not None
    look_for(backbone.glca.block, -30.0)
    return backbone


def test_rollout_and_last_block_are_the_models() -> None:
    backbone = shaken(backbone_of())
    maps = attention_of(backbone, noise(3))
    blocks = backbone.trunk.attention_maps(noise(3))
    for ours, row in ((maps.rollout, rollout(blocks)[:, 0, 1:]), (maps.last, blocks[-1].mean(1)[:, 0, 1:])):
        torch.testing.assert_close(ours.flatten(1), row / row.sum(1, keepdim=True))
        assert float(ours.std()) > 0.01  # or the next line would tell little
    assert not torch.allclose(maps.rollout, maps.last, atol=1e-3)
    assert maps.chosen is None
    assert maps.glca is None


@pytest.mark.parametrize("attention", ["sa", "glca", "pwca", "dcal"])
def test_every_map_sums_to_one(attention: str) -> None:
    maps = attention_of(shaken(backbone_of(attention=attention)), noise(2))
    present = [found for found in (maps.rollout, maps.last, maps.glca) if found is not None]
    assert len(present) == (3 if attention in ("glca", "dcal") else 2)
    for found in present:
        assert found.shape == (2, GRID, GRID)
        torch.testing.assert_close(found.sum((1, 2)), torch.ones(2))


def test_the_chosen_patches_are_those_that_the_model_asks_with(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = shaken(backbone_of(attention="dcal", inference="both")).eval()
    asked: list[tuple[Tensor, Tensor]] = []
    ask = GlobalLocal.ask

    def watched(branch: GlobalLocal, asking: Tensor, tokens: Tensor) -> Tensor:
        asked.append((asking, tokens))
        return ask(branch, asking, tokens)

    monkeypatch.setattr(GlobalLocal, "ask", watched)
    backbone(noise(4))
    maps = attention_of(backbone, noise(4))
    [(asking, tokens)] = asked
    assert maps.chosen is not None
    assert maps.chosen.shape == (4, 4)  # a quarter of 16 patches
    for picture, patches in enumerate(maps.chosen.tolist()):
        torch.testing.assert_close(tokens[picture, [1 + patch for patch in patches]], asking[picture, 1:])
    assert len({tuple(patches) for patches in maps.chosen.tolist()}) > 1  # it depends on the picture


def test_glcas_map_is_made_of_its_queries_attention() -> None:
    """The rows are found through the values: where value j is the unit vector j, the attended values are the map."""
    backbone = shaken(backbone_of(attention="glca"))
    maps = attention_of(backbone, noise(2))
    branch = backbone.glca
    assert branch is not None
    assert maps.chosen is not None
    assert maps.glca is not None
    tokens = backbone.trunk.embed(noise(2))
    for block in backbone.trunk.blocks:
        tokens = block(tokens)
    for picture, patches in enumerate(maps.chosen.tolist()):
        every = branch.block.ln_1(tokens[picture : picture + 1])
        queries, keys, _ = branch.block.self_attention.project(every)
        seen = nn.functional.scaled_dot_product_attention(queries, keys, torch.eye(17).expand(1, 3, 17, 17))[0].mean(0)
        row = (seen[0] + seen[[1 + patch for patch in patches]].mean(0))[1:]
        torch.testing.assert_close(maps.glca[picture].flatten(), row / row.sum(), rtol=1e-4, atol=1e-6)


def test_what_it_looks_at_stands_at_its_place() -> None:
    maps = attention_of(looking_for_spots(), spots())
    assert maps.glca is not None
    assert maps.chosen is not None
    for found, (row, column) in ((maps.rollout, BRIGHT), (maps.last, BRIGHT), (maps.glca, DARK)):
        assert float(found[0, row, column]) > 0.99
    assert maps.chosen[0, 0] == BRIGHT[0] * GRID + BRIGHT[1]


def test_batches_are_joined_in_order() -> None:
    backbone = shaken(backbone_of(attention="glca"))
    whole = attention_of(backbone, noise(3))
    parts = joined([attention_of(backbone, one) for one in noise(3).split(1)])
    for name in ("rollout", "last", "chosen", "glca"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
    alone = joined([attention_of(backbone_of(), one) for one in noise(2).split(1)])
    assert (alone.chosen, alone.glca) == (None, None)


def test_the_model_is_left_as_it_was() -> None:
    backbone = shaken(backbone_of(attention="dcal")).train()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    attention_of(backbone, noise(2))
    assert backbone.training
    assert all(parameter.grad is None for parameter in backbone.parameters())
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[name])
