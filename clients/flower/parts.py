"""A model's way through the SuperNode's process, in which none of its bytes lie there twice.

The SuperNode keeps each message as objects; a model is in pieces of 5 MiB, each of which has its SHA-256 for a name.
Flower's own executor asks for them through the SuperNode's API and puts them together, and the way back is as long:
more than six models lie in one process.  Ours lives in that process (clients/flower/supernode.py).  So it takes the
objects where they lie, gives the pieces to the trainer as they are, and makes objects of the answer's as they come.
"""

import hashlib
import json
from collections import deque
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any, Protocol

from flwr.app import Array, ArrayRecord
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.inflatable import inflatable_utils
from flwr.supernode.nodestate import NodeStateFactory

HEAD_ENDS = b"\x00"
Children = dict[str, Any]  # what an object is made of, by its id: Flower's Array, ArrayChunk and the like


class NodeState(Protocol):
    """What is asked of the SuperNode's state, an object of Flower's."""

    def get_object(self, run_id: int, object_id: str) -> bytes | None:
        """An object's bytes: b"" while they are on their way, None where nobody knows it."""

    def store_object(self, run_id: int, session_id: str, object_id: str, object_content: bytes) -> bool:
        """Whether it was taken."""


class Wanted(Protocol):
    """Of Flower's `PullObjectRequest`."""

    run_id: int
    object_id: str


class Pushed(Wanted, Protocol):
    """Of Flower's `PushObjectRequest`."""

    session_id: str
    object_content: bytes


def body_of(object_content: bytes) -> bytes:
    """What comes after an object's head."""
    return object_content[object_content.find(HEAD_ENDS) + len(HEAD_ENDS) :]


class Store:
    """What the SuperNode of this process keeps, once it has begun."""

    def __init__(self) -> None:
        """Nobody has begun."""
        self.state: NodeState | None = None

    def follow(self) -> None:
        """Learn of it when it is made."""
        factory: Any = NodeStateFactory
        flowers = factory.state

        def state(made_by: Any) -> NodeState:  # noqa: ANN401
            found: NodeState = flowers(made_by)
            self.state = found
            return found

        factory.state = state


class ViewedChunk:
    """Stands in Flower's table for `ArrayChunk`, whose bytes are those of the object and no copy."""

    @classmethod
    def inflate(cls, object_content: bytes, children: Children | None = None) -> ArrayChunk:
        """As `ArrayChunk.inflate`."""
        if children:
            raise ValueError("a piece of an array has no parts")
        begin = object_content.find(HEAD_ENDS) + len(HEAD_ENDS)
        return ArrayChunk(memoryview(object_content)[begin:])


class ArrayInPieces:
    """Stands in Flower's table for `Array`, whose data is a deque of its pieces as they came."""

    @classmethod
    def inflate(cls, object_content: bytes, children: Children | None = None) -> Array:
        """As `Array.inflate`."""
        about: Any = json.loads(body_of(object_content))
        pieces = [child.data for child in (children or {}).values() if isinstance(child, ArrayChunk)]
        array = Array(dtype=about["dtype"], shape=tuple(about["shape"]), stype=about["stype"], data=b"")
        array.data = deque(pieces[number] for number in about["arraychunk_ids"])  # type: ignore[assignment]
        return array


class RecordOfPieces:
    """Stands in Flower's table for `ArrayRecord`, whose constructor takes bytes only."""

    @classmethod
    def inflate(cls, object_content: bytes, children: Children | None = None) -> ArrayRecord:
        """As `ArrayRecord.inflate`."""
        record = ArrayRecord()
        for key, name in json.loads(body_of(object_content)).items():
            record[key] = (children or {})[name]
        return record


def take_in_pieces() -> None:
    """From now on this process leaves a message's arrays in pieces."""
    table: dict[str, Any] = inflatable_utils.inflatable_class_registry
    table[ArrayChunk.__qualname__], table[Array.__qualname__] = ViewedChunk, ArrayInPieces
    table[ArrayRecord.__qualname__] = RecordOfPieces


class ReadyChunk(ArrayChunk):
    """A piece that is an object already: its content and its name are made once."""

    def __init__(self, piece: bytes) -> None:
        """piece: the bytes of the array."""
        head = f"{ArrayChunk.__qualname__}  {len(piece)}".encode() + HEAD_ENDS
        self.content = head + piece
        self.name = hashlib.sha256(self.content).hexdigest()
        super().__init__(memoryview(self.content)[len(head) :])

    def deflate(self) -> bytes:
        """The content."""
        return self.content

    @property
    def object_id(self) -> str:
        """The name."""
        return self.name


class Answered:
    """Of one answer the pieces that are ready, by their names, until they are given to the SuperNode."""

    def __init__(self) -> None:
        """None yet."""
        self.pieces: dict[str, bytes] = {}

    def read(self, connection: Connection, array: Array, num_bytes: int) -> None:
        """Make objects of an array's pieces as they come: a `clients.flower.trainer.Reader`."""
        chunks, taken = [], 0
        while taken < num_bytes:
            chunk = ReadyChunk(connection.recv_bytes())
            taken += len(chunk.data)
            self.pieces[chunk.name] = chunk.content
            chunks.append((chunk.name, chunk))
        array.__dict__["_chunks"] = chunks  # as Flower keeps them


class Inside:
    """A client of the SuperNode's API whose objects do not go through it."""

    def __init__(self, client: Any, state: NodeState, answered: Answered) -> None:  # noqa: ANN401
        """client: of the API, for everything else.  state: where the objects lie.  answered: whence they come."""
        self._client, self._state, self._answered = client, state, answered

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """All other calls."""
        return getattr(self._client, name)

    def PullObject(self, request: Wanted) -> SimpleNamespace:  # noqa: N802 - Flower's name
        """As the API answers, but the content is the one that lies there."""
        content = self._state.get_object(request.run_id, request.object_id)
        return SimpleNamespace(
            object_found=content is not None, object_available=bool(content), object_content=content or b""
        )

    def PushObject(self, request: Pushed) -> SimpleNamespace:  # noqa: N802
        """As the API answers; a piece is given away."""
        content = self._answered.pieces.pop(request.object_id, None) or request.object_content
        stored = self._state.store_object(request.run_id, request.session_id, request.object_id, content)
        return SimpleNamespace(stored=stored)
