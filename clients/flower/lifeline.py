"""Keeps a SuperNode at its work over a bad network: what Flower gives up, puts off or takes for lost is done again.

It uses names inside Flower, as clients/flower/supernode.py does (docs/adr/0017-executor.md); a test pins them.
"""

import logging
import os
import ssl
import threading
from collections.abc import Callable
from typing import Any

import httpx
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse

from common.errors import EXIT_FAILED

LONGEST_RETRY_PAUSE_S = 3  # Flower's own is 20 s: after a cut of half a minute as long again would pass
HEARTBEAT_INTERVAL_S = 10.0  # a beat every 3.5 to 4.5 s; the server takes a site for gone after 60 s without one

log = logging.getLogger("facefed.client")


def hold_on() -> None:
    """Mend Flower's SuperNode in this process, before it starts."""
    from flwr.supercore import heartbeat
    from flwr.supercore.retry import http_retry
    from flwr.supernode import fleet_http_connection
    from flwr.supernode.fleet_http_client import FleetHttpClient

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


def _sure(push: Callable[[Any, PushObjectRequest], PushObjectResponse]) -> Callable[..., PushObjectResponse]:
    """A part of an answer that is refused after a try whose result was lost was taken at that try.

    The server takes each part once; Flower takes the second refusal for a loss and throws the answer away.
    """
    in_doubt: set[tuple[str, str]] = set()

    def push_object(client: object, request: PushObjectRequest) -> PushObjectResponse:
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
