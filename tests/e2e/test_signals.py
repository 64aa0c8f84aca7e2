"""Ctrl-C and SIGTERM in the middle: exit 130, a record that says KILLED, a whole checkpoint, nothing left behind."""

import json
import signal
import time

import pytest
from programs import STOPPED, free_port, mlflow_status, port_is_free, run_folder, state_of

from common.system.checkpoints import read_tensors

pytestmark = pytest.mark.e2e
ENDS_WITHIN_S = 60.0  # about 7 s on an idle machine of 2 cores, most of it MLflow's database; unsignalled, hours


def _assert_stopped(program, started, name):
    ended = program.ended(2 * ENDS_WITHIN_S)
    assert ended.code == 130, ended
    assert time.monotonic() - started < ENDS_WITHIN_S
    assert "Traceback" not in ended.err
    assert len(ended.error_lines) == 1, ended.err
    assert ended.err.startswith(f"{name}: stopped")
    program.assert_nothing_left()


def test_simulation_by_ctrl_c_after_a_round(faces, programs, with_tables):
    with_tables(programs.cwd)
    program = programs.start("flower-simulation", *faces.clients, *faces.small, *faces.cache, "--rounds", 500)
    program.wait_for("round 1 of 500")
    program.signal(signal.SIGINT, group=True)  # as a terminal does
    _assert_stopped(program, time.monotonic(), "flower-simulation")
    assert len(mlflow_status(programs.cwd)) == 3
    assert set(mlflow_status(programs.cwd).values()) == {"KILLED"}
    run = run_folder(programs.cwd)
    rounds = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    last_whole = max(event["round"] for event in rounds if event["kind"] == "round")
    assert state_of(run)["round"] == last_whole >= 1
    assert json.loads((run / "outcome.json").read_text())["exit_code"] == 130


def test_simulation_by_sigterm_while_a_client_trains_for_long(faces, programs, with_tables):
    """To the whole group, as `timeout` and systemd send it: Ray must not die before the record is closed."""
    with_tables(programs.cwd)
    program = programs.start(
        "flower-simulation", *faces.clients, *faces.bare, *faces.cache, "--local-epochs", 100_000
    )  # fmt: skip
    program.wait_for("2 of 2 clients are here")
    time.sleep(3)
    program.signal(signal.SIGTERM, group=True)
    _assert_stopped(program, time.monotonic(), "flower-simulation")
    assert set(mlflow_status(programs.cwd).values()) == {"KILLED"}
    assert state_of(run_folder(programs.cwd))["round"] == 0


@pytest.mark.parametrize("name", STOPPED)
def test_local_training(name, faces, programs, with_tables):
    with_tables(programs.cwd)
    program = programs.start(
        "facefed", "train", "local", "--client", f"celeba={faces.celeba}", *faces.small, *faces.cache, "--epochs", 5000
    )
    program.wait_for("epoch 2 of 5000")
    program.signal(STOPPED[name], group=name == "INT")
    _assert_stopped(program, time.monotonic(), "facefed")
    assert list(mlflow_status(programs.cwd).values()) == ["KILLED"]
    assert read_tensors(run_folder(programs.cwd) / "checkpoints" / "best.safetensors")[0]


def test_client_and_server_in_the_middle_of_a_round(faces, programs, with_tables):
    with_tables(programs.cwd)
    port = free_port()
    server = programs.start(
        "flower-server", "--address", f"127.0.0.1:{port}", "--min-clients", 1, *faces.bare, "--rounds", 500
    )
    client = programs.start(
        "flower-client", "--dataset", "celeba", "--data-dir", faces.celeba, "--server", f"127.0.0.1:{port}",
        *faces.cache,
    )  # fmt: skip
    server.wait_for("round 1 of 500")
    client.wait_for("round 2: training")
    assert len(client.processes()) > 1
    server.signal(signal.SIGINT, group=True)
    client.signal(signal.SIGTERM)
    signalled = time.monotonic()
    _assert_stopped(server, signalled, "flower-server")
    assert server.ended(1).err.endswith(f" Go on with: flower-server --resume {run_folder(programs.cwd)}\n")
    _assert_stopped(client, signalled, "flower-client")
    assert port_is_free(port)
    assert len(mlflow_status(programs.cwd)) == 2
    assert set(mlflow_status(programs.cwd).values()) == {"KILLED"}
    assert state_of(run_folder(programs.cwd))["round"] >= 1


def test_server_by_sigterm_while_it_waits(faces, programs):
    port = free_port()
    server = programs.start("flower-server", "--address", f"127.0.0.1:{port}", *faces.bare, "--no-mlflow")
    server.wait_for("waiting for 2 clients")
    time.sleep(1)
    server.signal(signal.SIGTERM)
    _assert_stopped(server, time.monotonic(), "flower-server")
    assert port_is_free(port)
