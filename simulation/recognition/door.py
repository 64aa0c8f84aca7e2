"""What stands before the page and the API: who may ask, how often, and how much.

An ASGI application around another.  Nothing of a request reaches that one before its host, its token, its rate and its
size are in order; what is refused gets a status and one line of JSON that says why.
"""

import asyncio
import hmac
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

API: Final = "/api/"
MOST_KNOWN: Final = 10_000  # addresses whose rate is remembered; the ones that were silent longest are forgotten
WRONG_TOKEN_COST: Final = 10.0  # requests that a wrong token counts for
DISCARDED_BYTES: Final = 256 * 2**20  # of a body that is too large: a client that still sends would not see the answer
# No script, style or picture but our own, and no other page may frame or read ours.
HEADERS: Final[Mapping[str, str]] = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:;"
        " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "cache-control": "no-store",
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much may be asked."""

    body_bytes: int = 32 * 2**20
    picture_bytes: int = 12 * 2**20
    pictures: int = 20  # of one enrolment
    requests_a_minute: float = 120.0  # of one address
    at_once: int = 4  # requests with a body, in all: so many bodies are in memory
    body_within_s: float = 30.0


@dataclass(kw_only=True)
class _Bucket:
    """A token bucket."""

    left: float
    seen: float


class Refused(Exception):
    """A request is turned away."""

    def __init__(self, status: int, reason: str, *, retry_after_s: int = 0) -> None:
        super().__init__(reason)
        self.status, self.reason, self.retry_after_s = status, reason, retry_after_s


@dataclass(kw_only=True)
class Door:
    """The application behind it is asked only what may be asked.

    hosts: names and addresses, lower case and without port, under which it may be reached: a page of another name that
    leads to this address (DNS rebinding) is refused.  token: what each request to the API carries as a bearer, so that
    no other page and no other account of this machine can ask.
    """

    app: App
    hosts: frozenset[str]
    token: str = field(repr=False)
    limits: Limits = Limits()  # frozen
    clock: Callable[[], float] = time.monotonic
    _buckets: "OrderedDict[str, _Bucket]" = field(default_factory=OrderedDict)
    _inside: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = False

        async def sent(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        try:
            self._admit(scope)
            await self._let_in(scope, receive, sent)
        except Refused as refused:
            if not began:
                await _answer(sent, refused, rest=receive if refused.status == 413 and not _waits(scope) else None)

    def _admit(self, scope: Scope) -> None:
        """Raises Refused."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = _host_of(headers.get("host", ""))
        if host not in self.hosts:
            raise Refused(421, "this server does not answer to that host name; open the address that it printed.")
        origin = headers.get("origin", "")
        if origin and _host_of(origin.partition("://")[2]) not in self.hosts:
            raise Refused(403, "a page of another site asks; open the address that the server printed.")
        client = (scope.get("client") or ("", 0))[0]
        self._spend(client, 1.0)
        if scope["path"].startswith(API):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token.encode()):
                self._spend(client, WRONG_TOKEN_COST - 1.0)
                raise Refused(401, "the token is wrong or missing; it stands in the address that the server printed.")
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length) > self.limits.body_bytes:
            raise Refused(413, f"more than {self.limits.body_bytes // 2**20} MiB; send fewer or smaller pictures.")

    def _spend(self, client: str, cost: float) -> None:
        """Raises Refused where an address asks too often."""
        now, most = self.clock(), self.limits.requests_a_minute
        bucket = self._buckets.pop(client, None) or _Bucket(left=most, seen=now)
        bucket.left = min(most, bucket.left + (now - bucket.seen) * most / 60.0)
        bucket.seen = now
        self._buckets[client] = bucket
        while len(self._buckets) > MOST_KNOWN:
            self._buckets.popitem(last=False)
        if bucket.left < 1.0:
            wait_s = max(1, round((1.0 - bucket.left) * 60.0 / most))
            raise Refused(429, f"more than {most:g} requests a minute; wait {wait_s} s.", retry_after_s=wait_s)
        bucket.left -= cost

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises Refused."""
        if scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        if self._inside >= self.limits.at_once:
            raise Refused(503, "too many requests at once; try again in a second.", retry_after_s=1)
        self._inside += 1
        try:
            body = await self._body(receive)
            await self.app(scope, _replay(body, receive), send)
        finally:
            self._inside -= 1

    async def _body(self, receive: Receive) -> bytes:
        """The whole body, in memory only.  Raises Refused."""
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_within_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "the request was broken off.")
                    size += len(message.get("body", b""))
                    if size > self.limits.body_bytes:
                        told = f"more than {self.limits.body_bytes // 2**20} MiB; send fewer or smaller pictures."
                        raise Refused(413, told)
                    parts.append(message.get("body", b""))
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise Refused(408, f"the request did not come within {self.limits.body_within_s:g} s; try again.") from None


def _host_of(header: str) -> str:
    """The name or address of a Host header, without port and brackets, lower case."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body once, and then whatever comes."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replayed


def _waits(scope: Scope) -> bool:
    """Whether the client sends its body only when it is told to (RFC 9110, 10.1.1)."""
    return any(name.lower() == b"expect" for name, _ in scope["headers"])


async def _discard(receive: Receive) -> None:
    """Read what a client still sends, up to a bound, and keep nothing."""
    size = 0
    try:
        async with asyncio.timeout(20.0):
            while size < DISCARDED_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return
    except TimeoutError:
        return


async def _answer(send: Send, refused: Refused, rest: Receive | None) -> None:
    """rest: what of the body is still to come, for a client that looks at the answer only when it has sent everything.

    The answer is whole, and sent, before the rest is read: a client that stops in the middle gets it at once.
    """
    body = json.dumps({"error": refused.reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refused.retry_after_s:
        headers.append((b"retry-after", str(refused.retry_after_s).encode()))
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refused.status == 413:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": rest is not None})
    if rest is not None:
        await _discard(rest)
        await send({"type": "http.response.body", "body": b""})
