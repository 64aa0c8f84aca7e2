"""The relay of the tests carries bytes whole, late and in order, and fails in each of its ways."""

import contextlib
import socket
import threading
import time

import pytest

from tests.relay import Relay, RelayProcess

SOON_S = 0.3  # that long nothing comes, and it is taken for silence
PIECES = [bytes([n % 251]) * (n * 37 % 5000 + 1) for n in range(400)]


@pytest.fixture(scope="module")
def echo():
    """A server that says everything again."""

    def say_again(connection):
        with connection, contextlib.suppress(OSError):
            while piece := connection.recv(65536):
                connection.sendall(piece)

    def serve():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=say_again, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()
        listener.shutdown(socket.SHUT_RDWR)


def connect(relay):
    return socket.create_connection((relay.host, relay.port), timeout=60)


def say(line, words=b"x"):
    line.sendall(words)
    return line.recv(4096)


def say_for_ever(line):
    while True:
        assert say(line) == b"x"


def is_silent(line):
    line.settimeout(SOON_S)
    try:
        return line.recv(1) is None
    except TimeoutError:
        return True
    finally:
        line.settimeout(60)


@pytest.mark.parametrize("kind", [Relay, RelayProcess])
def test_bytes_arrive_whole_in_order_and_late_and_the_end_too(kind, echo):
    with kind(to=echo, delay_s=0.05) as relay, connect(relay) as line:
        began = time.monotonic()
        assert say(line) == b"x"
        assert time.monotonic() - began >= 0.1  # there and back
        sender = threading.Thread(target=lambda: [line.sendall(piece) for piece in PIECES])
        sender.start()
        back, whole = b"", b"".join(PIECES)
        while len(back) < len(whole):
            back += line.recv(65536)
        sender.join(60)
        assert back == whole
        line.shutdown(socket.SHUT_WR)
        assert line.recv(1) == b""
        assert relay.counts()["connections"] == 1


def test_a_reset_ends_what_is_open_and_what_comes_until_it_is_healed(echo):
    with Relay(to=echo, delay_s=0) as relay, connect(relay) as old:
        assert say(old) == b"x"
        relay.cut("reset")
        with pytest.raises(ConnectionResetError):
            old.recv(1)
        with pytest.raises(ConnectionError), connect(relay) as new:
            say(new)
        relay.heal()
        with connect(relay) as new:
            assert say(new) == b"x"
        assert relay.counts()["cut"] == 2


def test_silence_holds_everything_back_and_gives_it_when_it_ends(echo):
    with Relay(to=echo, delay_s=0) as relay, connect(relay) as old:
        assert say(old) == b"x"
        relay.cut("silence")
        with connect(relay) as new:
            for line in (old, new):
                line.sendall(b"held")
                assert is_silent(line)
            relay.heal()
            assert [old.recv(9), new.recv(9)] == [b"held", b"held"]


def test_what_a_loss_caught_stays_silent_for_ever(echo):
    with RelayProcess(to=echo, delay_s=0) as relay, connect(relay) as old:
        assert say(old) == b"x"
        relay.cut("loss")
        relay.heal()
        old.sendall(b"y")
        assert is_silent(old)
        with connect(relay) as new:
            assert say(new) == b"x"


def test_open_connections_are_cut_now_and_then(echo):
    with Relay(to=echo, delay_s=0, cuts_per_s=20, seed=1) as relay:
        for _ in range(3):
            with pytest.raises(ConnectionError), connect(relay) as line:
                say_for_ever(line)
        assert relay.counts()["cut"] >= 3


def test_a_server_that_is_away_is_a_reset():
    with socket.create_server(("127.0.0.1", 0)) as gone:
        nobody = gone.getsockname()
    with Relay(to=nobody, delay_s=0) as relay, pytest.raises(ConnectionResetError), connect(relay) as line:
        line.recv(1)
