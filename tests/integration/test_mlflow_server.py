"""A real `mlflow server` over http that is late, dies and comes back; one that freezes; one that answers 403."""

import contextlib
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from common.settings import TrackingSettings
from common.tracking import sender as sender_module
from common.tracking.registry import register_model
from common.tracking.run import open_run


@pytest.fixture(scope="module", autouse=True)
def _impatient(silent_mlflow):
    silent_mlflow.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    silent_mlflow.setattr(sender_module, "RETRY_LAST_S", 1.0)


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`mlflow server` on a loopback port of its own, its data in a folder."""

    def __init__(self, folder):
        self.folder = folder
        self.port = _free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        command = [
            Path(sys.executable).with_name("mlflow"), "server", "--host", "127.0.0.1", "--port", str(self.port),
            "--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination", f"{self.folder}/artifacts",
        ]  # fmt: skip
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                start_new_session=True,
            )

    def wait(self):
        deadline = time.monotonic() + 180.0
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:  # noqa: S310
                if answer.status == 200:
                    return
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            time.sleep(0.2)
        raise AssertionError((self.folder / "server.log").read_text())

    def kill(self):
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # the group it leads: server and worker
            self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    made.kill()


def _open(uri, folder, **changes):
    given = {"experiment": "fed", "run_name": "n", "tags": {}, "params": {"lr": 0.05}}
    return open_run(TrackingSettings(tensorboard="none"), uri=uri, folder=folder, **{**given, **changes})


def _log(run, steps):
    for step in steps:
        run.log_metrics({"val_roc_auc": step / 1000}, step=step)


def _wait_flushed(run, timeout_s):
    deadline = time.monotonic() + timeout_s
    while not run.flush(5.0):
        assert time.monotonic() < deadline, "the server did not get everything"
        time.sleep(0.1)


def test_no_point_is_lost_or_doubled_by_a_server_that_is_late_and_dies(server, tmp_path, caplog, capsys):
    run = _open(server.uri, tmp_path / "run")
    nested = run.child("celeba", {"client": "celeba"})
    begun = time.monotonic()
    _log(run, range(100))  # nothing listens yet
    nested.log_metrics({"train_loss": 1.0}, step=1)
    run.log_text("early", "notes/early.txt")
    assert time.monotonic() - begun < 5.0
    assert run.mlflow_run_id == ""
    server.start()
    server.wait()
    _wait_flushed(run, 120.0)
    assert run.mlflow_run_id
    _log(run, range(100, 200))
    server.kill()
    _log(run, range(200, 300))
    server.start()
    server.wait()
    _wait_flushed(run, 120.0)
    _log(run, range(300, 400))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 4))
    version = register_model(
        run, model, name="m", image_size=8, step=3, role="best", val_auc=0.9, val_people="p", metrics={"test_eer": 0.1}
    )
    run.finish("FINISHED")

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=server.uri, registry_uri=server.uri)
    points = client.get_metric_history(run.mlflow_run_id, "val_roc_auc")
    # log_model writes the points of its step again, with the model's id beside them.
    assert [point.step for point in points if point.model_id is None] == list(range(400))
    assert client.get_run(run.mlflow_run_id).info.status == "FINISHED"
    assert client.get_run(nested.mlflow_run_id).data.tags["mlflow.parentRunId"] == run.mlflow_run_id
    # The run began when it was opened, not when the server heard of it.
    assert client.get_run(run.mlflow_run_id).info.start_time <= points[0].timestamp
    assert [item.path for item in client.list_artifacts(run.mlflow_run_id, "notes")] == ["notes/early.txt"]
    assert version == "1"
    assert str(client.get_model_version_by_alias("m", "champion").version) == "1"
    ours = [record.getMessage() for record in caplog.records if record.name == "facefed.tracking"]
    assert sum("cannot be used now" in line for line in ours) <= 2  # one for each time away
    assert sum("takes records again" in line for line in ours) == sum("cannot be used now" in line for line in ours)
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def frozen():
    """A port that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(50)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_frozen_server_delays_nobody(frozen, tmp_path, caplog):
    run = _open(frozen, tmp_path / "run")
    percentiles = []
    for first in range(0, 3000, 1000):  # three tries: other programs may hold the processor during one
        costs = []
        for step in range(first, first + 1000):
            begun = time.perf_counter()
            run.log_metrics({"a": 1.0, "b": 2.0}, step=step)
            costs.append(time.perf_counter() - begun)
        percentiles.append(sorted(costs)[990])
    assert min(percentiles) < 1e-3
    begun = time.monotonic()
    run.finish("FINISHED", timeout_s=1.0)
    assert time.monotonic() - begun < 3.0
    assert (tmp_path / "run" / "spool.jsonl").read_bytes().count(b"\n") == 6002
    assert "are not at http://127.0.0.1" in caplog.text


class Forbidding(http.server.BaseHTTPRequestHandler):
    """Answers 403 to everything, as MLflow's host check does."""

    def answer(self):
        self.send_response(403)
        self.end_headers()
        self.wfile.write(b"Invalid Host header - possible DNS rebinding attack detected")

    def __getattr__(self, name):
        if name in ("do_GET", "do_POST"):
            return self.answer
        raise AttributeError(name)

    def log_message(self, *args):
        pass


def test_a_server_that_refuses_us_costs_a_warning(tmp_path, caplog):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forbidding) as refusing:
        thread = threading.Thread(target=refusing.serve_forever)
        thread.start()
        try:
            run = _open(f"http://127.0.0.1:{refusing.server_port}", tmp_path / "run")
            _log(run, range(10))
            assert not run.flush(30.0)
            run.finish("FINISHED")
        finally:
            refusing.shutdown()
            thread.join()
    away, unsent = [record.getMessage() for record in caplog.records]
    assert "cannot be used now" in away
    assert "403" in away
    assert "are not at" in unsent
