"""What tracking survives: power cuts, full disks, a server that refuses, freezes, dies or forgets a run."""

import dataclasses
import errno
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.errors import FaceFedError, TrackingError
from common.runs import RunKind, begin_tracking
from common.settings import Settings, TrackingSettings
from common.tracking import sender as sender_module
from common.tracking import spool as spool_module
from common.tracking.run import open_run
from common.tracking.spool import SENT_NAME, Spool, load_sent, metric_line, read_entries
from common.tracking.sync import sync_run, unsent
from tests.unit.fake_mlflow import FakeMlflow

ROOT = Path(__file__).resolve().parents[2]
ON = TrackingSettings(tensorboard="none")
GB = 10**9


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    monkeypatch.setattr(sender_module, "RETRY_FIRST_S", 0.05)
    monkeypatch.setattr(sender_module, "RETRY_LAST_S", 0.2)
    monkeypatch.setattr(sender_module, "PAUSE_S", 0.02)


@pytest.fixture
def server():
    with FakeMlflow() as made:
        yield made


def _open(uri, folder):
    return open_run(ON, uri=uri, folder=folder, experiment="fed", run_name="n", tags={}, params={})


def _log(run, steps):
    for step in steps:
        run.log_metrics({"loss": float(step)}, step=step)


def _steps(run):
    return sorted(step for key, _, step, _ in run["points"] if key == "loss")


def _wait(condition):
    deadline = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _disk(monkeypatch, free):
    monkeypatch.setattr(spool_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def test_lines_are_on_the_disk_within_a_second_and_an_idle_spool_costs_nothing(tmp_path, monkeypatch):
    assert spool_module.SYNC_INTERVAL_S <= 1.0
    monkeypatch.setattr(spool_module, "SYNC_INTERVAL_S", 0.1)
    synced = []
    real = os.fsync
    spool = Spool(tmp_path)
    monkeypatch.setattr(spool_module.os, "fsync", lambda number: (real(number), synced.append(spool.size))[0])
    spool.append(metric_line("", "a", 1.0, 0, 1))
    _wait(lambda: synced)
    assert synced == [spool.size]
    time.sleep(0.5)  # five times
    assert len(synced) == 1
    spool.append(metric_line("", "a", 2.0, 1, 1))
    spool.close()
    assert synced[-1] == spool.size


def test_a_full_disk_is_refused_before_a_run_begins(tmp_path, monkeypatch):
    _disk(monkeypatch, 3_000_000)
    with pytest.raises(TrackingError, match="has 3 MB free and a run needs 50 MB to begin; make room"):
        Spool(tmp_path)


def test_a_disk_that_fills_is_told_once_while_there_is_room(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(spool_module, "SYNC_INTERVAL_S", 0.02)
    monkeypatch.setattr(spool_module, "LOOK_AT_DISK_S", 0.05)
    _disk(monkeypatch, 100 * GB)

    def told():  # other tests' spools look at their disks, too
        return [message for message in caplog.messages if str(tmp_path) in message]

    with caplog.at_level(logging.WARNING, logger="facefed.tracking"):
        spool = Spool(tmp_path)
        time.sleep(0.3)
        assert not told()
        _disk(monkeypatch, 200_000_000)
        _wait(told)
        time.sleep(0.3)
        spool.close()
    assert told() == [
        f"Tracking: only 200 MB are free for {tmp_path}; make room, or checkpoints and metrics will be lost."
    ]


def test_a_note_that_a_full_disk_cuts_off_blames_no_server(server, tmp_path, caplog):
    run = _open(server.uri, tmp_path / "r")
    aside = tmp_path / "r" / f".{SENT_NAME}.{os.getpid()}.tmp"
    aside.unlink(missing_ok=True)
    aside.mkdir()  # cannot be written
    _log(run, range(5))
    run.finish("FINISHED")
    assert not caplog.records
    (kept,) = server.runs.values()
    assert _steps(kept) == list(range(5))


def test_one_folder_has_one_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(spool_module, "LOCK_WITHIN_S", 0.2)
    first = Spool(tmp_path)
    with pytest.raises(TrackingError, match="is in use by a run or a `facefed tracking sync`"):
        Spool(tmp_path)
    first.close()
    Spool(tmp_path).close()


def test_a_folder_in_use_is_refused_before_anything_is_written_into_it(tmp_path, monkeypatch):
    monkeypatch.setattr(spool_module, "LOCK_WITHIN_S", 0.1)
    settings = Settings(tracking=dataclasses.replace(ON, enabled=False))
    kind = RunKind(mode="local", experiment="e", label="l")
    folder = tmp_path / "r"
    begun = begin_tracking(settings, folder, "none", kind)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert {path.name for path in before} == {"config.toml", "run.json", "spool.jsonl"}
    other = dataclasses.replace(settings, run=dataclasses.replace(settings.run, seed=7))
    with pytest.raises(TrackingError, match="is in use by a run"):
        begin_tracking(other, folder, "none", dataclasses.replace(kind, mode="twins"))
    assert {path.name: path.read_bytes() for path in before} == {path.name: text for path, text in before.items()}
    begun.finish("FINISHED")


def test_files_that_cannot_be_written_free_the_folder_again(tmp_path):
    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        open_run(ON, uri="", folder=tmp_path, experiment="e", run_name="n", tags={}, params={}, prepare=fail)
    Spool(tmp_path).close()


FULL = """
import resource, sys
from pathlib import Path
from common.settings import Settings, TrackingSettings
from common.tracking.run import open_run

def room(most):
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

off = TrackingSettings(enabled=False, tensorboard="none")
run = open_run(off, uri="", folder=Path(sys.argv[1]), experiment="e", run_name="n", tags={}, params={})
room(20_000)
run.log_text("x" * 30_000, "big.txt")
run.log_text("y" * 30_000, "large/big.txt")
run.log_text("small", "small.txt")
for step in range(1000):
    run.log_metrics({"a": 1.0, "b": 2.0}, step=step)
run.log_text("small", "late.txt")
room(resource.RLIM_INFINITY)
run.log_text("z", "large/big.txt")
run.finish("FINISHED")
"""


def test_a_disk_that_is_full_in_the_middle_costs_two_lines_and_the_record_says_what_is_missing(tmp_path):
    """With the system's own limit on a file's size, whose errors are those of a full disk."""
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [("big.txt cannot be written" in line, "metrics are lost" in line) for line in done.stderr.splitlines()] == [
        (True, False),
        (False, True),
    ]
    assert {path.name for path in tmp_path.rglob("*.txt")} == {"small.txt", "late.txt", "big.txt"}
    assert not (tmp_path / "big.txt").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    entries, end, corrupt = read_entries(tmp_path / "spool.jsonl", 0, 10_000)
    assert end == (tmp_path / "spool.jsonl").stat().st_size
    assert corrupt == 1  # the line at which the disk was full
    num_metrics = sum("key" in entry for entry in entries)
    assert 100 < num_metrics < 2000
    tags = {key: value for entry in entries if entry.get("event") == "tags" for key, value in entry["values"].items()}
    # Lost are the other metrics, and the event of late.txt.
    assert tags == {"missing_artifacts": "big.txt", "lost_records": str(2000 - num_metrics + 1)}
    assert [entry["name"] for entry in entries if entry.get("event") == "artifact"] == ["small.txt", "large/big.txt"]


def test_a_server_that_answers_403_in_the_middle_gets_everything_when_it_is_well(server, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="facefed.tracking"):
        run = _open(server.uri, tmp_path / "r")
        _log(run, range(10))
        assert run.flush(60.0)
        server.status = 403
        before = server.num_requests
        _log(run, range(10, 20))
        _wait(lambda: server.num_requests >= before + 3)
        server.status = 200
        _wait(lambda: run.flush(5.0))
        run.finish("FINISHED")
    (kept,) = server.runs.values()
    assert _steps(kept) == list(range(20))
    away, again = caplog.messages
    assert "403" in away
    assert "takes records again" in again


def test_a_server_that_freezes_costs_a_log_call_less_than_a_millisecond_and_no_point(server, tmp_path):
    run = _open(server.uri, tmp_path / "r")
    _log(run, range(10))
    assert run.flush(60.0)
    server.thaw.clear()
    percentiles = []
    for first in range(10, 1510, 500):  # three tries: other programs may hold the processor during one
        costs = []
        for step in range(first, first + 500):
            begun = time.perf_counter()
            run.log_metrics({"loss": float(step)}, step=step)
            costs.append(time.perf_counter() - begun)
        percentiles.append(sorted(costs)[495])
    assert min(percentiles) < 1e-3
    server.thaw.set()
    _wait(lambda: run.flush(5.0))
    run.finish("FINISHED")
    (kept,) = server.runs.values()
    assert _steps(kept) == list(range(1510))


def test_a_server_that_dies_for_good_leaves_the_rest_to_sync(server, tmp_path):
    run = _open(server.uri, tmp_path / "r")
    _log(run, range(10))
    assert run.flush(60.0)
    server.faults = iter(["before"] * 100_000)
    _log(run, range(10, 20))
    run.finish("FINISHED")
    assert unsent(run.folder).num_bytes > 0
    server.faults = iter(())
    sync_run(run.folder)
    (kept,) = server.runs.values()
    assert _steps(kept) == list(range(20))
    assert kept["status"] == "FINISHED"
    assert unsent(run.folder).num_bytes == 0


def test_an_experiment_deleted_under_a_run_costs_a_warning_and_comes_back(server, tmp_path, caplog):
    run = _open(server.uri, tmp_path / "r")
    _log(run, range(10))
    assert run.flush(60.0)
    (kept,) = server.runs.values()
    (experiment,) = server.experiments.values()
    kept["stage"] = experiment["stage"] = "deleted"
    with caplog.at_level(logging.WARNING, logger="facefed.tracking"):
        _log(run, range(10, 20))
        assert not run.flush(5.0)
        run.finish("FINISHED")
    assert ["cannot be used now" in line for line in caplog.messages] == [True, False]
    with pytest.raises(TrackingError, match="experiment 'fed' of"):
        sync_run(run.folder)
    kept["stage"] = experiment["stage"] = "active"
    sync_run(run.folder)
    assert list(server.runs.values()) == [kept]
    assert _steps(kept) == list(range(20))


def test_a_lost_note_finds_the_run_again(server, tmp_path):
    """Without the key in the spool the server would get the same run twice."""
    run = _open(server.uri, tmp_path / "r")
    _log(run, range(10))
    run.finish("FINISHED")
    key = load_sent(run.folder, server.uri).run_key
    (run.folder / SENT_NAME).write_text("", encoding="utf-8")  # as a power cut leaves it
    assert load_sent(run.folder, server.uri).run_key == key
    sync_run(run.folder, server.uri)
    assert len(server.runs) == 1


def test_artifacts_that_are_refused_hold_up_nothing_and_sync_sends_them(server, tmp_path, caplog):
    server.refused = ("a.txt", "b.txt")
    with caplog.at_level(logging.WARNING, logger="facefed.tracking"):
        run = _open(server.uri, tmp_path / "r")
        run.log_text("a", "notes/a.txt")
        _log(run, range(10))
        run.log_text("b", "notes/b.txt")
        run.log_text("c", "notes/c.txt")
        _log(run, range(10, 20))
        run.finish("FINISHED")
    (kept,) = server.runs.values()
    assert _steps(kept) == list(range(20))
    assert kept["status"] == "FINISHED"
    assert [path.rpartition("/")[2] for path in server.artifacts] == ["c.txt"]
    refused, left = caplog.messages
    assert "takes records, but" in refused
    assert "0 records and 2 files of" in left
    assert "`facefed tracking sync`" in left
    assert unsent(run.folder).num_bytes > 0
    with pytest.raises(FaceFedError, match=r"has every record, but 2 of the run's files it did not take \(.*run this"):
        sync_run(run.folder)
    server.refused = ("b.txt",)
    with pytest.raises(FaceFedError, match="but 1 of the run's files"):
        sync_run(run.folder)
    server.refused = ()
    assert dict(sync_run(run.folder).sent) == {"artifact": 1}
    assert {path.rpartition("/")[2]: text for path, text in server.artifacts.items()} == {
        "a.txt": b"a",
        "b.txt": b"b",
        "c.txt": b"c",
    }
    assert unsent(run.folder).num_bytes == 0
    assert set(kept["points"].values()) == {1}
    assert dict(sync_run(run.folder).sent) == {}
