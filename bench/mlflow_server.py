"""A real MLflow server, on sqlite, that can be killed, frozen and started again; and what its database then holds."""

import collections
import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

from common.system.processes import free_port, is_healthy, start
from simulation.admin.tracking_server import ServeOptions, plan_server

HEALTHY_WITHIN_S = 300.0
Point = tuple[str, int, float, int]  # name, step, value, milliseconds


class MlflowServer:
    """The server that `facefed tracking serve` would start; its database and artifacts lie in `folder`."""

    def __init__(self, folder: Path, migrated: Path | None = None) -> None:
        """migrated: a database to begin with, which saves the seconds that making the tables takes."""
        folder.mkdir(parents=True, exist_ok=True)
        self.database, self.artifacts = folder / "mlflow.db", folder / "artifacts"
        if migrated:
            shutil.copyfile(migrated, self.database)
        options = ServeOptions(
            port=free_port(), backend=f"sqlite:///{self.database}", artifacts=str(self.artifacts), auth=False
        )
        self._plan = plan_server(options, os.environ, folder)
        self.uri = self._plan.address
        self.hosts = self._plan.command[self._plan.command.index("--allowed-hosts") + 1]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, hosts: str = "") -> None:
        """Start it and return at once.  hosts: the names that it answers to, instead of its own."""
        command = [hosts if hosts and part == self.hosts else part for part in self._plan.command]
        with self._plan.log.open("ab") as log:
            self._process = start(command, environment=self._plan.environment, output=log)

    def wait(self) -> None:
        """Until it is healthy."""
        deadline = time.monotonic() + HEALTHY_WITHIN_S
        while not is_healthy(self._plan.host, self._plan.port):
            if self._process is None or self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server does not come up:\n{self._plan.log.read_text()}")
            time.sleep(0.1)

    def kill(self) -> None:
        """End it and its worker by kill -9."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """It keeps its connections and answers nothing."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)  # the group it leads

    def points(self, run_id: str) -> collections.Counter[Point]:
        """Every row of the run's metrics."""
        return collections.Counter(
            self.rows("select key, step, value, timestamp from metrics where run_uuid = ?", run_id)
        )

    def rows(self, query: str, *values: object) -> list[tuple]:
        """Ask the database itself, so that no code of MLflow's or ours stands between."""
        with contextlib.closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=60.0)) as database:
            return database.execute(query, values).fetchall()

    def artifact(self, run_id: str, name: str) -> bytes:
        """The content of a run's artifact, from the server's folder."""
        (uri,) = self.rows("select artifact_uri from runs where run_uuid = ?", run_id)[0]
        return (self.artifacts / str(uri).removeprefix("mlflow-artifacts:/") / name).read_bytes()
