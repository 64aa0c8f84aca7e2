"""Models of a run whose server was away, sent later to a real MLflow database: once, whatever cuts the sending off."""

import pytest
import torch

from common.errors import FaceFedError
from common.settings import TrackingSettings
from common.tracking import sync
from common.tracking.address import resolve_uri
from common.tracking.delivery import Delivery
from common.tracking.registry import register_model
from common.tracking.run import open_run
from common.tracking.sync import sync_run

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")  # MLflow's tables

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module", autouse=True)
def _impatient(silent_mlflow):
    silent_mlflow.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return resolve_uri("sqlite:///mlflow.db", tmp_path_factory.mktemp("registry"))


@pytest.fixture
def client(uri):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


class Cut:
    """A client that is cut off at one call: the server has acted, its answer is lost, and it is away from then on."""

    def __init__(self, client, at):
        self.client, self.at, self.is_away = client, at, False

    def __getattr__(self, name):
        def call(*args, **kwargs):
            answer = None if self.is_away else getattr(self.client, name)(*args, **kwargs)
            self.is_away |= name == self.at
            if self.is_away:
                raise ConnectionError("cut off")
            return answer

        return call


def _offline_run(folder, name):
    run = open_run(
        TrackingSettings(tensorboard="none"),
        uri=NOWHERE, folder=folder, experiment="fed", run_name="n", tags={}, params={},
    )  # fmt: skip
    run.log_metrics({"val_auc": 0.8, "loss": 0.5}, step=3)
    run.log_metrics({"loss": 0.4}, step=4)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 4))
    version = register_model(
        run, model, name=name, image_size=8, step=3, role="best", val_auc=0.8, val_people="p",
        metrics={"val_auc": 0.8, "test_eer": 0.1, "odd": float("nan")},
    )  # fmt: skip
    assert version is None
    run.finish("FINISHED", timeout_s=5.0)
    return run.folder, model


def _assert_there_once(client, name, run_id, model, uri):
    import mlflow

    (version,) = client.search_model_versions(f"name = '{name}'")
    assert version.tags == {"role": "best", "step": "3", "val_roc_auc": "0.8", "val_people": "p"}
    assert str(client.get_model_version_by_alias(name, "champion").version) == str(version.version) == "1"
    experiment = client.get_run(run_id).info.experiment_id
    (logged,) = client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'")
    assert str(logged.status) == "READY"
    assert sorted((m.key, m.value, m.step) for m in logged.metrics) == [("test_eer", 0.1, 3), ("val_auc", 0.8, 3)]
    points = [
        (p.step, p.value) for key in ("val_auc", "loss", "test_eer") for p in client.get_metric_history(run_id, key)
    ]
    assert points == [(3, 0.8), (3, 0.5), (4, 0.4), (3, 0.1)]
    assert [output.model_id for output in client.get_run(run_id).outputs.model_outputs] == [logged.model_id]
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    loaded = mlflow.pytorch.load_model(f"models:/{name}@champion")
    pictures = torch.rand(5, 3, 8, 8)
    torch.testing.assert_close(loaded(pictures), model(pictures))


def test_a_model_is_registered_by_a_later_sync_and_only_once(uri, client, tmp_path, caplog):
    folder, model = _offline_run(tmp_path / "r", "late")
    assert "late is not registered yet" in caplog.text
    done = sync_run(folder, uri)
    assert done.sent["model"] == 1
    _assert_there_once(client, "late", done.run_id, model, uri)
    assert dict(sync_run(folder).sent) == {}
    (folder / "spool.sent.json").unlink()  # everything is sent again
    sync_run(folder, uri)
    _assert_there_once(client, "late", done.run_id, model, uri)


def test_a_model_whose_sending_is_cut_off_after_every_call_is_there_once(uri, client, tmp_path, monkeypatch):
    folder, model = _offline_run(tmp_path / "r", "cut")

    def cut_at(name):
        class CutDelivery(Delivery):
            def __init__(self, *args):
                super().__init__(*args)
                self._client = Cut(self._client, name)

        monkeypatch.setattr(sync, "Delivery", CutDelivery)

    for name in (
        "create_run", "log_batch", "create_logged_model", "log_outputs", "log_model_artifacts",
        "finalize_logged_model", "create_registered_model", "create_model_version", "set_registered_model_alias",
        "set_terminated",
    ):  # fmt: skip
        cut_at(name)
        with pytest.raises(FaceFedError, match="cut off"):
            sync_run(folder, uri)
    cut_at("nothing")
    _assert_there_once(client, "cut", sync_run(folder, uri).run_id, model, uri)
