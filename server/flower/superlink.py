"""The SuperLink of a run: how it is started and reached, and the files by which the programs beside it agree.

Nobody but the SuperExec (server/flower/superexec.py) speaks to its Control interface: what flower-server wants of that,
and what came of it, stands in files of Flower's folder of the run, which is this user's alone.
"""

import json
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.system.certs import ServerFiles
from common.system.files import read_json, write_bytes, write_new
from common.system.processes import host_port, is_healthy, reached_at

HEALTHY_WITHIN_S = 2.0
# In Flower's folder of the run, by flower-server: the secret; the run's configuration, once it is to be submitted; the
# bundle.  By the SuperExec: a mark that the keys are admitted; the id of our run once it is submitted, or why it was
# refused; a mark that the ServerApp has ended; how the run ended, where Flower says that it has.
SECRET, SUBMISSION, BUNDLE = "superexec.key", "submission.json", "facefed"
ADMITTED, RUN_ID, REFUSAL, APP_ENDED, RUN_ENDED = "admitted", "run-id", "refusal", "app-ended", "run-ended"
MODEL_BYTES = "model-bytes"  # there too: of the flat model as float32, from the ServerApp
COUNTS_BYTES = 2**21  # all counts of a reply with two splits take less than half of it
NODES_FILE = Path("flwr") / "nodes.json"  # in the run's folder: which key is whose
UNREGISTERED = "unregistered"  # Flower's word for a node that was turned out
TOKEN = ".token"  # noqa: S105 - ends the name of a task's token


def write_secret(home: Path) -> Path:
    """A new secret for whoever takes tasks, readable by this user only; marks of an earlier start go."""
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o700)
    forget_secrets(home)
    for name in (SUBMISSION, ADMITTED, RUN_ID, REFUSAL, APP_ENDED, RUN_ENDED, NODES_FILE.name, MODEL_BYTES):
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
    write_bytes(path, json.dumps({str(node): name for node, name in names.items()}).encode(), 0o600)


def read_nodes(path: Path) -> dict[int, str] | None:
    """The names by node, or None where the federation has no keys."""
    return {int(node): str(name) for node, name in read_json(path).items()} if path.exists() else None


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

    def command(self, secret: Path, sockets: Sequence[int]) -> list[str]:
        """How to start it.

        secret: the file of what whoever takes a task or asks anything of Control must know; without it any caller
        could.  sockets: the numbers of those that listen at its address, open in the new process.
        """
        command = [sys.executable, "-P", "-m", "server.flower.redelivery"]
        command += [str(self.home), ",".join(str(number) for number in sockets)]
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
