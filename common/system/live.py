"""A line that moves on a terminal, and now and then a plain one elsewhere: how far a round or an epoch is.

On a terminal it is drawn where the work is done, at most twice a second and by no thread of its own, so that training
is not held up; a pipe gets whole lines only, and no control character.
"""

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Self, TextIO

from common.errors import escaped
from common.system.progress import EVERY_S, Amount

if TYPE_CHECKING:
    from rich.progress import Progress

QUIET_S: Final = 30.0  # between plain lines


def is_terminal(stream: TextIO) -> bool:
    """Whether lines can move there."""
    return stream.isatty() and os.environ.get("TERM", "") != "dumb"


def clock_text(seconds: float) -> str:
    """0:07, 12:30, 1:02:03."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def amount_words(amount: Amount) -> str:
    """1,240 of 5,600 pictures, 420 a second, 0:10 left."""
    words = f"{amount.done:,} of {amount.total:,} pictures"
    if amount.seconds_left is not None:
        rate = f"{amount.rate:,.0f}" if amount.rate >= 10.0 else f"{amount.rate:.1f}"
        words += f", {rate} a second, {clock_text(amount.seconds_left)} left"
    return words


class Live:
    """Lines that stay, and below them the one that moves."""

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        """stream: usually sys.stdout."""
        self._stream, self._clock = stream, clock
        self._progress: Progress | None = None
        self._spoke = self._drawn = clock()
        self._moves = False

    def __enter__(self) -> Self:
        if is_terminal(self._stream):
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[words]}", markup=False),
                console=Console(file=self._stream),
                auto_refresh=False,
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task("", visible=False, words="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def say(self, line: str) -> None:
        """A line that stays."""
        self._spoke = self._clock()
        line = escaped(line)  # names and reasons are the clients'
        if self._progress is not None:
            self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)
            return
        self._stream.write(line + "\n")
        self._stream.flush()

    def move(self, label: str, amount: Amount, more: str = "") -> None:
        """How far it is.  label: "round 3/10".  more: follows the figures."""
        self.tell(label, amount.done, amount.total, amount_words(amount) + more)

    def tell(self, label: str, done: int, total: int, words: str) -> None:
        """The same of anything that is counted.  words: after the bar, or in the plain line."""
        now = self._clock()
        if self._progress is None:
            if now - self._spoke >= QUIET_S and done < total:
                self.say(f"{label}: {words}")
        elif now - self._drawn >= EVERY_S:
            self._drawn, self._moves, total = now, True, max(total, 1)
            self._progress.update(
                self._task,
                description=escaped(label),
                completed=min(done, total),
                total=total,
                words=escaped(words),
                visible=True,
            )
            self._progress.refresh()

    def rest(self) -> None:
        """Nothing is under way."""
        if self._progress is not None and self._moves:
            self._moves = False
            self._progress.update(self._task, visible=False)
            self._progress.refresh()
