"""What the SuperNode's calls do over a bad wire, and that what is put into Flower is what Flower uses."""

import inspect
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
from flwr.supercore import heartbeat
from flwr.supercore.retry import http_retry, make_simple_http_retry_invoker
from flwr.supernode import fleet_http_connection
from flwr.supernode.fleet_http_client import FleetHttpClient

from clients.flower import patches
from clients.flower.patches import HEARTBEAT_INTERVAL_S, LONGEST_RETRY_PAUSE_S, hold_on
from tests.relay import Relay


@pytest.fixture
def held_on(monkeypatch):
    """Flower's modules mended, until the test is over."""
    for module, name in (
        (http_retry, "MAX_RETRY_DELAY"), (fleet_http_connection, "make_simple_http_retry_invoker"),
        (heartbeat, "exponential"), (heartbeat, "HEARTBEAT_DEFAULT_INTERVAL"), (FleetHttpClient, "PushObject"),
        (threading, "excepthook"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, getattr(module, name))
    hold_on()


def caused(error, cause):
    error.__cause__ = cause
    return error


CUT_IN_A_HANDSHAKE = (
    httpx.ConnectError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol (_ssl.c:1006)"),
    httpx.ConnectTimeout("_ssl.c:983: The handshake operation timed out"),
)


@pytest.mark.parametrize("error", CUT_IN_A_HANDSHAKE, ids=repr)
@pytest.mark.usefixtures("held_on")
def test_a_handshake_that_was_cut_off_is_tried_again(error):
    assert make_simple_http_retry_invoker().should_giveup(error), "Flower holds on by itself now"
    invoker = fleet_http_connection.make_simple_http_retry_invoker()
    invoker.wait_function = lambda _: None
    said = iter([error, error])

    def call():
        for wrong in said:
            raise wrong
        return "done"

    assert invoker.invoke(call) == "done"


@pytest.mark.usefixtures("held_on")
def test_a_certificate_that_is_not_the_servers_is_not():
    wrong = caused(httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED]"), ssl.SSLCertVerificationError(1, "no"))
    assert fleet_http_connection.make_simple_http_retry_invoker().should_giveup(wrong)


@pytest.mark.usefixtures("held_on")
def test_pauses_between_tries_and_beats_are_short():
    invoker = fleet_http_connection.make_simple_http_retry_invoker()
    pauses = invoker.wait_gen_factory()
    assert max(next(pauses) for _ in range(20)) == LONGEST_RETRY_PAUSE_S
    sender = heartbeat.HeartbeatSender(lambda: True)
    pauses = sender._retry_invoker.wait_gen_factory()
    assert max(next(pauses) for _ in range(20)) == LONGEST_RETRY_PAUSE_S
    assert heartbeat.HEARTBEAT_CALL_TIMEOUT < HEARTBEAT_INTERVAL_S == heartbeat.HEARTBEAT_DEFAULT_INTERVAL
    assert "HEARTBEAT_DEFAULT_INTERVAL - HEARTBEAT_CALL_TIMEOUT" in inspect.getsource(heartbeat)
    # What the server is told stays: so long after a beat it takes the node for gone.
    assert fleet_http_connection.HEARTBEAT_DEFAULT_INTERVAL == 30


def test_the_loop_uses_what_is_mended():
    source = inspect.getsource(fleet_http_connection.http_request_response)
    for part in ("= make_simple_http_retry_invoker()", "client.PushObject, request", "HeartbeatSender(send_node_hear"):
        assert part in source
    assert "lambda: exponential(max_delay=20)" in inspect.getsource(heartbeat.HeartbeatSender)
    assert "exponential(max_delay=MAX_RETRY_DELAY)" in inspect.getsource(http_retry)


def test_a_part_whose_first_try_was_lost_on_the_way_back_counts_as_taken():
    taken = set()

    def server(_, request):
        """Takes each part once; the first time its word is lost."""
        if request.object_id in taken:
            return PushObjectResponse(stored=False)
        taken.add(request.object_id)
        raise httpx.ReadError("cut")

    push = patches._sure(server)
    part = PushObjectRequest(session_id="s", object_id="a")
    with pytest.raises(httpx.ReadError):
        push(None, part)
    assert push(None, part).stored
    assert not push(None, part).stored  # a refusal without a doubt is one


def test_the_process_ends_with_its_heart(monkeypatch):
    ended = []
    monkeypatch.setattr(patches.os, "_exit", ended.append)
    monkeypatch.setattr(patches.logging, "shutdown", lambda: None)
    monkeypatch.setattr(threading, "excepthook", patches._end_with_the_thread)

    def beat():
        raise RuntimeError("The SuperLink does not recognize this SuperNode.")

    for work in (beat, exit):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert ended == [1]


class Nodes(BaseHTTPRequestHandler):
    """Answers each request, over connections that stay open."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        return


@pytest.mark.usefixtures("held_on")
def test_a_peer_that_forgets_its_connections_costs_a_time_out():
    """As behind a router that was started anew: nobody tells the client, and what it says is lost."""
    invoker = fleet_http_connection.make_simple_http_retry_invoker()
    with ThreadingHTTPServer(("127.0.0.1", 0), Nodes) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Relay(to=server.server_address, delay_s=0) as relay:
            client = FleetHttpClient(f"http://{relay.address}", timeout=1.0)
            with client:
                client.PullMessages(PullMessagesRequest())
                relay.cut("loss")
                threading.Timer(0.1, relay.heal).start()
                invoker.invoke(client.PullMessages, PullMessagesRequest())
            assert relay.counts()["connections"] > 1
        server.shutdown()
