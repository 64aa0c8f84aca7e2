"""The SuperLink of a run: how it is started, reached, asked and spoken to, in plain text or with TLS."""

import json
import secrets
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import FaceFedError
from common.system.certs import ServerFiles
from common.system.files import read_json, write_bytes, write_json, write_new
from common.system.processes import child_environment, host_port, is_healthy, reached_at

CONNECTION = "facefed"
ANSWER_WITHIN_S = 60.0
HEALTHY_WITHIN_S = 2.0
# In Flower's folder of the run: the secret, the id of our run once it is submitted, a mark that the keys are admitted,
# a mark that the ServerApp has ended.
SECRET, RUN_ID, ADMITTED, APP_ENDED = "superexec.key", "run-id", "admitted", "app-ended"
MODEL_BYTES = "model-bytes"  # there too: of the flat model as float32, from the ServerApp
COUNTS_BYTES = 2**21  # all counts of a reply with two splits take less than half of it
NODES_FILE = Path("flwr") / "nodes.json"  # in the run's folder: which key is whose
TOKEN = ".token"  # noqa: S105 - ends the name of a task's token


def write_secret(home: Path) -> Path:
    """A new secret for whoever takes tasks, readable by this user only; marks of an earlier start go."""
    home.mkdir(parents=True, exist_ok=True)
    forget_secrets(home)
    for name in (RUN_ID, ADMITTED, APP_ENDED, MODEL_BYTES):
        (home / name).unlink(missing_ok=True)
    return write_new(home / SECRET, secrets.token_bytes(32))


def forget_secrets(home: Path) -> None:
    """Delete what is of no use once the SuperLink has ended."""
    for path in (home / SECRET, *home.glob(f"*{TOKEN}")):
        path.unlink(missing_ok=True)


def write_model_bytes(home: Path, num_bytes: int) -> None:
    """Tell the SuperLink's process how large a model is that a site may answer with."""
    write_bytes(home / MODEL_BYTES, str(num_bytes).encode())


def read_model_bytes(home: Path) -> int | None:
    """What the ServerApp has told, or None as long as it has not."""
    try:
        return int((home / MODEL_BYTES).read_text(encoding="ascii"))
    except FileNotFoundError:
        return None


def write_nodes(path: Path, names: Mapping[int, str]) -> None:
    """names: of the keys, by the id of the node that has it."""
    write_json(path, {str(node): name for node, name in names.items()})


def read_nodes(path: Path) -> dict[int, str]:
    """The names by node, or nothing where the federation has no keys."""
    return {int(node): str(name) for node, name in read_json(path).items()} if path.exists() else {}


@dataclass(frozen=True, kw_only=True)
class Superlink:
    """Where it listens, with which files, and the folder where Flower's files of this run are."""

    host: str
    port: int
    home: Path
    tls: ServerFiles | None = None
    database: Path | None = None

    @property
    def address(self) -> str:
        """Where this machine reaches it."""
        return host_port(reached_at(self.host), self.port)

    def command(self, secret: Path) -> list[str]:
        """secret: the file of what whoever takes a task must know; without it any caller could take one."""
        command = [sys.executable, "-P", "-m", "server.flower.redelivery", str(self.home)]
        command += ["--host", self.host, "--port", str(self.port)]
        command.append("--disable-runtime-dependency-installation")  # it would ask a package index
        command += ["--isolation", "process", "--superexec-auth-secret-file", str(secret)]
        if self.tls:
            command += ["--ssl-certfile", str(self.tls.certificate), "--ssl-keyfile", str(self.tls.key)]
            command += ["--ssl-ca-certfile", str(self.tls.ca), "--enable-supernode-auth"]
        else:
            command.append("--insecure")
        return [*command, "--database", str(self.database)] if self.database else command

    def answers(self) -> bool:
        """Whether it is up."""
        ca = self.tls.ca if self.tls else None
        return is_healthy(reached_at(self.host), self.port, ca=ca, timeout_s=HEALTHY_WITHIN_S)

    def write_connection(self) -> None:
        """Tell Flower's command line, in this run's own home, how to reach it."""
        self.home.mkdir(parents=True, exist_ok=True)
        how = f"root-certificates = {json.dumps(str(self.tls.ca))}" if self.tls else "insecure = true"
        text = f'[superlink.{CONNECTION}]\naddress = "{self.address}"\n{how}\n'
        (self.home / "config.toml").write_text(text, encoding="utf-8")

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """Run Flower's command line and return the JSON it answers.  Raises FaceFedError."""
        try:
            done = subprocess.run(
                ["flwr", *arguments],
                env=child_environment(self.home),
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=ANSWER_WITHIN_S,
                check=False,
                process_group=0,  # Ctrl-C in a terminal is for us; it must not cut this short
            )
        except subprocess.TimeoutExpired:
            raise FaceFedError(f"flwr {arguments[0]} did not end within {ANSWER_WITHIN_S:g} s.") from None
        try:
            answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError:
            raise FaceFedError(
                f"flwr {arguments[0]} failed: {' '.join((done.stderr or done.stdout).split())[-400:]}"
            ) from None
        return answer
