"""Another account on the server's machine: it reaches the SuperLink's port, and nobody behind it does what it asks.

A SuperLink and its SuperExec as flower-server starts them, with TLS and keys; the stranger is another user id. The same
is tried without what keeps the stranger out: each attack then succeeds.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack

import httpx
import pytest
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StopRunRequest, UnregisterNodeRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes

from common.system.certs import read_server_folder
from common.system.processes import child_environment, listen, start, stop
from server.flower.access import SendPassword
from server.flower.launch import superexec_command
from server.flower.superlink import ADMITTED, BUNDLE, RUN_ID, SECRET, SUBMISSION, Superlink, read_nodes, write_secret
from simulation.admin import certs as new_certs

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another account")

# What the stranger's process does with the SuperLink's address, a key and a node; it prints what came of each.  It
# becomes another account only then: that may not be allowed to read where this Python is.
STRANGER = """
import json, os, sys
import httpx
from flwr.proto.control_pb2 import ListRunsRequest, RegisterNodeRequest, StopRunRequest, UnregisterNodeRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

address, certificate, key, node, run = json.loads(sys.argv[1])
control = ControlHttpClient.from_server_address(
    address, insecure=False, root_certificates=certificate.encode(),
    interceptors=[RuntimeVersionHttpInterceptor(component_name="stranger")],
)
calls = {
    "list": lambda: control.ListRuns(ListRunsRequest()),
    "register": lambda: control.RegisterNode(RegisterNodeRequest(public_key=key.encode(), name="sneaky")),
    "evict": lambda: control.UnregisterNode(UnregisterNodeRequest(node_id=node)),
    "stop": lambda: control.StopRun(StopRunRequest(run_id=run)),
}
try:
    httpx.get("http://127.0.0.1:9", timeout=5)
except httpx.HTTPError:
    os.setgroups([])
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[2]))
said = {"uid": os.getuid()}
for name, call in calls.items():
    try:
        call()
        said[name] = "done"
    except httpx.HTTPStatusError as error:
        said[name] = error.response.status_code
print(json.dumps(said))
"""
# The SuperLink's process without what asks for the secret.
UNGUARDED = """
import sys
from pathlib import Path
from server.flower import access, redelivery
access.WantPassword = lambda app, secret: app
redelivery.main(Path(sys.argv[1]), [int(sys.argv[2])], sys.argv[3:])
"""
BUNDLE_FILES = {
    "app/__init__.py": "",
    "pyproject.toml": (
        '[project]\nname = "a"\nversion = "1.0.0"\nlicense = "Apache-2.0"\ndependencies = []\n[tool.flwr.app]\n'
        'publisher = "a"\nfab-include = ["app/**/*.py"]\n[tool.flwr.app.components]\nserverapp = "app:app"\n'
        'clientapp = "app:app"\n'
    ),
}


class Machine:
    """A SuperLink and its SuperExec, with the keys of two sites."""

    def __init__(self, folder, started, *, guarded=True, database=None):
        new_certs.make_folder(folder / "tls", ["localhost", "127.0.0.1"], ["celeba", "vggface2"])
        self.tls = read_server_folder(folder / "tls", "127.0.0.1")
        self.home, self.log = folder / "run" / "flwr", (folder / "log").open("ab")
        started.enter_context(self.log)
        self.home.mkdir(parents=True)
        for name, text in BUNDLE_FILES.items():
            (self.home / BUNDLE / name).parent.mkdir(parents=True, exist_ok=True)
            (self.home / BUNDLE / name).write_text(text)
        [listener] = listen("127.0.0.1", 0, "--address")
        with listener:
            port, number = listener.getsockname()[1], listener.fileno()
            self.link = Superlink(host="127.0.0.1", port=port, home=self.home, tls=self.tls, database=database)
            command = self.link.command(write_secret(self.home), [number])
            if not guarded:
                command[1:4] = ["-P", "-c", UNGUARDED]
            self._start(started, command, [number])
        self._start(started, superexec_command(self.link))
        self.wait(lambda: (self.home / ADMITTED).exists())

    def _start(self, started, command, sockets=()):
        environment = child_environment(self.home)
        process = start(command, environment=environment, output=self.log, sockets=sockets)
        started.callback(stop, process)

    def wait(self, look):
        deadline = time.monotonic() + 60
        while not look():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def said(self):
        return (self.home.parents[1] / "log").read_text()

    def submitted(self):
        (self.home / SUBMISSION).write_text("{}")
        self.wait((self.home / RUN_ID).exists)
        return int((self.home / RUN_ID).read_text())

    def nodes(self):
        return read_nodes(self.home / "nodes.json") or {}

    def superexec(self):
        """A client that knows the secret."""
        return ControlHttpClient.from_server_address(
            self.link.address, insecure=False, root_certificates=self.tls.ca.read_bytes(),
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="superexec"),
                SendPassword((self.home / SECRET).read_bytes()),
            ],
        )  # fmt: skip

    def tried_by_a_stranger(self, run):
        """What another account gets from Control."""
        key = public_key_to_bytes(generate_key_pairs()[1]).decode()
        node = next(node for node, name in self.nodes().items() if name == "celeba")
        told = json.dumps([self.link.address, self.tls.ca.read_text(), key, node, run])
        done = subprocess.run(
            [sys.executable, "-P", "-c", STRANGER, told, str(NOBODY)],
            env=child_environment(self.home), capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert said.pop("uid") == NOBODY
        return said


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    with ExitStack() as started:
        yield Machine(tmp_path_factory.mktemp("machine"), started)


@needs_root
def test_another_account_cannot_list_register_evict_or_stop(machine):
    nodes, run = machine.nodes(), machine.submitted()
    assert machine.tried_by_a_stranger(run) == dict.fromkeys(("list", "register", "evict", "stop"), 401)
    time.sleep(1.5)  # the register has been looked at since
    assert machine.nodes() == nodes
    with pytest.raises(PermissionError):
        read_as_nobody(machine.home / SECRET)


def read_as_nobody(path):
    done = subprocess.run(["cat", path], user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, text=True)
    if "Permission denied" in done.stderr:
        raise PermissionError(path)


@needs_root
def test_what_asks_for_the_secret_is_what_keeps_it_out_and_the_register_is_mended(tmp_path):
    """Without it everything succeeds; and the SuperExec sees within seconds what was done to the register."""
    with ExitStack() as started:
        machine = Machine(tmp_path, started, guarded=False, database=tmp_path / "state.db")
        nodes, run = machine.nodes(), machine.submitted()
        assert machine.tried_by_a_stranger(run) == dict.fromkeys(("list", "register", "evict", "stop"), "done")
        began = time.monotonic()
        machine.wait(lambda: sorted(machine.nodes().values()) == ["celeba", "vggface2"] and machine.nodes() != nodes)
        machine.wait(lambda: "was registered by somebody else" in machine.said())
        assert time.monotonic() - began < 30
        assert "somebody else took the key of celeba out" in machine.said()


def test_a_node_that_nobody_admitted_goes_and_an_evicted_site_comes_back(machine):
    with machine.superexec() as superexec:
        known = {node.node_id for node in superexec.ListNodes(ListNodesRequest()).nodes_info}
        assert known >= set(machine.nodes())
        evicted, other = machine.nodes()
        stranger = superexec.RegisterNode(
            RegisterNodeRequest(public_key=public_key_to_bytes(generate_key_pairs()[1]), name="sneaky")
        ).node_id
        superexec.UnregisterNode(UnregisterNodeRequest(node_id=evicted))
        machine.wait(lambda: len(machine.nodes()) == 2 and evicted not in machine.nodes() and other in machine.nodes())
        status = {node.node_id: node.status for node in superexec.ListNodes(ListNodesRequest()).nodes_info}
    assert status[stranger] == status[evicted] == "unregistered"
    assert sorted(machine.nodes().values()) == ["celeba", "vggface2"]


@pytest.mark.parametrize("given", [{}, {"facefed-secret": "0" * 64}, {"facefed-secret": ""}])
def test_control_and_runtime_answer_nobody_without_the_secret(machine, given):
    """Each path that the SuperLink has, but for the sites' own and /health; two headers are one too many as well."""
    headers = {"content-type": "application/protobuf", **given}
    with (
        machine.superexec() as superexec,
        httpx.Client(verify=superexec._client._transport._pool._ssl_context) as anyone,
    ):
        base = f"https://{machine.link.address}"
        proof = SendPassword((machine.home / SECRET).read_bytes())._password
        described = anyone.get(f"{base}/openapi.json", headers={"facefed-secret": proof}).json()["paths"]
        inside = [path for path in described if not path.startswith("/v1/fleet/") and path != "/health"]
        assert len(inside) > 60
        assert {path.split("/")[2] for path in inside} == {"control", "runtime"}
        status = {path: anyone.post(base + path, headers=headers, content=b"").status_code for path in inside}
        assert set(status.values()) == {401}, status
        for path in (
            "/docs",
            "/openapi.json",
            "//v1/control/list-runs",
            "/v1/fleet/../control/list-runs",
            "/v1/%63ontrol/list-runs",
        ):
            assert anyone.request("POST", base + path, headers=headers).status_code in (401, 404), path
        doubled = [("facefed-secret", proof), ("facefed-secret", proof)]
        assert anyone.post(f"{base}/v1/control/list-runs", headers=doubled).status_code == 401


def test_with_the_secret_the_superexec_is_heard(machine):
    with machine.superexec() as superexec, pytest.raises(httpx.HTTPStatusError) as refused:
        superexec.StopRun(StopRunRequest(run_id=1))
    assert refused.value.response.status_code != 401
