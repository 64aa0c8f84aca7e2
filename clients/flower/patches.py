"""What is changed inside Flower's SuperNode, in its process: it holds on over a bad network, and it looks in time.

What Flower gives up, puts off or takes for lost is done again (`hold_on`).  And its loop sleeps 3 s whenever the server
has no message, and looks each 0.5 s whether the answer is ready.  The message of a round comes a moment after the last
answer went, so nearly each round would wait for 3 s.  `Pace` stands in for the module `time` in that loop: where the
loop sleeps it tells apart what it waits for (`quicken`).

Each name is in docs/adr/0022-flowers-inside.md; tests pin what is done with it.
"""

import logging
import os
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import httpx
from flwr.supercore import heartbeat
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.retry import http_retry
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.fleet_http_client import FleetHttpClient

from common.errors import EXIT_FAILED

LONGEST_RETRY_PAUSE_S = 3  # Flower's own is 20 s: after a cut of half a minute as long again would pass
HEARTBEAT_INTERVAL_S = 10.0  # a beat every 3.5 to 4.5 s; the server takes a site for gone after 60 s without one
QUICK_RETRY_S = 0.1  # of an object that the other side is still sending; Flower's own is a second
ANSWER_POLL_S = 0.5  # Flower's: between two looks for the answer
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 3.0
FRACTION_WAITED = 0.1  # a look costs the server some milliseconds; half a minute after the last message: every 3 s

log = logging.getLogger("facefed.client")


class Part(Protocol):
    """Of Flower's `PushObjectRequest`."""

    session_id: str
    object_id: str


class Taken(Protocol):
    """Of Flower's `PushObjectResponse`."""

    stored: bool


def hold_on() -> None:
    """Mend Flower's SuperNode in this process, before it starts."""
    retrying: Any = http_retry
    retrying.MAX_RETRY_DELAY = LONGEST_RETRY_PAUSE_S
    connection: Any = fleet_http_connection
    connection.make_simple_http_retry_invoker = _patient(connection.make_simple_http_retry_invoker)
    beats: Any = heartbeat
    flowers_pauses = beats.exponential
    beats.exponential = lambda max_delay: flowers_pauses(max_delay=min(max_delay, LONGEST_RETRY_PAUSE_S))
    beats.HEARTBEAT_DEFAULT_INTERVAL = HEARTBEAT_INTERVAL_S
    fleet: Any = FleetHttpClient
    fleet.PushObject = _sure(fleet.PushObject)
    threading.excepthook = _end_with_the_thread


def _patient(make_invoker: Callable[[], Any]) -> Callable[[], Any]:
    """Flower gives a call up whose error speaks of TLS, even where a handshake was only cut off or late."""

    def make() -> Any:  # noqa: ANN401 - Flower's RetryInvoker
        invoker = make_invoker()
        flowers = invoker.should_giveup
        invoker.should_giveup = lambda error: not is_passing(error) and flowers(error)
        invoker.recoverable_exceptions = (httpx.TransportError, httpx.HTTPStatusError)
        return invoker

    return make


def is_passing(error: BaseException) -> bool:
    """Whether it is the wire's fault: another try may succeed, unlike one at a server with a wrong certificate."""
    if not isinstance(error, httpx.TransportError):
        return False
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return False
        cause = cause.__cause__ or cause.__context__
    return True


def _sure(push: Callable[[Any, Part], Taken]) -> Callable[[Any, Part], Taken]:
    """A part of an answer that is refused after a try whose result was lost was taken at that try.

    The server takes each part once; Flower takes the second refusal for a loss and throws the answer away.
    """
    in_doubt: set[tuple[str, str]] = set()

    def push_object(client: object, request: Part) -> Taken:
        part = (request.session_id, request.object_id)
        try:
            response = push(client, request)
        except httpx.HTTPError:
            in_doubt.add(part)
            raise
        response.stored |= part in in_doubt
        in_doubt.discard(part)
        return response

    return push_object


def _end_with_the_thread(dead: threading.ExceptHookArgs) -> None:
    """A SuperNode whose heart stopped would go on asking, and the server would have forgotten it; so it ends.

    A heart stops at a server that does not know the node: another one, at the old one's address.  There is nobody to
    say goodbye to, and Flower's way of ending by a signal can wait for ever (for a thread that it starts in between).
    """
    if dead.exc_type is SystemExit:
        return
    log.warning("the connection ends: %s", dead.exc_value)
    logging.shutdown()
    os._exit(EXIT_FAILED)


class Pace:
    """The `sleep` of a SuperNode's loop, and what its executor waits for and tells."""

    def __init__(self) -> None:
        """Nothing has come yet, and everything may."""
        self._work, self._done = threading.Event(), threading.Event()
        self._last_message = time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Sleep at most so long: until the answer is there, or for a part of how long no message has come."""
        if seconds > ANSWER_POLL_S:
            waited = time.monotonic() - self._last_message
            time.sleep(min(max(FIRST_PAUSE_S, FRACTION_WAITED * waited), LONGEST_PAUSE_S, seconds))
            return
        self._work.set()
        self._done.wait(seconds)
        self._done.clear()
        self._last_message = time.monotonic()

    def wait_for_work(self, seconds: float) -> None:
        """Wait until a message is there, or so long."""
        self._work.wait(seconds)
        self._work.clear()

    def tell_done(self) -> None:
        """The answer is there: whoever waits for it need not sleep on."""
        self._done.set()


def quicken(pace: Pace) -> None:
    """Put our pace into Flower's loop, and have it ask soon for what is on its way."""
    loop: Any = start_client_internal
    loop.time = pace
    defaults: Any = inflatable_utils.pull_objects.__kwdefaults__
    defaults["initial_backoff"] = QUICK_RETRY_S
