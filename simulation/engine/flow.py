"""How messages flow through Flower's simulation engine: as many at a time as the actors need, in the order of sending.

The engine asks each of its N nodes ten times a second whether it has a message, by a look at all messages: with 1,000
clients seconds of work, and in an order of its own.  Replies wait in memory until the round loop takes them in the
order of names; so what is out of order, or sent long before an actor is free, costs a model's size of memory each.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from pickle import PickleBuffer
from queue import Queue
from typing import Any, Final, SupportsIndex

from flwr.app import Array, Message
from flwr.common import now
from flwr.server.superlink.fleet.vce import vce_api

from common.protocol import wire
from server.exchange.mailbox import Mailbox

LOOK_EVERY_S: Final = 0.01
BUFFERS_PROTOCOL: Final = 5  # of pickle, the first that can leave buffers where they are
LARGE_BYTES: Final = 2**16


class WindowedMailbox:
    """A Mailbox that holds back messages with a model while `window` of them are on their way or unread."""

    def __init__(self, mailbox: Mailbox, window: int) -> None:
        """mailbox: the engine's.  window: at least the number of actors, or some would be idle."""
        self._mailbox, self._window = mailbox, window
        self._held: deque[tuple[str, Message]] = deque()
        self._sent: dict[str, str] = {}  # our id -> the engine's, of messages without a reply yet
        self._heavy: set[str] = set()  # those of `_sent` that count
        self._count = 0

    def node_ids(self) -> list[int]:
        """The nodes that are connected now."""
        return self._mailbox.node_ids()

    def send(self, messages: Iterable[Message]) -> list[str]:
        """Accept all messages, and send as many as may be on their way.

        A new model goes out only when the loop is done with the one before, so what is still held is never sent.
        """
        messages = list(messages)
        if any(wire.ARRAYS in message.content for message in messages):
            self._held.clear()
            self._heavy.clear()
        ids = []
        for message in messages:
            self._count += 1
            ids.append(str(self._count))
            if wire.ARRAYS in message.content:
                self._held.append((ids[-1], message))
            else:
                self._send(ids[-1], message)
        self._refill()
        return ids

    def receive(self, message_id: str, deadline: float | None = None) -> Message | None:
        """The reply to that message, or None while there is none."""
        sent = self._sent.get(message_id, "")
        reply = self._mailbox.receive(sent, deadline) if sent else None
        if reply is not None:
            del self._sent[message_id]
            self._heavy.discard(message_id)
            self._refill()
        return reply

    def is_short(self, _message_id: str) -> bool:
        """Not known, and not needed: clients of a simulation answer when they are done."""
        return False

    def _refill(self) -> None:
        while self._held and len(self._heavy) < self._window:
            message_id, message = self._held.popleft()
            self._send(message_id, message)
            self._heavy.add(message_id)

    def _send(self, message_id: str, message: Message) -> None:
        self._sent[message_id] = next(iter(self._mailbox.send([message])), "")


def hand_out(state: Any, queue: "Queue[Message]", _nodes: object, f_stop: threading.Event) -> None:  # noqa: ANN401
    """Stands in for the engine's `add_messages_to_queue`: one look at all messages, oldest first.

    state: Flower's InMemoryLinkState.
    """
    while not f_stop.is_set():
        with state.lock:
            new = [m for m in state.message_ins_store.values() if m.metadata.delivered_at == ""]
            for message in new:
                message.metadata.delivered_at = now().isoformat()
        for message in new:
            queue.put(message)
        f_stop.wait(LOOK_EVERY_S)


def share_buffers() -> None:
    """Let Ray keep large arrays of messages in its shared memory as they are, for this process's sending.

    Pickled with the rest, a model is copied twice more each way.  What is received so is a read-only view, which holds
    its place in the shared memory until it is dropped.
    """
    Array.__reduce_ex__ = _taken_apart  # type: ignore[assignment]


def _taken_apart(array: Array, protocol: SupportsIndex) -> tuple[Any, ...]:
    if protocol.__index__() < BUFFERS_PROTOCOL or len(array.data) < LARGE_BYTES:
        return put_together, (array.dtype, array.shape, array.stype, bytes(array.data))
    return put_together, (array.dtype, array.shape, array.stype, PickleBuffer(array.data))


def put_together(dtype: str, shape: tuple[int, ...], stype: str, data: Any) -> Array:  # noqa: ANN401
    """The inverse, at the other end; data: bytes, or a view of Ray's memory."""
    array = Array(dtype=dtype, shape=shape, stype=stype, data=b"")
    array.data = data  # which the constructor refuses when it is a view
    return array


@contextlib.contextmanager
def handing_out() -> Iterator[None]:
    """In here the engine hands out messages as `hand_out` does."""
    share_buffers()
    flowers = vce_api.add_messages_to_queue
    vce_api.add_messages_to_queue = hand_out  # type: ignore[assignment]
    try:
        yield
    finally:
        vce_api.add_messages_to_queue = flowers
