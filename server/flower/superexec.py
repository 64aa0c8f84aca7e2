"""Beside the SuperLink, in a process of its own: admits the sites' keys, submits flower-server's run, and runs it.

It alone speaks to Control, for which Flower's own command line would do if it could prove who it is (access.py).  And
it stands in for Flower's SuperExec, which runs whatever bundle was submitted, and shows each task's token in its
command line.  Started as `python -m server.flower.superexec FOLDER ADDRESS [CA KEYS]`; in the folder lie the secret
that the SuperLink asks for, and the files by which this process and flower-server agree (superlink.py).
"""

import hashlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.cli.build import build_fab_from_disk
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.proto.transport_pb2 import Scalar
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from common.system.certs import CertificateError, read_public_key
from common.system.console import set_up_logging
from common.system.files import read_json, write_bytes, write_new
from common.system.processes import child_environment, start, stop
from common.system.runtime import go_silent
from server.flower.access import SendPassword
from server.flower.superlink import (
    ADMITTED,
    APP_ENDED,
    BUNDLE,
    NODES_FILE,
    REFUSAL,
    RUN_ENDED,
    RUN_ID,
    SECRET,
    SUBMISSION,
    TOKEN,
    UNREGISTERED,
    write_nodes,
)

LOOK_EVERY_S = 0.2
LOOK_AT_KEYS_EVERY_S = 1.0
ASK_STATUS_EVERY_S = 15.0
STOP_WITHIN_S = 5.0
ACQUIRE_TASK = "/flwr.proto.Runtime/AcquireTask"
FINISHED = "finished"  # Flower's word for a run that has ended
NOT_NOW = (httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.GATEWAY_TIMEOUT)

AnyClient = TypeVar("AnyClient", ControlHttpClient, RuntimeHttpClient)

log = logging.getLogger("facefed.server")


def is_passing(error: httpx.HTTPError) -> bool:
    """Whether it is of a SuperLink that is starting, or too busy: the next look may find it well."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in NOT_NOW
    return isinstance(error, httpx.TransportError)


@dataclass
class Register:
    """Keeps those whom the SuperLink knows equal to the *.pub files of a folder."""

    client: ControlHttpClient
    folder: Path
    names: dict[bytes, str] = field(default_factory=dict)  # by key
    complained: set[str] = field(default_factory=set)
    told: Callable[[Mapping[int, str]], object] = dict  # is told the keys' names by node, when they change
    _admitted: set[bytes] = field(default_factory=set)  # and not turned out since
    _last_told: dict[int, str] | None = None

    def look(self) -> None:
        """Compare the SuperLink's nodes with the files: first out with all others, then in with the new."""
        known = {
            node.public_key: node.node_id
            for node in self.client.ListNodes(ListNodesRequest()).nodes_info
            if node.status != UNREGISTERED
        }
        wanted = self._wanted()
        for key in [key for key in known if key not in wanted]:
            self._turn_out(key, known.pop(key))
        for key, name in wanted.items():
            self.names[key] = name
            if key not in known:
                known |= self._admit(key, name)
        self._admitted = set(known)
        names = {node: self.names[key] for key, node in known.items()}
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

    def _turn_out(self, key: bytes, node: int) -> None:
        self.client.UnregisterNode(UnregisterNodeRequest(node_id=node))
        if key in self.names:
            log.warning("the key of %s is accepted no more", self.names[key])
        elif self._last_told is None:
            log.warning("the key of a site of an earlier run is accepted no more (node %d)", node)
        else:
            log.warning("node %d was registered by somebody else, with a key that nobody admitted; it is removed", node)

    def _admit(self, key: bytes, name: str) -> dict[bytes, int]:
        """The node of the key, or nothing where the SuperLink refuses it."""
        if key in self._admitted:
            log.warning("somebody else took the key of %s out of the SuperLink; it is admitted anew", name)
        try:
            node = self.client.RegisterNode(RegisterNodeRequest(public_key=key, name=name)).node_id
        except httpx.HTTPStatusError as error:
            if is_passing(error):
                raise
            self._complain(f"the SuperLink refuses the key of {name} ({error.response.text.strip()[:200]})")
            return {}
        log.info("the key of %s is accepted", name)
        return {key: node}

    def _complain(self, line: str) -> None:
        if line not in self.complained:
            self.complained.add(line)
            log.warning("%s", line)


class Interceptor(Protocol):
    """Of Flower's `ProtobufClientInterceptor`: stands between a client and the wire."""

    def intercept(self, context: Any, call_next: Any) -> httpx.Response:  # noqa: ANN401 - Flower's
        """The answer to one request."""


class Superexec:
    """Looks at keys and tasks in turn, for as long as its SuperLink lives."""

    def __init__(self, folder: Path, address: str, ca: Path | None, keys: Path | None) -> None:
        """folder: Flower's of this run.  ca, keys: with TLS, whom to trust and whom to admit."""
        self._folder, self._address, self._ca = folder, address, ca
        secret = (folder / SECRET).read_bytes()
        self._control = self._connect(ControlHttpClient, SendPassword(secret))
        guard = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({ACQUIRE_TASK}))
        self._runtime = self._connect(RuntimeHttpClient, guard)
        told = partial(write_nodes, folder.parent / NODES_FILE)
        self._register = Register(self._control, keys, told=told) if keys else None
        self._apps: list[tuple[subprocess.Popen[bytes], Path]] = []
        self._look_at_keys_at = self._ask_status_at = 0.0

    def _connect(self, kind: type[AnyClient], *more: Interceptor) -> AnyClient:
        return kind.from_server_address(
            server_address=self._address,
            insecure=self._ca is None,
            root_certificates=self._ca.read_bytes() if self._ca else None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec"), *more],
            retry_invoker=None,  # `serve` looks again
        )

    def serve(self) -> None:
        """Until the process ends."""
        while True:
            try:
                self.look()
            except httpx.HTTPError as error:
                if not is_passing(error):
                    raise
                log.debug("the SuperLink does not answer now: %s", error)
            time.sleep(LOOK_EVERY_S)

    def look(self) -> None:
        """At keys and tasks, once; what a broken connection leaves out the next look makes up for.

        Raises httpx.HTTPError.
        """
        if self._register and time.monotonic() >= self._look_at_keys_at:
            self._register.look()
            self._look_at_keys_at = time.monotonic() + LOOK_AT_KEYS_EVERY_S
        (self._folder / ADMITTED).touch()
        self.submit()
        self.take_task()
        if time.monotonic() >= self._ask_status_at:
            self.ask_status()
            self._ask_status_at = time.monotonic() + ASK_STATUS_EVERY_S

    def submit(self) -> None:
        """Submit flower-server's bundle with its configuration, once, and leave Flower's id of the run or a refusal."""
        order, run_id, refusal = (self._folder / name for name in (SUBMISSION, RUN_ID, REFUSAL))
        if not order.exists() or run_id.exists() or refusal.exists():
            return
        content = build_fab_from_disk(self._folder / BUNDLE)
        request = StartRunRequest(
            fab=Fab(hash_str=hashlib.sha256(content).hexdigest(), content=content),
            override_config={name: Scalar(string=text) for name, text in read_json(order).items()},
        )
        try:
            answer = self._control.StartRun(request)
            reason = f"a bundle of {len(content):,} bytes, or its configuration"
        except httpx.HTTPStatusError as error:
            if is_passing(error):
                raise
            write_bytes(refusal, error.response.text.strip()[:400].encode())
            return
        if answer.HasField("run_id"):
            write_bytes(run_id, str(answer.run_id).encode())
        else:
            write_bytes(refusal, reason.encode())

    def ask_status(self) -> None:
        """Leave a word where Flower takes our run for ended: a ServerApp may have died without one."""
        run_id = self._folder / RUN_ID
        if not run_id.exists():
            return
        flower_run = int(run_id.read_text(encoding="utf-8"))
        try:
            status = self._control.ListRuns(ListRunsRequest(run_id=flower_run)).run_dict[flower_run].status
        except httpx.HTTPError as error:
            log.warning("the run's status is unknown: %s", error)
            return
        if status.status == FINISHED:
            write_bytes(self._folder / RUN_ENDED, f"{status.status}:{status.sub_status}".encode())

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
        self._end_former()
        # In a file of this user's: a command line is everybody's to read.
        path = write_new(self._folder / f"task-{task}{TOKEN}", token.encode())
        command = ["flwr-serverapp", "--runtime-api-address", self._address, "--token-file", str(path)]
        command += ["--root-certificates", str(self._ca)] if self._ca else ["--insecure"]
        command += ["--parent-pid", str(os.getpid())]
        app = start(command, environment=child_environment(self._folder), output=sys.stdout.fileno())
        self._apps.append((app, path))

    def _end_former(self) -> None:
        """Flower gives a task again whose ServerApp it has not heard of in time, and its former token is void."""
        for app, path in self._apps:
            if app.poll() is None:
                log.warning("the ServerApp took too long to start on a busy machine; it is started again")
                stop(app, STOP_WITHIN_S)
            path.unlink(missing_ok=True)
        self._apps.clear()

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
