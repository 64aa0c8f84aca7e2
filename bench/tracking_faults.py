"""What tracking has to survive, played with a real server: `bench.tracking` reports it, tests/e2e asserts it."""

import itertools
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.mlflow_server import MlflowServer
from bench.tracked_points import NUM_VALUES, Call, Trainer, assert_exactly_once, begin, log, spool_entries
from common.tracking.run import TrackedRun

PROGRAMS = Path(sys.executable).parent
MODEL = "faults_model"
SENT_WITHIN_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Faults:
    """How much of each."""

    num_steps: int  # of ten points each, through a late start and the kills
    num_kills: int  # of the server
    freeze_s: float  # with as long a time before it, in which the server is well
    pause_s: float  # between log calls then
    seed: int


@dataclass(frozen=True, kw_only=True)
class Survived:
    """What came of it."""

    num_points: int  # each in the database exactly once
    well: Sequence[Call]  # log calls of ten values while the server is well
    frozen: Sequence[Call]
    late_s: float  # between the run's beginning and the server's


def survive_server(server: MlflowServer, folder: Path, faults: Faults) -> Survived:
    """A server that is down at the start, killed and started again, and frozen; raises AssertionError for any loss."""
    chance = random.Random(faults.seed)  # noqa: S311 - when to kill
    num_phases = 1 + 2 * faults.num_kills
    bounds = [faults.num_steps * phase // num_phases for phase in range(num_phases + 1)]
    phases = [range(first, end) for first, end in itertools.pairwise(bounds)]
    begun = time.time()
    run = begin(server.uri, folder)
    log(run, phases[0])  # nothing listens yet
    run.log_text("early", "notes/early.txt")
    server.start()
    server.wait()
    late_s = time.time() - begun
    for kill in range(faults.num_kills):
        wait_until_sent(run)  # else it might still wait for the server's return when that is killed again
        log(run, phases[1 + 2 * kill])
        run.log_text(f"before kill {kill}", f"notes/kill_{kill}.txt")
        time.sleep(chance.uniform(0.0, 1.0))  # somewhere between two batches or in one
        server.kill()
        log(run, phases[2 + 2 * kill])
        server.start()
        server.wait()
    wait_until_sent(run)
    calls = int(faults.freeze_s / faults.pause_s)
    first = faults.num_steps
    well = log(run, range(first, first + calls), faults.pause_s)
    server.freeze()
    try:
        frozen_since = time.monotonic()
        run.log_text("frozen", "notes/frozen.txt")
        frozen = log(run, range(first + calls, first + 2 * calls), faults.pause_s)
        time.sleep(max(0.0, faults.freeze_s - (time.monotonic() - frozen_since)))
    finally:
        server.thaw()
    wait_until_sent(run)
    version = register(run, first)
    run.finish("FINISHED")
    num_points = assert_exactly_once(server, run.mlflow_run_id, folder, first + 2 * calls)
    assert_true_times(server, run.mlflow_run_id, folder, "FINISHED")
    assert version == "1", version
    assert_one_model(server, run.mlflow_run_id)
    told = ["early", "frozen", *(f"kill_{kill}" for kill in range(faults.num_kills))]
    for name in told:
        kept = (folder / "notes" / f"{name}.txt").read_bytes()
        assert server.artifact(run.mlflow_run_id, f"notes/{name}.txt") == kept, name
    return Survived(num_points=num_points, well=well, frozen=frozen, late_s=late_s)


def wait_until_sent(run: TrackedRun) -> None:
    """Until the server has everything that was logged so far."""
    deadline = time.monotonic() + SENT_WITHIN_S
    while not run.flush(10.0):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the server did not get everything within {SENT_WITHIN_S:.0f} s")
        time.sleep(0.1)


def register(run: TrackedRun, step: int) -> str | None:
    """A small network, as a run registers its best."""
    import torch

    from common.tracking.registry import register_model

    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 4))
    linked = {"value_0": step * NUM_VALUES / 7}
    return register_model(
        run, network, name=MODEL, image_size=8, step=step, role="best", val_auc=0.9, val_people="p", metrics=linked
    )


def assert_one_model(server: MlflowServer, run_id: str) -> None:
    """One version, the champion, of one logged model that is whole."""
    assert server.rows("select name, version, run_id from model_versions") == [(MODEL, 1, run_id)]
    assert server.rows("select alias, version from registered_model_aliases where name = ?", MODEL) == [("champion", 1)]
    ((location,),) = server.rows("select artifact_location from logged_models where source_run_id = ?", run_id)
    place = server.artifacts / str(location).removeprefix("mlflow-artifacts:/")
    assert {"MLmodel", "data"} <= {path.name for path in place.iterdir()}


def assert_true_times(server: MlflowServer, run_id: str, folder: Path, status: str) -> None:
    """The run began and ended when its record says, whenever the server heard of it; and there is no second one."""
    times = [entry["time_ms"] for entry in spool_entries(folder)]
    rows = server.rows("select run_uuid, start_time, end_time, status from runs")
    assert rows == [(run_id, times[0], times[-1], status)], (rows, times[0], times[-1])


def survive_trainer(server: MlflowServer, folder: Path, num_steps: int, num_kills: int) -> int:
    """A trainer that is killed and goes on, until a last kill after which `sync` sends the rest; the points there."""
    for kill in range(1, num_kills + 1):
        Trainer(folder, server.uri, num_steps).kill_at(num_steps * kill // num_kills - 1)
    sync(folder)
    assert sync(folder).endswith(": nothing was left\n")
    ((run_id,),) = server.rows("select run_uuid from runs")
    assert_true_times(server, run_id, folder, "KILLED")
    notes = sorted((folder / "notes").iterdir())
    assert len(notes) == num_kills, notes
    for path in notes:
        assert server.artifact(run_id, f"notes/{path.name}") == path.read_bytes(), path
    return assert_exactly_once(server, run_id, folder, num_steps)


def sync(folder: Path) -> str:
    """`facefed tracking sync`; returns what it said."""
    command = [str(PROGRAMS / "facefed"), "tracking", "sync", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    return done.stdout
