"""How far a packing is: a rate and the time left, in words, and a small file that other programs read.

Whoever packs writes the file; a second program that waits for the same pack, and a join that must not be given up while
a site still packs, read it.
"""

import json
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from common.system.files import write_bytes

Progress = Callable[
    [int, int], None
]  # (pictures done, pictures in all); done may begin above 0: a stopped pack goes on
WRITE_EVERY_S = 1.0
_WINDOW_S = 60.0  # the rate is that of the last minute
logger = logging.getLogger("facefed.faces")


@dataclass(frozen=True, kw_only=True)
class PackingState:
    """One look at a packing.

    done, total: pictures; 0 of 0 before they are counted.  per_second: pictures a second, 0 where it is not known yet.
    moved_at: when `done` last grew, seconds since 1970: who waits may go on waiting while this moves.
    """

    done: int
    total: int
    per_second: float
    moved_at: float

    @property
    def left_s(self) -> float | None:
        """Seconds until the end at this rate; None while there is no rate."""
        return (self.total - self.done) / self.per_second if self.per_second > 0.0 else None

    def words(self) -> str:
        """Such as `packing 31 %, 640 pictures a second, 40 min left`."""
        if self.total <= 0:
            return "packing: counting the pictures"
        share = f"packing {100 * self.done // self.total} %"
        if self.left_s is None:
            return share
        return f"{share}, {self.per_second:,.0f} pictures a second, {time_words(self.left_s)} left"


def time_words(seconds: float) -> str:
    """Such as `40 s`, `40 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class PackingClock:
    """Turns calls of a packer's progress into states with a rate.  Call it with (done, total); `state` is the last."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        """now: seconds since 1970."""
        self._now = now
        self._seen: deque[tuple[float, int]] = deque()
        self.state = PackingState(done=0, total=0, per_second=0.0, moved_at=now())

    def __call__(self, done: int, total: int) -> PackingState:
        """Note the pictures done, and of how many."""
        now = self._now()
        if not self._seen or done != self._seen[-1][1]:
            self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[0][0] > _WINDOW_S:
            self._seen.popleft()
        began, before = self._seen[0]
        rate = (done - before) / (now - began) if now > began else 0.0
        moved_at = now if done != self.state.done else self.state.moved_at
        self.state = PackingState(done=done, total=total, per_second=max(rate, 0.0), moved_at=moved_at)
        return self.state


class StateFile:
    """A packer's progress that also stands in a file, at most once a second.  `close` removes the file."""

    def __init__(self, path: Path, then: Progress | None = None) -> None:
        """path: of the file; its folder is there.  then: called too, with the same."""
        self._path, self._then = path, then
        self._clock = PackingClock()
        self._written_at = 0.0

    def __call__(self, done: int, total: int) -> None:
        """Note, and write where a second has passed or all is done.  A file that cannot be written stops no packing."""
        state = self._clock(done, total)
        now = time.monotonic()
        if now - self._written_at >= WRITE_EVERY_S or done == total:
            self._written_at = now
            try:
                write_bytes(self._path, json.dumps(vars(state)).encode())
            except OSError as error:
                logger.info("%s: cannot be written: %s", self._path, error.strerror)
        if self._then is not None:
            self._then(done, total)

    def close(self) -> None:
        """Whoever reads sees no packing any more."""
        self._path.unlink(missing_ok=True)


def read_state(path: Path) -> PackingState | None:
    """What a packer last wrote; None where nobody packs, or the file says nothing."""
    try:
        found = json.loads(path.read_bytes())
        state = PackingState(**found)
        return replace(
            state,
            done=int(state.done),
            total=int(state.total),
            per_second=float(state.per_second),
            moved_at=float(state.moved_at),
        )
    except (OSError, ValueError, TypeError, RecursionError, OverflowError):
        return None
