"""Where a round's seconds go, as the server sees it: every moment belongs to one phase, so the phases add up."""

import time
from collections.abc import Callable
from typing import Self

from common.metrics.names import ROUND_SECONDS, seconds_of

# wait: until clients are there and have answered.  send: tasks and model to the SuperLink.  receive: replies taken,
# decoded and checked.  evaluate: sums merged, public pairs scored.  log: records, pictures and events.
PHASES = ("wait", "send", "receive", "aggregate", "evaluate", "checkpoint", "log")


class RoundClock:
    """A stopwatch with laps: each lap's seconds go to the phase that is named when the lap ends."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """now: seconds from any beginning.  The first lap begins here."""
        self._now = now
        self._began = self._lap_began = now()
        self._phases = dict.fromkeys(PHASES, 0.0)
        self._exchange_began = self._began
        self._answers: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """Count the seconds since the last lap to one of PHASES."""
        now = self._now()
        self._phases[phase] += now - self._lap_began
        self._lap_began = now

    def sent(self) -> None:
        """The tasks are on their way: end the lap of sending, from which each client's answer is timed."""
        self.lap("send")
        self._exchange_began = self._lap_began

    def answered(self, client: str) -> None:
        """A client's reply was taken just now."""
        self._answers[client] = self._now() - self._exchange_began

    def answer_seconds(self, client: str) -> float:
        """From the sending of the tasks until that client's reply was taken; replies are taken in a fixed order."""
        return self._answers[client]

    def metrics(self) -> dict[str, float]:
        """The seconds of the round, and of each of PHASES, which add up to them."""
        phases = {seconds_of(phase): seconds for phase, seconds in self._phases.items()}
        return {ROUND_SECONDS: self._lap_began - self._began, **phases}


class TimeBudget:
    """Work that may be done again and again, but not for more than a fraction of the time."""

    def __init__(self, fraction: float, now: Callable[[], float] = time.monotonic) -> None:
        """fraction: of all time, in (0, 1).  now: seconds from any beginning."""
        self._fraction, self._now = fraction, now
        self._began = self._ended = float("-inf")
        self._cost = 0.0

    def affords(self) -> bool:
        """Whether the last time is long enough ago for what it cost; the first time always."""
        return (self._now() - self._ended) * self._fraction >= self._cost

    def __enter__(self) -> Self:
        """Begin the work."""
        self._began = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._ended = self._now()
        self._cost = self._ended - self._began
