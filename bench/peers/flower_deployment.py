"""The stock app on stock Flower with separate processes: a SuperLink, two SuperNodes, `flwr run`.

    BENCH_TIMES=FILE BENCH_ARRAYS=FOLDER BENCH_ROUNDS=2 python -m bench.peers.flower_deployment

Each SuperNode gets one thread: with both cores each, two clients on two cores would do half the work.
"""

import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.system.processes import free_port

APP = Path(__file__).parent / "flower_app"
NUM_CLIENTS = 2
CONNECTION = "bench"
HEALTHY_WITHIN_S, ENDED_WITHIN_S, LOOK_EVERY_S = 90.0, 800.0, 0.2


def healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except OSError:
        return False
    finally:
        connection.close()


def until(look, within_s: float, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + within_s
    while not look():
        if any(process.poll() is not None for process in processes):
            sys.exit("one of Flower's programs ended")
        if time.monotonic() > deadline:
            sys.exit(f"waited for {look.__name__} for more than {within_s:g} s")
        time.sleep(LOOK_EVERY_S)


def federate(folder: Path, app: Path = APP) -> None:
    """One run of a stock app; every process it starts has ended afterwards."""
    port, times = free_port(), Path(os.environ["BENCH_TIMES"])
    environment = os.environ | {"FLWR_HOME": str(folder / "home")}
    (folder / "home").mkdir()
    connection = f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (folder / "home" / "config.toml").write_text(connection)
    shutil.copytree(app, folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    processes: list[subprocess.Popen] = []

    def start(*command: str, **extra: str) -> None:
        with (folder / f"{len(processes)}.log").open("wb") as log:
            processes.append(
                subprocess.Popen(command, cwd=folder, env=environment | extra, stdout=log, stderr=subprocess.STDOUT)
            )

    def server_is_up() -> bool:
        return healthy(port)

    def run_ended() -> bool:
        return times.exists() and '"ended"' in times.read_text()

    try:
        address = ("--host", "127.0.0.1", "--port", str(port))
        start("flower-superlink", "--insecure", *address, "--disable-runtime-dependency-installation")
        until(server_is_up, HEALTHY_WITHIN_S, processes)
        for number in range(NUM_CLIENTS):
            link = ("--superlink", f"127.0.0.1:{port}", "--port", str(free_port()))
            node = ("--node-config", f"partition-id={number}")
            start("flower-supernode", "--insecure", *link, *node, BENCH_PART="client", OMP_NUM_THREADS="1")
        submit = ["flwr", "run", str(folder / "app"), CONNECTION]
        subprocess.run(submit, env=environment, cwd=folder, stdout=subprocess.DEVNULL, check=True)
        until(run_ended, ENDED_WITHIN_S, processes)
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        federate(Path(folder))


if __name__ == "__main__":
    main()
