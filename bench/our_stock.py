"""Workload W through `flwr run` of this checkout: a stock SuperLink and two stock SuperNodes, as Flower ships them.

    python -m bench.our_stock --workload FOLDER --rounds 3

Started as a program by bench.deployment; prints the run's figures as one JSON object. Runs in the current folder.
"""

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from bench.our_run import figures, newest_run
from bench.peers.flower_deployment import CONNECTION, ENDED_WITHIN_S, HEALTHY_WITHIN_S, healthy, until
from bench.workload import CLIENTS, SETTINGS, Workload
from common import config
from common.system.events import OUTCOME_FILE
from common.system.processes import free_port

ROOT = Path(__file__).parent.parent
PARTS = ("common", "server", "clients", "configs", "pyproject.toml", "README.md", "LICENSE")


def copy_app(folder: Path) -> Path:
    """The app as Flower bundles it: without what else lies in a checkout, which it would look through."""
    folder.mkdir()
    for name in PARTS:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    return folder


def run_config(rounds: int) -> str:
    values = dict(setting.split("=", 1) for setting in SETTINGS) | {"federation.rounds": str(rounds)}
    return " ".join(f"{name}={json.dumps(config.value_of(name, text))}" for name, text in values.items())


def federate(workload: Workload, rounds: int, aside: Path) -> None:
    """One run; every process it starts has ended afterwards.  aside: for Flower's own files, of the run."""
    port = free_port()
    environment = os.environ | {"FLWR_HOME": str(aside / "home")}
    (aside / "home").mkdir()
    connection = f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (aside / "home" / "config.toml").write_text(connection)
    processes: list[subprocess.Popen] = []

    def start(*command: str, **extra: str) -> None:
        with (aside / f"{len(processes)}.log").open("wb") as log:
            processes.append(subprocess.Popen(command, env=environment | extra, stdout=log, stderr=subprocess.STDOUT))

    def server_is_up() -> bool:
        return healthy(port)

    def run_ended() -> bool:
        return any(Path("runs").glob(f"*/{OUTCOME_FILE}"))

    try:
        address = ("--host", "127.0.0.1", "--port", str(port))
        start("flower-superlink", "--insecure", *address, "--disable-runtime-dependency-installation")
        until(server_is_up, HEALTHY_WITHIN_S, processes)
        for client in CLIENTS:
            site = {"dataset": "folder", "name": client, "data-dir": str(workload.pictures(client))}
            given = " ".join(f'{key}="{value}"' for key, value in (site | {"cache-dir": str(workload.cache)}).items())
            link = ("--superlink", f"127.0.0.1:{port}", "--port", str(free_port()))
            start("flower-supernode", "--insecure", *link, "--node-config", given, BENCH_PART="client")
        app = copy_app(aside / "facefed")
        submit = ["flwr", "run", str(app), CONNECTION, "--run-config", run_config(rounds)]
        subprocess.run(submit, env=environment, stdout=subprocess.DEVNULL, check=True)
        until(run_ended, ENDED_WITHIN_S, processes)
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as aside:
        federate(Workload(folder=arguments.workload), arguments.rounds, Path(aside))
    print(json.dumps(figures(newest_run(Path()))))


if __name__ == "__main__":
    main()
