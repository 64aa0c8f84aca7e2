"""What a client says of a server that is not the one it means, before anything of the federation is sent."""

import contextlib
import datetime as dt
import http.server
import socket
import ssl
import threading

import pytest

from clients.flower.handshake import examine
from common.errors import UserError
from common.system.certs import read_client_folder
from common.system.processes import free_port
from simulation.admin import certs as new_certs

OURS, OTHER = "127.0.0.1", "fl.example.org"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("certs") / "tls"
    new_certs.make_folder(made, [OTHER], ["celeba"])
    return made


@pytest.fixture
def tls(folder):
    return read_client_folder(folder / "celeba")


class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        return


class Quiet(http.server.ThreadingHTTPServer):
    def handle_error(self, *_):
        return  # a handshake that the other side broke off


@contextlib.contextmanager
def serving(folder=None):
    """The port of a server, with the TLS of that folder or in plain text."""
    server = Quiet(("127.0.0.1", 0), Healthy)
    if folder:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.crt", folder / "server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def said(port, tls, host=OURS):
    with pytest.raises(UserError) as found:
        examine(host, port, tls)
    assert "\n" not in str(found.value)
    assert f"{host}:{port}" in str(found.value)
    return str(found.value)


def test_the_right_server_is_accepted(folder, tls):
    with serving(folder) as port:
        examine(OURS, port, tls)
        examine("localhost", port, tls)
    with serving() as port:
        examine(OURS, port, None)


def test_another_authority_is_told(tls, tmp_path):
    new_certs.make_folder(tmp_path / "tls", [OTHER], ["celeba"])
    with serving(tmp_path / "tls") as port:
        assert "did not issue" in said(port, tls)


def test_another_name_is_told(folder, tls, monkeypatch):
    monkeypatch.setattr(new_certs, "LOOPBACK", ("localhost",))
    monkeypatch.setattr(new_certs, "_stamp", lambda: "former")
    with moved_aside(folder):
        new_certs.renew_server(folder, [OTHER])
        with serving(folder) as port:
            assert "for another name than 127.0.0.1" in said(port, tls)
            examine("localhost", port, tls)


@pytest.mark.parametrize(("days", "words"), [(+2, "not valid yet"), (-500, "expired")])
def test_another_time_is_told(folder, tls, monkeypatch, days, words):
    then = dt.datetime.now(dt.UTC) + dt.timedelta(days=days)
    monkeypatch.setattr(new_certs, "_now", lambda: then)
    with moved_aside(folder):
        new_certs.renew_server(folder, [])
        with serving(folder) as port:
            assert words in said(port, tls)


def test_plain_text_and_tls_are_told_apart(folder, tls):
    with serving() as port:
        assert "speaks plain text" in said(port, tls)
    with serving(folder) as port:
        assert "speaks TLS; give --tls DIR" in said(port, None)


def test_a_server_that_has_gone_or_says_nothing_is_waited_for(tls, monkeypatch):
    examine(OURS, free_port(), tls)
    examine(OURS, free_port(), None)
    monkeypatch.setattr("clients.flower.handshake.WITHIN_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        examine(OURS, silent.getsockname()[1], tls)
        examine(OURS, silent.getsockname()[1], None)


@contextlib.contextmanager
def moved_aside(folder):
    """The server's pair comes back afterwards."""
    kept = {name: (folder / name).read_bytes() for name in ("server.crt", "server.key")}
    try:
        yield
    finally:
        for path in folder.glob("server.*.*"):
            path.unlink()
        for name, content in kept.items():
            (folder / name).write_bytes(content)
            (folder / name).chmod(0o600)
