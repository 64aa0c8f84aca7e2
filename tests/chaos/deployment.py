"""A federation of real processes, and the administrator who starts again what has ended, as systemd's Restart= does.

clients (2) -> relay -> flower-server (SuperLink, SuperExec, ServerApp) -> MLflow
"""

import signal
import time
import tomllib
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil

from bench.mlflow_server import MlflowServer
from tests.chaos.disks import SmallDisk
from tests.e2e.programs import Program, Programs, free_port
from tests.relay import Relay

CLIENTS = ("celeba", "vggface2")
RESTART_PAUSE_S = 1.0
GONE_WITHIN_S = 20.0  # what lost its parent; twice the grace that our programs give to what they end themselves
MOST_RESTARTS = 40  # of one run's server: a run that cannot go on shall not do so for ever
# A part of each process's command line.
SUPERLINK, SUPEREXEC, SERVERAPP = "server.flower.redelivery", "server.flower.superexec", "flwr-serverapp"
SUPERNODE, TRAINER = "clients.flower.supernode", "clients.flower.trainer"


@dataclass
class Seen:
    """What the administrator saw."""

    server_exits: list[tuple[int, str]] = field(default_factory=list)  # exit code and last line, in order
    client_exits: list[tuple[str, int]] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)


class Deployment:
    """Starts it all, tends it, and ends it."""

    def __init__(self, folder: Path, faces: Path, config: Path, migrated: Path, *, disks: bool) -> None:
        """folder: of this run, new.  faces: with data/NAME of each client.  migrated: a database with MLflow's tables.

        disks: whether the server's runs and the first client's state lie on small disks of their own.
        """
        self.folder, self._faces, self._config = folder, faces, config
        folder.mkdir(parents=True)
        self._programs, self._port = Programs(folder), free_port()
        self.relay = Relay(to=("127.0.0.1", self._port), delay_s=0.0)
        self.mlflow = MlflowServer(folder / "mlflow", migrated)
        self._mlflow_is_down = False
        self.disks = {name: SmallDisk(folder / name) for name in ("server", "client")} if disks else {}
        self.runs = folder / "server" / "runs"
        self.seen = Seen()
        self.server: Program | None = None
        self.clients: dict[str, Program] = {}
        self._at_end = ExitStack()

    def __enter__(self) -> Self:
        try:
            for disk in self.disks.values():
                self._at_end.enter_context(disk)
            self._at_end.callback(self._programs.close)
            self._at_end.enter_context(self.relay)
            self._at_end.callback(self.mlflow.kill)
            self.mlflow.start()
            for name in CLIENTS:
                self._start_client(name)
            self.mlflow.wait()
            self.start_server()
        except BaseException:
            self._at_end.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._at_end.close()

    # ---- what it is made of

    @property
    def run(self) -> Path | None:
        """The run's folder, once it is there."""
        return next(iter(self.runs.iterdir()), None) if self.runs.is_dir() else None

    def state_dir(self, client: str) -> Path:
        """A client's state folder."""
        return self.folder / ("client" if client == CLIENTS[0] else "state") / client

    def processes(self, part: str, client: str = "") -> list[psutil.Process]:
        """Those of the server, or of a client, whose command line has that part; all of them for ""."""
        program = self.clients.get(client) if client else self.server
        found = program.processes() if program else []
        return [process for process in found if part in _command_line(process)]

    def start_server(self) -> None:
        """Start it, or have it go on with its run."""
        run = self.run
        begins = ("--config", self._config, "--tracking-uri", self.mlflow.uri, "--out", self.runs)
        what = ("--resume", run) if run else begins
        self.server = self._programs.start("flower-server", "--address", f"127.0.0.1:{self._port}", *what)

    def _start_client(self, name: str) -> None:
        seed = tomllib.loads(self._config.read_text(encoding="utf-8"))["run"]["seed"]  # the undisturbed simulation's
        self.clients[name] = self._programs.start(
            "flower-client", "--dataset", name, "--data-dir", self._faces / "data" / name,
            "--server", self.relay.address, "--state-dir", self.state_dir(name), "--cache-dir", self._faces / "packs",
            "--site-seed", seed,
        )  # fmt: skip

    # ---- the administrator

    def tend(self) -> int | None:
        """Start again what has ended; the server's exit code once it is 0, None before.

        Raises AssertionError when the server cannot go on.
        """
        for name, client in list(self.clients.items()):
            if (code := client.process.poll()) is not None:
                self.seen.client_exits.append((name, code))
                self._expect_gone(client, name)
                self._start_client(name)
        code = self.server.process.poll()
        if code is None or code == 0:
            return code
        line = (self.server.ended().error_lines or [""])[-1]
        self.seen.server_exits.append((code, line))
        self._expect_gone(self.server, "flower-server")
        assert len(self.seen.server_exits) <= MOST_RESTARTS, self.seen.server_exits[-3:]
        time.sleep(RESTART_PAUSE_S)
        self.start_server()
        return None

    def _expect_gone(self, program: Program, name: str) -> None:
        """What a program started ends with it; what does not is counted, and ended."""
        deadline = time.monotonic() + GONE_WITHIN_S
        while (left := program.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        self.seen.orphans += [f"{name}: {_command_line(process)[:160]}" for process in left]
        kill(left)

    def sync(self) -> str:
        """Send what the tracking server has not got, as an administrator does who was told of it."""
        ended = self._programs.run("facefed", "tracking", "sync", self.run)
        assert ended.code == 0, ended
        return ended.out

    def stop(self) -> None:
        """SIGTERM to the clients and the end of the server, as at the end of a day."""
        for name, client in self.clients.items():
            with suppress(ProcessLookupError):
                client.signal(signal.SIGTERM)
            client.process.wait(60)
            self._expect_gone(client, name)
        self._expect_gone(self.server, "flower-server")


def kill(processes: Iterable[psutil.Process]) -> None:
    """By kill -9, at once."""
    send(processes, signal.SIGKILL)


def send(processes: Iterable[psutil.Process], number: int) -> None:
    """A signal to each that lives."""
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(number)


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
