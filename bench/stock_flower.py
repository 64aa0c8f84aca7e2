"""A federation on Flower's own programs: a SuperLink, its SuperNodes and `flwr run`, started, waited for and ended."""

import http.client
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.system.processes import free_port

CONNECTION = "bench"
HEALTHY_WITHIN_S, ENDED_WITHIN_S, LOOK_EVERY_S = 90.0, 800.0, 0.2


@dataclass(frozen=True)
class Node:
    """A SuperNode: its `--node-config`, and what its environment has beside ours."""

    config: str
    environment: Mapping[str, str] = field(default_factory=dict)


def healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except OSError:
        return False
    finally:
        connection.close()


def until(what: str, look: Callable[[], bool], within_s: float, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + within_s
    while not look():
        if any(process.poll() is not None for process in processes):
            sys.exit("one of Flower's programs ended")
        if time.monotonic() > deadline:
            sys.exit(f"waited for {what} for more than {within_s:g} s")
        time.sleep(LOOK_EVERY_S)


def federate(
    app: Path, aside: Path, nodes: Sequence[Node], has_ended: Callable[[], bool], *, run_config: str = "", cwd: Path
) -> None:
    """One run of an app; every process that it starts has ended afterwards.

    app: its folder.  aside: for Flower's own files of the run.  has_ended: whether the run has.  cwd: of all programs.
    """
    port = free_port()
    home = aside / "home"
    home.mkdir()
    environment = os.environ | {"FLWR_HOME": str(home)}
    connection = f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (home / "config.toml").write_text(connection)
    processes: list[subprocess.Popen] = []

    def start(*command: str, **extra: str) -> None:
        with (aside / f"{len(processes)}.log").open("wb") as log:
            processes.append(
                subprocess.Popen(command, cwd=cwd, env=environment | extra, stdout=log, stderr=subprocess.STDOUT)
            )

    try:
        address = ("--host", "127.0.0.1", "--port", str(port))
        start("flower-superlink", "--insecure", *address, "--disable-runtime-dependency-installation")
        until("the SuperLink", lambda: healthy(port), HEALTHY_WITHIN_S, processes)
        for node in nodes:
            link = ("--superlink", f"127.0.0.1:{port}", "--port", str(free_port()))
            start("flower-supernode", "--insecure", *link, "--node-config", node.config, **node.environment)
        submit = ["flwr", "run", str(app), CONNECTION, *(["--run-config", run_config] if run_config else [])]
        subprocess.run(submit, env=environment, cwd=cwd, stdout=subprocess.DEVNULL, check=True)
        until("the run's end", has_ended, ENDED_WITHIN_S, processes)
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait()
