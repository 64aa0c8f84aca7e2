"""The SuperLink's process: Flower's own, but an answer that was lost on its way to a node is given again.

Two of Flower's calls work once only, and a cut connection may lose what they said:

    PullMessages    marks the message that it hands out as delivered.  The node never hears of it; the ServerApp waits
                    until the round's deadline.  A node asks for the next message only after it confirmed the last, so
                    one that asks and has not confirmed has lost it.
    PushMessages    says which parts of a reply are wanted.  Asked again, once the ServerApp has seen that there is a
                    reply, it says none; the node takes its reply for sent, and the ServerApp waits for the parts.

Started as `python -m server.flower.redelivery ARGUMENT...`; the arguments are flower-superlink's.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

from flwr.proto.fleet_pb2 import (
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.object_store import NoObjectInStoreError, ObjectStore

from common.system.runtime import go_silent

MOST_TIMES = 20  # one that a node cannot take for another reason must not keep the next from it


class Redelivery:
    """Stands in for Flower's two calls, and remembers the last answer of each to each node."""

    def __init__(self, pull: Callable[..., PullMessagesResponse], push: Callable[..., PushMessagesResponse]) -> None:
        """pull, push: Flower's own, for what is asked for the first time."""
        self._pull, self._push = pull, push
        self._given: dict[int, PullMessagesResponse] = {}
        self._times: dict[int, int] = {}
        self._wanted: dict[int, tuple[str, PushMessagesResponse]] = {}  # by node: the reply, and what was wanted of it

    def pull_messages(self, request: PullMessagesRequest, state: LinkState, store: ObjectStore) -> PullMessagesResponse:
        """The last answer again where its message is still wanted and was not confirmed; else Flower's."""
        node = request.node.node_id
        given = self._given.get(node)
        if given is not None and self._times[node] < MOST_TIMES and _is_unconfirmed(given, store):
            self._times[node] += 1
            return given
        response = self._pull(request=request, state=state, store=store)
        if response.messages_list:
            self._given[node], self._times[node] = response, 1
        else:
            self._given.pop(node, None)
        return response

    def push_messages(self, request: PushMessagesRequest, state: LinkState) -> PushMessagesResponse:
        """What was wanted of this reply, if it is known; else Flower's."""
        node, reply = request.node.node_id, "".join(message.metadata.message_id for message in request.messages_list)
        known, wanted = self._wanted.get(node, ("", None))
        if wanted is not None and known == reply:
            return wanted
        response = self._push(request=request, state=state)
        self._wanted[node] = reply, response
        return response


def _is_unconfirmed(given: PullMessagesResponse, store: ObjectStore) -> bool:
    """Whether the message is in the store: a receipt deletes it there, and so does the end of the run."""
    metadata = given.messages_list[0].metadata
    if metadata.created_at + metadata.ttl <= time.time():
        return False
    try:
        store.get_object_tree(metadata.message_id)
    except NoObjectInStoreError:
        return False
    return True


def redeliver() -> None:
    """Put `Redelivery` into Flower's place."""
    from flwr.superlink.servicer.fleet import fleet_handlers

    handlers: Any = fleet_handlers
    mended = Redelivery(handlers.pull_messages, handlers.push_messages)
    handlers.pull_messages, handlers.push_messages = mended.pull_messages, mended.push_messages


def main(arguments: list[str]) -> None:
    """Serve until stopped."""
    go_silent()
    from flwr.superlink.cli.flower_superlink import flower_superlink

    redeliver()
    sys.argv = ["flower-superlink", *arguments]
    flower_superlink()


if __name__ == "__main__":
    main(sys.argv[1:])
