"""A simulation's own Ray answers its run alone: whoever may talk to it runs code as the account that started it."""

import contextlib
import json
import os
import stat
import subprocess
import sys
from concurrent import futures
from pathlib import Path

import grpc
import psutil
import pytest
import ray
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from common.errors import UserError
from simulation import commands
from simulation.engine import cluster
from tests.another_account import as_another_account

# Prints where the token is, then waits for its standard input to be closed.
VICTIM = """
import json, os, sys
from common.system.runtime import go_silent
go_silent()
import ray
from simulation.engine.cluster import own_ray
with own_ray(1, num_gpus=0):
    ray.get(ray.remote(lambda: None).remote())  # so that there is a worker
    print(json.dumps(os.environ.get("RAY_AUTH_TOKEN_PATH", "")), flush=True)
    sys.stdin.read()
print(json.dumps([name for name in os.environ if "AUTH" in name]), flush=True)
"""
# A call of each of Ray's servers: the GCS twice, raylet, object manager, and a worker, to which tasks are pushed.
CALLS = (
    "NodeInfoGcsService/CheckAlive",
    "InternalKVGcsService/InternalKVKeys",
    "NodeManagerService/GetNodeStats",
    "ObjectManagerService/Pull",
    "CoreWorkerService/GetCoreWorkerStats",
)
STRANGER = """
folder, token, *ports = sys.argv[1:]
found = {}
for place in (folder, token):
    try:
        found[place] = repr(os.listdir(place) if place == folder else open(place).read())
    except PermissionError:
        found[place] = "kept out"
for port in ports:
    for call in CALLS:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            try:
                channel.unary_unary("/ray.rpc." + call)(b"", timeout=5)
                found[f"{port} {call}"] = "OK"
            except grpc.RpcError as error:
                found[f"{port} {call}"] = error.code().name
    asked = http.client.HTTPConnection("127.0.0.1", int(port), timeout=5)
    try:
        asked.request("GET", "/")
        found[f"{port} HTTP"] = asked.getresponse().status
    except (OSError, http.client.HTTPException):
        pass
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def victim():
    """A process with a Ray of its own, and where that one's token is; afterwards it ends well."""
    with subprocess.Popen(
        [sys.executable, "-c", VICTIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    ) as process:  # fmt: skip
        try:
            token = json.loads(process.stdout.readline())
            yield process, Path(token)
            process.stdin.close()
            left = json.loads(process.stdout.readline())
            assert process.wait(60) == 0
            assert left == [name for name in os.environ if "AUTH" in name]
            assert not Path(token).parent.exists()
        finally:
            process.kill()


def _listening(pid):
    """The ports of a process's descendants."""
    ports = set()
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            ports |= {each.laddr.port for each in process.net_connections("inet") if each.status == "LISTEN"}
    return sorted(ports)


def test_another_account_is_refused_at_each_port_and_at_the_folder(victim):
    """Each of Ray's five kinds of server says UNAUTHENTICATED, its HTTP server 401; without the token all answer."""
    process, token = victim
    found = json.loads(
        as_another_account(
            STRANGER, token.parent, token, *_listening(process.pid),
            imports=f"import encodings.idna, grpc, grpc._channel, http.client, json, os, sys\nCALLS = {CALLS}",
        )
    )  # fmt: skip
    assert found.pop(str(token.parent)) == found.pop(str(token)) == "kept out"
    for call in CALLS:
        answers = {answer for where, answer in found.items() if where.endswith(call)}
        assert "UNAUTHENTICATED" in answers
        # what is no such server, or speaks no gRPC
        assert answers <= {"UNAUTHENTICATED", "UNIMPLEMENTED", "UNAVAILABLE"}, found
    assert {answer for where, answer in found.items() if where.endswith("HTTP")} == {401}


def test_the_folder_is_ours_alone_and_the_token_no_command_lines(victim):
    process, token = victim
    assert [stat.S_IMODE(path.stat().st_mode) for path in (token.parent, token)] == [0o700, 0o600]
    secret = token.read_text()
    assert len(secret) == 64
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            assert secret not in " ".join(child.cmdline())


def test_sockets_fit_where_the_folder_of_temporary_files_is_deep(tmp_path, monkeypatch):
    """Linux takes 107 bytes; Ray's session and its longest socket have 64, the slash before them among them."""
    session = "/session_2026-11-28_11-48-16_589870_4194304/sockets/plasma_store"
    for usual, taken in ((Path("/tmp"), "/tmp"), (tmp_path / ("deep" * 12), "/tmp")):  # noqa: S108 - what is tested
        usual.mkdir(exist_ok=True, parents=True)
        monkeypatch.setattr("tempfile.gettempdir", lambda usual=usual: str(usual))
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        with cluster._private_folder() as folder:
            assert str(folder.parent) == taken
            assert len(os.fsencode(f"{folder}/ray{session}")) <= 107
        assert not folder.exists()


# -- somebody else's cluster -------------------------------------------------------------------------------------------


class _Head(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
    """What a cluster's head says to whoever asks whether it is alive.  token: which it asks for, or ""."""

    def __init__(self, token):
        self.token = token

    def CheckAlive(self, _, context):  # noqa: N802 - Ray's name
        if self.token and dict(context.invocation_metadata()).get("authorization") != f"Bearer {self.token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return gcs_service_pb2.CheckAliveReply(ray_version=ray.__version__)


@pytest.fixture
def head():
    """Starts heads; returns their addresses."""
    servers = []

    def start(token):
        servers.append(grpc.server(futures.ThreadPoolExecutor(1)))
        gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(_Head(token), servers[-1])
        port = servers[-1].add_insecure_port("127.0.0.1:0")
        servers[-1].start()
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None)


@pytest.fixture
def our_token():
    """Lets Ray take a token from the environment."""
    before = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("RAY_AUTH")}
    yield lambda token: cluster._read_authentication({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token})
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        os.environ.pop(name, None)
    cluster._read_authentication(before)


def test_a_cluster_that_asks_for_no_token_is_told_first_of_all(head, capsys):
    address = head("")
    commands._check_engine(commands.Engine(ray_address=address), sys.stdout)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: the Ray cluster at {address} asks for no token: whoever reaches it")
    assert "RAY_AUTH_MODE=token" in line


def test_a_cluster_with_our_token_is_no_news_and_one_with_another_is_refused(head, our_token):
    address = head("right")
    for token in ("", "wrong"):
        if token:
            our_token(token)
        with pytest.raises(UserError, match="asks for a token and does not take ours; set RAY_AUTH_MODE=token"):
            cluster.check_address(address)
    our_token("right")
    assert cluster.check_address(address) == ""
