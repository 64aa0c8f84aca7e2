"""Memory and time of a large model on its way: our processes of one federation beside a bare echo on stock Flower.

    python -m bench.wire_memory [--repeats 3] [--rounds 2] [--backbone vit_base] [--only ours|echo]

Either side has a server and two clients as processes of their own, plain text on loopback.  Ours trains and scores a
few small pictures (vit_base at 64 px); the echo sends one array of the same bytes back.  The sides take turns.

Memory is what a process holds of its own and in shared memory (RssAnon + RssShmem, looked at every 20 ms), less what
the same process holds at most in a federation of a model of no size ("libraries"), in models.  Seconds are those of
sending to and receiving from both clients at the server, CPU-seconds those of all processes of a kind; either for
100 MB of model and a round of training (after which ours also sends the last and the best model down).  Linux only.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Self

import psutil

from bench.our_run import newest_run
from bench.sides import ROOT, environment
from bench.workload import PROGRAMS
from common.system.processes import free_port

LOOK_EVERY_S, ENDED_WITHIN_S = 0.02, 900.0
ECHO = Path(__file__).parent / "peers" / "echo_app"
CLIENTS = ("north", "south")
# What a command line has of a process of each kind; ours and stock Flower's.
KINDS = {
    "clients.flower.supernode": "SuperNode", "clients.flower.trainer": "trainer",
    "server.flower.redelivery": "SuperLink", "flwr-serverapp": "ServerApp",
    "flower-superlink": "SuperLink", "flower-supernode": "SuperNode", "flwr-clientapp": "ClientApp",
}  # fmt: skip
SETTINGS = (
    "data.image_size=64", "model.width=1.0", "training.precision=float32", "training.memory_format=contiguous",
    "training.threads=1", "training.compile=off", "federation.local_epochs=1", "training.optimiser=sgd",
    "tracking.plots=none", "tracking.tensorboard=none", "federation.min_clients=2", "federation.test_every_rounds=100",
)  # fmt: skip
SMALL = ("model.backbone=cnn", "model.width=0.125")


def kind_of(process: psutil.Process) -> str:
    """Which of KINDS a process is, or ""."""
    words = " ".join(process.cmdline())
    return next((kind for mark, kind in KINDS.items() if mark in words and "multiprocessing" not in words), "")


def held_mib(pid: int) -> float:
    """What a process holds of its own and in shared memory now, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))) / 1024


class Watch:
    """Samples the processes below this one while the block lasts: by kind the peak of each process, and its CPU."""

    def __init__(self) -> None:
        self.peaks: dict[str, dict[int, float]] = defaultdict(dict)
        self.cpu_s: dict[str, dict[int, float]] = defaultdict(dict)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        known: dict[int, tuple[psutil.Process, str]] = {}
        me, looked = psutil.Process(), 0.0
        while not self._ended.wait(LOOK_EVERY_S):
            if time.monotonic() - looked > 0.5:
                looked = time.monotonic()
                for process in me.children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        if process.pid not in known or not known[process.pid][1]:
                            known[process.pid] = (process, kind_of(process))
            for pid, (process, kind) in list(known.items()):
                if kind:
                    with contextlib.suppress(psutil.Error, OSError, ValueError):
                        self.peaks[kind][pid] = max(self.peaks[kind].get(pid, 0.0), held_mib(pid))
                        times = process.cpu_times()
                        self.cpu_s[kind][pid] = times.user + times.system

    def figures(self) -> dict[str, float]:
        """By name: "SuperNode MiB", the largest of its kind; "SuperNode CPU-s", of all of its kind."""
        found = {f"{kind} MiB": max(own.values()) for kind, own in self.peaks.items()}
        return found | {f"{kind} CPU-s": sum(own.values()) for kind, own in self.cpu_s.items()}


def _federate(folder: Path, data: Path, rounds: int, settings: tuple[str, ...]) -> None:
    """One federation of ours in that folder; every process it starts has ended afterwards."""
    address, processes = f"127.0.0.1:{free_port()}", []
    flags = [part for item in (*SETTINGS, *settings) for part in ("--set", item)]

    def start(name: str, *command: str) -> None:
        with (folder / f"{name}.log").open("wb") as log:
            processes.append(
                subprocess.Popen(command, cwd=folder, env=environment(), stdout=log, stderr=subprocess.STDOUT)
            )

    try:
        server = [str(PROGRAMS / "flower-server"), "--address", address, "--rounds", str(rounds), "--no-mlflow"]
        start("server", *server, *flags)
        for name in CLIENTS:
            command = [str(PROGRAMS / "flower-client"), "--dataset", "celeba", "--data-dir", str(data), "--once"]
            start(name, *command, "--name", name, "--cache-dir", str(data.parent / "packs"), "--server", address)
        code = processes[0].wait(timeout=ENDED_WITHIN_S)
        if code:
            sys.exit(f"flower-server ended with {code}: {(folder / 'server.log').read_text()[-1000:]}")
        for process in processes[1:]:
            process.wait(timeout=60)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def _wire_seconds(run: Path) -> dict[str, float]:
    """The medians over rounds of the server's seconds, by phase."""
    values: dict[str, list[float]] = defaultdict(list)
    for line in (run / "spool.jsonl").read_bytes().splitlines():
        entry = json.loads(line)
        if "key" in entry and not entry["run"]:  # the server's own
            values[entry["key"]].append(entry["value"])
    found = {key: statistics.median(values[key]) for key in values if key.endswith("_seconds")}
    return {key.removeprefix("time/").removesuffix("_seconds"): value for key, value in found.items()}


def ours(place: Path, rounds: int, settings: tuple[str, ...]) -> dict[str, float]:
    """A federation of ours: memory and CPU by kind of process, and seconds."""
    with tempfile.TemporaryDirectory(dir=place) as name:
        with Watch() as watch:
            _federate(Path(name), place / "data", rounds, settings)
        return watch.figures() | _wire_seconds(newest_run(Path(name)))


def echo(place: Path, rounds: int, num_bytes: int) -> dict[str, float]:
    """The same of a bare echo on stock Flower."""
    from bench.peers.flower_deployment import run

    with tempfile.TemporaryDirectory(dir=place) as name:
        times = Path(name) / "times.jsonl"
        os.environ.update(environment(BENCH_TIMES=str(times), BENCH_BYTES=str(num_bytes), BENCH_ROUNDS=str(rounds)))
        with Watch() as watch:
            run(Path(name), ECHO)
        notes = [json.loads(line) for line in times.read_text().splitlines()]
    told = [note for note in notes if "round" in note]
    return watch.figures() | {part: statistics.median(note[part] for note in told) for part in ("send", "receive")}


def above(figures: dict[str, float], libraries: dict[str, float], *, mib: float, rounds: int) -> dict[str, float]:
    """Peaks in models above libraries; seconds and CPU-seconds for 100 MB of model and a round."""
    unit = mib * 2**20 / 1e8
    found = {}
    for name, value in figures.items():
        if name.endswith(" MiB"):
            found[name.replace(" MiB", ", models")] = (value - libraries.get(name, 0.0)) / mib
        elif name.endswith(" CPU-s"):
            found[name] = (value - libraries.get(name, 0.0)) / unit / rounds
        elif name in ("send", "receive"):
            found[f"{name}, s"] = value / unit
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--backbone", default="vit_base")
    parser.add_argument("--only", choices=("ours", "echo"))
    parser.add_argument("--bytes", type=int, default=344_238_920, help="of the model, for the echo")
    arguments = parser.parse_args()
    rounds, mib = arguments.rounds, arguments.bytes / 2**20
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        synth = [str(PROGRAMS / "facefed"), "data", "synth", "--layout", "celeba", "--people", "10", "--pictures", "6"]
        command = [*synth, "--out", str(place / "data")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=environment())
        sides: dict[str, tuple[Callable[[], dict[str, float]], Callable[[], dict[str, float]]]] = {
            "ours": (
                lambda: ours(place, rounds, SMALL),
                lambda: ours(place, rounds, (f"model.backbone={arguments.backbone}",)),
            ),
            "echo": (lambda: echo(place, rounds, 1000), lambda: echo(place, rounds, arguments.bytes)),
        }
        sides = {side: runs for side, runs in sides.items() if arguments.only in (None, side)}
        libraries = {side: small() for side, (small, _) in sides.items()}
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(arguments.repeats):
            for side, (_, large) in sides.items():
                runs[side].append(above(large(), libraries[side], mib=mib, rounds=rounds))
                print(side, {name: round(value, 2) for name, value in runs[side][-1].items()}, file=sys.stderr)
    report(runs)
    print(json.dumps({"libraries": libraries, "runs": runs}))


def report(runs: dict[str, list[dict[str, float]]]) -> None:
    """Medians of each side, with the smallest and the largest."""
    names = sorted({name for own in runs.values() for one in own for name in one})
    print(f"{'':24}" + "".join(f"{side:>22}" for side in runs))
    for name in names:
        cells = []
        for own in runs.values():
            values = sorted(one[name] for one in own if name in one)
            median = statistics.median(values) if values else None
            cells.append("-" if median is None else f"{median:.2f} ({values[0]:.2f}-{values[-1]:.2f})")
        print(f"{name:24}" + "".join(f"{cell:>22}" for cell in cells))


if __name__ == "__main__":
    main()
