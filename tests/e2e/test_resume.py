"""`flower-server --resume`: a server killed with all it started goes on, in the same MLflow run, to the same model."""

import re
import signal
import socket
import sqlite3
import time
from contextlib import suppress

import psutil
import pytest
from conftest import DISTURBED, others_environment
from programs import DONE_WITHIN_S, Programs, assert_one_line, free_port, mlflow_status, run_folder, sha_of, state_of
from warm import WarmPrograms

from clients.flower.supernode import last_written
from clients.site import MIDWAY
from tests.chaos.deployment import TRAINER

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def place(faces, tmp_path_factory, with_tables):
    """Two clients that stay, and what starts a server for them: at an IPv6 address, in an environment others made."""
    programs = Programs(tmp_path_factory.mktemp("resume"))
    where = f"{'[::1]' if has_ipv6() else '127.0.0.1'}:{free_port()}"
    environment = others_environment(programs.cwd)
    with_tables(programs.cwd)
    for name in ("celeba", "vggface2"):
        programs.start(
            "flower-client", "--dataset", name, "--data-dir", faces.folder / "data" / name,
            "--server", where, "--site-seed", 1, *faces.cache, environment=environment,
        )  # fmt: skip

    def server(*arguments):
        return programs.start("flower-server", "--address", where, *arguments, environment=environment)

    yield programs, server, where
    programs.close()


def has_ipv6():
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return False
    return True


def killed_after(program, line):
    """Kill -9 the server and everything it started, as a machine that loses its power does."""
    program.wait_for(line)
    for process in program.processes():
        with suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)
    program.process.wait()
    program.assert_nothing_left()


def kill_a_trainer_midway(client, kept):
    """Kill -9 the trainer of a client when it has kept a part of a round; another one takes its place."""
    before, deadline = last_written(kept), time.monotonic() + DONE_WITHIN_S
    while time.monotonic() < deadline:
        if last_written(kept) in (before, 0.0):
            time.sleep(0.01)
            continue
        [trainer] = [one for one in client.processes() if TRAINER in one.cmdline()]
        trainer.suspend()
        if last_written(kept):  # still in the middle of it
            trainer.kill()
            return
        trainer.resume()
    raise AssertionError(f"nothing of a round was kept:\n{client.out}")


def test_a_killed_server_and_a_killed_trainer_cost_the_model_nothing(place, undisturbed, warm):
    """IPv6, a proxy that is not there and a long TMPDIR are no obstacle on the way."""
    here, server, where = place
    config = here.cwd / "disturbed.toml"
    config.write_text(DISTURBED)
    killed_after(server("--config", config), "round 2 of 5")
    config.write_text(DISTURBED.replace("\nrounds = 5", "\nrounds = 2"))
    refused = WarmPrograms(here.cwd, warm)
    run = run_folder(here.cwd)
    assert 0 < state_of(run)["round"] < 5
    assert_one_line(
        refused.run("flower-server", "--resume", run, "--config", config),
        "flower-server", "federation.rounds is 5 in the run, 2 in --config", code=2,
    )  # fmt: skip
    assert_one_line(refused.run("flower-server", "--resume", "nowhere"), "flower-server", "no run is at", code=2)
    killed_after(server("--resume", run.name), r"going on after round [2-4]")  # and again, at its very beginning
    last = server("--resume", run)
    kill_a_trainer_midway(here.started[0], here.cwd / ".facefed/clients/celeba/private" / run.name / MIDWAY)
    ended = last.ended()
    assert ended.code == 0, ended
    assert re.search(r"celeba: round [2-5] goes on where it was cut off", here.started[0].out)
    assert f"server at {where}; waiting for 2 clients" in ended.out
    for client in here.started[:2]:
        assert f"connected to {where}" in client.out
    assert sha_of(ended.out) == undisturbed
    assert set(mlflow_status(here.cwd).values()) == {"FINISHED"}
    assert len(mlflow_status(here.cwd)) == 3  # the run and its two clients, however often it was begun
    with sqlite3.connect(here.cwd / "mlflow.db") as database:
        points = database.execute("select key, run_uuid, step, count(*) from metrics group by 1, 2, 3").fetchall()
    database.close()
    assert [point for point in points if point[3] != 1] == []
    assert {step for key, _, step, _ in points if key == "train_loss"} == {1, 2, 3, 4, 5}
    assert {step for key, _, step, _ in points if key == "val_roc_auc"} == {0, 1, 2, 3, 4, 5}
    assert_one_line(refused.run("flower-server", "--resume", run), "flower-server", "that run is finished", code=2)
