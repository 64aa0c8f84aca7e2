"""A beat: what a site says while it works for longer than a server waits for one answer, and nothing else.

It holds shares and seconds, never counts, and is no promise: whoever waits bounds what it believes
(`server/exchange/patience.py`).  Both ends know it without torch.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from common.errors import ReplyRefused
from common.faces.pack_progress import time_words
from common.system.progress import WORKS, read_amount

RECORD: Final = "progress"  # of the message
UNKNOWN: Final = -1.0
NOT_COUNTED: Final = -1
SHORTEST_S: Final = 1.0  # no site answers more often, whatever it is asked
LONGEST_S: Final = 3600.0  # and none more seldom that says how far it is
LONGEST_LEFT_S: Final = 1e8  # and of standing still
WORKING: Final = "working"  # at what is not told of
_COUNTING: Final = "counting the pictures"


@dataclass(frozen=True, kw_only=True)
class Beat:
    """How far a site is with one piece of its work.

    work: one of `common.system.progress.WORKS`, or WORKING.  percent: of it, 0 to 100, or NOT_COUNTED.  left_s: seconds
    until its end, of two digits; UNKNOWN.  still_s: whole seconds since it last moved; UNKNOWN: nobody looks at what
    is done now.
    """

    client: str
    work: str = WORKING
    percent: int = 0
    left_s: float = UNKNOWN
    still_s: float = UNKNOWN

    def words(self) -> str:
        """Such as `packing 31 %, 40 min left`."""
        if self.work == WORKING:
            return "is at work"
        if self.percent == NOT_COUNTED:
            return f"{self.work}: {_COUNTING}"
        left = f", {time_words(self.left_s)} left" if self.left_s != UNKNOWN else ""
        return f"{self.work} {self.percent} %{left}"

    def values(self) -> dict[str, Any]:
        """As the message has them."""
        return asdict(self)


def beat_of(path: Path, client: str, *, since: float = 0.0, now: Callable[[], float] = time.time) -> Beat:
    """What the file of a site's trainer comes to.  path: as `common.system.progress.tell_into` got it.

    since: when the work began, seconds since 1970; what was told before is of a trainer that was killed.
    """
    told = read_amount(path)
    if told is None or told[1] < since:
        return Beat(client=client)
    amount, moved_at = told
    plain = Beat(client=client, work=amount.work)
    if amount.total <= 0:  # it is not known yet of how many
        return replace(plain, percent=NOT_COUNTED, still_s=_whole(now() - moved_at))
    percent = min(100, max(0, 100 * amount.done // amount.total))
    if amount.done >= amount.total:  # what follows of this piece is not told of
        return replace(plain, percent=percent)
    left = amount.seconds_left
    return replace(
        plain,
        percent=percent,
        left_s=UNKNOWN if left is None else _two_digits(min(left, LONGEST_LEFT_S)),
        still_s=_whole(now() - moved_at),
    )


def _whole(seconds: float) -> float:
    return min(float(max(0, math.floor(seconds))), LONGEST_LEFT_S)


def _two_digits(seconds: float) -> float:
    return float(f"{seconds:.1e}") if seconds >= 1.0 else 0.0


def read_beat(record: Mapping[str, Any]) -> Beat:
    """The inverse of `Beat.values`, with possible values only.  Raises ReplyRefused."""
    try:
        beat = Beat(**record)
    except TypeError as error:
        raise ReplyRefused(f"a beat is malformed ({error}); use equal versions of FaceFed.") from None
    said: Mapping[str, Any] = beat.values()  # of whatever types it came with
    seconds = (said["left_s"], said["still_s"])
    if (
        type(said["client"]) is not str
        or said["work"] not in (*WORKS, WORKING)
        or type(said["percent"]) is not int
        or not NOT_COUNTED <= said["percent"] <= 100
        or not all(type(one) is float and (one == UNKNOWN or 0.0 <= one <= LONGEST_LEFT_S) for one in seconds)
    ):
        raise ReplyRefused(f"a beat is malformed: it is {str(dict(record))[:200]}")
    return beat
