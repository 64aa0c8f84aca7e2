"""Beside the SuperLink, in a process of its own: admits the sites' keys, and runs the run that flower-server submitted.

It stands in for Flower's SuperExec, which runs whatever bundle anyone on this machine submits, and shows each task's
token in its command line.  Started as `python -m server.flower.superexec FOLDER ADDRESS [CA KEYS]`; in the folder lie
the secret that the SuperLink asks of whoever takes a task, and, once there is one, the id of our run.
"""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import httpx
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StopRunRequest, UnregisterNodeRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClient, ProtobufClientInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient

from common.system.certs import CertificateError, read_public_key
from common.system.console import set_up_logging
from common.system.files import write_new
from common.system.processes import child_environment, start
from common.system.runtime import go_silent
from server.flower.superlink import ADMITTED, APP_ENDED, NODES_FILE, RUN_ID, SECRET, TOKEN, write_nodes

LOOK_EVERY_S = 0.2
LOOK_AT_KEYS_EVERY_S = 1.0
ACQUIRE_TASK = "/flwr.proto.Runtime/AcquireTask"
UNREGISTERED = "unregistered"  # Flower's word for a node that was

AnyClient = TypeVar("AnyClient", bound=ProtobufClient)

log = logging.getLogger("facefed.server")


@dataclass
class Register:
    """Keeps those whom the SuperLink knows equal to the *.pub files of a folder."""

    client: ControlHttpClient
    folder: Path
    node_ids: dict[bytes, int] = field(default_factory=dict)  # by key
    names: dict[bytes, str] = field(default_factory=dict)
    complained: set[str] = field(default_factory=set)
    told: Callable[[Mapping[int, str]], object] = dict  # is told the keys' names by node, when they change
    _last_told: dict[int, str] = field(default_factory=dict)

    def open(self) -> None:
        """Begin with those whom the SuperLink's database knows from before."""
        for node in self.client.ListNodes(ListNodesRequest()).nodes_info:
            if node.status != UNREGISTERED:
                self.node_ids[node.public_key] = node.node_id

    def look(self) -> None:
        """First out with those whose file is gone, then in with the new."""
        wanted = self._wanted()
        for key in [key for key in self.node_ids if key not in wanted]:
            self.client.UnregisterNode(UnregisterNodeRequest(node_id=self.node_ids.pop(key)))
            log.warning("the key of %s is accepted no more", self.names.get(key, "a site of an earlier run"))
        for key, name in wanted.items():
            self.names[key] = name
            if key not in self.node_ids:
                self._admit(key, name)
        names = {node: self.names[key] for key, node in self.node_ids.items()}
        if names != self._last_told:
            self.told(names)
            self._last_told = names

    def _wanted(self) -> dict[bytes, str]:
        found = {}
        for path in sorted(self.folder.glob("*.pub")):
            try:
                key = read_public_key(path).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
                found[key] = path.stem
            except CertificateError as error:  # half written, or none; it must not keep the others from being seen
                self._complain(str(error))
        return found

    def _admit(self, key: bytes, name: str) -> None:
        try:
            self.node_ids[key] = self.client.RegisterNode(RegisterNodeRequest(public_key=key, name=name)).node_id
            log.info("the key of %s is accepted", name)
        except httpx.HTTPStatusError as error:
            self._complain(f"the SuperLink refuses the key of {name} ({error.response.text.strip()[:200]})")

    def _complain(self, line: str) -> None:
        if line not in self.complained:
            self.complained.add(line)
            log.warning("%s", line)


class Superexec:
    """Looks at keys and tasks in turn, for as long as its SuperLink lives."""

    def __init__(self, folder: Path, address: str, ca: Path | None, keys: Path | None) -> None:
        """folder: Flower's of this run.  ca, keys: with TLS, whom to trust and whom to admit."""
        self._folder, self._address, self._ca = folder, address, ca
        self._control = self._connect(ControlHttpClient)
        guard = SuperExecAuthHttpInterceptor(
            master_secret=(folder / SECRET).read_bytes(), protected_methods=frozenset({ACQUIRE_TASK})
        )
        self._runtime = self._connect(RuntimeHttpClient, guard)
        told = partial(write_nodes, folder.parent / NODES_FILE)
        self._register = Register(self._control, keys, told=told) if keys else None
        self._apps: list[tuple[subprocess.Popen[bytes], Path]] = []

    def _connect(self, kind: type[AnyClient], *more: ProtobufClientInterceptor) -> AnyClient:
        return kind.from_server_address(
            server_address=self._address,
            insecure=self._ca is None,
            root_certificates=self._ca.read_bytes() if self._ca else None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec"), *more],
            retry_invoker=make_simple_http_retry_invoker(),
        )

    def serve(self) -> None:
        """Until the process ends."""
        if self._register:
            self._register.open()
        look_at_keys = 0.0
        while True:
            if self._register and time.monotonic() >= look_at_keys:
                self._register.look()
                look_at_keys = time.monotonic() + LOOK_AT_KEYS_EVERY_S
            (self._folder / ADMITTED).touch()
            self.take_task()
            time.sleep(LOOK_EVERY_S)

    def take_task(self) -> None:
        """Start the ServerApp of our run; stop any other run."""
        ours = self._folder / RUN_ID
        if not ours.exists():
            return
        self._forget_ended()
        found = self._runtime.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
        if not (found.HasField("task") and found.token):
            return
        if str(found.task.run_id) == ours.read_text(encoding="utf-8"):
            self._start_app(found.task.task_id, found.token)
            return
        log.warning(
            "run %d was not submitted by this flower-server; it is stopped, and nothing of it ran", found.task.run_id
        )
        self._control.StopRun(StopRunRequest(run_id=found.task.run_id))

    def _start_app(self, task: int, token: str) -> None:
        # In a file of this user's: a command line is everybody's to read.
        path = write_new(self._folder / f"task-{task}{TOKEN}", token.encode())
        command = ["flwr-serverapp", "--runtime-api-address", self._address, "--token-file", str(path)]
        command += ["--root-certificates", str(self._ca)] if self._ca else ["--insecure"]
        command += ["--parent-pid", str(os.getpid())]
        app = start(command, environment=child_environment(self._folder), output=sys.stdout.fileno())
        self._apps.append((app, path))

    def _forget_ended(self) -> None:
        """Flower misses a ServerApp that was killed after a minute; flower-server sees our note at once."""
        for app, path in self._apps:
            if app.poll() is not None:
                path.unlink(missing_ok=True)
                (self._folder / APP_ENDED).touch()


def main(arguments: list[str]) -> None:
    """Serve until stopped."""
    go_silent()
    set_up_logging("info")
    folder, address, *files = arguments
    ca, keys = (Path(files[0]), Path(files[1])) if files else (None, None)
    Superexec(Path(folder), address, ca, keys).serve()


if __name__ == "__main__":
    main(sys.argv[1:])
