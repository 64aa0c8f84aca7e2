"""Who may ask what of the SuperLink on its own machine, where every account reaches its port.

The port carries three interfaces, and Flower judges the callers of two:

    Fleet      a site signs each request with its key, where there are keys.
    Runtime    AcquireTask is signed with the run's secret; every other call carries the token of a task.
    Control    lists, starts and stops runs, takes sites in and turns them out: for whoever asks.

So Control, and whatever else a SuperLink may serve, asks here for the secret of the run.  Runtime does not ask for it
a second time: the ServerApp would have to know it, and of all our processes that is the one that opens what the sites
sent; its token is good for its own task and no more.

The secret lies in a file of this user's (0600).  What is sent is made from it, so that the secret itself, with which
tasks are taken, never travels.
"""

import hmac
import os
import socket
import sys
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, Protocol

import httpx

from server.flower.superlink import UNREGISTERED

HEADER = "facefed-secret"
# The SuperLink routes by the same text, so it is judged as it is.
JUDGED_BY_FLOWER = ("/v1/fleet/", "/v1/runtime/")
HEALTH = "/health"
FAILED_TO_START = 3  # uvicorn's own

_Mapping = MutableMapping[str, Any]
_App = Callable[[_Mapping, Callable[[], Awaitable[_Mapping]], Callable[[_Mapping], Awaitable[None]]], Awaitable[None]]


def password(secret: bytes) -> str:
    """What is sent to prove that one knows the run's secret."""
    return hmac.digest(secret, b"facefed control", "sha256").hex()


class InFlight(Protocol):
    """Of Flower's `ProtobufRequestContext`: a request that is about to be sent."""

    @property
    def request(self) -> httpx.Request:
        """As httpx has it."""


class SendPassword:
    """Of a client of Control: lets each request prove that it comes from this run."""

    def __init__(self, secret: bytes) -> None:
        """secret: the run's."""
        self._password = password(secret)

    def intercept(self, context: InFlight, call_next: Callable[..., httpx.Response]) -> httpx.Response:
        """Add it to one request."""
        context.request.headers[HEADER] = self._password
        return call_next(context)


class WantPassword:
    """Before the SuperLink: refuses what nobody behind it would judge, unless the caller knows the run's secret."""

    def __init__(self, app: _App, secret: bytes) -> None:
        """app: the SuperLink's, an ASGI application.  secret: the run's."""
        self._app, self._expected = app, password(secret).encode()

    async def __call__(
        self,
        scope: _Mapping,
        receive: Callable[[], Awaitable[_Mapping]],
        send: Callable[[_Mapping], Awaitable[None]],
    ) -> None:
        """Pass a request on, or answer 401 before a byte of its body is read."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and self._passes(scope)):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            text = b"this interface is for the programs of the run only"
            headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(text)).encode())]
            await send({"type": "http.response.start", "status": httpx.codes.UNAUTHORIZED, "headers": headers})
            await send({"type": "http.response.body", "body": text})
        else:  # a SuperLink has no other kind
            await send({"type": f"{scope['type']}.close"})

    def _passes(self, scope: _Mapping) -> bool:
        path: str = scope["path"]
        if path == HEALTH or path.startswith(JUDGED_BY_FLOWER):
            return True
        given = [value for name, value in scope["headers"] if name == HEADER.encode()]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)


def serve_on(descriptors: Sequence[int], secret: bytes) -> None:
    """Let Flower's SuperLink in this process serve on sockets that are open already, and ask for the run's secret.

    Whoever started this process has them bound before anybody could read the port in a command line; a port that is
    only told would be there for any account of this machine to take.
    """
    import uvicorn

    # Not by uvicorn's own `fd`: it takes the socket for a local one, and leaves small packets waiting (Nagle).
    listeners = [socket.socket(fileno=os.dup(descriptor)) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)  # no program that this one starts shall have them
    program: Any = uvicorn  # Flower says uvicorn.run(app=..., ...)

    def run(*, app: _App, **settings: Any) -> None:  # noqa: ANN401 - uvicorn's
        server = uvicorn.Server(uvicorn.Config(WantPassword(app, secret), **settings))
        server.run(sockets=listeners)
        if not server.started:
            sys.exit(FAILED_TO_START)

    program.run = run


def let_keys_return() -> None:
    """A key that was turned out can be registered anew, as another node: Flower keeps it taken for ever."""
    from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
    from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
    from flwr.supercore.state.schema.linkstate_models import Node

    nodes: Any = Node.__table__

    def forget_in_memory(state: Any, key: bytes) -> None:  # noqa: ANN401 - Flower's
        with state.lock:
            node = state.nodes.get(state.node_public_key_to_node_id.get(key))
            if node is not None and node.status == UNREGISTERED:
                del state.node_public_key_to_node_id[key]

    def forget_in_database(state: Any, key: bytes) -> None:  # noqa: ANN401 - Flower's
        gone = nodes.update().where(nodes.c.public_key == key, nodes.c.status == UNREGISTERED)
        with state.session() as session:
            session.execute(gone.values(public_key=None))

    for kind, forget in ((InMemoryLinkState, forget_in_memory), (SqlLinkState, forget_in_database)):
        changed: Any = kind
        changed.create_node = _after(forget, changed.create_node)


def _after(forget: Callable[[Any, bytes], None], create_node: Callable[..., int]) -> Callable[..., int]:
    """Flower's create_node, once the key is free."""

    def create(state: Any, owner_aid: str, owner_name: str, public_key: bytes, *rest: Any, **named: Any) -> int:  # noqa: ANN401
        forget(state, public_key)
        return create_node(state, owner_aid, owner_name, public_key, *rest, **named)

    return create
