"""A ViT's given weights arrive bit for bit through construction, or are refused by name."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from common.errors import CheckpointError, ConfigError
from common.models.pretrained import interpolated
from common.models.recogniser import Recogniser, build_recogniser
from common.settings import ModelSettings

DCAL = ModelSettings(backbone="vit_tiny", patch_size=8, depth=2, embedding_size=16, attention="dcal")
POSITIONS = "encoder.pos_embedding"


def recogniser(model: ModelSettings, *, size: int = 32, seed: int = 1) -> Recogniser:
    return build_recogniser(model, num_people=3, image_size=size, backbone_seed=seed, head_seed=2)


def torchvisions(*, size: int = 32, heads: int = 3, depth: int = 2, patch: int = 8) -> dict[str, Tensor]:
    """A ViT of torchvision's with random weights, none of which is 0 or 1, classifier included."""
    theirs = VisionTransformer(
        image_size=size,
        patch_size=patch,
        num_layers=depth,
        num_heads=heads,
        hidden_dim=64 * heads,
        mlp_dim=256 * heads,
        num_classes=7,
    )
    stream = torch.Generator().manual_seed(4)
    return {name: torch.randn(tensor.shape, generator=stream) for name, tensor in theirs.state_dict().items()}


def from_file(tensors: dict[str, Tensor], path: Path, model: ModelSettings = DCAL, *, size: int = 32) -> Recogniser:
    save_file(tensors, path / "w.safetensors")
    return recogniser(dataclasses.replace(model, pretrained=str(path / "w.safetensors")), size=size)


def differing(have: dict[str, Tensor], given: dict[str, Tensor]) -> list[str]:
    return [name for name in have if not torch.equal(have[name], given[name])]


def test_a_torchvision_file_is_kept_bit_for_bit_and_fills_the_trunk_alone(tmp_path: Path) -> None:
    given = torchvisions()
    loaded = from_file(given, tmp_path)
    assert differing(loaded.backbone.trunk.state_dict(), given) == []
    fresh = recogniser(DCAL)
    others = {name: tensor for name, tensor in loaded.state_dict().items() if "trunk." not in name}
    assert {name.split(".")[1] for name in others if "backbone." in name} == {"closing", "glca", "glca_closing"}
    assert differing(others, fresh.state_dict()) == []


def test_the_old_names_in_torchvisions_files_are_understood(tmp_path: Path) -> None:
    given = torchvisions()
    old = {name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): t for name, t in given.items()}
    assert old.keys() != given.keys()
    assert differing(from_file(old, tmp_path).backbone.trunk.state_dict(), given) == []


def test_vit_b_16_comes_through_torchvisions_api_and_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {name: t + 1 for name, t in torchvision.models.vit_b_16().state_dict().items()}
    asked: list[str] = []
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda url, **_: asked.append(url) or given)
    model = ModelSettings(backbone="vit_base", embedding_size=16, pretrained="imagenet")
    assert differing(recogniser(model, size=224).backbone.trunk.state_dict(), given) == []
    assert "vit_b_16" in asked[0]
    small = recogniser(model, size=112).backbone.trunk.state_dict()
    assert differing(small, given | {POSITIONS: small[POSITIONS]}) == []


def test_the_small_sizes_have_no_imagenet_weights() -> None:
    with pytest.raises(ConfigError, match="no weights for vit_tiny; choose resnet18, resnet50, mobilenet_v2, vit_base"):
        recogniser(dataclasses.replace(DCAL, pretrained="imagenet"))


@pytest.mark.parametrize("size", [16, 48])
def test_positions_of_another_grid_are_interpolated_as_torchvision_does(tmp_path: Path, size: int) -> None:
    given = torchvisions()
    loaded = from_file(given, tmp_path, size=size).backbone.trunk.state_dict()
    theirs = interpolate_embeddings(size, 8, dict(given))
    torch.testing.assert_close(loaded[POSITIONS], theirs[POSITIONS])
    assert torch.equal(loaded[POSITIONS][:, 0], given[POSITIONS][:, 0])
    assert differing(loaded, given | {POSITIONS: loaded[POSITIONS]}) == []


def test_interpolation_keeps_rows_and_columns_apart() -> None:
    rows = torch.arange(4.0).repeat_interleave(4)
    positions = torch.cat([torch.tensor([9.0]), rows]).view(1, 17, 1)
    grid = interpolated(positions, 50)[0, 1:, 0].view(7, 7)
    torch.testing.assert_close(grid, grid[:, :1].expand(7, 7))
    assert (grid[1:, 0] > grid[:-1, 0]).all()


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"heads": 6}, r"class_token is \[1, 1, 384\], the model has \[1, 1, 192\]; .*; and \d+ more\.$"),
        ({"patch": 16}, r"conv_proj\.weight is \[192, 3, 16, 16\], the model has \[192, 3, 8, 8\]\.$"),
        ({"depth": 3}, r"encoder\.layers\.encoder_layer_2\.ln_1\.weight \[192\] is not in the model; "),
        ({"depth": 1}, r"encoder\.layers\.encoder_layer_1\.ln_1\.weight \[192\] is missing; "),
    ],
)
def test_weights_of_another_size_name_the_tensor_and_both_shapes(
    tmp_path: Path, other: dict[str, int], expected: str
) -> None:
    with pytest.raises(CheckpointError, match=expected) as caught:
        from_file(torchvisions(**other), tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/w.safetensors: does not fit")
    assert "\n" not in str(caught.value)


def test_positions_of_no_square_grid_are_refused(tmp_path: Path) -> None:
    given = torchvisions() | {POSITIONS: torch.zeros(1, 13, 192)}
    with pytest.raises(CheckpointError, match=r"pos_embedding is \[1, 13, 192\], the model has \[1, 17, 192\]\.$"):
        from_file(given, tmp_path)


def test_a_whole_dcal_model_fills_the_backbone_and_no_head(tmp_path: Path) -> None:
    given = {name: t + 1 for name, t in recogniser(DCAL, seed=77).state_dict().items()}
    loaded, fresh = from_file(given, tmp_path).state_dict(), recogniser(DCAL).state_dict()
    backbone = {name for name in given if name.startswith("backbone.")}
    assert differing({name: loaded[name] for name in backbone}, given) == []
    assert differing({name: loaded[name] for name in given.keys() - backbone}, fresh) == []


def test_a_plain_vit_starts_one_with_glca_whose_branch_stays_as_it_is(tmp_path: Path) -> None:
    given = recogniser(dataclasses.replace(DCAL, attention="sa"), seed=9).state_dict()
    loaded = from_file(given, tmp_path).state_dict()
    shared = {name for name in given if name.startswith("backbone.")}
    assert differing({name: given[name] for name in shared}, loaded) == []
    branch = {name: tensor for name, tensor in loaded.items() if name.startswith("backbone.glca")}
    assert branch
    assert differing(branch, recogniser(DCAL).state_dict()) == []


def test_half_a_glca_branch_is_refused(tmp_path: Path) -> None:
    given = recogniser(DCAL).state_dict()
    del given["backbone.glca.block.ln_1.weight"]
    with pytest.raises(CheckpointError, match=r"glca\.block\.ln_1\.weight \[192\] is missing"):
        from_file(given, tmp_path)
