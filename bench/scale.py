"""Many virtual clients, 50 a round, ResNet-18 (45 MB): memory and seconds of a round against few clients and training.

    python -m bench.scale [--clients 50 100 1000] [--per-round 50] [--rounds 3] [--size 64] [--data DIR] [--json FILE]

Each count is one `flower-simulation` over made-up pictures, four training people of eight pictures for each client.
The memory is the process tree's proportional set size (shared pages count once), sampled each second. The work is
what the clients themselves spent on evaluating and training, divided by the actors: a round cannot be shorter.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from common.metrics.names import ROUND_SECONDS, WORK_SECONDS
from common.system.events import EventReader

PROGRAM = Path(sys.executable).parent / "flower-simulation"
PEOPLE_EACH, PICTURES_EACH = 4, 8
FRACTION_TRAINED = 0.68  # of the people; the others are for the open sets
LOOK_EVERY_S = 1.0
CONFIG = """
[data]
image_size = {size}
alignment = "resize"
max_people = {people}
[model]
backbone = "{backbone}"
[training]
precision = "float32"
memory_format = "channels_last"
threads = 1
[federation]
rounds = {rounds}
local_epochs = {epochs}
clients_per_round = {per_round}
round_timeout_s = 36000
[tracking]
enabled = false
tensorboard = "none"
plots = "none"
system_metrics_s = "off"
"""


def people_for(num_clients: int) -> int:
    return int(num_clients * PEOPLE_EACH / FRACTION_TRAINED) + 12


def draw(folder: Path, num_people: int, size: int) -> None:
    """Blurred noise around one base for each person, as JPEG."""
    random = np.random.default_rng(1)
    for person in range(num_people):
        (folder / f"p{person:05d}").mkdir(parents=True)
        base = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(base.resize((size, size), Image.Resampling.BILINEAR)).astype(np.int16)
        for number in range(PICTURES_EACH):
            noisy = smooth + random.integers(-30, 31, (size, size, 1))
            picture = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
            picture.save(folder / f"p{person:05d}" / f"{number}.jpg", quality=85)


class Memory:
    """Samples a process tree until it is told to stop."""

    def __init__(self, pid: int) -> None:
        self.peaks = {"all": 0.0, "server": 0.0, "actor": 0.0}
        self.others_cores: list[float] = []
        self._pid, self._done = pid, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def stop(self) -> dict[str, float]:
        self._done.set()
        self._thread.join()
        return {name: round(mib) for name, mib in self.peaks.items()}

    def _sample(self) -> None:
        root = psutil.Process(self._pid)
        while not self._done.wait(LOOK_EVERY_S):
            try:
                tree = [root, *root.children(recursive=True)]
            except psutil.Error:
                return
            total = 0.0
            for process in tree:
                mib = pss_mib(process.pid)
                total += mib
                if process.pid == self._pid:
                    self.peaks["server"] = max(self.peaks["server"], mib)
                elif is_actor(process):
                    self.peaks["actor"] = max(self.peaks["actor"], mib)
            self.peaks["all"] = max(self.peaks["all"], total)


def pss_mib(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    except (OSError, StopIteration, ValueError):
        return 0.0


def is_actor(process: psutil.Process) -> bool:
    try:
        return process.name().startswith("ray::ClientApp")
    except psutil.Error:
        return False


def simulate(count: int, data: Path, folder: Path, options: argparse.Namespace) -> dict:
    folder.mkdir(parents=True)
    config = folder / "scale.toml"
    people = people_for(count)
    config.write_text(CONFIG.format(people=people, size=options.size, rounds=options.rounds, epochs=options.epochs,
                                    backbone=options.backbone, per_round=min(options.per_round, count)))  # fmt: skip
    command = [str(PROGRAM), "--config", config, "--client", f"noise:folder={data}", "--clients", str(count),
               "--actors", str(options.actors), "--cache-dir", folder.parent / "packs",
               "--device", options.device]  # fmt: skip
    started = time.time()
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
        memory = Memory(process.pid)
        code = wait_for(process, folder, options)
    peaks = memory.stop()
    if code:
        raise SystemExit(f"{count} clients: exit code {code}: {(folder / 'output').read_text()[-2000:]}")
    return {"clients": count, "seconds": time.time() - started, "peak_mib": peaks, **results(folder, started, options)}


def wait_for(process: subprocess.Popen, folder: Path, options: argparse.Namespace) -> int:
    """Until its end, or until all rounds are told, when it is ended."""
    while process.poll() is None:
        time.sleep(0.5)
        told = [event for event in events_of(folder) if event["kind"] == "round"]
        if len(told) == options.rounds and not options.to_the_end:
            process.send_signal(signal.SIGINT)
            process.wait()
            return 0
    return process.returncode


def run_folder(folder: Path) -> Path | None:
    runs = [path for path in folder.glob("runs/*") if path.name != "clients"]
    return max(runs, default=None)


def events_of(folder: Path) -> list[dict]:
    run = run_folder(folder)
    return [] if run is None else list(EventReader(run).new_events())


def results(folder: Path, started: float, options: argparse.Namespace) -> dict:
    events, by_step = events_of(folder), {}
    for line in (run_folder(folder) / "spool.jsonl").read_text().splitlines():
        point = json.loads(line)
        if point.get("key", "").endswith("_seconds"):
            by_step.setdefault(point["step"], {})[point["key"]] = point["value"]
    rows = [row for step, row in sorted(by_step.items()) if ROUND_SECONDS in row and step > 1]  # 1 starts the actors
    work = [row[WORK_SECONDS] / options.actors for row in rows]
    seconds = [row[ROUND_SECONDS] for row in rows]
    kept = [path.stat().st_size for path in (folder / "runs" / "clients").rglob("*") if path.is_file()]
    last = max(event["time"] for event in events if event["kind"] == "round")
    joined = next(event["time"] for event in events if event["kind"] == "members") - started
    return {
        "to_all_joined_s": round(joined, 1),
        "round_s": [round(value, 2) for value in seconds],
        "work_s": [round(value, 2) for value in work],
        "ratio": round(sum(seconds) / sum(work), 3),
        "phases": [{key: round(value, 3) for key, value in row.items()} for row in rows],
        "after_last_round_s": round(events[-1]["time"] - last, 1),
        "files_of_clients": len(kept),
        "mib_of_clients": round(sum(kept) / 2**20, 1),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[50, 100, 1000])
    parser.add_argument("--per-round", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--actors", type=int, default=psutil.cpu_count())
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--to-the-end", action="store_true", help="with the final evaluation of all clients")
    parser.add_argument("--data", type=Path, help="a folder of people made before; default: drawn anew")
    parser.add_argument("--json", type=Path, help="where the figures go too")
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        data = (options.data or Path(temporary) / "data").resolve()
        if not data.exists():
            draw(data, people_for(max(options.clients)), options.size)
        for count in options.clients:
            found.append(simulate(count, data, Path(temporary) / str(count), options))
            print(json.dumps(found[-1]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
