"""Runs in a real MLflow sqlite database: every point once, odd values marked, resumption, a quiet terminal."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.settings import TrackingSettings
from common.system.runtime import PATIENCE, SILENCE
from common.tracking.address import resolve_uri
from common.tracking.run import open_run

ROOT = Path(__file__).resolve().parents[2]
ON = TrackingSettings(tensorboard="none")

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),  # MLflow's tables
    pytest.mark.usefixtures("silent_mlflow"),
]


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """One database for all tests of this file: making it takes MLflow seconds."""
    return resolve_uri("sqlite:///data/mlflow.db", tmp_path_factory.mktemp("tracking"))


@pytest.fixture(scope="module")
def client(uri):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _open(uri, folder, **changes):
    given = {"experiment": "fed", "run_name": folder.name, "tags": {"mode": "federated"}, "params": {"lr": 0.05}}
    return open_run(ON, uri=uri, folder=folder, **{**given, **changes})


def _points(client, run_id, key):
    return [(point.step, point.value) for point in client.get_metric_history(run_id, key)]


def test_a_run_with_everything(uri, client, tmp_path):
    run = _open(uri, tmp_path / "whole", params={f"p{i}": i for i in range(150)} | {"long": "x" * 7000})
    nested = run.child("celeba", {"client": "celeba"})
    for step in range(1, 4):
        run.log_metrics({"val_roc_auc": 0.5 + step / 10, "test_tar_at_far_1e-3": 0.1}, step=step)
        nested.log_metrics({"train_loss": 1.0 / step}, step=step)
    (run.folder / "config.toml").write_text("[run]\n", encoding="utf-8")
    run.log_file(run.folder / "config.toml", "config.toml")
    run.log_dict({"auc": 0.8}, "metrics.json")
    nested.log_text("hello", "notes/celeba.txt")
    run.set_tags({"device": "cpu"})
    run.finish("FINISHED")

    kept = client.get_run(run.mlflow_run_id)
    assert kept.info.status == "FINISHED"
    assert kept.info.run_name == "whole"
    assert kept.data.tags["mode"] == "federated"
    assert kept.data.tags["device"] == "cpu"
    assert "nonfinite_metrics" not in kept.data.tags
    assert kept.data.params["p149"] == "149"
    assert len(kept.data.params["long"]) == 6000  # MLflow's limit
    assert _points(client, run.mlflow_run_id, "val_roc_auc") == [(1, 0.6), (2, 0.7), (3, 0.8)]
    assert {item.path for item in client.list_artifacts(run.mlflow_run_id)} == {"config.toml", "metrics.json"}
    child = client.get_run(nested.mlflow_run_id)
    assert child.data.tags["mlflow.parentRunId"] == run.mlflow_run_id
    assert child.info.status == "FINISHED"
    assert child.data.metrics["train_loss"] == pytest.approx(1 / 3)
    assert [item.path for item in client.list_artifacts(nested.mlflow_run_id, "notes")] == ["notes/celeba.txt"]
    # Artifacts lie beside the database, not where the program was started.
    assert Path(kept.info.artifact_uri.removeprefix("file://")).is_relative_to(
        Path(uri.removeprefix("sqlite:///")).parent
    )


def test_infinities_stay_in_the_spool_and_nan_is_kept_and_both_are_marked(uri, client, tmp_path):
    run = _open(uri, tmp_path / "nonfinite")
    run.log_metrics({"loss": math.inf, "auc": math.nan, "eer": 0.1}, step=1)
    assert run.flush(60.0)
    run.log_metrics({"gain": -math.inf}, step=2)
    run.finish("FAILED")
    kept = client.get_run(run.mlflow_run_id)
    assert math.isnan(kept.data.metrics["auc"])
    assert kept.data.metrics["eer"] == 0.1
    assert "loss" not in kept.data.metrics
    assert "gain" not in kept.data.metrics
    assert kept.data.tags["nonfinite_metrics"] == "auc, gain, loss"
    assert (run.folder / "spool.jsonl").read_text().count('"inf"') == 1


def test_an_invalid_name_costs_only_itself(uri, client, tmp_path, caplog):
    run = _open(uri, tmp_path / "names")
    run.log_metrics({"good": 1.0, "bad:name*": 2.0, "also good": 3.0}, step=1)
    run.log_params({"lr": "another"})  # MLflow does not change a parameter
    run.log_metrics({"later": 4.0}, step=1)
    run.finish("FINISHED")
    kept = client.get_run(run.mlflow_run_id)
    assert kept.data.metrics == {"good": 1.0, "also good": 3.0, "later": 4.0}
    assert kept.data.params == {"lr": "0.05"}
    assert sorted(record.getMessage().split("(")[0] for record in caplog.records) == [
        "Tracking: MLflow takes no metric 'bad:name*' ",
        "Tracking: MLflow takes no param 'lr' ",
    ]


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(uri, client, tmp_path):
    run = _open(uri, tmp_path / "resumed")
    run.log_metrics({"loss": 1.0}, step=1)
    run.child("celeba", {}).log_metrics({"loss": 2.0}, step=1)
    run.finish("KILLED")
    child_id = run.child("celeba", {}).mlflow_run_id
    again = _open(uri, tmp_path / "resumed", resume_run_id=run.mlflow_run_id)
    assert again.mlflow_run_id == run.mlflow_run_id
    nested = again.child("celeba", {})
    assert again.flush(60.0)
    assert client.get_run(run.mlflow_run_id).info.status == "RUNNING"
    again.log_metrics({"loss": 0.5}, step=2)
    again.finish("FINISHED")
    assert nested.mlflow_run_id == child_id
    assert _points(client, run.mlflow_run_id, "loss") == [(1, 1.0), (2, 0.5)]
    assert client.get_run(run.mlflow_run_id).info.status == "FINISHED"


def test_sending_all_again_adds_nothing(uri, client, tmp_path):
    run = _open(uri, tmp_path / "twice")
    for step in range(50):
        run.log_metrics({"loss": 1.0 / (step + 1), "auc": math.nan}, step=step)
    run.child("celeba", {}).log_metrics({"loss": 2.0}, step=1)
    run.finish("FINISHED")
    note = tmp_path / "twice" / "spool.sent.json"
    note.unlink()  # as after a power cut
    again = _open(uri, tmp_path / "twice", resume_run_id=run.mlflow_run_id)
    again.finish("FINISHED")
    assert len(_points(client, run.mlflow_run_id, "loss")) == 50
    assert len(_points(client, run.mlflow_run_id, "auc")) == 50


def test_a_run_that_was_made_just_before_a_kill_is_found_again(uri, client, tmp_path):
    run = _open(uri, tmp_path / "killed")
    run.child("celeba", {})
    run.log_metrics({"loss": 1.0}, step=1)
    run.finish("KILLED")
    path = tmp_path / "killed" / "spool.sent.json"
    note = json.loads(path.read_text())
    path.write_text(json.dumps({**note, "run_ids": {}, "offset": 0}))  # the server answered, nobody wrote it down
    again = _open(uri, tmp_path / "killed")
    nested = again.child("celeba", {})
    again.finish("FINISHED")
    assert again.mlflow_run_id == run.mlflow_run_id
    assert nested.mlflow_run_id == run.child("celeba", {}).mlflow_run_id
    assert _points(client, run.mlflow_run_id, "loss") == [(1, 1.0)]


def test_a_run_deleted_on_the_server_is_made_anew_with_all_its_points(uri, client, tmp_path, caplog):
    run = _open(uri, tmp_path / "deleted")
    run.log_metrics({"loss": 1.0}, step=1)
    run.finish("KILLED")
    client.delete_run(run.mlflow_run_id)
    again = _open(uri, tmp_path / "deleted", resume_run_id=run.mlflow_run_id)
    again.log_metrics({"loss": 0.5}, step=2)
    again.finish("FINISHED")
    assert again.mlflow_run_id != run.mlflow_run_id
    assert _points(client, again.mlflow_run_id, "loss") == [(1, 1.0), (2, 0.5)]
    assert "is gone from sqlite" in caplog.text


def test_another_database_gets_the_whole_record(uri, client, tmp_path):
    run = _open("http://127.0.0.1:9", tmp_path / "moved")
    run.log_metrics({"loss": 1.0}, step=1)
    run.finish("FINISHED")
    again = _open(uri, tmp_path / "moved")
    again.finish("FINISHED")
    assert _points(client, again.mlflow_run_id, "loss") == [(1, 1.0)]


def test_nothing_but_our_own_lines_reach_the_terminal(tmp_path):
    """A new database (migrations), a run, a registered model: MLflow would print about all of them."""
    program = """
import sys
from pathlib import Path
import torch
from common.settings import TrackingSettings
from common.system.runtime import PATIENCE, SILENCE
from common.tracking.address import resolve_uri
from common.tracking.registry import register_model
from common.tracking.run import open_run
base = Path(sys.argv[1])
run = open_run(TrackingSettings(tensorboard="none"), uri=resolve_uri("sqlite:///mlflow.db", base), folder=base / "r",
               experiment="e", run_name="n", tags={}, params={})
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 4))
version = register_model(run, model, name="m", image_size=8, step=1, role="best", val_auc=0.5, val_people="p",
                         metrics={"test_roc_auc": 0.5})
run.finish("FINISHED")
assert version == "1", version
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, **SILENCE, **PATIENCE},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""
