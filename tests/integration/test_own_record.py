"""What a site keeps for itself: pictures and figures in its own folder, and in its own MLflow where it has one."""

import dataclasses
import json

import pytest
from tiny_federation import settings_with, task_for, tiny_workplace

from clients import own_record
from clients.local_update import train
from clients.own_record import export_own_model, keep_own_record, keep_round, own_folder
from common.errors import DataError
from common.protocol.parameters import flatten
from common.system.checkpoints import read_tensors
from common.tracking import spool
from common.training.loop import Compute

CPU = Compute(device="cpu", precision="float32", memory_format="contiguous", threads=1)


def keep(tmp_path, tracking_uri="", **values):
    settings = settings_with(**({"tracking__plots": "final"} | values))
    state = tiny_workplace(settings, tmp_path)
    site = dataclasses.replace(state.site, tracking_uri=tracking_uri)
    task = task_for(state.manifest, settings, kind="evaluate", server_round=2, last=True)
    keep_own_record(site, task, settings, state.recogniser, state.pack, CPU)
    return own_folder(site, task.run_id)


def test_pictures_and_figures_lie_in_the_sites_own_folder(tmp_path):
    folder = keep(tmp_path)
    assert folder == tmp_path / "alpha" / "runs" / "run-1"
    names = {"confusion.png", "embeddings.png", "hardest_pairs.png"}
    assert {path.name for path in (folder / "plots").iterdir()} == names
    # What is sent is what the spool names: faces are in the folder alone.
    sent = {row["name"] for row in spooled(folder) if row.get("event") == "artifact"}
    assert sent == {"plots/confusion.png", "plots/embeddings.png", "metrics.json"}
    told = json.loads((folder / "metrics.json").read_text())
    assert told["round"] == 2
    assert {"accuracy", "f1", "roc_auc", "ten_fold_accuracy"} <= set(told["test"])


def test_without_plots_nothing_is_drawn(tmp_path):
    assert not keep(tmp_path, tracking__plots="none").exists()


@pytest.mark.usefixtures("tables_once")
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
def test_a_sites_own_mlflow_gets_them_whatever_the_servers_tracking_is(tmp_path):
    uri = f"sqlite:///{tmp_path}/own.db"
    keep(tmp_path, uri, tracking__enabled=False)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("facial_recognition_client_alpha")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test_roc_auc"] > 0
    assert {file.path for file in client.list_artifacts(run.info.run_id, "plots")} == {
        "plots/confusion.png",
        "plots/embeddings.png",
    }


@pytest.mark.parametrize(
    ("error", "told"),
    [(DataError("no pictures"), "no pictures"), (AttributeError("no version"), "AttributeError('no version')")],
)
def test_a_picture_that_cannot_be_drawn_costs_a_warning_and_not_the_answer(tmp_path, monkeypatch, caplog, error, told):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(own_record, "private_pictures", fail)
    folder = keep(tmp_path)
    assert f"this client's own pictures of run run-1 are not complete: {told}\n" in caplog.text
    assert (folder / "metrics.json").exists()


def test_a_folder_in_use_costs_a_warning_and_not_the_answer(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(spool, "LOCK_WITHIN_S", 0.1)
    other = spool.Spool(tmp_path / "alpha" / "runs" / "run-1")
    folder = keep(tmp_path)
    other.close()
    assert "this client's own pictures of run run-1 are not complete: " in caplog.text
    assert f"{folder} is in use by a run" in caplog.text


@pytest.mark.parametrize(("normalisation", "kept"), [("shared", False), ("private", True)])
def test_a_site_keeps_its_own_model_only_where_there_is_no_common_one(tmp_path, normalisation, kept):
    settings = settings_with(model__normalisation=normalisation)
    state = tiny_workplace(settings, tmp_path)
    task = task_for(state.manifest, settings, kind="evaluate", server_round=2)
    export_own_model(state.site, task, settings, state.recogniser)
    path = tmp_path / "alpha" / "export" / "run-1.safetensors"
    assert path.exists() == kept
    if kept:
        tensors, notes = read_tensors(path)
        assert set(tensors) == {f"backbone.{name}" for name in state.recogniser.backbone.state_dict()}
        assert notes["round"] == "2"


# ---- round by round


def trained_rounds(folder, rounds, uri="", **values):
    """The tiny client alpha answers `rounds` training tasks, through `clients.app.handle`'s own way."""
    settings = settings_with(**({"tracking__system_metrics_s": 0.05, "tracking__plots": "none"} | values))
    state = tiny_workplace(settings, folder)
    site = dataclasses.replace(state.site, tracking_uri=uri)
    shared = flatten(state.recogniser.state_dict(), state.manifest)
    for server_round in range(1, rounds + 1):
        task = task_for(state.manifest, settings, server_round=server_round, splits="val")
        with keep_round(
            site, task, settings, num_pictures=len(state.pack), bytes_down=state.manifest.num_bytes
        ) as kept:
            kept(train(state, task, shared))
    return state, site, settings


def spooled(folder):
    return [json.loads(line) for line in (folder / "spool.jsonl").read_text().splitlines()]


def test_each_round_leaves_its_figures_and_the_machines_use_in_the_sites_own_folder(tmp_path):
    state, site, _ = trained_rounds(tmp_path, 2)
    rows = [row for row in spooled(own_folder(site, "run-1")) if "key" in row]
    for name in (
        "train_loss",
        "gradient_norm",
        "images_per_second",
        "time/receive_seconds",
        "time/train_seconds",
        "time/send_seconds",
    ):
        assert [row["step"] for row in rows if row["key"] == name] == [1, 2], name
    assert {row["value"] for row in rows if row["key"] == "bytes/down"} == {state.manifest.num_bytes}
    # Pairs, twins and folds of one split, a byte each; no confusion, since the run draws no pictures.
    counts = 2 * 8192 * 2 + 10 * 2 * 1024
    assert {row["value"] for row in rows if row["key"] == "bytes/up"} == {state.manifest.num_bytes + counts}
    used = [row["step"] for row in rows if row["key"] == "system/cpu_utilization_percentage"]
    assert used == list(range(len(used)))
    assert len(used) >= 2


def test_a_sites_own_mlflow_gets_all_rounds_at_the_end_as_one_run(tmp_path):
    uri = f"sqlite:///{tmp_path}/own.db"
    state, site, settings = trained_rounds(tmp_path, 3, uri)
    assert not (tmp_path / "own.db").exists()  # rounds wait for nothing and nobody
    first = spooled(own_folder(site, "run-1"))[0]["time_ms"]
    task = task_for(state.manifest, settings, kind="evaluate", server_round=3, last=True)
    keep_own_record(site, task, settings, state.recogniser, state.pack, CPU)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    [run] = client.search_runs([client.get_experiment_by_name("facial_recognition_client_alpha").experiment_id])
    assert (run.info.status, run.info.start_time) == ("FINISHED", first)
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train_loss")] == [1, 2, 3]
    assert "test_roc_auc" in run.data.metrics
    assert "system/cpu_utilization_percentage" in run.data.metrics
    assert not client.list_artifacts(run.info.run_id, "plots")


def test_a_folder_in_use_costs_the_rounds_figures_and_not_the_round(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(spool, "LOCK_WITHIN_S", 0.1)
    other = spool.Spool(tmp_path / "alpha" / "runs" / "run-1")
    trained_rounds(tmp_path, 1)
    other.close()
    assert "this client's own figures of round 1 are not kept: " in caplog.text


def test_a_round_that_fails_leaves_the_folder_free(tmp_path):
    settings = settings_with()
    state = tiny_workplace(settings, tmp_path)
    task = task_for(state.manifest, settings)
    with (
        pytest.raises(DataError, match="broken"),
        keep_round(state.site, task, settings, num_pictures=1, bytes_down=4),
    ):
        raise DataError("broken")
    spool.Spool(own_folder(state.site, task.run_id)).close()
