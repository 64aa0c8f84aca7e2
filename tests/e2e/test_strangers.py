"""Strangers at a federation with TLS behind its front door: none gets in, and the run goes on and ends well.

One federation for all: while its server waits for clients the strangers come, a site is turned out, and then, with the
pests still at the door, three sites train, with secure aggregation.  The tests run in their order.
"""

import base64
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess

import httpx
import pytest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from programs import BIN, Programs, assert_one_line, free_port, port_is_free, run_folder, state_of
from strangers import NEVER_READ, SLOW_BODY, SLOW_HEADER, Pest, hung_up_on, idle, many_files

from clients.flower.handshake import examine
from common.errors import UserError
from common.system.certs import read_client_folder
from server.flower.front_door import find_nginx
from server.flower.superlink import NODES_FILE, read_nodes
from tests.conftest import skip_or_fail

pytestmark = pytest.mark.e2e
NUM_IDLE = 1000
SITES = {"celeba": "celeba", "vggface2": "vggface2", "another": "celeba"}  # and whose pictures each has
REFUSED = "does not accept this site's key"
BUNDLE = {
    "pyproject.toml": """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "stranger"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "stranger"
[tool.flwr.app.components]
serverapp = "stranger.app:server"
clientapp = "stranger.app:client"
[tool.flwr.app.config]
""",
    "stranger/__init__.py": "",
    "stranger/app.py": """\
from pathlib import Path
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
Path({marker!r}).touch()
client = ClientApp()
server = ServerApp()
""",
}


class Federation:
    """A server that waits for three clients, and the folders of those who may and may not come."""

    def __init__(self, faces, programs):
        self.faces, self.programs, self.port = faces, programs, free_port()
        self.cwd, self.marker = programs.cwd, programs.cwd / "marker"
        self.tls = self.cwd / "tls"
        sites = [word for name in (*SITES, "guest") for word in ("--client", name)]
        for folder in (self.tls, self.cwd / "other"):
            made = programs.run("facefed", "certs", "init", folder, "--server-name", "localhost", *sites)
            assert made.code == 0, made
        (self.tls / "ca.key").rename(self.cwd / "ca.key")
        (self.cwd / "intruder").mkdir()
        shutil.copy(self.tls / "ca.crt", self.cwd / "intruder")
        shutil.copy(self.cwd / "other" / "guest" / "client.key", self.cwd / "intruder")
        self.server = programs.start(
            "flower-server", "--address", f"localhost:{self.port}", "--front-door", "--tls", self.tls, *faces.bare,
            "--min-clients", 3, "--secagg", "--no-mlflow", "--join-timeout", 900,
        )  # fmt: skip
        self.guest = self.client("vggface2", "guest", self.tls / "guest")
        self.intruder = self.client("vggface2", "intruder", self.cwd / "intruder")
        self.server.wait_for("joined: guest")  # so the ServerApp is up
        home = run_folder(self.cwd) / "flwr"
        words = next(p.cmdline() for p in self.server.processes() if "server.flower.redelivery" in p.cmdline())
        self.inside = f"127.0.0.1:{words[words.index('--port') + 1]}"
        self.secrets = [*home.glob("*.token"), home / "superexec.key", *self.cwd.rglob("*.key")]
        self.secrets = {path: path.read_bytes() for path in self.secrets}
        self.pests, self.silent = [], []

    @property
    def outside(self):
        return f"localhost:{self.port}"

    def client(self, dataset, name, tls, *arguments):
        return self.programs.start(
            "flower-client", "--dataset", dataset, "--data-dir", self.faces.folder / "data" / dataset, "--name", name,
            "--server", self.outside, "--tls", tls, *self.faces.cache, *arguments,
        )  # fmt: skip

    def flower(self, kind, address, *interceptors):
        """A client of Flower's own that trusts the federation's authority."""
        return kind.from_server_address(
            address, insecure=False, root_certificates=(self.tls / "ca.crt").read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="stranger"), *interceptors],
        )  # fmt: skip

    def submit(self, address):
        """What `flwr run` says of the stranger's bundle."""
        folder, home = self.cwd / "bundle", self.cwd / "stranger-flwr"
        for name, text in BUNDLE.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text.replace("{marker!r}", repr(str(self.marker))))
        home.mkdir(exist_ok=True)
        trusted = f'address = "{address}"\nroot-certificates = "{self.tls / "ca.crt"}"\n'
        (home / "config.toml").write_text(f"[superlink.victim]\n{trusted}")
        environment = {**os.environ, "FLWR_HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["flwr", "run", folder, "victim", "--format", "json"],
            env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        return done.stdout + done.stderr

    def is_healthy(self):
        context = ssl.create_default_context(cafile=self.tls / "ca.crt")
        with contextlib.closing(
            http.client.HTTPSConnection("localhost", self.port, context=context, timeout=60)
        ) as line:
            line.request("GET", "/health")
            return line.getresponse().status == 200

    def processes(self):
        return [p for started in (self.server, self.guest, self.intruder) for p in started.processes()]


@pytest.fixture(scope="module")
def federation(faces, tmp_path_factory):
    try:
        find_nginx()
    except UserError as error:
        skip_or_fail(str(error))
    programs = Programs(tmp_path_factory.mktemp("strangers"))
    try:
        with many_files():
            made = Federation(faces, programs)
            yield made
            for pest in made.pests:
                pest.stop()
            for connection in made.silent:
                connection.close()
    finally:
        programs.close()


def status_of(call, *arguments):
    with pytest.raises(httpx.HTTPStatusError) as refused:
        call(*arguments)
    return refused.value.response.status_code


def test_plain_text_is_answered_by_the_door_alone(federation):
    with contextlib.closing(http.client.HTTPConnection("localhost", federation.port, timeout=60)) as line:
        line.request("POST", "/v1/control/start-run", body=b"x")
        assert line.getresponse().status == 400
    with pytest.raises(UserError, match="speaks TLS; give --tls"):
        examine("localhost", federation.port, None)


def test_a_client_that_trusts_another_authority_sends_nothing(federation):
    ended = federation.client(
        "vggface2", "guest", federation.cwd / "other" / "guest", "--state-dir", federation.cwd / "other-state"
    ).ended()
    assert_one_line(ended, "flower-client", "did not issue", "not your federation's server")


def test_a_key_of_ones_own_opens_nothing(federation):
    private, public = generate_key_pairs()
    key = public_key_to_bytes(public)
    with federation.flower(FleetHttpClient, federation.outside, NodeAuthHttpInterceptor(private, public)) as fleet:
        assert status_of(fleet.RegisterNode, RegisterNodeFleetRequest(public_key=key)) in (403, 412)
        assert status_of(fleet.ActivateNode, ActivateNodeRequest(public_key=key, heartbeat_interval=30)) == 412


def test_nor_does_another_sites_name_or_message(federation):
    """Signed by itself, in the name of a site that is there: neither what it is sent, nor a reply in its place."""
    log = (federation.cwd / ".facefed" / "clients" / "guest" / "supernode.log").read_text()
    victim = Node(node_id=int(re.search(r"SuperNode ID: (\d+)", log)[1]))
    with federation.flower(
        FleetHttpClient, federation.outside, NodeAuthHttpInterceptor(*generate_key_pairs())
    ) as fleet:
        assert status_of(fleet.PullMessages, PullMessagesRequest(node=victim)) == 401
        assert status_of(fleet.PushMessages, PushMessagesRequest(node=victim)) == 401
    with federation.flower(FleetHttpClient, federation.outside) as fleet:
        assert status_of(fleet.PullMessages, PullMessagesRequest(node=victim)) == 401


def test_nobody_outside_is_given_a_task_and_nobody_inside_without_the_secret(federation):
    wanted = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
    for address, status in ((federation.outside, 404), (federation.inside, 401)):
        with federation.flower(RuntimeHttpClient, address) as runtime:
            assert status_of(runtime.AcquireTask, wanted) == status


def test_a_bundle_cannot_be_submitted_from_outside(federation):
    said = federation.submit(federation.outside)
    assert '"success": true' not in said
    assert "404" in said, said


def test_nor_on_the_servers_machine_without_the_secret_of_the_run(federation):
    said = federation.submit(federation.inside)
    assert '"success": true' not in said
    assert "Authentication failed" in said, said
    assert not federation.marker.exists()


def test_no_command_line_tells_a_secret(federation):
    lines = [" ".join(process.cmdline()).encode() for process in federation.processes()]
    assert any(b"flwr-serverapp" in line for line in lines)
    assert any(b"--auth-supernode-private-key" in line for line in lines)
    assert [path for path, secret in federation.secrets.items() for line in lines if tells(line, secret)] == []


def tells(text, secret):
    """Whether the text holds the secret: as it is, in hexadecimal or base64, or a line of a key's file."""
    shapes = [secret, secret.hex().encode(), base64.b64encode(secret)]
    shapes += [line for line in secret.splitlines() if len(line) > 30 and not line.startswith(b"-----")]
    return any(shape in text for shape in shapes)


def test_a_client_whose_key_is_not_registered_is_told_and_ends(federation):
    ended = federation.intruder.ended()
    assert_one_line(ended, "flower-client", REFUSED, read_client_folder(federation.cwd / "intruder").fingerprint)
    assert REFUSED in ended.out  # at once, and not only in the end
    federation.intruder.assert_nothing_left()


def test_a_body_of_ten_gigabytes_is_not_taken(federation):
    context = ssl.create_default_context(cafile=federation.tls / "ca.crt")
    with (
        socket.create_connection(("localhost", federation.port), timeout=60) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as line,
    ):
        line.sendall(
            b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: a\r\nContent-Length: 10737418240\r\n\r\n" + b"x" * 9999
        )
        assert line.recv(4096).startswith(b"HTTP/1.1 413 ")
    with (
        socket.create_connection(("localhost", federation.port), timeout=60) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as line,
        pytest.raises(OSError, match=r"(?i)reset|pipe|eof"),  # hung up on
    ):
        send_ten_gigabytes(line)


def send_ten_gigabytes(line):
    line.sendall(b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(10_240):
        line.sendall(b"100000\r\n" + b"x" * 0x100000 + b"\r\n")


def test_a_site_that_was_cut_off_is_let_in_again_at_once(federation):
    """Though the server takes it for connected: heartbeats are missed only after a minute."""
    federation.guest.signal(signal.SIGKILL)
    federation.guest.process.wait()
    federation.guest = federation.client("vggface2", "guest", federation.tls / "guest")
    federation.guest.wait_for("connected to")
    assert REFUSED not in federation.guest.out


def test_a_revoked_site_is_turned_out_and_told(federation):
    assert "joined: guest" in federation.server.out
    revoked = federation.programs.run("facefed", "certs", "revoke", federation.tls, "guest")
    assert revoked.code == 0, revoked
    federation.guest.wait_for(REFUSED)


def test_a_thousand_idle_connections_and_slow_ones_leave_room_for_others(federation):
    federation.pests += [
        Pest(federation.port, words) for words in (SLOW_HEADER, SLOW_BODY, NEVER_READ) for _ in range(8)
    ]
    federation.silent += idle(federation.port, NUM_IDLE)
    assert federation.is_healthy()


def test_the_run_goes_on_meanwhile_and_ends_well(federation):
    sites = [federation.client(data, name, federation.tls / name, "--once") for name, data in SITES.items()]
    ended = federation.server.ended()
    assert ended.code == 0, ended
    assert ended.err == ""
    assert set(re.findall(r"^joined: (\w+)", ended.out, re.MULTILINE)) == {"guest", *SITES}
    assert "round 2 of 2: 3 clients" in ended.out
    assert state_of(run_folder(federation.cwd))["round"] == 2
    # Whom a node is, so that nobody joins under the name of another's key; the guest's was revoked.
    assert sorted(read_nodes(run_folder(federation.cwd) / NODES_FILE).values()) == sorted(SITES)
    assert [site.ended(120).code for site in sites] == [0, 0, 0]
    federation.server.assert_nothing_left()
    assert port_is_free(federation.port)
    assert hung_up_on(federation.silent) == NUM_IDLE
    assert all(pest.visits > 1 for pest in federation.pests)  # sent away, and come again
    assert not federation.marker.exists()


def test_what_left_the_sites_was_masked_and_nothing_of_the_masks_is_left(federation):
    run = run_folder(federation.cwd)
    for name in SITES:
        folder = federation.cwd / ".facefed" / "clients" / name
        lines = [json.loads(line) for line in (folder / "egress" / f"{run.name}.jsonl").read_text().splitlines()]
        masked = [line["masked"] for line in lines if "masked" in line]
        assert [line["with"] for line in masked] == [sorted(SITES)] * 3  # two rounds, and the last model's scores
        assert [line["attempt"] for line in masked] == [1, 2, 3]
        kept = json.loads((folder / "private" / run.name / "secure-sum.json").read_text())
        assert (kept["secrets"], kept["own_shares"], kept["pairs"]) == ("", {}, {})
    summary = json.loads((run / "metrics.json").read_text())
    assert summary["clients"] == {}  # no site's own figures
    assert 0.0 < summary["best"]["roc_auc"] < 1.0


def test_no_file_tells_a_secret(federation):
    files = [path for path in federation.cwd.rglob("*") if path.is_file() and path not in federation.secrets]
    assert any(path.name == "superlink.log" for path in files)
    assert not list(run_folder(federation.cwd).rglob("*.token"))
    for path in files:
        content = path.read_bytes()
        assert not [secret for secret in federation.secrets.values() if tells(content, secret)], path
