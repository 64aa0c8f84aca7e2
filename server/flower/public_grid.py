"""Flower's Grid by its public interface alone: what `flwr run` falls back on where `grid.py` finds Flower changed.

It is slower (Flower asks again after a second for what is on its way), a reply may become as large as its sender says,
and nobody is asked for a short answer before its turn.
"""

from collections.abc import Iterable

from flwr.app import Message
from flwr.serverapp import Grid


class PublicMailbox:
    """A Mailbox over any Grid."""

    def __init__(self, grid: Grid) -> None:
        """grid: as the ServerApp got it."""
        self._grid = grid

    def expect(self, _model_bytes: int) -> None:
        """Nothing here can bound a reply by it."""

    def node_ids(self) -> list[int]:
        """The nodes that are connected now."""
        return sorted(self._grid.get_node_ids())

    def send(self, messages: Iterable[Message]) -> list[str]:
        """Push all messages at once."""
        return [message_id or "" for message_id in self._grid.push_messages(list(messages))]

    def receive(self, message_id: str, deadline: float | None = None) -> Message | None:  # noqa: ARG002
        """Pull one reply only, so that the others wait in the SuperLink's store."""
        found = self._grid.pull_messages([message_id])
        return next((message for message in found if message.metadata.reply_to_message_id == message_id), None)

    def is_short(self, _message_id: str) -> bool:
        """It cannot be known without taking it."""
        return False
