"""Workload W through our own separate processes: `flower-server` and two `flower-client --once`, as a user starts them.

    python -m bench.our_deployment --workload FOLDER --rounds 3 [--codec int8] [--load tiny]

Started as a program by bench.deployment; prints the run's figures as one JSON object. Runs in the current folder.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from bench.our_run import figures, newest_run
from bench.workload import CLIENTS, LOADS, PROGRAMS, Workload, settings_arguments
from common.system.processes import free_port

ENDED_WITHIN_S = 800.0


def federate(workload: Workload, rounds: int, codec: str, load: str) -> None:
    """One run; every process it starts has ended afterwards."""
    address = f"127.0.0.1:{free_port()}"
    codecs = [f"federation.{way}_codec={codec}" for way in ("upload", "download")] if codec != "float32" else []
    processes: dict[str, subprocess.Popen] = {}

    def start(name: str, *command: str, **extra: str) -> None:
        with Path(f"{name}.log").open("wb") as log:
            processes[name] = subprocess.Popen(command, env=os.environ | extra, stdout=log, stderr=subprocess.STDOUT)

    try:
        server = [str(PROGRAMS / "flower-server"), "--address", address, "--rounds", str(rounds)]
        flags = [part for setting in codecs for part in ("--set", setting)]
        start("server", *server, *settings_arguments(load), *flags)
        for client in CLIENTS:
            command = [str(PROGRAMS / "flower-client"), "--dataset", "folder", "--once", "--name", client]
            places = ["--data-dir", str(workload.pictures(client)), "--cache-dir", str(workload.cache)]
            start(client, *command, *places, "--server", address, BENCH_PART="client")
        code = processes["server"].wait(timeout=ENDED_WITHIN_S)
        if code:
            sys.exit(f"flower-server ended with {code}: {Path('server.log').read_text()[-500:]}")
        for client in CLIENTS:
            processes[client].wait(timeout=60)
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--codec", default="float32")
    parser.add_argument("--load", choices=LOADS, default="workload", help="whose settings")
    arguments = parser.parse_args()
    federate(Workload(folder=arguments.workload), arguments.rounds, arguments.codec, arguments.load)
    print(json.dumps(figures(newest_run(Path()))))


if __name__ == "__main__":
    main()
