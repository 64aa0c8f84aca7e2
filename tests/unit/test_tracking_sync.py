"""`facefed tracking sync`: everything once after any cut, true start times, damage passed, and one line for trouble."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.errors import FaceFedError, TrackingError
from common.settings import TrackingSettings
from common.tracking import sync as sync_module
from common.tracking.run import open_run
from common.tracking.spool import SENT_NAME, Spool, load_sent, metric_line
from common.tracking.sync import ServerUnusable, sync_run, sync_runs, unsent
from tests.unit.fake_mlflow import FakeMlflow

ROOT = Path(__file__).resolve().parents[2]
OFF = TrackingSettings(enabled=False, tensorboard="none")
STEPS = 40


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")


@pytest.fixture
def server():
    with FakeMlflow() as made:
        yield made


@pytest.fixture
def folder(tmp_path):
    """A finished run that no server has heard of."""
    run = open_run(
        OFF, uri="", folder=tmp_path / "r1", experiment="fed", run_name="n", tags={"mode": "x"}, params={"lr": 0.1}
    )
    nested = run.child("celeba", {"client": "celeba"})
    run.log_text("kept", "notes/note.txt")
    run.log_dataset(name="celeba", digest="d1", context="training", profile={"num_pictures": 3})
    for step in range(STEPS):
        run.log_metrics({"loss": step / 7}, step=step)
        nested.log_metrics({"train_loss": step / 9}, step=step)
    run.set_tags({"device": "cpu"})
    run.finish("FINISHED")
    return run.folder


def _entries(folder):
    return [json.loads(line) for line in (folder / "spool.jsonl").read_bytes().splitlines() if line.startswith(b"{")]


def _points(run, key):
    return sorted((step, value) for name, _, step, value in run["points"] if name == key)


def _assert_whole(server):
    """The run, its nested run, and each point of them once."""
    by_name = {run["name"]: run for run in server.runs.values()}
    assert sorted(run["name"] for run in server.runs.values()) == ["celeba", "n"]
    assert _points(by_name["n"], "loss") == [(step, str(step / 7)) for step in range(STEPS)]
    assert _points(by_name["celeba"], "train_loss") == [(step, str(step / 9)) for step in range(STEPS)]
    assert by_name["n"]["params"] == {"lr": "0.1"}
    assert by_name["n"]["tags"]["device"] == "cpu"
    assert by_name["n"]["inputs"] == {"d1"}
    assert [run["status"] for run in server.runs.values()] == ["FINISHED", "FINISHED"]
    assert [content for path, content in server.artifacts.items() if path.endswith("notes/note.txt")] == [b"kept"]
    return by_name["n"], by_name["celeba"]


def test_a_run_of_an_unreachable_server_arrives_whole_with_its_true_times(server, folder):
    done = sync_run(folder, server.uri)
    run, nested = _assert_whole(server)
    entries = _entries(folder)
    assert run["start"] == entries[0]["time_ms"]
    assert run["end"] == entries[-1]["time_ms"]
    assert nested["tags"]["mlflow.parentRunId"] == done.run_id
    assert done.sent["metric"] == 2 * STEPS
    assert done.num_corrupt == 0
    assert unsent(folder).num_bytes == 0
    assert unsent(folder).uri == server.uri


def test_a_second_time_sends_nothing(server, folder):
    sync_run(folder, server.uri)
    assert dict(sync_run(folder).sent) == {}
    run, nested = _assert_whole(server)
    assert set(run["points"].values()) == set(nested["points"].values()) == {1}  # not even sent again


@pytest.mark.parametrize("seed", range(4))
def test_any_mixture_of_cuts_leaves_each_point_once(server, folder, seed, monkeypatch):
    """Requests are cut before or after the server acts, notes of what was sent are lost, batches are small."""
    draw = random.Random(seed)
    monkeypatch.setattr(sync_module, "LINES_PER_BATCH", 7)
    server.faults = iter([draw.choice(["", "", "", "", "before", "after"]) for _ in range(200)])
    num_failures = 0
    for _ in range(200):
        try:
            sync_run(folder, server.uri)
            break
        except FaceFedError:
            num_failures += 1
            if draw.random() < 0.2:
                (folder / SENT_NAME).unlink(missing_ok=True)
    assert num_failures > 2
    _assert_whole(server)


def test_a_trainer_that_is_killed_loses_nothing_that_it_logged(server, tmp_path):
    program = """
import os, signal, sys
from pathlib import Path
from common.settings import TrackingSettings
from common.tracking.run import open_run
run = open_run(TrackingSettings(tensorboard="none"), uri="http://127.0.0.1:9", folder=Path(sys.argv[1]),
               experiment="fed", run_name="n", tags={}, params={})
for step in range(500):
    run.log_metrics({"loss": float(step)}, step=step)
os.kill(os.getpid(), signal.SIGKILL)
"""
    folder = tmp_path / "r"
    killed = subprocess.run([sys.executable, "-c", program, folder], cwd=ROOT, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    sync_run(folder, server.uri)
    [run] = server.runs.values()
    assert _points(run, "loss") == [(step, str(float(step))) for step in range(500)]
    assert run["status"] == "KILLED"
    assert run["end"] == _entries(folder)[-1]["time_ms"]


def test_damaged_lines_are_passed_counted_and_kept(server, folder):
    path = folder / "spool.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    number = next(i for i, line in enumerate(lines) if b'"key":"loss"' in line and b'"step":5}' in line)
    lines[number] = b'{"time_ms":1,"ru\x00\xff\n'
    lines.insert(3, b'{"time_ms":1,"run":"","event":"params"}\n')  # JSON, but nothing in it
    path.write_bytes(b"".join(lines) + b'{"time_ms":1,"run":"","key":"lo')
    before = path.read_bytes()
    done = sync_run(folder, server.uri)
    assert done.num_corrupt == 3
    assert path.read_bytes() == before
    [run] = [run for run in server.runs.values() if run["name"] == "n"]
    assert [step for step, _ in _points(run, "loss")] == [step for step in range(STEPS) if step != 5]


def test_a_run_whose_first_line_is_damaged_is_made_from_the_rest(server, folder):
    path = folder / "spool.jsonl"
    _, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"damaged\n" + b"".join(rest))
    sync_run(folder, server.uri)
    by_name = {run["name"]: run for run in server.runs.values()}
    assert set(by_name) == {"r1", "celeba"}
    assert len(_points(by_name["r1"], "loss")) == STEPS
    assert [about["name"] for about in server.experiments.values()] == ["fed"]


def test_a_name_that_mlflow_refuses_keeps_nothing_else(server, tmp_path, caplog):
    run = open_run(OFF, uri="", folder=tmp_path / "r", experiment="e", run_name="n", tags={}, params={})
    run.log_metrics({"bad!": 1.0, "good": 2.0, "odd": float("nan"), "endless": float("inf")}, step=1)
    run.finish("FINISHED")
    with caplog.at_level(logging.WARNING, logger="facefed.tracking"):
        sync_run(run.folder, server.uri)
    [kept] = server.runs.values()
    assert sorted(name for name, *_ in kept["points"]) == ["good", "odd"]
    assert kept["tags"]["nonfinite_metrics"] == "endless, odd"
    assert "takes no metric 'bad!'" in caplog.text


def test_a_folder_that_is_no_runs_is_refused(tmp_path):
    with pytest.raises(TrackingError, match=r"is no run's folder: it has no spool.jsonl"):
        sync_run(tmp_path, "http://127.0.0.1:9")


def test_a_run_that_does_not_know_its_server_says_so(folder):
    with pytest.raises(TrackingError, match="give --tracking-uri"):
        sync_run(folder)


def test_a_hidden_password_has_to_be_given_again(folder):
    (folder / SENT_NAME).write_text(json.dumps({"uri": "http://***@server:5000"}), encoding="utf-8")
    with pytest.raises(TrackingError, match="password is not kept; give --tracking-uri"):
        sync_run(folder)


def test_an_unreachable_server_costs_one_line(folder):
    with pytest.raises(ServerUnusable) as refused:
        sync_run(folder, "http://127.0.0.1:9")
    assert "Connection refused" in str(refused.value)
    assert "start the server" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("status", "hint"), [(401, "MLFLOW_TRACKING_USERNAME"), (403, "--allowed-hosts")])
def test_a_server_that_does_not_let_us_in_costs_one_line(server, folder, status, hint):
    server.status = status
    with pytest.raises(ServerUnusable) as refused:
        sync_run(folder, server.uri.replace("//", "//me:secret@"))
    assert hint in str(refused.value)
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_frozen_server_is_given_up(server, folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    server.thaw.clear()
    begun = time.monotonic()
    with pytest.raises(ServerUnusable, match="timed out"):
        sync_run(folder, server.uri)
    assert time.monotonic() - begun < 30.0


def test_a_server_that_dies_in_the_middle_is_told_with_what_is_left(server, folder, monkeypatch):
    monkeypatch.setattr(sync_module, "LINES_PER_BATCH", 7)
    server.faults = iter([""] * 20 + ["before"] * 100)
    with pytest.raises(FaceFedError, match=r"stopped taking records .* bytes are left; run this again"):
        sync_run(folder, server.uri)
    left = unsent(folder).num_bytes
    assert 0 < left < (folder / "spool.jsonl").stat().st_size
    server.faults = iter(())
    sync_run(folder)
    _assert_whole(server)


def test_a_run_that_still_writes_is_refused(server, folder):
    program = """
import sys, time
from pathlib import Path
from common.tracking.spool import Spool
spool = Spool(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program, folder], cwd=ROOT, stdout=subprocess.PIPE) as writer:
        try:
            assert writer.stdout.readline() == b"held\n"
            with pytest.raises(TrackingError, match="is in use by a run"):
                sync_run(folder, server.uri)
            assert not server.runs
        finally:
            writer.kill()
    sync_run(folder, server.uri)
    _assert_whole(server)


def test_a_deleted_experiment_is_named_with_the_way_back(server, folder, monkeypatch):
    monkeypatch.setattr(sync_module, "LINES_PER_BATCH", 7)
    server.faults = iter([""] * 20 + ["before"] * 100)
    with pytest.raises(FaceFedError):
        sync_run(folder, server.uri)
    server.faults = iter(())
    for about in (*server.experiments.values(), *server.runs.values()):
        about["stage"] = "deleted"
    with pytest.raises(TrackingError, match=r"experiment 'fed' of .* was deleted; .*`mlflow experiments restore -x 1`"):
        sync_run(folder)
    for about in (*server.experiments.values(), *server.runs.values()):
        about["stage"] = "active"
    sync_run(folder)
    _assert_whole(server)


def test_a_deleted_run_with_unsent_records_is_made_anew_and_a_whole_one_stays_deleted(server, folder):
    sync_run(folder, server.uri)
    for run in server.runs.values():
        run["stage"] = "deleted"
    sync_run(folder)
    assert len(server.runs) == 2
    spool = Spool(folder)
    spool.append(metric_line("", "late", 1.0, 0, 1))
    spool.close()
    sync_run(folder)
    active = [run for run in server.runs.values() if run["stage"] == "active"]
    assert sorted(run["name"] for run in active) == ["celeba", "n"]
    assert sorted(len(run["points"]) for run in active) == [STEPS, STEPS + 1]


def test_lines_that_a_power_cut_took_do_not_hide_later_ones(folder):
    sent = load_sent(folder, "http://a")
    sent.offset = (folder / "spool.jsonl").stat().st_size + 100
    sync_module.save_sent(folder, sent)
    assert load_sent(folder, "http://a").offset == 0


@pytest.mark.usefixtures("folder")
def test_several_runs_one_of_which_is_none(server, tmp_path, capsys):
    code = sync_runs([str(tmp_path / "none"), "r1"], tmp_path, server.uri, sys.stdout, sys.stderr)
    out, err = capsys.readouterr()
    assert code == 2
    assert err.startswith(f"facefed: {tmp_path / 'none'} is no run's folder")
    assert f"{2 * STEPS} metric" in out
    assert out.count("\n") == err.count("\n") == 1
    _assert_whole(server)


def test_the_command_does_it(server, folder):
    program = "import sys; from simulation.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "tracking", "sync", str(folder), "--tracking-uri", server.uri]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{folder} -> {server.uri} run ")
    _assert_whole(server)
