"""How long one client's answer is waited for: longer while it moves, shorter where it stands still, never for ever.

`federation.round_timeout_s` as a number is the whole rule.  `auto`:

    at first     GENEROUS_S, or USUAL_FACTOR times what this client took for the like before, LEAST_S at the least
    moves        until it has not moved for `federation.silence_s`, and for what sending its answer may take
    stands still given up as soon as it says itself that it has not moved for `federation.silence_s`
    at most      LONGEST_S; of a client whose usual time is known LIMIT_FACTOR times that, GENEROUS_S at the least

What a client says of itself is believed within these bounds only: a lie costs the time up to the last one.
"""

from dataclasses import dataclass, field
from typing import Final

from common.protocol.beats import UNKNOWN, Beat
from common.settings import FederationSettings

GENEROUS_S: Final = 3600.0
LEAST_S: Final = 600.0
USUAL_FACTOR: Final = 3.0
LIMIT_FACTOR: Final = 10.0
LONGEST_S: Final = 86_400.0  # as the default of a site's max_task_seconds
SLOWEST_BYTES_PER_S: Final = 125_000.0  # 1 Mbit/s: an answer is not heard of until its last byte is there
BEATS_IN_SILENCE: Final = 20  # so often a client that moves is heard of within `federation.silence_s`


def beat_s(federation: FederationSettings) -> float:
    """After how many seconds a client that works on says how far it is."""
    return federation.silence_s / BEATS_IN_SILENCE


@dataclass(kw_only=True)
class Patience:
    """With one client, in one exchange.  Times are seconds of one clock, such as time.monotonic().

    fixed_s: `federation.round_timeout_s` where it is a number.  usual_s: what this client took for the like before;
    None: not known.  transfer_s: what sending the answer may take.
    """

    began: float
    silence_s: float
    fixed_s: float | None = None
    usual_s: float | None = None
    transfer_s: float = 0.0
    beat: Beat | None = None  # the last that was heard
    _moved: float = field(init=False)
    _stood_still: float | None = None  # when it said so last, where nothing was heard to move since

    def __post_init__(self) -> None:
        self._moved = self.began

    @property
    def limit(self) -> float:
        """When waiting ends, whatever is said."""
        if self.fixed_s is not None:
            return self.began + self.fixed_s
        known = LONGEST_S if self.usual_s is None else LIMIT_FACTOR * self.usual_s
        return self.began + min(max(known, GENEROUS_S), LONGEST_S)

    @property
    def ends(self) -> float:
        """When waiting ends, as far as is known now."""
        if self.fixed_s is not None:
            return self.limit
        if self._stood_still is not None:
            return min(self._stood_still, self.limit)
        usual = GENEROUS_S if self.usual_s is None else max(USUAL_FACTOR * self.usual_s, LEAST_S)
        return min(self.limit, max(self.began + usual, self._moved + self.silence_s + self.transfer_s))

    def hear(self, beat: Beat, now: float) -> None:
        """The client said how far it is."""
        self.beat = beat
        if beat.still_s == UNKNOWN:
            self._stood_still = None
            return
        self._moved = max(self._moved, now - beat.still_s)
        self._stood_still = now if beat.still_s >= self.silence_s else None

    def move(self, now: float) -> None:
        """It is seen to move, as in a simulation, whose clients are processes of this machine."""
        self._moved, self._stood_still = max(self._moved, now), None

    def words(self, now: float) -> str:
        """Why it is waited for no longer."""
        if self.fixed_s is not None:
            return f"no answer within {self.fixed_s:g} s"
        if self._stood_still is not None and self.beat is not None and now < self.limit:
            return (
                f"its {self.beat.work} stands still at {self.beat.percent} % for {self.beat.still_s:.0f} s"
                " (federation.silence_s)"
            )
        if now >= self.limit:
            return f"no answer within {self.limit - self.began:.0f} s, the longest that a site is waited for"
        last = f"; the last that it said: {self.beat.words()}" if self.beat is not None else ""
        return f"no answer within {now - self.began:.0f} s{last}"
