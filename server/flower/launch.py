"""`flower-server`: a SuperLink of our own, one run submitted to it, watched until it ends, and everything ended."""

import importlib.util
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from common import config
from common.errors import EXIT_FAILED, EXIT_INTERRUPTED, FaceFedError, InterruptedRun
from common.settings import Settings
from common.system.certs import ServerFiles
from common.system.events import OUTCOME_FILE, STOP_FILE
from common.system.files import read_json, write_bytes
from common.system.processes import child_environment, listen, require_free_port, start, stop
from common.system.runtime import facefed_version, git_commit
from server.flower.front_door import Door, FrontDoor
from server.flower.superlink import (
    ADMITTED,
    APP_ENDED,
    BUNDLE,
    REFUSAL,
    RUN_ENDED,
    RUN_ID,
    SUBMISSION,
    Superlink,
    forget_secrets,
    write_secret,
)

HEALTHY_WITHIN_S = 60.0
LOOK_EVERY_S = 0.2
STOP_WITHIN_S = 20.0
# The app bundle that Flower wants from whoever submits a run: the packages as they are installed here.
PACKAGES = ("common", "server", "clients")  # by name: the server's code never imports the clients'
PYPROJECT = """\
[project]
name = "facefed"
version = "{version}"
description = "Federated face recognition"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "facefed"
fab-include = ["server/**/*.py", "clients/**/*.py", "common/**/*.py"]

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "clients.app:app"

[tool.flwr.app.config]
settings = ""
run-folder = ""
git-commit = ""
"""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where clients connect to, and how."""

    host: str
    port: int
    database: Path | None = None  # of the SuperLink's state
    tls: ServerFiles | None = None
    front_door: bool = False  # nginx listens there, and the SuperLink on loopback


class Launch:
    """One run on a SuperLink of its own."""

    def __init__(self, settings: Settings, options: ServerOptions, run_folder: Path) -> None:
        """run_folder: where logs, the bundle and Flower's own files of this run are kept."""
        self._settings, self._options, self._folder = settings, options, run_folder
        self._stop = threading.Event()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._home = run_folder / "flwr"

    def request_stop(self) -> None:
        """Ask the run to end; safe in a signal handler."""
        self._stop.set()

    def run(self) -> dict[str, Any]:
        """Start, submit, watch, end; returns the outcome {"exit_code", "line"}.  Raises FaceFedError."""
        require_free_port(self._options.host, self._options.port, "--address")
        with ExitStack() as started:
            try:
                self._start(started)
                self._submit()
                return self._watch()
            except InterruptedRun as error:
                return {"exit_code": EXIT_INTERRUPTED, "line": str(error)}

    def _start(self, started: ExitStack) -> None:
        """The SuperLink and its SuperExec, and once all keys are admitted the front door."""
        log_path = self._folder / "logs" / "superlink.log"
        log_path.parent.mkdir(parents=True, exist_ok=True)
        output = started.enter_context(log_path.open("ab"))
        started.callback(forget_secrets, self._home)
        link = self._start_superlink(started, output)
        self._add(started, "the SuperExec", superexec_command(link), output)
        self._wait_until(lambda: self._lives() and link.answers(), "the SuperLink did not start")
        admitted = link.home / ADMITTED
        self._wait_until(lambda: self._lives() and admitted.exists(), "the sites' keys were not admitted")
        if self._options.front_door:
            options = self._options
            at = Door(host=options.host, port=options.port, superlink_port=link.port, tls=options.tls)
            door = started.enter_context(FrontDoor(at, self._folder / "logs" / "front_door"))
            self._running["nginx, the front door,"] = door.process
            self._wait_until(lambda: self._lives() and door.is_open(), "the front door did not open")

    def _start_superlink(self, started: ExitStack, output: IO[bytes]) -> Superlink:
        """With sockets that listen before its command line tells the port: no other account can take it first."""
        options = self._options
        host, port = ("127.0.0.1", 0) if options.front_door else (options.host, options.port)
        sockets = [started.enter_context(one) for one in listen(host, port, "--address")]
        port = sockets[0].getsockname()[1]
        link = Superlink(host=host, port=port, home=self._home, tls=options.tls, database=options.database)
        numbers = [one.fileno() for one in sockets]
        self._add(started, "the SuperLink", link.command(write_secret(link.home), numbers), output, numbers)
        for one in sockets:
            one.close()  # the SuperLink's now: whoever connects after its end is to hear that it has ended
        return link

    def _add(
        self, started: ExitStack, name: str, command: list[str], output: IO[bytes], sockets: Sequence[int] = ()
    ) -> None:
        process = start(command, environment=child_environment(self._home), output=output, sockets=sockets)
        started.callback(stop, process)
        self._running[name] = process

    def _dead(self) -> str:
        """What has ended of what should run, in a sentence, or nothing."""
        if (self._home / APP_ENDED).exists():
            return f"the ServerApp ended without a word (see {self._folder}/logs/superlink.log)."
        for name, process in self._running.items():
            if process.poll() is not None:
                return f"{name} ended with exit code {process.returncode} (see {self._folder}/logs)."
        return ""

    def _lives(self) -> bool:
        """Raises FaceFedError where something has ended."""
        if dead := self._dead():
            raise FaceFedError(dead)
        return True

    def _wait_until(self, look: Callable[[], bool], failure: str) -> None:
        deadline = time.monotonic() + HEALTHY_WITHIN_S
        while not look():
            if self._stop.wait(LOOK_EVERY_S):
                raise InterruptedRun("stopped by the user")
            if time.monotonic() > deadline:
                raise FaceFedError(f"{failure} within {HEALTHY_WITHIN_S:g} s (see {self._folder}/logs).")

    def _submit(self) -> None:
        """Have the SuperExec submit the bundle; it tells itself by that which run is ours."""
        write_bundle(self._home / BUNDLE, facefed_version())
        run_config = {
            "settings": config.to_json(self._settings),
            "run-folder": str(self._folder),
            "git-commit": git_commit(),
        }
        run_id, refusal = self._home / RUN_ID, self._home / REFUSAL
        write_bytes(self._home / SUBMISSION, json.dumps(run_config).encode(), 0o600)
        self._wait_until(lambda: self._lives() and (run_id.exists() or refusal.exists()), "Flower did not take the run")
        if refusal.exists():
            raise FaceFedError(f"Flower refused the run: {' '.join(refusal.read_text(encoding='utf-8').split())}")

    def _watch(self) -> dict[str, Any]:
        """Wait for the outcome file; Flower's own status tells of a ServerApp that died without writing one."""
        outcome, ended = self._folder / OUTCOME_FILE, self._home / RUN_ENDED
        give_up_at = float("inf")
        while not outcome.exists():
            if self._stop.wait(LOOK_EVERY_S) and give_up_at == float("inf"):
                (self._folder / STOP_FILE).touch()
                give_up_at = time.monotonic() + STOP_WITHIN_S
            if self._stop.is_set():
                time.sleep(LOOK_EVERY_S)
            if time.monotonic() > give_up_at:
                return {"exit_code": EXIT_INTERRUPTED, "line": "stopped by the user"}
            if (dead := self._dead()) and not outcome.exists():
                return {"exit_code": EXIT_FAILED, "line": dead}
            if ended.exists() and not outcome.exists():
                status = ended.read_text(encoding="utf-8")
                line = f"the ServerApp ended as {status!r} without a word (see {self._folder}/logs/superlink.log)."
                return {"exit_code": EXIT_FAILED, "line": line}
        return read_json(outcome)


def superexec_command(link: Superlink) -> list[str]:
    """How to start the SuperExec."""
    command = [sys.executable, "-P", "-m", "server.flower.superexec", str(link.home), link.address]
    return [*command, str(link.tls.ca), str(link.tls.clients)] if link.tls else command


def write_bundle(folder: Path, version: str) -> Path:
    """Copy the installed packages' Python files and a project file into `folder`; returns it.

    Submitting a copy, and not the current folder, works from a checkout and from an installed wheel alike, and leaves
    data, runs and pictures out by construction.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for name in PACKAGES:
        found = importlib.util.find_spec(name)
        source = Path(str(found.origin if found else "")).parent
        for path in sorted(source.rglob("*.py")):
            target = folder / source.name / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    plain = version if version != "unknown" else "0.0.0"
    (folder / "pyproject.toml").write_text(PYPROJECT.format(version=plain), encoding="utf-8")
    return folder
