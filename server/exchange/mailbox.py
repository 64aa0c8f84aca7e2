"""The few things the round loop needs from Flower's Grid, so that tests can stand in for it."""

import time
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from flwr.app import Message

from common.errors import DeadlinePassed, InterruptedRun

T = TypeVar("T")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.01, 0.25
FRACTION_WAITED = 0.03  # a look costs little beside a long wait, and is late by little beside it


class Mailbox(Protocol):
    """Nodes, and messages to and from them."""

    def node_ids(self) -> list[int]:
        """The nodes that are connected now."""
        ...

    def send(self, messages: Iterable[Message]) -> list[str]:
        """Send, and return an id for each message, "" where it could not be sent."""
        ...

    def receive(self, message_id: str, deadline: float | None = None) -> Message | None:
        """The reply to that message, or None while there is none.

        deadline: until when to wait for parts of one that has begun to come (time.monotonic()); None: what is there.
        """
        ...

    def is_short(self, message_id: str) -> bool:
        """Whether a reply to that message is there that holds no model, so that taking it costs no memory.

        False also where that cannot be known.
        """
        ...


class Waiter:
    """Waits until something happens, a deadline passes, or the run is stopped; pauses grow with what was waited."""

    def __init__(self, stopped: Callable[[], bool], *, run_timeout_s: float = float("inf")) -> None:
        """stopped: asked at each look; True raises InterruptedRun.  run_timeout_s: from now until DeadlinePassed."""
        self._stopped = stopped
        self._run_timeout_s, self._ends = run_timeout_s, time.monotonic() + run_timeout_s
        self._work: Callable[[], None] | None = None

    def check(self) -> None:
        """Raise InterruptedRun when the run is stopped, DeadlinePassed when it takes too long."""
        if self._stopped():
            raise InterruptedRun("stopped by the user")
        if time.monotonic() >= self._ends:
            raise DeadlinePassed(f"the run did not end within {self._run_timeout_s:g} s (federation.run_timeout_s).")

    def leave_work(self, work: Callable[[], None]) -> None:
        """Have something done while we would wait anyway; what was left before is done first."""
        self.do_work()
        self._work = work

    def do_work(self) -> None:
        """Do now what was left, if anything."""
        work, self._work = self._work, None
        if work is not None:
            work()

    def until(self, look: Callable[[], T | None], deadline: float | Callable[[], float]) -> T | None:
        """The first result of `look` that is not None, or None at the deadline (a time.monotonic() value).

        Looks at least once, and does the work that was left before the first pause.  deadline: where it moves, what
        says where it is now.  Raises InterruptedRun.
        """
        began = time.monotonic()
        while True:
            self.check()
            seen = look()
            ends = deadline() if callable(deadline) else deadline
            if seen is not None or time.monotonic() >= ends:
                return seen
            self.do_work()
            now = time.monotonic()
            pause = min(max(FIRST_PAUSE_S, FRACTION_WAITED * (now - began)), LONGEST_PAUSE_S)
            time.sleep(min(pause, max(0.0, ends - now)))
