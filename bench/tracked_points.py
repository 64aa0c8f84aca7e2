"""Points that can be told apart, logged by this process or by one that is killed, and the proof that all are there.

    python -m bench.tracked_points FOLDER URI NUM_STEPS

logs until NUM_STEPS steps are in the run's record, says each step, and then waits to be killed. Started again it goes
on behind the last whole step, as a training does.
"""

import collections
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from bench.mlflow_server import MlflowServer, Point
from common.settings import TrackingSettings
from common.tracking.run import TrackedRun, open_run

NUM_VALUES = 10  # of one log call
ROOT = Path(__file__).resolve().parents[1]
PAUSE_S = 0.002


def values_of(step: int) -> dict[str, float]:
    """What a call logs: ten values that no other step has."""
    return {f"value_{number}": (step * NUM_VALUES + number) / 7 for number in range(NUM_VALUES)}


def begin(uri: str, folder: Path) -> TrackedRun:
    """Begin the run, or go on with it."""
    tracking = TrackingSettings(tensorboard="none")
    return open_run(
        tracking, uri=uri, folder=folder, experiment="faults", run_name="points", tags={}, params={"lr": 0.1}
    )


class Call(NamedTuple):
    """One log call."""

    seconds: float  # by the clock
    is_preempted: bool  # the kernel gave the processor to another program in the middle


def log(run: TrackedRun, steps: Iterable[int], pause_s: float = 0.0) -> list[Call]:
    """Log steps with a pause behind each."""
    calls = []
    for step in steps:
        values = values_of(step)
        preempted = _preemptions()
        begun = time.perf_counter()
        run.log_metrics(values, step=step)
        calls.append(Call(time.perf_counter() - begun, _preemptions() > preempted))
        time.sleep(pause_s)
    return calls


def _preemptions() -> int:
    return resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)).ru_nivcsw


def spool_entries(folder: Path) -> list[dict]:
    """The run's own record, read with nothing of the tracking's."""
    lines = (folder / "spool.jsonl").read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"\n") and line.strip()]


def assert_exactly_once(server: MlflowServer, run_id: str, folder: Path, num_steps: int) -> int:
    """Each point of the steps 0 to num_steps - 1 is in the database once, as it was logged; returns how many."""
    logged: collections.Counter[Point] = collections.Counter(
        (entry["key"], entry["step"], entry["value"], entry["time_ms"])
        for entry in spool_entries(folder)
        if "key" in entry
    )
    told = {(key, step, value) for step in range(num_steps) for key, value in values_of(step).items()}
    assert {point[:3] for point in logged} == told, "the run's own record is not what was logged"
    assert len(logged) == logged.total() == len(told), "a point is twice in the run's own record"
    there = server.points(run_id)
    lost, added = logged - there, there - logged
    assert not lost and not added, f"{lost.total()} points lost, {added.total()} doubled or changed"  # noqa: PT018
    return there.total()


class Trainer:
    """A process that logs, which can be killed."""

    def __init__(self, folder: Path, uri: str, num_steps: int) -> None:
        command = [sys.executable, "-m", "bench.tracked_points", str(folder), uri, str(num_steps)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    def kill_at(self, step: int) -> None:
        """End it by kill -9 once it has logged `step`."""
        try:
            assert self._process.stdout is not None
            for line in self._process.stdout:
                if int(line) >= step:
                    return
            raise RuntimeError(f"the trainer ended before step {step}")
        finally:
            self._process.kill()
            self._process.communicate()


def _main(folder: Path, uri: str, num_steps: int) -> None:
    from common.system.runtime import go_silent

    go_silent()
    steps = [entry["step"] for entry in spool_entries(folder) if "key" in entry] if folder.exists() else []
    run = begin(uri, folder)
    last = max(steps, default=-1)
    if steps:
        run.log_missing_metrics(values_of(last), last)
    run.log_text(f"began behind step {last}\n", f"notes/{last}.txt")
    for step in range(last + 1, num_steps):
        log(run, [step], PAUSE_S)
        sys.stdout.write(f"{step}\n")
        sys.stdout.flush()
    time.sleep(3600.0)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
