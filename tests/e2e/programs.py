"""Starts FaceFed's programs as a user does: by name, from the environment's bin folder, in a folder of their own."""

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from common import config
from common.protocol.parameters import buffer_sha256, flatten
from common.system.checkpoints import read_tensors

BIN = Path(sys.executable).parent
MARK = "FACEFED_E2E_MARK"  # inherited by every child, whatever its session: so orphans are found
DONE_WITHIN_S = 600.0  # a busy machine may take several times as long as an idle one


def free_port() -> int:
    """A loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def port_is_free(port: int) -> bool:
    """Whether a server can listen there at once."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    code: int
    out: str
    err: str

    def __repr__(self) -> str:
        """In full, unlike a dataclass's own: pytest cuts long lines, and the reason is at the end."""
        return f"Ended with {self.code}\n--- out\n{self.out}\n--- err\n{self.err}"

    @property
    def error_lines(self) -> list[str]:
        """The lines on standard error."""
        return self.err.splitlines()


class Program:
    """A started program, in a process group of its own, with its output in files."""

    def __init__(
        self,
        name: str,
        *arguments: object,
        cwd: Path,
        wrapper: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """wrapper: a command that becomes the program, such as `nsenter`.  environment: instead of this process's."""
        self.cwd, self._mark = cwd, uuid.uuid4().hex
        self.log = cwd / f"{name}-{self._mark[:6]}"
        self._out, self._err = self.log.with_suffix(".out"), self.log.with_suffix(".err")
        environment = self.environment_of(os.environ if environment is None else environment)
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [*wrapper, str(BIN / name), *map(str, arguments)],
                cwd=cwd,
                env=environment | {MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @staticmethod
    def environment_of(inherited: Mapping[str, str]) -> dict[str, str]:
        """A user's, of whom MLflow and Flower know nothing yet."""
        return {k: v for k, v in inherited.items() if not k.startswith(("MLFLOW_TRACKING", "FLWR_HOME"))}

    @property
    def out(self) -> str:
        """What it printed so far."""
        return self._out.read_text(encoding="utf-8")

    def wait_for(self, text: str, timeout_s: float = DONE_WITHIN_S) -> None:
        """Until it prints `text` (a regular expression)."""
        deadline = time.monotonic() + timeout_s
        while not re.search(text, self.out):
            assert self.process.poll() is None, f"ended before {text!r}:\n{self.out}\n{self._err.read_text()}"
            assert time.monotonic() < deadline, f"no {text!r} within {timeout_s} s:\n{self.out}"
            time.sleep(0.05)

    def ended(self, timeout_s: float = DONE_WITHIN_S) -> Ended:
        """Wait until it ends."""
        try:
            code = self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s:\n{self.out}\n{self._err.read_text()}") from None
        return Ended(code, self.out, self._err.read_text(encoding="utf-8"))

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal to it alone, or as a terminal and `timeout` do to its whole process group."""
        (os.killpg if group else os.kill)(self.process.pid, number)

    def processes(self) -> list[psutil.Process]:
        """It and everything it started, alive now, even what left its group or lost its parent."""
        found = []
        for process in psutil.process_iter():
            try:
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and process.environ().get(MARK) == self._mark:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def left(self, within_s: float = 3.0) -> list[str]:
        """The processes that it started and that do not end within this time."""
        deadline = time.monotonic() + within_s
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [str(process) for process in left]

    def assert_nothing_left(self, within_s: float = 3.0) -> None:
        """No process that it started lives on."""
        assert not self.left(within_s)

    def kill(self) -> None:
        """End all of it, whatever state it is in."""
        for process in self.processes():
            try:
                process.kill()
            except psutil.Error:
                continue
        self.process.wait()


class Programs:
    """Programs of one folder, all ended at the end."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd
        self.started: list[Program] = []  # in their order

    def start(self, name: str, *arguments: object, **how: object) -> Program:
        """Start a program in the folder; how: `Program`'s wrapper and environment."""
        program = Program(name, *arguments, cwd=self.cwd, **how)
        self.started.append(program)
        return program

    def run(self, name: str, *arguments: object, timeout_s: float = DONE_WITHIN_S) -> Ended:
        """Start a program and wait for its end."""
        return self.start(name, *arguments).ended(timeout_s)

    def close(self) -> None:
        """End what still runs."""
        for program in self.started:
            program.kill()


def run_folder(cwd: Path, out: str = "runs") -> Path:
    """The newest run of a folder."""
    return max(path for path in (cwd / out).iterdir() if path.name != "clients")


def sha_of(out: str) -> str:
    """The SHA-256 of the model that a run came to, from what its server or simulation printed."""
    found = re.search(r"model SHA-256 ([0-9a-f]{64})", out)
    assert found, out
    return found[1]


def mlflow_status(cwd: Path) -> dict[str, str]:
    """Run name -> status, from the database itself."""
    with sqlite3.connect(cwd / "mlflow.db") as database:
        rows = dict(database.execute("select name, status from runs"))
    database.close()
    return rows


def state_of(run: Path) -> dict:
    """The checkpoint's state file, after a look whether what it names is whole and has the digest it says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Flower's typer asks click for a name that click will drop
        from server.app import initial_model

    state = json.loads((run / "checkpoints" / "state.json").read_text())
    path = run / "checkpoints" / state["model"]
    tensors, _ = read_tensors(path)
    _, manifest = initial_model(config.load(run / "config.toml"))  # the names' order
    assert manifest.digest == state["manifest"]
    assert buffer_sha256(flatten(tensors, manifest)) == state["sha256"]
    return state


def assert_one_line(ended: Ended, program: str, *fragments: str, code: int = 2) -> None:
    """It ended with `code` and exactly one line of its own on standard error, which holds the fragments."""
    assert ended.code == code, (ended.code, ended.out, ended.err)
    assert len(ended.error_lines) == 1, ended.err
    assert ended.err.startswith(f"{program}: "), ended.err
    for fragment in fragments:
        assert fragment in ended.err, (fragment, ended.err)


STOPPED = {"INT": signal.SIGINT, "TERM": signal.SIGTERM}
