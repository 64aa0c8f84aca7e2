"""How far a long piece of work is: told by whoever works, in a file of one line where that is another process.

A step of training costs the worker a comparison of clocks; twice a second the line is written anew, and nothing waits
for a disk.  Where nobody asked to be told (`tell_into`), nothing is written.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

FOLDER: Final = "progress"  # of a simulation, in the run's folder: a file for each process that works for the clients
FILE: Final = "progress.json"  # of a site, in its state folder
EVERY_S: Final = 0.5
LINE_BYTES: Final = 512  # of the whole file, so that one write replaces it
STALE_S: Final = 60.0  # whoever has said nothing for so long does not work any more

PACKING, SCORING, WARMING_UP, TRAINING = WORKS = ("packing", "scoring", "warming up", "training")  # what is told of

Tick = Callable[[int], object]  # is told after each step how many pictures it took


def no_tick(_num_pictures: int) -> None:
    """Nobody wants to know."""


def no_show(_amount: "Amount") -> None:
    """Nobody looks."""


@dataclass(frozen=True, kw_only=True)
class Amount:
    """How far one piece of work is."""

    done: int  # pictures
    total: int
    seconds: float  # since it began
    who: str = ""  # the client that works
    run: str = ""
    server_round: int = 0
    work: str = TRAINING  # one of WORKS
    before: int = 0  # of `done`, what was done before it began: a packing that was stopped goes on

    @property
    def label(self) -> str:
        """What it is, for a person: "packing", "round 3", "round 3, scoring"."""
        if self.work == PACKING:
            return self.work
        return f"round {self.server_round}" + (f", {self.work}" if self.work != TRAINING else "")

    @property
    def rate(self) -> float:
        """Pictures a second so far; 0 at the beginning."""
        return (self.done - self.before) / self.seconds if self.seconds > 0.0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """At this rate; None where it is not known yet."""
        return max(0, self.total - self.done) / self.rate if self.rate > 0.0 else None


def added(amounts: Sequence[Amount], *, done: int = 0, total: int = 0, seconds: float | None = None) -> Amount:
    """What several do at once, as one piece of work.

    done: what is finished already.  total: of all together, where that is known.  seconds: since they began together.
    """
    return Amount(
        done=done + sum(amount.done for amount in amounts),
        total=total or done + sum(amount.total for amount in amounts),
        seconds=max((amount.seconds for amount in amounts), default=0.0) if seconds is None else seconds,
    )


class Meter:
    """Counts the pictures of one piece of work and shows the sum now and then."""

    def __init__(
        self,
        total: int,
        show: Callable[[Amount], object],
        *,
        clock: Callable[[], float] = time.monotonic,
        every_s: float = EVERY_S,
    ) -> None:
        """total: pictures in all.  show: is called at most each `every_s`, from where the steps are made."""
        self._total, self._show, self._clock, self._every_s = total, show, clock, every_s
        self._done = self._before = 0
        self._began = self._shown = clock()

    def __call__(self, num_pictures: int) -> None:
        """One step was made."""
        self._move(self._done + num_pictures)

    def reach(self, done: int, total: int) -> None:
        """So many pictures of so many are done, as whoever counts them says; the first time, before it began."""
        if self._total != total:
            self._total, self._done, self._before, self._shown = total, done, done, float("-inf")
            self._move(done)
        elif done != self._done:  # who waits for another program's work calls this, also while nothing moves
            self._move(done)

    def _move(self, done: int) -> None:
        self._done = done
        now = self._clock()
        if now - self._shown >= self._every_s:
            self._shown = now
            self._show(self.amount(now))

    def amount(self, now: float) -> Amount:
        """How far it is."""
        return Amount(done=self._done, total=self._total, seconds=now - self._began, before=self._before)


# -- from one process to another ---------------------------------------------------------------------------------------

_place: Path | None = None  # of this process


def tell_into(path: Path | None) -> None:
    """Have this process tell how far it is into that file, if its folder is there; None: nowhere."""
    global _place
    _place = path if path is not None and path.parent.is_dir() else None


@contextlib.contextmanager
def telling(total: int, *, who: str, run: str, server_round: int, work: str = TRAINING) -> Iterator[Meter]:
    """What is to be called after each step of one client's work; the file is gone afterwards.

    total: pictures in all; 0: it is not known yet, and `Meter.reach` says it.  A file that cannot be written costs
    nothing but the news.
    """
    if _place is None:
        yield Meter(total, no_show)
        return
    path, handle = _place, -1
    try:
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

        def show(amount: Amount) -> None:
            about = {"who": who, "run": run, "server_round": server_round, "work": work}
            content = {**asdict(amount), **about, "time": time.time()}
            with contextlib.suppress(OSError):
                os.pwrite(handle, json.dumps(content).encode()[: LINE_BYTES - 1].ljust(LINE_BYTES - 1) + b"\n", 0)

        meter = Meter(total, show)
        show(meter.amount(time.monotonic()))
        yield meter
    finally:
        if handle >= 0:
            with contextlib.suppress(OSError):
                os.close(handle)
                path.unlink(missing_ok=True)


def read_amounts(place: Path, *, now: Callable[[], float] = time.time) -> list[Amount]:
    """What the processes that tell into a folder, or into one file, say; what is old or half written is left out."""
    told = [read_amount(path) for path in (sorted(place.iterdir()) if place.is_dir() else [place])]
    return [amount for amount, when in filter(None, told) if now() - when <= STALE_S]


def read_amount(path: Path) -> tuple[Amount, float] | None:
    """What a process that tells into that file said last, and when it moved, seconds since 1970.

    None where nothing is under way, and of what is half written.
    """
    try:
        content = json.loads(path.read_bytes())
        when = float(content.pop("time"))
        return Amount(**content), when
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
