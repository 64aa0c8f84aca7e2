"""A proxy in the environment: this machine is reached without it, and one that stands in the way is named."""

import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny_federation import site_settings

from clients.flower import launch
from clients.flower.launch import ClientOptions, Launch
from common.errors import UserError
from common.system import processes, runtime
from common.tracking.sender import Sender
from simulation.admin import doctor

ROOT = Path(__file__).resolve().parents[2]
NOBODY = "http://127.0.0.1:9"  # a proxy that is not there
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
# Each library that speaks for us, as it reads the environment; the last address is another machine's.
ASK = """
import sys
from common.system.runtime import go_silent, reach_directly
if sys.argv[1] == "silent":
    go_silent()
import grpc, httpx, requests
def told(ask):
    try:
        return str(ask())
    except Exception as error:
        return type(error).__name__
for url in sys.argv[2:]:
    print(told(lambda: httpx.get(url, timeout=5).status_code), told(lambda: requests.get(url, timeout=5).status_code))
"""


class Well(BaseHTTPRequestHandler):
    """Answers 200 to everything, also as a proxy would that reaches everybody."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def __init__(self, host: str) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.asked: list[str] = []
        super().__init__((host, 0), Well)


@contextmanager
def serving(*hosts):
    servers = [Server(host) for host in hosts]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield servers
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


@pytest.fixture
def environment(monkeypatch):
    """No proxy, whatever this machine's own environment has; what a test sets goes with it."""
    for name in VARIABLES:
        for one in (name, name.upper()):
            monkeypatch.setenv(one, "")
            monkeypatch.delenv(one)
    return monkeypatch


def test_no_library_asks_a_proxy_for_this_machine(environment):
    environment.setenv("http_proxy", NOBODY)
    with serving("127.0.0.1", "::1") as (four, six):
        urls = [
            f"http://127.0.0.1:{four.server_port}/",
            f"http://localhost:{four.server_port}/",
            f"http://[::1]:{six.server_port}/",
        ]
        said = {}
        for how in ("silent", "as it is"):
            done = subprocess.run(
                [sys.executable, "-c", ASK, how, *urls], cwd=ROOT, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, done.stderr
            said[how] = done.stdout.splitlines()
    assert said["silent"] == ["200 200"] * 3
    assert set(said["as it is"]) == {"ConnectError ProxyError"}  # so the proxy would have been asked


def test_what_the_user_excepts_stays_excepted(environment):
    environment.setenv("no_proxy", "example.org, 10.0.0.7")
    runtime.reach_directly("127.0.0.5")
    runtime.reach_directly("127.0.0.5")
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "example.org,10.0.0.7,127.0.0.5"
    environment.setenv("no_proxy", "*")
    runtime.reach_directly("127.0.0.5")
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "*"


def test_which_proxy_stands_before_a_host(environment):
    assert processes.proxy_before("203.0.113.1") is None
    environment.setenv("HTTPS_PROXY", "http://me:hunter2@proxy.example.org:3128")
    environment.setenv("all_proxy", "other.example.org:1080")
    runtime.reach_directly(*runtime.LOOPBACK)
    found = processes.proxy_before("203.0.113.1", "https")
    assert str(found) == "the proxy http://***@proxy.example.org:3128 of HTTPS_PROXY"
    assert processes.proxy_before("203.0.113.1") == ("all_proxy", "http://other.example.org:1080")
    assert [processes.proxy_before(host) for host in ("127.0.0.1", "localhost", "::1")] == [None] * 3


class NoTrainer:
    def keep_alive(self) -> None:
        pass


def client(host, port, folder, *, timeout_s):
    options = ClientOptions(host=host, port=port, connect_timeout_s=timeout_s, once=False)
    said: list[str] = []
    made = Launch(site_settings("alpha", folder), options, said.append)
    made._give_up_at = time.monotonic() + timeout_s
    return made, said


def test_a_client_names_the_proxy_that_does_not_reach_its_server(environment, tmp_path):
    environment.setenv("http_proxy", NOBODY)
    made, said = client("203.0.113.1", 8000, tmp_path, timeout_s=2.0)
    with pytest.raises(UserError) as caught:
        made._wait_for_server(NoTrainer())
    line = str(caught.value)
    assert "no server at 203.0.113.1:8000 by way of the proxy http://127.0.0.1:9 of http_proxy within 2 s" in line
    assert "no_proxy=203.0.113.1" in line
    assert "the proxy" in said[0]


def test_a_client_says_that_its_servers_name_means_nothing_here(environment, tmp_path):
    """The name is one that never resolves (RFC 6761); no server is asked, as there is no address."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        environment.delenv(name, raising=False)
    made, said = client("fl.invalid", 8443, tmp_path, timeout_s=2.0)
    with pytest.raises(UserError) as caught:
        made._wait_for_server(NoTrainer())
    assert said[0] == (
        "no server at fl.invalid:8443 yet: this machine finds no address for the name fl.invalid; trying again"
    )
    assert "this machine finds no address for the name fl.invalid; correct --server" in str(caught.value)


def test_a_client_waits_for_its_server_by_way_of_the_proxy(environment, tmp_path):
    """Where a site's network lets nothing out but the proxy, a connection past it would never come about."""
    with serving("127.0.0.1") as (proxy,):
        environment.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
        made, said = client("203.0.113.1", 8000, tmp_path, timeout_s=5)
        made._wait_for_server(NoTrainer())
        assert proxy.asked == ["http://203.0.113.1:8000/health"]
    assert said == []


def test_the_doctor_and_the_sender_name_the_proxy(environment):
    environment.setenv("http_proxy", NOBODY)
    uri = "http://203.0.113.1:5000"
    [finding] = doctor._server(uri)
    assert "by way of the proxy http://127.0.0.1:9 of http_proxy; no_proxy=203.0.113.1" in finding.text
    sender = Sender.__new__(Sender)
    sender._uri = uri
    assert sender._reason(ConnectionRefusedError("refused")).endswith("of http_proxy")
    sender._uri = "http://127.0.0.1:5000"
    runtime.reach_directly(*runtime.LOOPBACK)
    assert sender._reason(ConnectionRefusedError("refused")) == "refused"


def test_the_doctor_reaches_any_address_of_this_machine(environment, monkeypatch):
    environment.setenv("http_proxy", NOBODY)
    monkeypatch.setattr(doctor, "_write_test", lambda uri: doctor.Finding(name="x", state=doctor.OK, text=uri))
    with serving("127.0.0.7") as (server,):
        first = next(iter(doctor._server(f"http://127.0.0.7:{server.server_port}")))
    assert (first.name, first.state) == ("reachable", doctor.OK)


@pytest.fixture
def silent_server():
    """Accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.mark.usefixtures("environment")
def test_a_client_gives_up_at_a_server_that_says_nothing(tmp_path, silent_server, monkeypatch):
    """The connect timeout ends it, wherever it is stuck: here the SuperNode tries for ever."""
    site = tmp_path / "alpha"
    made, _ = client("127.0.0.1", silent_server, tmp_path, timeout_s=2.0)
    monkeypatch.setattr(launch, "Trainer", lambda *_: _Context(tmp_path))
    (tmp_path / launch.KEY).write_bytes(b"key")
    monkeypatch.setattr(made, "_command", lambda _: [sys.executable, "-c", "import time; time.sleep(60)"])
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        made.run()
    assert time.monotonic() - started < 40
    assert "answers, but no connection came about within 2 s (--connect-timeout)" in str(caught.value)
    assert f"{site}/supernode.log" in str(caught.value)


class _Context(NoTrainer):
    def __init__(self, folder):
        self.folder = folder

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None
