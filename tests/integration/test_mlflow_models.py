"""Registered models: loadable by a Python that cannot import FaceFed, for any batch size; the champion is guarded."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common.errors import TrackingError
from common.metrics.sums import NUM_BINS
from common.metrics.thresholds import thresholds_from
from common.models.recogniser import EmbeddingModel, build_backbone
from common.results import threshold_tags
from common.settings import ModelSettings, TrackingSettings
from common.tracking.address import resolve_uri
from common.tracking.notes import registered_note, version_note
from common.tracking.registry import THRESHOLDS, register_model, thresholds_of
from common.tracking.run import open_run
from tests.without_facefed import BLOCKER

NAME = "cnn_federated_fedavg"
SIZE = 16

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),  # MLflow's tables
    pytest.mark.usefixtures("silent_mlflow"),
]

# Runs with `python -I` in an empty folder.  It compares nothing itself: it has no model of ours to compare with.
STRANGER = """
import mlflow, numpy, torch
uri, pictures, out, *model_uris = sys.argv[1:]
mlflow.set_tracking_uri(uri)
mlflow.set_registry_uri(uri)
x = torch.from_numpy(numpy.load(pictures))
found = {}
for number, model_uri in enumerate(model_uris):
    model = mlflow.pytorch.load_model(model_uri)
    with torch.no_grad():
        found |= {f"{number}/{n}": model(x[:n]).numpy() for n in (1, 2, 7)}
numpy.savez(out, **found)
"""


class SmallEmbedder(torch.nn.Module):
    """A class that only this file has; batch norm and dropout differ between training and evaluation."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, stride=2)
        self.norm = torch.nn.BatchNorm2d(8)
        self.drop = torch.nn.Dropout(0.5)
        self.out = torch.nn.Linear(8, 4)

    def forward(self, pictures):
        x = torch.relu(self.norm(self.conv(pictures))).mean(dim=(2, 3))
        return F.normalize(self.out(self.drop(x)))


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return resolve_uri("sqlite:///mlflow.db", tmp_path_factory.mktemp("registry"))


@pytest.fixture(scope="module")
def client(uri):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@pytest.fixture
def run(uri, tmp_path):
    opened = open_run(
        TrackingSettings(tensorboard="none"),
        uri=uri,
        folder=tmp_path / "run",
        experiment="fed",
        run_name="n",
        tags={},
        params={},
    )
    yield opened
    opened.finish("FINISHED")


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = SmallEmbedder()
    with torch.no_grad():
        made.norm.running_mean.uniform_(-1.0, 1.0)
        made.norm.running_var.uniform_(0.5, 2.0)
    return made.train()


def _ours(caplog):
    return [record for record in caplog.records if not record.name.startswith("torch")]


def _register(run, model, **changes):
    given = {
        "name": NAME, "image_size": SIZE, "step": 3, "role": "best", "val_auc": 0.8, "val_people": "p1",
        "metrics": {"test_roc_auc": 0.75, "test_eer": float("nan")},
    }  # fmt: skip
    return register_model(run, model, **{**given, **changes})


def _stranger(uri, model_uris, folder, pictures):
    np.save(folder / "pictures.npy", pictures)
    (folder / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-I", "-c", BLOCKER + STRANGER, uri, folder / "pictures.npy", folder / "out.npz", *model_uris],
        cwd=folder / "empty",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return np.load(folder / "out.npz")


def test_a_python_without_facefed_loads_and_runs_it(uri, client, run, model, tmp_path):
    run.log_metrics({"val_roc_auc": 0.8}, step=3)
    assert _register(run, model, role="last") == "1"
    assert _register(run, model) == "2"
    assert model.training  # left as it was found
    pictures = np.random.default_rng(5).uniform(-1.0, 1.0, (7, 3, SIZE, SIZE)).astype(np.float32)
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(pictures)).numpy()
    embeddings = _stranger(uri, [f"models:/{NAME}/1", f"models:/{NAME}@champion"], tmp_path, pictures)
    for number, count in itertools.product((0, 1), (1, 2, 7)):
        found = embeddings[f"{number}/{count}"]
        np.testing.assert_allclose(found, expected[:count], atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-6)
    version = client.get_model_version(NAME, "2")
    assert version.tags == {"role": "best", "step": "3", "val_roc_auc": "0.8", "val_people": "p1"}
    logged = client.search_logged_models([client.get_run(run.mlflow_run_id).info.experiment_id])
    assert {model.name for model in logged if model.source_run_id == run.mlflow_run_id} == {"best", "last"}
    assert version.run_id == run.mlflow_run_id


def test_a_dcal_model_whose_both_branches_embed_is_loaded_likewise(uri, run, tmp_path):
    """Its choice of patches differs with the picture, so the graph gathers by what it worked out."""
    settings = ModelSettings(
        backbone="vit_tiny", width=0.25, depth=2, patch_size=4, embedding_size=8, attention="dcal", inference="both"
    )
    torch.manual_seed(0)
    dual = EmbeddingModel(build_backbone(settings, SIZE))
    _register(run, dual, name="vit_twins")
    pictures = np.random.default_rng(5).uniform(-1.0, 1.0, (7, 3, SIZE, SIZE)).astype(np.float32)
    expected = dual(torch.from_numpy(pictures)).numpy()
    embeddings = _stranger(uri, ["models:/vit_twins/1"], tmp_path, pictures)
    for count in (1, 2, 7):
        np.testing.assert_allclose(embeddings[f"0/{count}"], expected[:count], atol=1e-5)


def test_what_is_stored_with_it(client, run, model, tmp_path):
    run.log_metrics({"test_roc_auc": 0.75}, step=3)
    version = _register(run, model, name="stored", metrics={"test_roc_auc": 0.75, "test_eer": 0.25})
    logged = client.search_logged_models(
        [client.get_run(run.mlflow_run_id).info.experiment_id],
        filter_string=f"source_run_id = '{run.mlflow_run_id}'",
    )
    assert len(logged) == 1
    assert logged[0].status == "READY"
    metrics = {(metric.key, metric.value, metric.step) for metric in logged[0].metrics}
    assert metrics == {("test_roc_auc", 0.75, 3), ("test_eer", 0.25, 3)}
    assert len(logged[0].metrics) == 2
    import mlflow

    local = tmp_path / "local"
    mlflow.artifacts.download_artifacts(f"models:/stored/{version}", dst_path=str(local), tracking_uri=run.uri)
    example = json.loads((local / "input_example.json").read_text())
    values = np.asarray(example if isinstance(example, list) else next(iter(example.values())))
    assert values.shape == (2, 3, SIZE, SIZE)
    # Noise in [-1, 1], uniform: mean 0, standard deviation 1/sqrt(3) = 0.577, neighbours unrelated (faces: about 0.9).
    assert abs(values.std() - 3**-0.5) < 0.05
    assert abs(np.corrcoef(values[..., :-1].ravel(), values[..., 1:].ravel())[0, 1]) < 0.1
    requirements = (local / "requirements.txt").read_text().split()
    assert f"torch=={torch.__version__.split('+')[0]}" in requirements
    assert not any("facefed" in line for line in requirements)
    assert not list(local.rglob("*.pkl"))
    assert not list(local.rglob("*.pth"))
    about = " ".join((local / "MLmodel").read_text().split())
    assert "float32" in about
    assert "[-1, 3, 16, 16]" in about


def test_what_is_best_and_last_is_one_version_that_says_so_and_how_to_load_it(client, run, model):
    note = f"{version_note('both', 'cnn', SIZE)} Data: celeba, 96 pictures. Best and last round: 3."
    about = registered_note("both", "cnn")
    version = _register(run, model, name="both", role="best and last", note=note, about=about)
    [found] = client.search_model_versions("name = 'both'")
    assert (str(found.version), found.tags["role"], found.tags["is_last"]) == (version, "best", "true")
    for text in ("96 pictures", "Best and last round: 3.", "[B, 3, 16, 16]", f'"models:/both/{version}"'):
        assert text in found.description
    described = client.get_registered_model("both")
    assert 'load_model("models:/both@champion")' in described.description
    assert str(described.aliases["champion"]) == version


def test_a_model_carries_its_thresholds(uri, run, model, tmp_path):
    """What is kept beside it comes back as it was made; a model without says so, and a damaged file is told."""
    (tmp_path / "config.toml").write_text("")
    run.log_file(tmp_path / "config.toml", "config.toml")
    histogram = np.random.default_rng(0).integers(0, 9, (2, NUM_BINS))
    found = thresholds_from([histogram])
    tags = threshold_tags(found)
    beside = {THRESHOLDS: json.dumps(found.to_json())}
    with_them = _register(run, model, name="with", beside=beside, more_tags=tags)
    without = _register(run, model, name="without")
    damaged = _register(run, model, name="damaged", beside={THRESHOLDS: "{}"})

    assert thresholds_of(f"models:/with/{with_them}", uri) == found
    assert thresholds_of(f"models:/without/{without}", uri) is None
    with pytest.raises(TrackingError, match=rf"models:/damaged/{damaged}: its thresholds\.json is damaged"):
        thresholds_of(f"models:/damaged/{damaged}", uri)


def test_its_thresholds_stand_in_its_tags(client, run, model):
    found = thresholds_from([np.random.default_rng(0).integers(0, 9, (2, NUM_BINS))])
    _register(run, model, name="tagged", more_tags=threshold_tags(found))
    [version] = client.search_model_versions("name = 'tagged'")
    assert version.tags["val_eer"] == f"{found.eer:.4f}"
    assert version.tags["threshold_at_far_1e-3"] == f"{found.at(1e-3).threshold:.6f}"
    assert "threshold_at_far_1e-4" not in version.tags


def test_mlflows_own_predict_takes_the_models_own_example(run, model):
    """What `mlflow models predict` and `serve` call; torch's wrapper refuses the dict of named ones."""
    import mlflow

    version = _register(run, model, name="served")
    mlflow.set_tracking_uri(run.uri)
    mlflow.set_registry_uri(run.uri)
    served = mlflow.pyfunc.load_model(f"models:/served/{version}")
    example = served.input_example
    assert (example.dtype, example.shape) == (np.float32, (2, 3, SIZE, SIZE))
    for pictures in (example, example[:1], np.concatenate([example] * 3)):
        with torch.no_grad():
            expected = model.eval()(torch.from_numpy(pictures)).numpy()
        np.testing.assert_allclose(served.predict(pictures), expected, atol=1e-6)


def test_the_champion_moves_only_for_a_better_auc_on_the_same_people(client, run, model):
    name = "guarded"

    def champion():
        version = client.get_registered_model(name).aliases.get("champion")
        return None if version is None else str(version)

    assert _register(run, model, name=name, role="last", val_auc=0.99) == "1"
    assert champion() is None  # only a best model is a candidate
    assert _register(run, model, name=name, val_auc=float("nan")) == "2"
    assert champion() is None
    others = "it was validated on other people, so the two cannot be compared"
    for auc, people, expected, verdict in (
        (0.80, "p1", "3", "it is the champion now"),  # the first
        (0.79, "p1", "3", "version 3 stays champion: its validation AUC is 0.8000, this one's 0.7900"),
        (0.80, "p1", "3", "version 3 stays champion: its validation AUC is 0.8000, this one's 0.8000"),
        (0.90, "p2", "3", f"version 3 stays champion: {others}"),
        (0.81, "p1", "7", "it is the champion now, instead of version 3"),
    ):
        told = []
        _register(run, model, name=name, val_auc=auc, val_people=people, tell=told.append)
        assert champion() == expected, (auc, people)
        assert told == [verdict]


def test_a_model_below_the_untrained_one_is_registered_and_does_not_become_champion(client, run, model):
    told = []
    why = "training ended below the untrained model (test AUC 0.783 -> 0.593)"
    assert _register(run, model, name="below", held_back=why, tell=told.append) == "1"
    assert client.get_registered_model("below").aliases == {}
    assert client.get_model_version("below", "1").tags["held_back"] == why
    assert told == ["it does not become champion"]


def test_a_model_that_cannot_be_exported_costs_one_warning(run, caplog):
    class Odd(torch.nn.Module):
        def forward(self, pictures):
            return pictures.flatten(1) if float(pictures.sum()) > 0 else pictures.flatten(1) * 2

    assert _register(run, Odd(), name="odd") is None
    assert [record.levelname for record in _ours(caplog)] == ["WARNING"]
    assert "model odd (best) is not registered" in caplog.text


def test_an_unknown_role_is_refused(run, model):
    with pytest.raises(ValueError, match="role"):
        _register(run, model, role="middle")


def test_a_server_that_is_away_costs_one_warning(model, tmp_path, caplog):
    run = open_run(
        TrackingSettings(tensorboard="none"),
        uri="http://127.0.0.1:9",
        folder=tmp_path,
        experiment="e",
        run_name="n",
        tags={},
        params={},
    )
    assert _register(run, model) is None
    server, about_model = [record.getMessage() for record in _ours(caplog)]
    assert server.startswith("Tracking: http://127.0.0.1:9 cannot be used now ([Errno 111] Connection refused)")
    assert "is not registered" in about_model
    run.finish("FINISHED")
