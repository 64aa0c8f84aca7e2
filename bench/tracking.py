"""Tracking's figures: points through faults, the cost of a log call, and the import of a wandb run.

    python -m bench.tracking [--faults] [--trainer] [--wandb] [--points 10000] [--json FILE]

Without a choice all three. --faults: a real MLflow server is down at the start, killed and started five times and
frozen for 30 s. --trainer: a training is killed five times; then `facefed tracking sync`. Every row of the server's
database is compared with what was logged. --wandb: 100,000 points of one offline run into a new sqlite database.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.mlflow_server import MlflowServer
from bench.tracked_points import NUM_VALUES, Call
from bench.tracking_faults import Faults, survive_server, survive_trainer
from bench.wandb_log import write_run
from common.system.runtime import go_silent

PROGRAMS = Path(sys.executable).parent
NUM_KILLS = 5
WANDB_POINTS = 100_000


def spread(calls: Sequence[Call]) -> dict[str, float]:
    """Of log calls, in milliseconds; and without those in which the kernel let another program run meanwhile."""
    every = sorted(1000 * call.seconds for call in calls)
    alone = sorted(1000 * call.seconds for call in calls if not call.is_preempted)
    return {
        "calls": len(every),
        "median_ms": statistics.median(every),
        "p99_ms": every[len(every) * 99 // 100],
        "max_ms": every[-1],
        "preempted": len(every) - len(alone),
        "p99_ms_not_preempted": alone[len(alone) * 99 // 100],
    }


def faults(folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    server = MlflowServer(folder / "server")
    planned = Faults(
        num_steps=arguments.points // NUM_VALUES,
        num_kills=NUM_KILLS,
        freeze_s=arguments.freeze,
        pause_s=0.01,
        seed=arguments.seed,
    )
    try:
        survived = survive_server(server, folder / "run", planned)
    finally:
        server.kill()
    well, frozen = spread(survived.well), spread(survived.frozen)
    print(
        f"server {survived.late_s:.0f} s late, killed {NUM_KILLS} times, frozen {arguments.freeze:.0f} s:"
        f" {survived.num_points:,} points, 0 lost, 0 doubled; {NUM_KILLS + 2} artifacts and one registered model there"
    )
    for name, figures in (("well", well), ("frozen", frozen)):
        print(
            f"log call of {NUM_VALUES} values, server {name}: median {figures['median_ms']:.3f} ms,"
            f" p99 {figures['p99_ms']:.3f} ms, max {figures['max_ms']:.3f} ms ({figures['calls']:,} calls);"
            f" p99 {figures['p99_ms_not_preempted']:.3f} ms without {figures['preempted']} that the kernel interrupted"
        )
    return {"points": survived.num_points, "lost": 0, "doubled": 0, "log_call_well": well, "log_call_frozen": frozen}


def trainer(folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    server = MlflowServer(folder / "server")
    try:
        server.start()
        server.wait()
        points = survive_trainer(server, folder / "run", arguments.points // NUM_VALUES, NUM_KILLS)
    finally:
        server.kill()
    print(f"trainer killed {NUM_KILLS} times, resumed, synced: {points:,} points, 0 lost, 0 doubled")
    return {"points": points, "lost": 0, "doubled": 0}


def wandb(folder: Path, _arguments: argparse.Namespace) -> dict[str, object]:
    """Import through the command; and again, which adds nothing."""
    logs = write_run(folder, WANDB_POINTS // NUM_VALUES, NUM_VALUES)
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    seconds = []
    for expected in (f"{WANDB_POINTS:,} points", "nothing new"):
        begun = time.perf_counter()
        done = subprocess.run(
            [str(PROGRAMS / "facefed"), "tracking", "import-wandb", str(logs), "--tracking-uri", uri],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        seconds.append(time.perf_counter() - begun)
        if done.returncode or expected not in done.stdout:
            raise RuntimeError(f"the import said: {done.stdout}{done.stderr}")
    print(
        f"wandb import of {WANDB_POINTS:,} points into a new sqlite database: {seconds[0]:.1f} s, the program's start"
        f" and the making of the database among them; again, which adds nothing: {seconds[1]:.1f} s"
    )
    return {"points": WANDB_POINTS, "seconds": seconds[0], "again_seconds": seconds[1]}


PARTS: dict[str, Callable[[Path, argparse.Namespace], dict[str, object]]] = {
    "faults": faults,
    "trainer": trainer,
    "wandb": wandb,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in PARTS:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--points", type=int, default=10_000)
    parser.add_argument("--freeze", type=float, default=30.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    go_silent()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # else the server and the scratch folder would stay
    wanted = [name for name in PARTS if getattr(arguments, name)] or list(PARTS)
    figures = {}
    for name in wanted:
        with tempfile.TemporaryDirectory() as scratch:
            figures[name] = PARTS[name](Path(scratch), arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
