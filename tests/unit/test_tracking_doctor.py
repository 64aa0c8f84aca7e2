"""`facefed tracking doctor`: each state it can find, against servers that behave as MLflow 3.17 was seen to."""

import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from common import config
from common.settings import Settings
from common.system.runtime import SILENCE, go_silent
from common.tracking.spool import Sent, Spool, metric_line, save_sent
from simulation import cli
from simulation.admin import doctor


def settings_for(uri: str) -> Settings:
    return config.from_mapping({"tracking": {"uri": uri, "tensorboard": "none"}, "run": {"out": "runs"}})


def found(uri: str, base: Path) -> dict[str, doctor.Finding]:
    return {one.name: one for one in doctor.examine(settings_for(uri), SILENCE, base, uri)}


class Server(ThreadingHTTPServer):
    """Answers as an MLflow server does on the way to its middleware; allowed: Host headers, or None for all."""

    def __init__(self, allowed: tuple[str, ...] | None, version: str = "3.17.2", health: int = 200) -> None:
        self.allowed, self.version, self.health = allowed, version, health
        super().__init__(("127.0.0.1", 0), Answer)


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        host = self.headers["Host"].rpartition(":")[0] or self.headers["Host"]
        status, body = 200, "page"
        if self.path == "/health":
            status, body = self.server.health, "OK"
        elif self.path == "/version":
            body = self.server.version
        elif self.server.allowed is not None and host not in self.server.allowed:
            status, body = 403, "Invalid Host header - possible DNS rebinding attack detected"
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serving(monkeypatch):
    servers = []
    monkeypatch.setattr(doctor, "write_and_remove", lambda _uri: (0.1, ""))

    def begin(**options):
        server = Server(**options)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_well_server(serving, tmp_path):
    findings = found(serving(allowed=("127.0.0.1",)), tmp_path)
    assert {one.state for one in findings.values()} == {"ok"}
    assert findings["allowed hosts"].values == {"own": True, "stranger": False}
    assert findings["server's version"].values == {"server": "3.17.2"}
    assert doctor.exit_code(list(findings.values())) == 0


def test_a_server_that_does_not_answer_to_its_name(serving, tmp_path):
    """Measured: MLflow answers 403 to http://mlflow:5000 while /health stays green."""
    findings = found(serving(allowed=("localhost",)), tmp_path)
    assert findings["reachable"].state == "ok"
    assert findings["allowed hosts"].state == "wrong"
    assert "--allowed-hosts 127.0.0.1" in findings["allowed hosts"].text
    assert "write test" not in findings
    assert doctor.exit_code(list(findings.values())) == 1


def test_a_server_that_answers_to_every_name(serving, tmp_path):
    finding = found(serving(allowed=None), tmp_path)["allowed hosts"]
    assert (finding.state, finding.values["stranger"]) == ("note", True)


def test_another_version_of_the_server(serving, tmp_path):
    findings = found(serving(allowed=("127.0.0.1",), version="3.16.0"), tmp_path)
    assert findings["server's version"].state == "note"
    assert "use one version" in findings["server's version"].text


def test_an_unhealthy_and_an_absent_server(serving, tmp_path):
    assert "status 503" in found(serving(allowed=None, health=503), tmp_path)["reachable"].text
    server = Server(None)
    server.server_close()  # its port is free again
    findings = found(f"http://someone:secret@127.0.0.1:{server.server_port}", tmp_path)
    assert findings["reachable"].state == "wrong"
    assert "Connection refused" in findings["reachable"].text
    assert not any("secret" in one.text for one in findings.values())


def test_a_write_test_that_fails_says_what_to_do(serving, tmp_path, monkeypatch):
    def refuse(_uri):
        raise RuntimeError("API request failed with error code 401 != 200")

    address = serving(allowed=("127.0.0.1",))
    monkeypatch.setattr(doctor, "write_and_remove", refuse)
    finding = found(address, tmp_path)["write test"]
    assert finding.state == "wrong"
    assert finding.text.endswith("set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.")


def test_a_file_address_is_refused_with_the_reason(tmp_path):
    finding = found("file:./mlruns", tmp_path)["address"]
    assert finding.state == "wrong"
    assert "a file store, which MLflow refuses" in finding.text


def test_a_database_that_is_to_come_is_not_made(tmp_path):
    findings = found("sqlite:///later/mlflow.db", tmp_path)
    assert {one.state for one in findings.values()} == {"ok"}
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"hello, this is a text")
    finding = found("sqlite:///mlflow.db", tmp_path)["reachable"]
    assert (finding.state, "is no sqlite database" in finding.text) == ("wrong", True)


def test_telemetry_that_is_on(tmp_path):
    """The negative control: each variable matters, and MLflow takes "true" only."""
    for variable in SILENCE:
        without = {name: value for name, value in SILENCE.items() if name != variable}
        for environment in (without, {**SILENCE, variable: "maybe"}):
            findings = list(doctor.examine(settings_for("sqlite:///mlflow.db"), environment, tmp_path))
            telemetry = next(one for one in findings if one.name == "telemetry")
            assert telemetry.state == "wrong"
            assert variable in telemetry.text


def _run(out: Path, name: str, *, sent: int | None) -> Path:
    """A run whose server has `sent` bytes of its record; None: tracking was off."""
    folder = out / name
    spool = Spool(folder)
    spool.append(metric_line("", "loss", 1.0, 0, 1000) + metric_line("", "loss", 0.5, 1, 2000))
    spool.close()
    if sent is not None:
        save_sent(folder, Sent(uri="http://gone:5000", offset=sent))
    return folder


def test_what_is_unsent(tmp_path):
    out = tmp_path / "runs"
    behind, whole = _run(out, "behind", sent=10), _run(out, "whole", sent=0)
    size = (behind / "spool.jsonl").stat().st_size
    save_sent(whole, Sent(uri="http://gone:5000", offset=size))
    _run(out, "sweep/trial", sent=None)
    _run(out, "clients/celeba/runs/trial", sent=None)  # a simulation's client, for itself
    finding = found("sqlite:///mlflow.db", tmp_path)["unsent records"]
    assert finding.state == "wrong"
    assert finding.values == {"unsent_bytes": {"behind": size - 10}, "running": [], "local_only": 1}
    assert finding.text.endswith(f"facefed tracking sync {behind}")


def test_a_run_that_is_being_written_is_not_amiss(tmp_path):
    folder = tmp_path / "runs" / "now"
    spool = Spool(folder)
    try:
        spool.append(metric_line("", "loss", 1.0, 0, 1000))
        save_sent(folder, Sent(uri="http://gone:5000"))
        finding = found("sqlite:///mlflow.db", tmp_path)["unsent records"]
        assert (finding.state, finding.values["running"]) == ("ok", ["now"])
    finally:
        spool.close()


def test_a_full_disk(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    for free, state in ((40_000_000, "wrong"), (400_000_000, "note"), (600_000_000, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _path, free=free: usage._replace(free=free))
        assert found("sqlite:///mlflow.db", tmp_path)["disk of the runs"].state == state


@pytest.mark.usefixtures("tables_once")
def test_the_program_in_text_and_json(tmp_path, monkeypatch, capsys):
    """On a real, new sqlite database: the write test leaves no file and no active experiment."""
    from mlflow import MlflowClient
    from mlflow.entities import ViewType

    for name in (*SILENCE, "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # restored afterwards
    go_silent()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(tracking_uri=uri)
    client.create_experiment("mine", artifact_location=(tmp_path / "elsewhere").as_uri())
    before = sorted(path.name for path in tmp_path.iterdir())

    for _ in range(2):  # the second time the experiment is there already, deleted
        assert cli.main(["tracking", "doctor", "--tracking-uri", uri, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["well"] is True
        states = {one["name"]: one["state"] for one in answer["findings"]}
        assert states["write test"] == "ok"
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert {one.name for one in client.search_experiments()} == {"Default", "mine"}
    deleted = client.search_experiments(view_type=ViewType.DELETED_ONLY)
    assert [one.name.startswith("facefed-doctor-") for one in deleted] == [True]

    assert cli.main(["tracking", "doctor", "--tracking-uri", "file:./mlruns"]) == 1
    assert "WRONG  address: tracking address 'file:./mlruns'" in capsys.readouterr().out
