"""Flower's Grid as the round loop uses it, with a limit to what a reply may become when Flower unpacks it.

Flower sends an array as pieces and a list of their numbers, and a piece may stand in the list more than once. So one
piece of 8 MiB and a list of a million zeros would be 8 TiB in the server's memory, before any check of ours sees it.
"""

import contextlib
import itertools
import json
import logging
import threading
import time
import typing
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, MessageType, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.serverapp import Grid
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import get_object_head_values_from_object_content

from server.flower.superlink import COUNTS_BYTES

log = logging.getLogger("facefed.server")

UNREADABLE = 501  # our error code in Flower's Error
UNDELIVERED = "Reply message objects are unavailable"  # Flower's words for a reply of which parts are missing
HEAD_ENDS = b"\x00"  # of an object
PUSHED_AT_ONCE = 4  # objects of which the bytes are made
QUICK_RETRY_S = 0.1  # of an object that is on its way into the SuperLink's store
SHORT_OBJECTS: Final = 3  # of a reply with one record and no array: the message, its content, the record
LEAST_PULL_S = 1.0  # a reply that is whole is never given up for what its transfer takes, even at the deadline


class _Limit(threading.local):
    """Of the reply that this thread unpacks."""

    most_bytes: int | None = None  # None: it unpacks none
    left = 0


_limit = _Limit()
Children = dict[str, Any]  # what an object is made of, by its id: Flower's Array, ArrayChunk and the like


def body_of(object_content: bytes) -> bytes:
    """What comes after an object's head."""
    return object_content[object_content.find(HEAD_ENDS) + len(HEAD_ENDS) :]


class ViewedChunk:
    """Stands in Flower's table for `ArrayChunk`, whose bytes are those of the object and no copy."""

    @classmethod
    def inflate(cls, object_content: bytes, children: Children | None = None) -> ArrayChunk:
        """As `ArrayChunk.inflate`."""
        _, inside, _ = get_object_head_values_from_object_content(object_content)
        if children or inside:
            raise ValueError("a piece of an array has no parts")
        return ArrayChunk(memoryview(object_content)[object_content.find(HEAD_ENDS) + len(HEAD_ENDS) :])


class BoundedArray:
    """Stands in Flower's table for `Array`, whose arrays it makes as long as the reply stays within its bytes.

    An array is put together once, and each piece given up as soon as it has its place: a reply lies in memory once.
    """

    @classmethod
    def inflate(cls, object_content: bytes, children: Children | None = None) -> Array:
        """As `Array.inflate`.  Raises ValueError when the reply's arrays are larger than any that was asked for."""
        if _limit.most_bytes is not None:
            _limit.left -= _claimed_bytes(object_content, children or {})
            if _limit.left < 0:
                raise ValueError(f"its arrays are more than {_limit.most_bytes} bytes")
        if not all(isinstance(child, ArrayChunk) for child in (children or {}).values()):
            raise ValueError("an array is made of other things than pieces")
        return _put_together(object_content, typing.cast("dict[str, ArrayChunk]", children or {}))


def _put_together(object_content: bytes, pieces: dict[str, ArrayChunk]) -> Array:
    about: Any = json.loads(body_of(object_content))
    _, names, _ = get_object_head_values_from_object_content(object_content)
    array = Array(dtype=about["dtype"], shape=tuple(about["shape"]), stype=about["stype"], data=b"")
    order = [pieces[names[number]] for number in about["arraychunk_ids"]]
    whole, begin = np.empty(sum(len(piece.data) for piece in order), dtype=np.uint8).data, 0
    for piece in order:
        here = whole[begin : begin + len(piece.data)]
        here[:] = piece.data
        piece.data = here  # whoever else has this piece finds it there
        begin += len(here)
    array.data = whole.toreadonly()  # type: ignore[assignment]  # which the constructor refuses
    return array


class RecordOfViews:
    """Stands in Flower's table for `ArrayRecord`, whose constructor takes bytes only."""

    @classmethod
    def inflate(cls, object_content: bytes, children: Children | None = None) -> ArrayRecord:
        """As `ArrayRecord.inflate`, which makes it of arrays without bytes."""
        arrays = {name: child for name, child in (children or {}).items() if isinstance(child, Array)}
        hollow: Children = {
            name: Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=b"")
            for name, array in arrays.items()
        }
        record = ArrayRecord.inflate(object_content, hollow)
        for key, name in json.loads(body_of(object_content)).items():
            record[key] = arrays[name]
        return record


def _claimed_bytes(object_content: bytes, children: Children) -> int:
    listed: Any = json.loads(body_of(object_content))["arraychunk_ids"]
    pieces = [children.get(name) for name in get_object_head_values_from_object_content(object_content)[1]]
    sizes = [len(piece.data) if isinstance(piece, ArrayChunk) else 0 for piece in pieces]
    return sum(sizes[number] for number in listed)


@contextlib.contextmanager
def bounded(model_bytes: int) -> Iterator[None]:
    """While it lasts, this thread refuses replies whose arrays are larger than a model and its counts.

    model_bytes: of the flat model as float32, the largest of the codecs.
    """
    table: dict[str, Any] = inflatable_utils.inflatable_class_registry
    table[Array.__qualname__], table[ArrayChunk.__qualname__] = BoundedArray, ViewedChunk
    table[ArrayRecord.__qualname__] = RecordOfViews
    _limit.most_bytes = _limit.left = model_bytes + COUNTS_BYTES
    try:
        yield
    finally:
        _limit.most_bytes = None


class GridMailbox:
    """A Mailbox over Flower's Grid."""

    def __init__(self, grid: Grid, *, tell: Callable[[int], None] = lambda _num_bytes: None) -> None:
        """grid: as the ServerApp got it.  tell: who else wants to know how large a model is, in bytes."""
        self._grid, self._tell = grid, tell
        self._model_bytes: int | None = None
        self._announced: dict[str, Any] = {}  # message id -> the SuperLink's word on a reply that is there
        self._asks = self._only_asks = False
        self.num_dropped = 0  # messages that answer nothing that was asked for

    def expect(self, model_bytes: int) -> None:
        """From now on a reply may hold a flat model of so many bytes, float32, beside its counts."""
        self._model_bytes = model_bytes
        self._tell(model_bytes)

    def node_ids(self) -> list[int]:
        """The nodes that are connected now."""
        return sorted(self._grid.get_node_ids())

    def send(self, messages: Iterable[Message]) -> list[str]:
        """Push all messages at once: equal arrays then travel to the SuperLink once."""
        return [message_id or "" for message_id in self._grid.push_messages(list(messages))]

    def receive(self, message_id: str, deadline: float | None = None) -> Message | None:
        """Pull one reply only, so that the others wait in the SuperLink's store and not in our memory."""
        _pull_until(deadline)
        try:
            with bounded(self._model_bytes) if self._model_bytes is not None else contextlib.nullcontext():
                found = self._own(message_id, self._grid.pull_messages([message_id]))
        except Exception as error:
            if not _is_of_the_bytes(error):
                raise
            return _unreadable(f"the reply cannot be unpacked: {type(error).__name__}: {error}")
        if found is not None and found.has_error() and UNDELIVERED in (found.error.reason or ""):
            return _unreadable("no answer: a reply was announced, and not all of it came")
        return found

    def is_short(self, message_id: str) -> bool:
        """Whether a reply is there that holds no model.

        The SuperLink says once that a reply is there and of how many objects, and then gives them: its word is kept
        for `receive`.
        """
        self._keep_words()
        if message_id not in self._announced:
            self._only_asks = self._asks
            try:
                if self._only_asks:
                    self._grid.pull_messages([message_id])
            finally:
                self._only_asks = False
        word = self._announced.get(message_id)
        return word is not None and sum(map(_num_objects, word.message_object_trees)) <= SHORT_OBJECTS

    def _keep_words(self) -> None:
        """Stand before Flower's call, where this Grid has one: a simulation's has none."""
        client: Any = getattr(self._grid, "_runtime_client", None)
        if client is None or self._asks:
            return
        flowers, self._asks = client.PullMessages, True

        def pull_messages(request: Any) -> Any:  # noqa: ANN401 - Flower's
            name = next(iter(request.message_ids), "")
            word = self._announced.pop(name, None) or flowers(request)
            if not self._only_asks or not word.messages_list:
                return word
            self._announced[name] = word
            return SimpleNamespace(messages_list=[], message_object_trees=[])

        client.PullMessages = pull_messages

    def _own(self, message_id: str, messages: Iterable[Message]) -> Message | None:
        """The reply to that message; Flower gives what a node sent to the SuperLink unasked beside it."""
        found = None
        for message in messages:
            if found is None and message.metadata.reply_to_message_id == message_id:
                found = message
                continue
            self.num_dropped += 1
            if self.num_dropped == 1:
                node = message.metadata.src_node_id
                log.warning("a message of node %d answers nothing that was asked; it and its like are dropped", node)
        return found


def _num_objects(tree: Any) -> int:  # noqa: ANN401 - Flower's
    return 1 + sum(_num_objects(child) for child in tree.children)


def _pull_until(deadline: float | None) -> None:
    """How long Flower's next pull waits for parts that are announced and not there; its own limit is two hours.

    deadline: a time.monotonic(), or None for what is there now.
    """
    left = 0.0 if deadline is None else deadline - time.monotonic()
    defaults: Any = inflatable_utils.pull_objects.__kwdefaults__
    defaults["max_time"] = max(left, LEAST_PULL_S)


def _is_of_the_bytes(error: Exception) -> bool:
    """Whether Flower failed on bytes that a client made up, and not on the way to the SuperLink."""
    kinds = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError)
    return isinstance(error, kinds) or type(error).__module__ == "google.protobuf.message"


def _unreadable(reason: str) -> Message:
    """What stands in for a reply of which Flower can make no message: an error, as for one that was never whole."""
    nobodys = Message(RecordDict(), 0, MessageType.QUERY)  # what was asked is not kept, and nobody asks for it here
    return Message(Error(code=UNREADABLE, reason=reason), reply_to=nobodys)


def push_in_turn() -> None:
    """Have the ServerApp make the bytes of a few objects at a time; Flower would make a second model, and then send."""
    flowers = inflatable_utils.push_object_contents_from_iterable

    def push(contents: Iterable[tuple[str, bytes]], push_object: Callable[[str, bytes], None], **options: int) -> None:
        left = iter(contents)
        while few := list(itertools.islice(left, PUSHED_AT_ONCE)):
            flowers(few, push_object, **options)

    utils: Any = inflatable_utils
    utils.push_object_contents_from_iterable = push


def ask_soon() -> None:
    """A reply is announced before its objects are whole; Flower would ask for them again after a second."""
    defaults: Any = inflatable_utils.pull_objects.__kwdefaults__
    defaults["initial_backoff"] = QUICK_RETRY_S
