"""What a stranger may do to a front door: connections that say nothing, or slowly, or never read, till told to stop."""

import contextlib
import resource
import socket
import ssl
import threading

FILES = 4096
LINE = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: localhost\r\n"
SLOW_HEADER, SLOW_BODY = LINE, LINE + b"Content-Length: 1000000\r\n\r\n"
NEVER_READ = b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20_000


@contextlib.contextmanager
def many_files():
    """Room for a thousand sockets in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(FILES, hard)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def idle(port, number):
    """So many connections, of which none ever says a word."""
    return [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(number)]


def is_closed(connection):
    """Whether the other side has hung up; what it said before is read."""
    connection.setblocking(False)
    try:
        while connection.recv(4096):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def hung_up_on(connections):
    """How many of them the other side has closed."""
    return sum(is_closed(connection) for connection in connections)


class Pest:
    """Sends what it has with TLS, then a byte each half second; comes again whenever it is hung up on."""

    def __init__(self, port, words):
        self._port, self._words, self._over = port, words, threading.Event()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.check_hostname, self._context.verify_mode = False, ssl.CERT_NONE
        self.visits = 0
        self._thread = threading.Thread(target=self._visit_again, daemon=True)
        self._thread.start()

    def stop(self):
        """Let it be; returns when it has gone."""
        self._over.set()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _visit_again(self):
        while not self._over.is_set():
            self.visits += 1
            with contextlib.suppress(OSError):
                self._visit()
            self._over.wait(0.5)

    def _visit(self):
        with (
            socket.create_connection(("127.0.0.1", self._port), timeout=5) as raw,
            self._context.wrap_socket(raw) as line,
        ):
            line.sendall(self._words)  # of what is never read a part only: it times out
            while not self._over.wait(0.5):
                line.sendall(b"x")
