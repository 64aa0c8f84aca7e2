"""A limit to what a reply may become when Flower unpacks it: a few kilobytes can claim to be terabytes.

Flower sends an array as pieces and a list of their numbers, and a piece may stand in the list more than once. So one
piece of 8 MiB and a list of a million zeros would be 8 TiB in the server's memory, before any check of ours sees it.
"""

import contextlib
import json
import threading
from collections.abc import Iterator
from typing import Any

from flwr.app import Array
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_body,
    get_object_children_ids_from_object_content,
)

COUNTS_BYTES = 2**21  # all counts of a reply with two splits take less than half of it


class _Limit(threading.local):
    """Of the reply that this thread unpacks."""

    most_bytes: int | None = None  # None: it unpacks none
    left = 0


_limit = _Limit()


class BoundedArray:
    """Stands in Flower's table for `Array`, whose arrays it makes as long as the reply stays within its bytes."""

    @classmethod
    def inflate(cls, object_content: bytes, children: dict[str, InflatableObject] | None = None) -> Array:
        """As `Array.inflate`.  Raises ValueError when the reply's arrays are larger than any that was asked for."""
        if _limit.most_bytes is not None:
            _limit.left -= _claimed_bytes(object_content, children or {})
            if _limit.left < 0:
                raise ValueError(f"its arrays are more than {_limit.most_bytes} bytes")
        return Array.inflate(object_content, children)


def _claimed_bytes(object_content: bytes, children: dict[str, InflatableObject]) -> int:
    listed: Any = json.loads(get_object_body(object_content, Array).decode("utf-8"))["arraychunk_ids"]
    pieces = [children.get(name) for name in get_object_children_ids_from_object_content(object_content)]
    sizes = [len(piece.data) if isinstance(piece, ArrayChunk) else 0 for piece in pieces]
    return sum(sizes[number] for number in listed)


@contextlib.contextmanager
def bounded(model_bytes: int) -> Iterator[None]:
    """While it lasts, this thread refuses replies whose arrays are larger than a model and its counts.

    model_bytes: of the flat model as float32, the largest of the codecs.
    """
    table: dict[str, Any] = inflatable_utils.inflatable_class_registry
    table[Array.__qualname__] = BoundedArray
    _limit.most_bytes = _limit.left = model_bytes + COUNTS_BYTES
    try:
        yield
    finally:
        _limit.most_bytes = None
