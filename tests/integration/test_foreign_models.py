"""A registry that someone else can write to: README's program runs nothing of what is in it, and still loads ours.

Each attack is tried on MLflow's own loader as well, where it succeeds: one that works nowhere would prove nothing.
"""

import os
import re
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from common import config
from common.errors import TrackingError
from common.models.recogniser import EmbeddingModel, build_backbone
from common.settings import TrackingSettings
from common.tracking import load_model
from common.tracking.registry import register_model
from common.tracking.run import open_run
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAM = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "@champion" in block)
NAME = "resnet18_federated_fedavg"
SETTINGS = config.from_mapping({"model": {"backbone": "cnn", "embedding_size": 16}, "data": {"image_size": 64}})

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),  # MLflow's tables
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning"),  # MLflow's own classes
    pytest.mark.usefixtures("silent_mlflow"),
]


class Payload:
    """What makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.makedirs, (str(self.path),)


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A reader's folder, with a run and its champion."""
    folder = tmp_path_factory.mktemp("registry")
    for name, shade in (("a.jpg", 90), ("b.jpg", 160)):
        Image.new("RGB", (40, 40), (shade, 80, 70)).save(folder / name)
    torch.manual_seed(0)
    model = EmbeddingModel(build_backbone(SETTINGS.model, SETTINGS.data.image_size))
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    run = open_run(
        TrackingSettings(tensorboard="none"), uri=uri, folder=folder / "run", experiment="fed", run_name="n", tags={},
        params={},
    )  # fmt: skip
    run.log_text(config.to_toml(SETTINGS), "config.toml")
    about = {"image_size": 64, "step": 3, "role": "best", "val_auc": 0.8, "val_people": "p", "metrics": {}}
    assert register_model(run, model, name=NAME, **about) == "1"
    run.finish("FINISHED")
    return folder, model


@pytest.fixture
def champion(registry, monkeypatch):
    """Puts another model in the champion's place, as whoever can write to the registry may; honest again afterwards."""
    from mlflow import MlflowClient

    folder, _ = registry
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    monkeypatch.chdir(folder)
    honest = client.get_model_version(NAME, "1")

    def replace(source):
        made = client.create_model_version(NAME, str(source), run_id=honest.run_id)
        client.set_registered_model_alias(NAME, "champion", made.version)

    yield replace
    client.set_registered_model_alias(NAME, "champion", "1")


def copied(registry, to):
    """The honest model's files, as MLflow keeps them."""
    folder, _ = registry
    [about] = (folder / "run" / "models").rglob("MLmodel")
    return shutil.copytree(about.parent, to)


def run_program():
    exec(compile(PROGRAM, "README.md", "exec"), {})  # noqa: S102 - what a reader runs


def run_mlflow():
    import mlflow

    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    mlflow.set_registry_uri("sqlite:///mlflow.db")
    mlflow.pytorch.load_model(f"models:/{NAME}@champion")


def test_the_champion_is_loaded_and_computes_what_it_did(registry, capsys, monkeypatch):
    monkeypatch.chdir(registry[0])
    run_program()
    assert re.fullmatch(r"-?[01]\.\d+\n", capsys.readouterr().out)
    pictures = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (3, 3, 64, 64)).astype(np.float32))
    loaded = load_model(f"models:/{NAME}@champion", "sqlite:///mlflow.db")
    assert not loaded.training
    torch.testing.assert_close(loaded(pictures), registry[1](pictures))


def test_a_pickle_in_the_champions_place_is_not_run(registry, champion, tmp_path, monkeypatch):
    model, marker = copied(registry, tmp_path / "evil"), tmp_path / "ran"
    (model / "data" / "model.pt2").unlink()
    torch.save(Payload(marker), model / "data" / "model.pth")
    (model / "data" / "pickle_module_info.txt").write_text("mlflow.pytorch.pickle_module")
    champion(model)
    with pytest.raises(TrackingError, match="cannot be loaded"):
        run_program()
    assert not marker.exists()
    with pytest.raises(AttributeError):  # it is no model; by then it has run
        run_mlflow()
    assert marker.exists()
    marker.rmdir()
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    with pytest.raises(Exception, match="pickle is disallowed"):
        run_mlflow()
    assert not marker.exists()


def test_a_formula_in_the_champions_graph_is_not_run(registry, champion, tmp_path, monkeypatch):
    """MLflow's own refusal of pickles lets it through: the archive holds JSON and tensors alone."""
    model, marker = copied(registry, tmp_path / "evil"), tmp_path / "ran"
    path = model / "data" / "model.pt2"
    with zipfile.ZipFile(path) as archive:
        files = {one.filename: archive.read(one) for one in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            formula = f"__import__('os').makedirs('{marker}', exist_ok=True) or "
            archive.writestr(name, content.replace(b'"expr_str": "', f'"expr_str": "{formula}'.encode()))
    champion(model)
    run_program()  # the tensors are as they were; nothing else is looked at
    assert not marker.exists()
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    run_mlflow()
    assert marker.exists()


def test_tensors_of_another_model_are_one_line(champion, tmp_path):
    from common.tracking import registry as module

    wider = config.from_mapping({"model": {"backbone": "cnn", "embedding_size": 8}})
    module._export(EmbeddingModel(build_backbone(wider.model, 64)), tmp_path / "model", 64)
    champion(tmp_path / "model")
    with pytest.raises(TrackingError, match="is no cnn of its run") as seen:
        load_model(f"models:/{NAME}@champion", "sqlite:///mlflow.db")
    assert "\n" not in str(seen.value)
