"""Given weights arrive bit for bit, stay, or are refused by one line."""

import dataclasses
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from common.errors import CheckpointError, ConfigError
from common.models.recogniser import Recogniser, build_recogniser, shared_names
from common.settings import ModelSettings

SMALL = ModelSettings(backbone="cnn", embedding_size=16)


def recogniser(model: ModelSettings, seed: int = 1) -> Recogniser:
    return build_recogniser(model, num_people=3, image_size=64, backbone_seed=seed, head_seed=2)


def with_file(model: ModelSettings, path: Path) -> ModelSettings:
    return dataclasses.replace(model, pretrained=str(path))


def other_weights(model: ModelSettings) -> dict[str, Tensor]:
    """A backbone's state that differs from every fresh one in every tensor, statistics and counters included."""
    state = recogniser(model, seed=77).backbone.state_dict()
    return {name: tensor + 1 for name, tensor in state.items()}


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_backbones_file_is_loaded_bit_for_bit(tmp_path: Path, prefix: str) -> None:
    given = other_weights(SMALL)
    save_file({prefix + name: tensor for name, tensor in given.items()}, tmp_path / "w.safetensors")
    loaded = recogniser(with_file(SMALL, tmp_path / "w.safetensors")).backbone.state_dict()
    assert loaded.keys() == given.keys()
    assert [name for name in given if not torch.equal(loaded[name], given[name])] == []


def test_the_shared_parameters_of_a_run_are_a_whole_file(tmp_path: Path) -> None:
    source = recogniser(SMALL, seed=77)
    state = source.state_dict()
    save_file({name: state[name] for name in shared_names(source, "shared")}, tmp_path / "w.safetensors")
    loaded = recogniser(with_file(SMALL, tmp_path / "w.safetensors"))
    assert all(torch.equal(loaded.state_dict()[name], state[name]) for name in shared_names(source, "shared"))


def test_a_head_in_the_file_is_not_taken_over(tmp_path: Path) -> None:
    save_file(recogniser(SMALL, seed=77).state_dict() | {"head.weight": torch.ones(9, 16)}, tmp_path / "w.safetensors")
    loaded = recogniser(with_file(SMALL, tmp_path / "w.safetensors"))
    assert torch.equal(loaded.head.weight, recogniser(SMALL).head.weight)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_a_torchvision_file_fills_the_trunk_and_leaves_the_rest(tmp_path: Path, name: str) -> None:
    model = ModelSettings(backbone=name, embedding_size=16)
    given = {key: value + 1 for key, value in torchvision.models.get_model(name, weights=None).state_dict().items()}
    save_file(given, tmp_path / "w.safetensors")
    loaded = recogniser(with_file(model, tmp_path / "w.safetensors")).backbone
    trunk = loaded.trunk.state_dict()
    assert [key for key in trunk if not torch.equal(trunk[key], given[key])] == []
    assert torch.equal(loaded.linear.weight, recogniser(model).backbone.linear.weight)


def test_imagenet_weights_come_through_torchvisions_api(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {key: value + 1 for key, value in torchvision.models.resnet18(weights=None).state_dict().items()}
    asked: list[str] = []

    def download(url: str, **_: object) -> dict[str, Tensor]:
        asked.append(url)
        return given

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    trunk = recogniser(ModelSettings(embedding_size=16, pretrained="imagenet")).backbone.trunk.state_dict()
    assert [key for key in trunk if not torch.equal(trunk[key], given[key])] == []
    assert "resnet18" in asked[0]


def test_imagenet_offline_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("torch.hub.urlopen", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        recogniser(ModelSettings(pretrained="imagenet"))
    (line,) = caught.value.problems
    assert "\n" not in line
    assert "resnet18 cannot be downloaded" in line
    assert "path of a .safetensors file" in line
    assert caught.value.__suppress_context__


def test_imagenet_has_no_weights_for_the_small_net() -> None:
    with pytest.raises(ConfigError, match="no weights for cnn; choose resnet18, resnet50, mobilenet_v2, vit_base"):
        recogniser(dataclasses.replace(SMALL, pretrained="imagenet"))


def test_every_mismatch_is_listed(tmp_path: Path) -> None:
    given = other_weights(SMALL)
    given["linear.weight"] = torch.zeros(8, 256)
    del given["trunk.blocks.0.0.weight"]
    given["trunk.extra"] = torch.zeros(2)
    save_file(given, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError) as caught:
        recogniser(with_file(SMALL, tmp_path / "w.safetensors"))
    assert str(caught.value) == (
        f"{tmp_path}/w.safetensors: does not fit model.backbone and model.embedding_size: "
        "trunk.blocks.0.0.weight [32, 3, 3, 3] is missing; "
        "linear.weight is [8, 256], the model has [16, 256]; "
        "trunk.extra [2] is not in the model."
    )


def test_another_backbones_file_is_refused_in_one_short_line(tmp_path: Path) -> None:
    save_file(other_weights(SMALL), tmp_path / "w.safetensors")
    with pytest.raises(
        CheckpointError, match=r"conv1\.weight \[64, 3, 7, 7\] is missing; .*; and \d+ more\.$"
    ) as caught:
        recogniser(with_file(ModelSettings(backbone="resnet18"), tmp_path / "w.safetensors"))
    assert len(str(caught.value)) < 600 + len(str(tmp_path))


def test_a_name_that_is_no_choice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'"imagenette" is no file of weights; write none, imagenet, FILE'):
        recogniser(dataclasses.replace(SMALL, pretrained="imagenette"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.safetensors\": no such file"):
        recogniser(with_file(SMALL, tmp_path / "gone.safetensors"))


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    save_file(other_weights(SMALL), tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"w\.safetensors: not a readable \.safetensors file"):
        recogniser(with_file(SMALL, tmp_path / "w.safetensors"))
