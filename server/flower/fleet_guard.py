"""What a site may say to the SuperLink: its own answers to what it was asked, whole, and no larger than was asked for.

Flower binds a request to the node that signed it, and believes whatever else stands there:

    PushMessages            takes a message of any sender to any node; one that answers nothing is an order to that
                            node.  The objects in its tree, of any number, are in the store before a byte of them came.
    PushObject              takes any bytes for them, as many as there are.
    PullObject              hands out, and
    ConfirmMessageReceived  deletes, any object whose id one knows.

`FleetGuard` stands before these calls.  It knows what each node was given, so it knows what it may answer, read and
confirm.  A reply lies with it, within a bound, until its last part is there and each is what its id and the tree say;
only then does Flower hear of it.  So the ServerApp sees whole replies only, and no tree can spoil another's: ids of
small parts (a histogram of zeros) can be guessed, and Flower would take the children that the first one names.
"""

import gc
import hashlib
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NoReturn

from flwr.proto.fleet_pb2 import PushMessagesResponse
from flwr.proto.message_pb2 import PushObjectResponse
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable.inflatable_object import get_object_head_values_from_object_content

from server.flower import fleet_messages as say
from server.flower.superlink import COUNTS_BYTES

log = logging.getLogger("flwr")  # the SuperLink's

MOST_ASKED = 32  # messages of a node that it may still answer: it is asked one at a time, the others are out of date
MOST_UNREAD = 2  # whole replies of a node in the store; the ServerApp reads one before it asks for the next
MOST_WORDS_BYTES = 2**20  # of a reply's announcement, which holds the words of an error
SOME_OBJECTS = 64  # a reply to training has 10, and one for each 5 MiB of its model
BYTES_OF_AN_OBJECT = 2**20
UNKNOWN_MODEL_BYTES = 2**30  # until the ServerApp has said how large its model is
MOST_THROWN_AWAY_BYTES = 2**25
MOST_LINES = 1000  # without keys a site may call itself any node
TRAIN = "train"  # the only kind of message whose reply holds a model
OBJECT_ID = re.compile(r"[0-9a-f]{64}")
SAYS = "of a site, is refused: it"


@dataclass
class _Asked:
    """A message that a node was given."""

    run_id: int
    sender: int  # the SuperLink's own node, whom an answer is for
    kind: str
    expires: float  # a time.time(), as Flower's
    objects: frozenset[str]  # its parts, until it is confirmed
    answered: str = ""  # the id of the reply that came whole


@dataclass
class _Reply:
    """A reply while its parts come."""

    request: say.PushMessagesRequest  # as it was announced
    asked: _Asked
    most_bytes: int
    children: dict[str, tuple[str, ...]]  # of each object
    parts: dict[str, say.PushObjectRequest] = field(default_factory=dict)
    num_bytes: int = 0
    session: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def message_id(self) -> str:
        return str(self.request.messages_list[0].metadata.message_id)


class FleetGuard:
    """Stands in for five of Flower's handlers; whatever they raise is raised here too."""

    def __init__(self, handlers: Any, model_bytes: Callable[[], int | None]) -> None:  # noqa: ANN401 - Flower's module
        """handlers: Flower's own.  model_bytes: of the run's flat model as float32, None while nobody has said."""
        self._handlers, self._model_bytes = handlers, model_bytes
        self._lock = threading.Lock()
        self._asked: dict[int, dict[str, _Asked]] = {}  # by node and message id, the newest last
        self._making: dict[int, _Reply] = {}  # by node
        self._taken: dict[int, _Reply] = {}  # by node: its last whole reply, without its parts
        self._thrown_away = 0  # bytes that were refused since Python last looked for cycles
        self._unread: dict[int, list[str]] = {}  # by node: replies that may be in the store, the newest last

    def pull_messages(
        self, request: say.PullMessagesRequest, state: object, store: say.ObjectStore
    ) -> say.PullMessagesResponse:
        """Flower's; what it hands out is what this node may answer, and whose objects it may pull."""
        response: say.PullMessagesResponse = self._handlers.pull_messages(request=request, state=state, store=store)
        with self._lock:
            for message, tree in zip(response.messages_list, response.message_object_trees, strict=True):
                about, asked = message.metadata, self._asked.setdefault(request.node.node_id, {})
                asked[about.message_id] = _Asked(
                    run_id=about.run_id, sender=about.src_node_id, kind=about.message_type,
                    expires=about.created_at + about.ttl, objects=frozenset(_ids(tree)),
                )  # fmt: skip
                while len(asked) > MOST_ASKED:
                    del asked[next(iter(asked))]
        return response

    def pull_object(self, request: say.PullObjectRequest, state: object) -> object:
        """Flower's, for an object of a message that this node was given and has not confirmed."""
        with self._lock:
            asked = self._asked.get(request.node.node_id, {})
            if not any(request.object_id in message.objects for message in asked.values()):
                _refuse(request.node.node_id, "asks for an object of no message to it")
        response: object = self._handlers.pull_object(request=request, state=state)
        return response

    def confirm_message_received(
        self, request: say.ConfirmMessageReceivedRequest, state: object, store: say.ObjectStore
    ) -> object:
        """Flower's, for a message that this node was given."""
        with self._lock:
            asked = self._asked.get(request.node.node_id, {}).get(request.message_object_id)
            if asked is None:
                _refuse(request.node.node_id, "confirms a message that it was not given")
            asked.objects = frozenset()
        response: object = self._handlers.confirm_message_received(request=request, state=state, store=store)
        return response

    def push_messages(self, request: say.PushMessagesRequest, state: object) -> PushMessagesResponse:  # noqa: ARG002
        """Which parts of a reply are wanted: all, each time that it is announced, and none once it is whole or late.

        A node that did not hear it asks again; once the ServerApp has seen the reply Flower would say none, the node
        would take it for sent, and the ServerApp would wait for its parts.
        """
        node, now = request.node.node_id, time.time()
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            _refuse(node, "announces other than one message and its objects")
        about, tree = request.messages_list[0].metadata, request.message_object_trees[0]
        with self._lock:
            self._making = {other: reply for other, reply in self._making.items() if reply.asked.expires > now}
            asked = self._asked.get(node, {}).get(about.reply_to_message_id)
            if asked is None:
                _refuse(node, "sends what is no answer to a message that it was given")
            _check_about(node, about, asked)
            if asked.answered or asked.expires <= now:
                return PushMessagesResponse(results={about.message_id: 0})
            reply = self._making.get(node)
            if reply is None or reply.message_id != about.message_id:
                if request.messages_list[0].ByteSize() > MOST_WORDS_BYTES:
                    _refuse(node, f"announces a reply by more than {MOST_WORDS_BYTES} bytes")
                most = self._most_bytes(asked.kind)
                reply = _Reply(request, asked, most, _children(node, tree, about.message_id, most))
                replaced, self._making[node] = self._making.get(node), reply
                self._throw_away(replaced.num_bytes if replaced else 0)
        return PushMessagesResponse(
            results={about.message_id: 0}, objects_to_push=list(reply.children), session_id=reply.session
        )

    def push_object(self, request: say.PushObjectRequest, state: say.LinkState) -> PushObjectResponse:
        """Take a part of the reply that this node has announced; with the last one Flower gets all of it.

        A part that is refused is not stored, which is no error: SuperNode and log need none for each part.
        """
        try:
            return self._take(request, state)
        except _Refusal as refusal:
            log.error("%s", refusal.message)  # noqa: TRY400 - nobody wants to see where
            self._throw_away(len(request.object_content))
            return PushObjectResponse(stored=False)

    def _take(self, request: say.PushObjectRequest, state: say.LinkState) -> PushObjectResponse:
        node, name = request.node.node_id, request.object_id
        with self._lock:
            taken, reply = self._taken.get(node), self._making.get(node)
            if taken is not None and taken.session == request.session_id and name in taken.children:
                return PushObjectResponse(stored=True)  # the word that it arrived was lost
            if reply is None or reply.session != request.session_id or name not in reply.children:
                _refuse(node, "sends an object of no reply that it has announced")
        content = request.object_content
        _check_part(node, name, content, reply.children[name])  # takes a while, and not the others' time
        with self._lock:
            if self._making.get(node) is not reply:
                _refuse(node, "sends an object of a reply that is no longer waited for")
            if name not in reply.parts:
                reply.num_bytes += len(content)
                if reply.num_bytes > reply.most_bytes:
                    del self._making[node]
                    _refuse(
                        node, f"sends more than {reply.most_bytes} bytes, the most of a reply to {reply.asked.kind}"
                    )
                reply.parts[name] = request
            if len(reply.parts) < len(reply.children):
                return PushObjectResponse(stored=True)
            del self._making[node]
            self._taken[node], reply.asked.answered = reply, reply.message_id
        self._hand_over(node, reply, state)
        return PushObjectResponse(stored=True)

    def _throw_away(self, num_bytes: int) -> None:
        """A request is part of a cycle in Flower's server, so its bytes go when Python looks for such: seldom."""
        self._thrown_away += num_bytes
        if self._thrown_away > MOST_THROWN_AWAY_BYTES:
            self._thrown_away = 0
            gc.collect()

    def _most_bytes(self, kind: str) -> int:
        """Twice the counts of a reply, for its names and numbers, and a model where it was asked for."""
        if kind != TRAIN:
            return 2 * COUNTS_BYTES
        known = self._model_bytes()
        return (UNKNOWN_MODEL_BYTES if known is None else known) + 2 * COUNTS_BYTES

    def _hand_over(self, node: int, reply: _Reply, state: say.LinkState) -> None:
        store: Any = state.object_store
        store.verify = False  # each part of a site's was hashed when it came, and the ServerApp is ours
        wanted: say.PushMessagesResponse = self._handlers.push_messages(request=reply.request, state=state)
        for name in dict.fromkeys(wanted.objects_to_push):
            part = reply.parts.pop(name)
            part.session_id = wanted.session_id
            self._handlers.push_object(request=part, state=state)
        reply.parts.clear()
        with self._lock:
            unread = [one for one in [*self._unread.get(node, []), reply.message_id] if one in store]
            for late in unread[:-MOST_UNREAD]:  # the ServerApp has long ceased to wait for it
                store.delete(late)
            self._unread[node] = unread[-MOST_UNREAD:]


def _check_about(node: int, about: say.Metadata, asked: _Asked) -> None:
    """Refuses what is not this node's own answer, the first, to the SuperLink."""
    if about.src_node_id != node:
        _refuse(node, "speaks in the name of another node")
    if about.dst_node_id != asked.sender:
        _refuse(node, "sends a message to another node")
    if about.run_id != asked.run_id:
        _refuse(node, "answers in another run")
    if asked.answered not in ("", about.message_id):
        _refuse(node, "answers a message a second time")


def _ids(tree: say.ObjectTree) -> list[str]:
    """Of all objects of a tree that the ServerApp made."""
    return [tree.object_id, *(name for child in tree.children for name in _ids(child))]


def _children(node: int, tree: say.ObjectTree, root: str, most_bytes: int) -> dict[str, tuple[str, ...]]:
    """The children of each object of a reply's tree, which is bounded, and says the same of an object each time.

    Flower keeps the children once for each id and makes a tree of that again: were an id's second mention a leaf, some
    dozens of objects could become a tree of 2 ** 50.
    """
    most = SOME_OBJECTS + most_bytes // BYTES_OF_AN_OBJECT
    children: dict[str, tuple[str, ...]] = {}
    seen, todo = 0, [tree]
    if tree.object_id != root:
        _refuse(node, "announces a message by the objects of another")
    while todo:
        one = todo.pop()
        seen += 1
        if seen + len(todo) + len(one.children) > most:
            _refuse(node, f"announces more than {most} objects")
        names = tuple(child.object_id for child in one.children)
        if not OBJECT_ID.fullmatch(one.object_id) or children.setdefault(one.object_id, names) != names:
            _refuse(node, "announces a tree of objects that cannot be")
        todo.extend(one.children)
    return children


def _check_part(node: int, name: str, content: bytes, children: tuple[str, ...]) -> None:
    """Refuses bytes that are not those of the id, or have other children than the tree says."""
    if hashlib.sha256(content).hexdigest() != name:
        _refuse(node, "sends an object under the id of another")
    try:
        _, inside, _ = get_object_head_values_from_object_content(content)
    except ValueError:  # of no form; of no text is a ValueError too
        _refuse(node, "sends an object of no form")
    if sorted(inside) != sorted(children):
        _refuse(node, "announces a tree of objects that is not that of its reply")


class _Refusal(FlowerError):
    """403; Flower writes the line into its log."""


def _refuse(node: int, reason: str) -> NoReturn:
    raise _Refusal(ApiErrorCode.NO_PERMISSIONS, f"node {node}, {SAYS} {reason}")


class _Once(logging.Filter):
    """Lets each line about a refusal through once: a site that tries without end must not fill the disk."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        line = record.getMessage()
        if SAYS not in line:
            return True
        new = line not in self._seen and len(self._seen) < MOST_LINES
        self._seen |= {line} if new else set()
        return new


def stand_guard(model_bytes: Callable[[], int | None]) -> None:
    """Put a `FleetGuard` into Flower's place.  model_bytes: as there."""
    from flwr.superlink.servicer.fleet import fleet_handlers

    handlers: Any = fleet_handlers
    flowers = SimpleNamespace(
        pull_messages=handlers.pull_messages,
        push_messages=handlers.push_messages,
        pull_object=handlers.pull_object,
        push_object=handlers.push_object,
        confirm_message_received=handlers.confirm_message_received,
    )
    guard = FleetGuard(flowers, model_bytes)
    handlers.pull_messages, handlers.push_messages = guard.pull_messages, guard.push_messages
    handlers.pull_object, handlers.push_object = guard.pull_object, guard.push_object
    handlers.confirm_message_received = guard.confirm_message_received
    log.addFilter(_Once())
