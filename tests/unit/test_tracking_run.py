"""A run's own record: what stands in its folder with tracking switched off, and that MLflow is then never imported."""

import errno
import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from common.settings import TrackingSettings
from common.system.runtime import user_name
from common.tracking.registry import register_model
from common.tracking.run import open_run

ROOT = Path(__file__).resolve().parents[2]
OFF = TrackingSettings(enabled=False, tensorboard="none")


class Picture:
    """Stands in for a matplotlib figure."""

    def savefig(self, fname, *, format):  # noqa: A002
        fname.write_bytes(b"picture as " + format.encode())


@pytest.fixture
def run(tmp_path):
    opened = open_run(
        OFF, uri="", folder=tmp_path / "r1", experiment="e", run_name="n", tags={"mode": "x"}, params={"lr": 0.1}
    )
    yield opened
    opened.finish("FINISHED")


def _record(run):
    return [json.loads(line) for line in (run.folder / "spool.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_folder_holds_the_whole_record(run):
    run.log_metrics({"train_loss": 0.5, "val_roc_auc": 0.9}, step=3)
    run.log_params({"rounds": 10})
    run.set_tags({"device": "cpu"})
    run.finish("FAILED")
    start, loss, auc, params, tags, finish = _record(run)
    assert (start["event"], start["experiment"], start["name"]) == ("start", "e", "n")
    assert (start["tags"], start["params"]) == ({"mlflow.user": user_name(), "mode": "x"}, {"lr": "0.1"})
    assert (loss["key"], loss["value"], loss["step"], loss["run"]) == ("train_loss", 0.5, 3, "")
    assert (auc["key"], auc["value"]) == ("val_roc_auc", 0.9)
    assert params["values"] == {"rounds": "10"}
    assert tags["values"] == {"device": "cpu"}
    assert (finish["event"], finish["status"]) == ("finish", "FAILED")
    assert run.mlflow_run_id == ""


def test_figures_and_files_are_kept_in_the_folder(run, tmp_path):
    outside = tmp_path / "outside.toml"
    outside.write_text("a = 1\n", encoding="utf-8")
    inside = run.folder / "config.toml"
    inside.write_text("b = 2\n", encoding="utf-8")
    assert run.log_figure(Picture(), "plots/roc.png").read_bytes() == b"picture as png"
    run.log_dict({"a": [1, 2]}, "metrics.json")
    run.log_text("hello", "notes/note.txt")
    run.log_file(outside, "given/outside.toml")
    run.log_file(inside, "config.toml")
    assert (run.folder / "plots" / "roc.png").is_file()
    assert json.loads((run.folder / "metrics.json").read_text()) == {"a": [1, 2]}
    assert (run.folder / "notes" / "note.txt").read_text() == "hello"
    assert (run.folder / "given" / "outside.toml").read_text() == "a = 1\n"
    artifacts = {entry["name"]: entry["file"] for entry in _record(run) if entry.get("event") == "artifact"}
    assert artifacts == {
        "plots/roc.png": "plots/roc.png",
        "metrics.json": "metrics.json",
        "notes/note.txt": "notes/note.txt",
        "given/outside.toml": "given/outside.toml",
        "config.toml": "config.toml",
    }
    assert not list(run.folder.rglob("*.tmp"))


class FullDiskPicture:
    """A matplotlib figure on a disk that gets full while it is written."""

    def savefig(self, fname, *, format):  # noqa: A002, ARG002
        fname.write_bytes(b"half of a pic")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_picture_without_room_costs_a_warning_and_a_tag(run, caplog):
    run.log_figure(FullDiskPicture(), "plots/roc.png")
    run.keep_figure(FullDiskPicture(), "plots/det.png")
    run.child("celeba", {}).log_figure(FullDiskPicture(), "plots/roc.png")
    assert not list(run.folder.rglob("*.png*"))
    assert caplog.messages == [
        f"Tracking: {run.folder}/plots/roc.png cannot be written ([Errno 28] No space left on device); the run goes on"
        " without it.",
        f"Tracking: {run.folder}/plots/celeba/roc.png cannot be written ([Errno 28] No space left on device); the run"
        " goes on without it.",
    ]
    run.log_figure(Picture(), "plots/roc.png")
    run.finish("FINISHED")
    events = [(e["run"], e["event"], e.get("values") or e.get("name")) for e in _record(run) if e["event"] != "start"]
    assert events == [
        ("", "tags", {"missing_artifacts": "plots/roc.png"}),
        ("", "tags", {"missing_artifacts": "plots/roc.png, plots/det.png"}),
        ("celeba", "tags", {"missing_artifacts": "plots/roc.png"}),
        ("", "tags", {"missing_artifacts": "plots/det.png"}),
        ("", "artifact", "plots/roc.png"),
        ("celeba", "tags", {"missing_artifacts": "plots/roc.png"}),
        ("celeba", "finish", None),
        ("", "tags", {"missing_artifacts": "plots/det.png"}),
        ("", "finish", None),
    ]


def test_an_artifact_is_on_the_disk_before_the_record_speaks_of_it(run, monkeypatch):
    """Else a power cut could leave an event without its file."""
    synced = []
    real = os.fsync

    def fsync(number):
        about = os.fstat(number)
        told = (run.folder / "spool.jsonl").read_bytes().count(b'"artifact"')
        synced.append((about.st_ino, about.st_size if stat.S_ISREG(about.st_mode) else "folder", told))
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    path = run.log_text("hello", "notes/note.txt")
    assert synced[:2] == [(path.stat().st_ino, 5, 0), (path.parent.stat().st_ino, "folder", 0)]


def test_a_model_is_on_the_disk_before_the_record_speaks_of_it(run, monkeypatch):
    folder = run.folder / "models" / "m"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "weights").write_bytes(b"123")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append((os.fstat(number).st_ino, len(_record(run)))))
    run.log_model(folder, name="m", step=1, tags={}, metrics={}, people="")
    assert {((folder / "data" / "weights").stat().st_ino, 1), ((folder / "data").stat().st_ino, 1)} <= set(synced)


def test_a_model_is_linked_to_the_point_that_was_told_though_a_repeated_round_measured_another(run):
    """Another value at the same step would be a second point of the run's in MLflow."""
    (run.folder / "models" / "m").mkdir(parents=True)
    run.log_metrics({"time/round_seconds": 7.0, "val_roc_auc": math.nan}, step=3)
    run.log_metrics({"time/round_seconds": 6.0}, step=4)
    measured = {"time/round_seconds": 9.0, "val_roc_auc": 0.9, "untold": 2.0}
    run.log_model(run.folder / "models" / "m", name="m", step=3, tags={}, metrics=measured, people="")
    point, *_, entry = _record(run)[1:]
    linked = {key: (value, time_ms) for key, value, time_ms in entry["metrics"]}
    assert linked["time/round_seconds"] == ("7.0", point["time_ms"])
    assert linked["val_roc_auc"][0] == "nan"
    assert linked["untold"][0] == "2.0"


def test_a_nested_run_has_its_own_metrics_and_files(run):
    nested = run.child("celeba", {"client": "celeba"})
    assert run.child("celeba", {}) is nested
    nested.log_metrics({"train_loss": 1.0}, step=1)
    path = nested.log_figure(Picture(), "plots/roc.png")
    assert path == run.folder / "plots" / "celeba" / "roc.png"
    run.finish("FINISHED")
    entries = _record(run)
    assert [e["run"] for e in entries if "key" in e] == ["celeba"]
    assert [(e["run"], e["status"]) for e in entries if e.get("event") == "finish"] == [
        ("celeba", "FINISHED"),
        ("", "FINISHED"),
    ]
    with pytest.raises(ValueError, match="nested already"):
        nested.child("again", {})


@pytest.mark.parametrize("name", ["../secret.png", "/tmp/secret.png"])  # noqa: S108
def test_an_artifact_stays_in_the_folder(run, name):
    with pytest.raises(ValueError, match="leaves the run's folder"):
        run.log_figure(Picture(), name)


def test_a_finished_run_takes_nothing_and_finishes_once(run):
    run.finish("FINISHED")
    run.finish("FAILED")
    with pytest.raises(RuntimeError, match="has finished"):
        run.log_metrics({"a": 1.0}, step=1)
    assert [e["status"] for e in _record(run) if e.get("event") == "finish"] == ["FINISHED"]


def test_a_resumed_run_continues_its_spool(run):
    run.log_metrics({"a": 1.0}, step=1)
    run.finish("KILLED")
    again = open_run(OFF, uri="", folder=run.folder, experiment="e", run_name="n", tags={}, params={})
    again.log_metrics({"a": 2.0}, step=2)
    again.finish("FINISHED")
    assert [entry["step"] for entry in _record(run) if "key" in entry] == [1, 2]


def test_nothing_is_registered_without_mlflow(run):
    made = register_model(
        run, None, name="m", image_size=8, step=1, role="best", val_auc=0.5, val_people="p", metrics={}
    )
    assert made is None


def test_tracking_off_never_imports_mlflow(tmp_path):
    program = """
import sys
from pathlib import Path
from common.settings import TrackingSettings
from common.tracking.registry import register_model
from common.tracking.run import open_run
off = TrackingSettings(enabled=False, tensorboard="none")
run = open_run(off, uri="", folder=Path(sys.argv[1]), experiment="e", run_name="n", tags={}, params={})
run.log_metrics({"a": 1.0}, step=1)
run.child("c", {}).log_metrics({"a": 1.0}, step=1)
register_model(run, None, name="m", image_size=8, step=1, role="last", val_auc=0.5, val_people="p", metrics={})
run.finish("FINISHED")
heavy = {"mlflow", "torch", "tensorboard", "matplotlib", "numpy"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
