"""What is read of Flower's requests and answers between a node and the SuperLink, and nothing else of them.

Flower's own classes are made from its protocol's description and are private. Here is the part of each that
`fleet_guard.py` and `redelivery.py` rely on; `tests/unit/test_fleet_guard.py` finds each part in Flower's class of the
same name.
"""

from collections.abc import Sequence
from typing import Protocol


class Node(Protocol):
    """Who asks: signed, where there are keys."""

    node_id: int


class Metadata(Protocol):
    """What a message says of itself; times in seconds, `created_at` since 1970."""

    run_id: int
    message_id: str
    src_node_id: int
    dst_node_id: int
    reply_to_message_id: str
    message_type: str
    created_at: float
    ttl: float


class Message(Protocol):
    """A message without its content."""

    metadata: Metadata

    def ByteSize(self) -> int:  # noqa: N802 - Flower's name
        """Of the message as it is sent."""


class ObjectTree(Protocol):
    """An object by its id, the SHA-256 of its bytes in hexadecimal, and those that it is made of."""

    object_id: str
    children: Sequence["ObjectTree"]


class PullMessagesRequest(Protocol):
    """A node asks for its next message."""

    node: Node


class PullMessagesResponse(Protocol):
    """One message or none."""

    messages_list: Sequence[Message]
    message_object_trees: Sequence[ObjectTree]


class PushMessagesRequest(Protocol):
    """A node announces a reply."""

    node: Node
    messages_list: Sequence[Message]
    message_object_trees: Sequence[ObjectTree]


class PushMessagesResponse(Protocol):
    """Which objects of it are wanted."""

    objects_to_push: Sequence[str]
    session_id: str


class PullObjectRequest(Protocol):
    """A node asks for an object."""

    node: Node
    object_id: str


class PushObjectRequest(Protocol):
    """A node sends an object."""

    node: Node
    session_id: str
    object_id: str
    object_content: bytes


class ConfirmMessageReceivedRequest(Protocol):
    """A node has all objects of a message."""

    node: Node
    message_object_id: str


class ObjectStore(Protocol):
    """Where the SuperLink keeps objects until they are confirmed."""

    def __contains__(self, object_id: str) -> bool:
        """Whether it is there, or announced."""

    def delete(self, object_id: str) -> None:
        """With what only it is made of."""


class LinkState(Protocol):
    """What the SuperLink knows."""

    @property
    def object_store(self) -> ObjectStore:
        """Its objects."""
