"""The SuperLink's process: Flower's own, but a site speaks for itself only, and a message that was lost is given again.

Flower's PullMessages marks the message that it hands out as delivered, and a cut connection may lose it.  The node
never hears of it; the ServerApp waits until the round's deadline.  A node asks for the next message only after it
confirmed the last, so one that asks and has not confirmed has lost it.  What a node may say: server/flower/fleet_guard.

Started as `python -m server.flower.redelivery HOME SOCKETS ARGUMENT...`: Flower's folder of the run, the numbers of the
open sockets to serve on, with commas (server/flower/access.py), and what flower-superlink is told.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common.system.runtime import go_silent
from server.flower.access import let_keys_return, serve_on
from server.flower.fleet_guard import stand_guard
from server.flower.fleet_messages import ObjectStore, PullMessagesRequest, PullMessagesResponse
from server.flower.superlink import SECRET, read_model_bytes

MOST_TIMES = 20  # one that a node cannot take for another reason must not keep the next from it


class Redelivery:
    """Stands in for Flower's call, and remembers its last answer to each node."""

    def __init__(self, pull: Callable[..., PullMessagesResponse]) -> None:
        """pull: Flower's own, for what is asked for the first time."""
        self._pull = pull
        self._given: dict[int, PullMessagesResponse] = {}
        self._times: dict[int, int] = {}

    def pull_messages(self, request: PullMessagesRequest, state: object, store: ObjectStore) -> PullMessagesResponse:
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


def _is_unconfirmed(given: PullMessagesResponse, store: ObjectStore) -> bool:
    """Whether the message is in the store: a receipt deletes it there, and so does the end of the run."""
    metadata = given.messages_list[0].metadata
    if metadata.created_at + metadata.ttl <= time.time():
        return False
    return metadata.message_id in store


def redeliver() -> None:
    """Put `Redelivery` into Flower's place."""
    from flwr.superlink.servicer.fleet import fleet_handlers

    handlers: Any = fleet_handlers
    handlers.pull_messages = Redelivery(handlers.pull_messages).pull_messages


def main(home: Path, sockets: list[int], arguments: list[str]) -> None:
    """Serve until stopped."""
    go_silent()
    from flwr.superlink.cli.flower_superlink import flower_superlink

    stand_guard(partial(read_model_bytes, home))
    redeliver()
    let_keys_return()
    serve_on(sockets, (home / SECRET).read_bytes())
    sys.argv = ["flower-superlink", *arguments]
    flower_superlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(number) for number in sys.argv[2].split(",")], sys.argv[3:])
