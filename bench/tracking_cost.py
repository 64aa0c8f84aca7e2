"""What tracking costs a training: `facefed train local` with MLflow (a server by http, and sqlite) and without it.

    python -m bench.tracking_cost [--cycles 10] [--epochs 80] [--threads N] [--json FILE]

Each cycle trains off, http, off, sqlite, every second one in the other order: so each tracked training has one without
beside it, and so have these two each other, which is the noise. The data, the model (the tiny configuration of the
end-to-end tests), the seed and thus the work are the same in all. Seconds of training are from the first epoch's begin
to the record of the last, by the run's own record, with validation, checkpoints and log calls; start-up (imports,
reading the pack) and the end (test, registering models) are reported apart. The server runs on the same machine, and
its work is part of the cost. "off" is --no-mlflow: the local record and TensorBoard are written in all.
"""

import argparse
import json
import math
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.mlflow_server import MlflowServer
from common.metrics.names import EPOCH_SECONDS
from common.system.runtime import go_silent

PROGRAMS = Path(sys.executable).parent
ORDER = ("off", "http", "off again", "sqlite")
PAIRS = {"http / off": ("http", "off"), "sqlite / off": ("sqlite", "off again"), "off / off": ("off again", "off")}
NUM_DRAWS = 10_000
TINY = """\
[data]
image_size = 32

[model]
backbone = "cnn"
embedding_size = 32

[training]
precision = "float32"
memory_format = "contiguous"
batch_size = 8
threads = THREADS

[tracking]
plots = "none"
"""


@dataclass(frozen=True)
class Seconds:
    """Of one program, by the clock."""

    start_up: float  # until the first epoch begins
    training: float
    epochs: float  # of these the epochs' own: neither validation nor checkpoints nor log calls
    end: float  # after the last epoch


def trained(folder: Path, uri: str, epochs: int) -> Seconds:
    """Train once.  uri: empty for --no-mlflow."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [
            str(PROGRAMS / "facefed"), "train", "local", "--client", "celeba", "--data-dir", "data", "--config",
            "tiny.toml", "--cache-dir", "packs", "--epochs", str(epochs), "--out", out,
            *(["--tracking-uri", uri] if uri else ["--no-mlflow"]),
        ]  # fmt: skip
        begun = time.time()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        ended = time.time()
        if done.returncode or done.stderr:
            raise RuntimeError(f"the training said: {done.stdout}{done.stderr}")
        (run,) = Path(out).iterdir()
        own = [row[EPOCH_SECONDS] for row in json.loads((run / "metrics.json").read_text())["epochs"]]
        entries = [json.loads(line) for line in (run / "spool.jsonl").read_bytes().splitlines()]
    told = [entry["time_ms"] / 1000 for entry in entries if entry.get("key") == EPOCH_SECONDS]
    if len(told) != epochs or len(own) != epochs:
        raise RuntimeError(f"{len(told)} of {epochs} epochs are in the record")
    first = told[0] - own[0]  # and its validation, which start-up thereby has
    return Seconds(first - begun, told[-1] - first, sum(own), ended - told[-1])


def noise_of_medians(logs: list[float]) -> tuple[float, float]:
    """Where 95% of medians of as many off / off pairs lie, drawn from these with either side as the first."""
    draw = random.Random(0)  # noqa: S311 - statistics
    medians = sorted(
        statistics.median(draw.choice((-1, 1)) * one for one in draw.choices(logs, k=len(logs)))
        for _ in range(NUM_DRAWS)
    )
    return math.exp(medians[NUM_DRAWS // 40]), math.exp(medians[-NUM_DRAWS // 40])


def compared(runs: dict[str, list[Seconds]]) -> dict[str, object]:
    """Medians of the ratios, and the noise."""
    ratios = {
        name: [on.training / off.training for on, off in zip(runs[first], runs[second], strict=True)]
        for name, (first, second) in PAIRS.items()
    }
    low, high = noise_of_medians([math.log(ratio) for ratio in ratios["off / off"]])
    return {
        "ratios": ratios,
        "median_ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "noise_of_median": [low, high],
        "within_noise": {name: low <= statistics.median(values) <= high for name, values in ratios.items()},
    }


def show(runs: dict[str, list[Seconds]], figures: dict, arguments: argparse.Namespace) -> None:
    print(f"{arguments.epochs} epochs, {arguments.cycles} cycles; medians in seconds")
    print(f"{'':12}{'training':>10}{'epochs alone':>14}{'start-up':>10}{'end':>8}")
    for name, values in runs.items():
        parts = (
            statistics.median(getattr(one, part) for one in values)
            for part in ("training", "epochs", "start_up", "end")
        )
        print("{:12}{:10.2f}{:14.2f}{:10.2f}{:8.2f}".format(name, *parts))
    low, high = figures["noise_of_median"]
    for name, ratio in figures["median_ratio"].items():
        each = figures["ratios"][name]
        print(f"{name:12} median ratio {ratio:.4f}; pairs from {min(each):.3f} to {max(each):.3f}")
    print(f"noise: 95% of medians of {arguments.cycles} off / off pairs lie in {low:.4f} to {high:.4f}")


def measured(folder: Path, arguments: argparse.Namespace) -> dict[str, list[Seconds]]:
    (folder / "tiny.toml").write_text(TINY.replace("THREADS", arguments.threads))
    command = [
        str(PROGRAMS / "facefed"),
        "data",
        "synth",
        "--layout",
        "celeba",
        "--people",
        "12",
        "--pictures",
        "8",
        "--out",
        "data",
    ]
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=True)
    server = MlflowServer(folder / "server")
    server.start()
    try:
        server.wait()
        uris = {"off": "", "http": server.uri, "off again": "", "sqlite": f"sqlite:///{folder / 'mlflow.db'}"}
        for uri in set(uris.values()):  # makes the pack, the database's tables and the experiments
            trained(folder, uri, 1)
        runs: dict[str, list[Seconds]] = {name: [] for name in ORDER}
        for cycle in range(arguments.cycles):
            for name in ORDER if cycle % 2 == 0 else reversed(ORDER):
                runs[name].append(trained(folder, uris[name], arguments.epochs))
                print(f"  cycle {cycle + 1}: {name:10} {runs[name][-1].training:.2f} s", file=sys.stderr, flush=True)
    finally:
        server.kill()
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--threads", default='"auto"', help="of the training; by default all cores")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    go_silent()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # else the server and the scratch folder would stay
    with tempfile.TemporaryDirectory() as scratch:
        runs = measured(Path(scratch), arguments)
    figures = compared(runs)
    show(runs, figures, arguments)
    if arguments.json:
        each = {name: [asdict(one) for one in values] for name, values in runs.items()}
        arguments.json.write_text(json.dumps({**figures, "runs": each}, indent=2) + "\n")


if __name__ == "__main__":
    main()
