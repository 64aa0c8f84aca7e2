"""Peak memory of the server with 2 and with 16 real client processes, ResNet-18 (45 MB a reply).

    python -m bench.server_memory [--clients 2 16] [--rounds 2]

Reports the high-water mark of the ServerApp process, and the largest sum over the server's whole process tree
(proportional set size, so that shared pages count once), with Flower's state in a database file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from common.system.processes import free_port

PROGRAMS = Path(sys.executable).parent
MIB = 2**20
SETTINGS = (
    "data.image_size=32", "training.precision=float32", "training.memory_format=contiguous", "training.threads=1",
    "federation.local_epochs=1", "federation.round_timeout_s=900", "tracking.plots=none",
)  # fmt: skip


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=log.open("wb"), stderr=subprocess.STDOUT)


def high_water_mib(process: psutil.Process) -> float:
    """VmHWM of a process in MiB."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


def watch(server: subprocess.Popen[bytes]) -> dict[str, float]:
    """Follow the server's tree until it ends; peaks in MiB."""
    peaks = {"serverapp_mib": 0.0, "tree_mib": 0.0}
    root = psutil.Process(server.pid)
    while server.poll() is None:
        total = 0.0
        try:
            for process in [root, *root.children(recursive=True)]:
                total += process.memory_full_info().pss / MIB
                if "flwr-serverapp" in " ".join(process.cmdline()):
                    peaks["serverapp_mib"] = max(peaks["serverapp_mib"], high_water_mib(process))
        except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError, ProcessLookupError):
            pass
        peaks["tree_mib"] = max(peaks["tree_mib"], total)
        time.sleep(0.1)
    return peaks


def measure(num_clients: int, rounds: int, folder: Path) -> dict[str, float]:
    address = f"127.0.0.1:{free_port()}"
    place = folder / str(num_clients)
    place.mkdir()
    flags = [part for item in SETTINGS for part in ("--set", item)]
    server = start(
        [
            str(PROGRAMS / "flower-server"), "--address", address, "--min-clients", str(num_clients),
            "--rounds", str(rounds), "--no-mlflow", "--join-timeout", "900", "--out", str(place / "runs"),
            "--database", str(place / "state.db"), *flags,
        ],
        place / "server.log",
    )  # fmt: skip
    clients = [
        start(
            [
                str(PROGRAMS / "flower-client"), "--dataset", "celeba", "--data-dir", str(folder / "data"),
                "--name", f"c{number:02d}", "--server", address, "--once", "--device", "cpu",
                "--state-dir", str(place / f"c{number:02d}"), "--cache-dir", str(folder / "packs"),
            ],
            place / f"client-{number:02d}.log",
        )
        for number in range(num_clients)
    ]  # fmt: skip
    try:
        peaks = watch(server)
        if server.returncode != 0:
            sys.exit(f"the server ended with {server.returncode}; see {place}/server.log")
    finally:
        for process in [server, *clients]:
            process.terminate()
        for process in [server, *clients]:
            process.wait()
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synth = [str(PROGRAMS / "facefed"), "data", "synth", "--layout", "celeba", "--people", "10", "--pictures", "6"]
        subprocess.run([*synth, "--out", str(folder / "data")], check=True, stdout=subprocess.DEVNULL)
        results = {count: measure(count, arguments.rounds, folder) for count in arguments.clients}
    first = results[arguments.clients[0]]
    print(f"{'clients':>8}  {'ServerApp MiB':>14}  {'ratio':>6}  {'server tree MiB':>16}")
    for count, peaks in results.items():
        ratio = peaks["serverapp_mib"] / first["serverapp_mib"]
        print(f"{count:8d}  {peaks['serverapp_mib']:14.0f}  {ratio:6.2f}  {peaks['tree_mib']:16.0f}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
