"""nginx before the SuperLink: what it lets through, tried on a server that notes what it gets."""

import contextlib
import http.client
import http.server
import socket
import threading
import time

import pytest

from common.errors import UserError
from common.system.processes import free_port
from server.flower.front_door import LARGEST_BODY_MIB, Door, FrontDoor, find_nginx
from tests.conftest import skip_or_fail

pytestmark = pytest.mark.e2e

REFUSED = (
    "/", "/docs", "/openapi.json", "/v1/control/start-run", "/v1/runtime/acquire-task", "/v1/control/register-node",
    "/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run", "/v1/fleet/..%2fcontrol/start-run",
    "/v1/control/../fleet/get-run", "//v1/control/start-run", "/v1//control/start-run", "/v1/fleet/get-run?a=b",
    "/v1/fleet/get-run/", "/v1/fleet/", "/V1/fleet/get-run", "/health/", "/health%00", "/v1/fleet/a%0ab",
    "http://127.0.0.1/v1/control/start-run",
)  # fmt: skip


class Behind(http.server.BaseHTTPRequestHandler):
    """Stands in for the SuperLink."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, int]] = []  # noqa: RUF012 - one for the test, emptied by its fixture

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.seen.append((self.path, len(body)))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_):
        return


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    try:
        find_nginx()
    except UserError as error:
        skip_or_fail(str(error))
    behind = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Behind)
    serving = threading.Thread(target=behind.serve_forever, daemon=True)
    serving.start()
    at = Door(host="127.0.0.1", port=free_port(), superlink_port=behind.server_address[1], tls=None)
    with FrontDoor(at, tmp_path_factory.mktemp("door")) as opened:
        deadline = time.monotonic() + 60
        while not opened.is_open():
            assert opened.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield at
    assert opened.process.poll() is not None
    behind.shutdown()
    behind.server_close()
    serving.join(10)


@pytest.fixture(autouse=True)
def _nothing_seen_yet():
    Behind.seen.clear()


def ask(door, path, method="POST", body=b"x", headers=()):
    with contextlib.closing(http.client.HTTPConnection(door.host, door.port, timeout=60)) as connection:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in {"Host": "fl.example.org", "Content-Length": str(len(body)), **dict(headers)}.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        return connection.getresponse().status


def test_what_clients_need_gets_through(door):
    largest = b"x" * (LARGEST_BODY_MIB << 20)
    assert ask(door, "/health", "GET", b"") == 200
    assert ask(door, "/v1/fleet/push-object", body=largest) == 200
    assert Behind.seen == [("/health", 0), ("/v1/fleet/push-object", len(largest))]


@pytest.mark.parametrize("path", REFUSED)
def test_nothing_else_does(door, path):
    assert ask(door, path) in (400, 404)
    assert Behind.seen == []


def test_a_body_that_is_too_large_is_refused_by_its_header(door):
    assert ask(door, "/v1/fleet/push-object", body=b"", headers={"Content-Length": str(10 << 30)}.items()) == 413
    assert Behind.seen == []


def test_and_so_is_one_that_does_not_say_its_size(door):
    piece = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
    with socket.create_connection((door.host, door.port), timeout=60) as sender:
        sender.sendall(b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        with pytest.raises(OSError, match=r"reset|pipe"):  # hung up on
            send_for(sender, piece, 120.0)
    assert Behind.seen == []


def send_for(sender, piece, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        sender.sendall(piece)
