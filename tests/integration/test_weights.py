"""`model.pretrained` takes a registered model, a run of MLflow's and one of ours; anything else is one line."""

import dataclasses
import io

import pytest
import torch
from tiny_federation import enter_run, settings_with, site_settings, tiny_pack

from common import config
from common.errors import CheckpointError, ConfigError, TrackingError
from common.protocol.parameters import buffer_sha256, flatten, views
from common.runs import federated_kind, write_run_file
from common.settings import Settings
from common.system.checkpoints import read_tensors, write_tensors
from common.system.files import write_json
from common.weights import begin_run
from server.app import initial_model
from simulation.alone.baselines import run_local

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),  # MLflow's tables
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning"),  # MLflow's own classes
    pytest.mark.usefixtures("silent_mlflow"),
]


def _tracked(settings: Settings, place) -> Settings:
    settings = config.with_value(settings, "tracking", "enabled", True)
    settings = config.with_value(settings, "tracking", "uri", f"sqlite:///{place / 'mlflow.db'}")
    return config.with_value(settings, "run", "out", str(place / "runs"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(settings, a finished local run's folder, MLflow's id of it): tracked, with its best model in a registry."""
    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        enter_run(patch)
        settings = _tracked(settings_with(training__epochs=1), place)
        settings, folder = begin_run(settings, settings.tracking.uri)
        run_local(settings, site_settings("alpha", place), tiny_pack("alpha"), folder, io.StringIO())
    from mlflow import MlflowClient

    registry = MlflowClient(settings.tracking.uri, settings.tracking.uri)
    [version] = registry.search_model_versions("")  # one epoch: the best is the last
    registry.set_registered_model_alias(version.name, "champion", str(version.version))  # be it as it may
    assert version.description
    return settings, folder, version


def _backbone(folder):
    tensors, _ = read_tensors(folder / "checkpoints" / "best.safetensors")
    return {name: one for name, one in tensors.items() if name.startswith("backbone.") and one.is_floating_point()}


def _begun(settings, wanted):
    """The state of the model that a run with such weights begins with, its settings and its folder."""
    settings, folder = begin_run(config.with_value(settings, "model", "pretrained", wanted), settings.tracking.uri)
    return initial_model(settings)[0].state_dict(), settings, folder


@pytest.mark.parametrize("kind", ["version", "alias", "mlflow run", "folder", "id"])
def test_a_run_begins_with_the_best_model_of_another(trained, kind):
    settings, source, version = trained
    wanted = {
        "version": f"models:/{version.name}/{version.version}",
        "alias": f"models:/{version.name}@champion",
        "mlflow run": version.run_id,
        "folder": str(source),
        "id": source.name,
    }[kind]
    state, begun, folder = _begun(settings, wanted)
    assert all(torch.equal(state[name], tensor) for name, tensor in _backbone(source).items())
    assert begun.model.pretrained == str(folder / "pretrained.safetensors")
    assert config.load_of_run(folder / "config.toml")[0] == begun, "and goes on with it"
    origin = source.name if kind in ("folder", "id") else f"models:/{version.name}/{version.version}"
    assert read_tensors(folder / "pretrained.safetensors")[1] == {"from": origin}


def _federated(settings, place):
    """A finished federated run's folder, whose best round's model is made up."""
    folder = place / "runs" / "fed"
    recogniser, manifest = initial_model(dataclasses.replace(settings, run=dataclasses.replace(settings.run, seed=7)))
    buffer = flatten(recogniser.state_dict(), manifest)
    path = folder / "checkpoints" / "round-000001.safetensors"
    path.parent.mkdir(parents=True)
    write_tensors(path, views(buffer, manifest), {"round": "1", "sha256": buffer_sha256(buffer)})
    write_run_file(folder, settings, federated_kind(settings), ["alpha"])
    (folder / "config.toml").write_text(config.to_toml(settings))
    write_json(folder / "metrics.json", {"best_round": 1})
    return folder, path, recogniser.state_dict()


def test_a_federated_runs_best_round_whose_digest_is_examined(trained, tmp_path):
    settings = _tracked(trained[0], tmp_path)
    folder, path, expected = _federated(settings, tmp_path)
    state, _, _ = _begun(settings, "fed")
    assert all(torch.equal(state[name], expected[name]) for name in state if name.startswith("backbone.linear"))
    tensors, notes = read_tensors(path)
    next(iter(tensors.values())).view(-1)[0] += 1.0
    write_tensors(path, tensors, notes)
    with pytest.raises(CheckpointError, match=r"model\.pretrained = fed: .*round-000001\.safetensors is damaged"):
        _begun(settings, "fed")
    (folder / "metrics.json").unlink()
    with pytest.raises(CheckpointError, match="has not finished"):
        _begun(settings, "fed")


@pytest.mark.parametrize(
    ("wanted", "error", "line"),
    [
        ("models:/nobody/1", TrackingError, r"model\.pretrained = models:/nobody/1: not found at sqlite:"),
        ("models:/alpha_cnn_local", TrackingError, r"write models:/NAME/VERSION or models:/NAME@champion"),
        ("0" * 32, TrackingError, r"model\.pretrained = 0{32}: no run at sqlite:.* registered a model"),
        ("nowhere", ConfigError, r"model\.pretrained = 'nowhere' is no run in .*; write none, imagenet, FILE"),
        ("nowhere.safetensors", ConfigError, "no such file"),
    ],
)
def test_weights_that_cannot_be_had_are_one_line_and_leave_no_run(trained, tmp_path, wanted, error, line):
    settings = config.with_value(trained[0], "run", "out", str(tmp_path / "out"))
    with pytest.raises(error, match=line):
        _begun(settings, wanted)
    assert not (tmp_path / "out").exists()


def test_another_shape_is_one_line_that_names_what_was_asked_for(trained, tmp_path):
    settings, _, version = trained
    other = config.with_value(settings, "model", "embedding_size", settings.model.embedding_size + 1)
    other = config.with_value(other, "run", "out", str(tmp_path / "out"))
    wanted = f"models:/{version.name}/{version.version}"
    with pytest.raises(CheckpointError, match=rf"^model\.pretrained = {wanted}: does not fit model\.backbone") as told:
        _begun(other, wanted)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()


def test_a_registry_that_is_off_is_said(trained):
    settings = config.with_value(trained[0], "tracking", "enabled", False)
    with pytest.raises(TrackingError, match="tracking is off, so the registry is not asked"):
        _begun(settings, "models:/x@champion")
