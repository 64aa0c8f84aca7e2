"""The guide's five functions: its own examples run as they stand, into the run's folder, and misuse costs one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import TrackingError
from common.tracking import create_nested_run, guide, log_metrics, log_params, setup_mlflow, start_run
from tests.unit.fake_mlflow import FakeMlflow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    monkeypatch.setattr(guide, "_setup", None)
    monkeypatch.setattr(guide, "go_silent", lambda: None)  # it sets variables of this process for good
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    monkeypatch.chdir(tmp_path)


def _record(run):
    return [json.loads(line) for line in (run.folder / "spool.jsonl").read_bytes().splitlines()]


def test_the_guides_first_example(tmp_path):
    setup_mlflow("my_experiment", "")
    with start_run(run_name="my_run") as run:
        log_params({"learning_rate": 0.001, "batch_size": 32})
        log_metrics({"loss": 0.5, "accuracy": 0.85}, step=1)
        log_metrics({"once": 1.0})
    start, params, loss, accuracy, once, finish = _record(run)
    assert (start["experiment"], start["name"]) == ("my_experiment", "my_run")
    assert params["values"] == {"learning_rate": "0.001", "batch_size": "32"}
    assert [(e["key"], e["value"], e["step"]) for e in (loss, accuracy, once)] == [
        ("loss", 0.5, 1),
        ("accuracy", 0.85, 1),
        ("once", 1.0, 0),
    ]
    assert finish["status"] == "FINISHED"
    assert run.folder.parent == tmp_path / "runs"


def test_nested_runs_of_rounds_reach_a_server():
    with FakeMlflow() as server:
        setup_mlflow("fed", server.uri)
        with start_run(run_name="federated_training", tags={"mode": "x"}) as run:
            for round_num in range(3):
                log_metrics({"round_loss": 0.3}, step=round_num)
                with create_nested_run("celeba"):
                    log_metrics({"train_loss": 0.1 * round_num}, step=round_num)
                    log_params({"client": "celeba"})
        assert run.mlflow_run_id in server.runs
        by_name = {kept["name"]: kept for kept in server.runs.values()}
    assert set(by_name) == {"federated_training", "celeba"}
    assert by_name["celeba"]["tags"]["mlflow.parentRunId"] == run.mlflow_run_id
    assert by_name["celeba"]["params"] == {"client": "celeba"}
    assert sorted(step for key, _, step, _ in by_name["federated_training"]["points"]) == [0, 1, 2]
    assert sorted(key for key, *_ in by_name["celeba"]["points"]) == ["train_loss"] * 3
    assert {kept["status"] for kept in by_name.values()} == {"FINISHED"}


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_block_that_fails_ends_its_run_so(error, status):
    setup_mlflow("e", "")
    with pytest.raises(error), start_run("n") as run:
        raise error
    assert _record(run)[-1]["status"] == status
    with start_run("again"):  # nothing is left active
        log_metrics({"a": 1.0})


def test_the_address_comes_from_mlflows_variable_unless_given(monkeypatch, tmp_path):
    setup_mlflow("e")
    assert guide._setup.uri == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    setup_mlflow("e")
    assert guide._setup.uri == "http://elsewhere:5000"
    setup_mlflow("e", "http://given:5000")
    assert guide._setup.uri == "http://given:5000"


def test_misuse_is_told_in_one_line():
    with pytest.raises(TrackingError, match="before setup_mlflow"), start_run("n"):
        pass
    with pytest.raises(TrackingError, match="outside a run"):
        log_metrics({"a": 1.0})
    with pytest.raises(TrackingError, match="outside a run"):
        log_params({"a": 1.0})
    with pytest.raises(TrackingError, match="outside a run"), create_nested_run("n"):
        pass
    with pytest.raises(TrackingError, match="file store"):
        setup_mlflow("e", "file:./mlruns")
    setup_mlflow("e", "")
    with start_run("n"):
        with pytest.raises(TrackingError, match="use create_nested_run"), start_run("m"):
            pass
        with pytest.raises(TrackingError, match="before start_run"):
            setup_mlflow("e", "")
        with create_nested_run("m"), pytest.raises(TrackingError, match="inside a nested one"), create_nested_run("k"):
            pass


def test_the_names_cost_nothing_until_they_are_used_and_silence_mlflow():
    program = """
import os, sys
for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
    os.environ.pop(name, None)
import common.tracking.address
assert "common.tracking.guide" not in sys.modules
import common.tracking
try:
    common.tracking.nothing
except AttributeError:
    pass
else:
    sys.exit("a name that is not there")
from common.tracking import setup_mlflow
setup_mlflow("e", "http://127.0.0.1:9")
assert "mlflow" not in sys.modules
assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
