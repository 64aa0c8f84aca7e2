"""How each side of workload W is run: a program, its environment, and what its figures are called."""

import importlib.util
import json
import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

from bench.comparison import Figures, NotInstalled, Place
from bench.our_run import FIRST_STEADY, figures, newest_run
from bench.watch import run_side
from bench.workload import CLIENTS, PROGRAMS, Workload, draw, prepare, settings_arguments

ROOT = Path(__file__).parent.parent
SILENT = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def environment(**extra: str) -> dict[str, str]:
    """Ours, with this checkout first on the import path of every process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MLFLOW_TRACKING"))}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    programs = f"{PROGRAMS}{os.pathsep}{os.environ.get('PATH', '')}"  # peers start theirs by bare name
    return kept | SILENT | {"PYTHONPATH": os.pathsep.join(paths), "PATH": programs} | extra


def workload_of(place: Place) -> Workload:
    return prepare(place.scratch)


def describe_workload(place: Place) -> str:
    """Make W's pictures; says how many each side gets."""
    workload = workload_of(place)
    used = house(place)  # the first run on a machine measures precisions, makes the packs and MLflow's tables: once
    if not (used / "mlflow.db").exists():
        our_simulation(place, rounds=1)
    return f"each client: {workload.counts()}; our packs, precision trial and MLflow's tables exist beforehand"


def house(place: Place) -> Path:
    """The folder in which our programs run, with their MLflow."""
    folder = place.scratch.resolve() / "ours"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _from_ends(found: Figures, ends: dict[int, float]) -> Figures:
    """Adds what is worked out from when rounds ended."""
    steady = [step for step in sorted(ends) if step >= FIRST_STEADY]
    seconds = [ends[step] - ends[step - 1] for step in steady]
    return found | {"round_seconds": seconds, "to_round_1_seconds": ends[1] - found["started"]}


def plain_loop(place: Place, *, rounds: int, network: str = "ours") -> Figures:
    workload = workload_of(place)
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder) / "times.jsonl"
        command = [sys.executable, "-m", "bench.peers.plain_loop", "--rounds", str(rounds), "--network", network]
        arrays = [str(workload.arrays(client)) for client in CLIENTS]
        command += ["--threads", str(len(os.sched_getaffinity(0))), "--times", str(times)]
        found = run_side([*command, *arrays], cwd=ROOT, environment=environment())
        notes = _notes(times)
    return _from_ends(found, {note["round"]: note["time"] for note in notes})


def _notes(times: Path) -> list[dict]:
    return [json.loads(line) for line in times.read_text().splitlines()]


def _stock(place: Place, program: str, rounds: int) -> Figures:
    """Stock Flower; its overhead is what a round has beyond the slowest client's training and scoring."""
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder) / "times.jsonl"
        variables = {"BENCH_TIMES": str(times), "BENCH_ARRAYS": str(workload_of(place).folder)}
        variables |= {"BENCH_ROUNDS": str(rounds), "FLWR_HOME": str(Path(folder) / "flwr")}
        # Without a token any account of this machine runs code as ours while a simulation lasts.
        variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        command = [sys.executable, "-m", f"bench.peers.{program}"]
        found = run_side(command, cwd=Path(folder), environment=environment(**variables))
        notes = _notes(times)
    ends = {note["round"]: note["time"] for note in notes if "round" in note}
    overheads = []
    for step in [step for step in sorted(ends) if step >= FIRST_STEADY]:
        within = [note for note in notes if "kind" in note and ends[step - 1] < note["time"] <= ends[step]]
        work = sum(
            max((note["seconds"] for note in within if note["kind"] == kind), default=0.0)
            for kind in ("train", "evaluate")
        )
        overheads.append(ends[step] - ends[step - 1] - work)
    return _from_ends(found, ends) | {"overhead_seconds": overheads, "torch_per_client": found["torch_processes"] / 2}


def stock_simulation(place: Place, *, rounds: int) -> Figures:
    return _stock(place, "flower_simulation", rounds)


def stock_deployment(place: Place, *, rounds: int) -> Figures:
    return _stock(place, "flower_deployment", rounds)


def our_simulation(place: Place, *, rounds: int, load: str = "workload") -> Figures:
    """`flower-simulation` as a user runs it: MLflow and pictures on.  load: of bench.workload.LOADS."""
    workload, folder = draw(place.scratch, load), house(place)
    data = [part for client in CLIENTS for part in ("--client", f"{client}:folder={workload.pictures(client)}")]
    command = [str(PROGRAMS / "flower-simulation"), *data, "--cache-dir", str(workload.cache)]
    command += ["--rounds", str(rounds), *settings_arguments(load)]
    shutil.rmtree(folder / "runs", ignore_errors=True)
    found = run_side(command, cwd=folder, environment=environment())
    found |= figures(newest_run(folder))
    return found | {"to_round_1_seconds": found["round_1_ended"] - found["started"]}


def our_deployment(place: Place, *, rounds: int, codec: str, load: str = "workload") -> Figures:
    workload, folder = draw(place.scratch, load), house(place)
    shutil.rmtree(folder / "runs", ignore_errors=True)
    shutil.rmtree(folder / ".facefed", ignore_errors=True)
    command = [sys.executable, "-m", "bench.our_deployment", "--workload", str(workload.folder)]
    command += ["--rounds", str(rounds), "--codec", codec, "--load", load]
    found = run_side(command, cwd=folder, environment=environment())
    later = {"to_round_1_seconds": found["round_1_ended"] - found["started"]}
    return found | later | {"torch_per_client": found["torch_processes"] / 2}


def our_stock(place: Place, *, rounds: int) -> Figures:
    """Our app on stock Flower, by `flwr run`."""
    workload, folder = workload_of(place), house(place)
    shutil.rmtree(folder / "runs", ignore_errors=True)
    shutil.rmtree(folder / ".facefed", ignore_errors=True)
    command = [sys.executable, "-m", "bench.our_stock", "--workload", str(workload.folder), "--rounds", str(rounds)]
    found = run_side(command, cwd=folder, environment=environment())
    later = {"to_round_1_seconds": found["round_1_ended"] - found["started"]}
    return found | later | {"torch_per_client": found["torch_processes"] / 2}


def nvflare_simulation(place: Place, *, rounds: int) -> Figures:
    if importlib.util.find_spec("nvflare") is None:
        raise NotInstalled("pip install nvflare pyhocon, or put it on PYTHONPATH")
    return _stock(place, "nvflare_simulation", rounds)
