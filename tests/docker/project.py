"""One project of docker-compose, under a name of its own, and what a test asks of its containers."""

import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DONE_WITHIN_S = 1800.0  # a busy machine may take several times as long as an idle one
LOOK_EVERY_S = 0.3


def docker(*arguments: str) -> str:
    """Run the client and return what it prints.  Raises AssertionError."""
    return run(["docker", *arguments], os.environ)


def run(command: list[str], environment: Mapping[str, str]) -> str:
    """Standard output and, behind it, standard error of a command that must succeed.  Raises AssertionError."""
    done = subprocess.run(
        command, env=dict(environment), cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)} gave {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@dataclass
class Project:
    """docker-compose.yml as it is, with settings by its variables only."""

    name: str
    variables: dict[str, str]
    began: str = field(default="0")  # what was logged earlier belongs to an earlier part of the test

    def compose(self, *arguments: str) -> str:
        """`docker-compose ARGUMENT ...` on this project.  No .env is read but these variables."""
        command = ["docker-compose", "--project-name", self.name, "--file", str(ROOT / "docker-compose.yml")]
        with tempfile.NamedTemporaryFile() as empty:
            return run([*command, "--env-file", empty.name, *arguments], {**os.environ, **self.variables})

    def container(self, service: str) -> str:
        """The id of a service's container, whether it runs or not."""
        label = "label=com.docker.compose."
        found = docker("ps", "-aq", "--filter", f"{label}project={self.name}", "--filter", f"{label}service={service}")
        assert len(found.split()) == 1, f"{service}: {found!r}"
        return found.strip()

    def look(self, service: str, path: str) -> str:
        """What `docker inspect` says of a service's container, by a path such as State.Status."""
        return docker("inspect", "--format", f"{{{{.{path}}}}}", self.container(service)).strip()

    def begin(self) -> None:
        """From now on only what is logged from now on counts."""
        self.began = f"{time.time():.6f}"

    def log(self, service: str) -> str:
        """What a service has printed since `begin`."""
        return docker("logs", "--since", self.began, self.container(service))

    def wait_for(self, service: str, pattern: str) -> str:
        """Until a service prints that; returns the match's first group, or all of it."""
        found: list[re.Match[str]] = []

        def look() -> bool:
            found[:] = re.finditer(pattern, self.log(service))
            return bool(found)

        self.until(look, f"{service} prints {pattern!r}", lambda: self.log(service))
        return found[-1][found[-1].re.groups and 1]

    def until(self, look: Callable[[], bool], what: str, explain: Callable[[], str] = str) -> None:
        """Wait.  Raises AssertionError at the deadline."""
        deadline = time.monotonic() + DONE_WITHIN_S
        while not look():
            assert time.monotonic() < deadline, f"not within {DONE_WITHIN_S:g} s: {what}\n{explain()}"
            time.sleep(LOOK_EVERY_S)

    def ended(self) -> int:
        """Wait until the server's container has ended and is not started again; returns its exit code."""
        self.until(
            lambda: self.look("server", "State.Status") == "exited", "the server ends", lambda: self.log("server")
        )
        return int(self.look("server", "State.ExitCode"))

    def network(self, name: str) -> str:
        """The name of one of the project's networks."""
        return f"{self.name}_{name}"

    def execute(self, service: str, code: str) -> str:
        """Run Python in a service's container."""
        return docker("exec", self.container(service), "python", "-P", "-c", code)

    def read(self, volume: str, command: str) -> str:
        """Run a shell command over a volume, read-only, in a container of its own."""
        mount = f"{self.name}_{volume}:/volume:ro"
        image = self.look("mlflow", "Config.Image")
        return docker("run", "--rm", "--network", "none", "-v", mount, image, "sh", "-c", command)

    def points(self, run_id: str) -> list[dict[str, object]]:
        """Every metric that the run recorded in its own folder: {"run", "key", "step", "value"}."""
        lines = self.read("runs", f"cat /volume/runs/{run_id}/spool.jsonl").splitlines()
        entries = [json.loads(line) for line in lines if line.startswith("{")]
        return [entry for entry in entries if "key" in entry]

    def close(self) -> None:
        """Remove all of it, volumes too."""
        self.compose("--profile", "postgres", "--profile", "twins", "down", "--volumes", "--timeout", "20")
