"""When a SuperNode looks for what: at once where something is known to be there, seldom where nothing comes.

Flower's loop sleeps 3 s whenever the server has no message, and looks each 0.5 s whether the answer is ready.  The
message of a round comes a moment after the last answer went, so nearly each round would wait for 3 s.  `Pace` stands in
for the module `time` in that loop: where the loop sleeps it tells apart what it waits for.
"""

import threading
import time

ANSWER_POLL_S = 0.5  # Flower's: between two looks for the answer
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 3.0
FRACTION_WAITED = 0.1  # a look costs the server some milliseconds; half a minute after the last message: every 3 s


class Pace:
    """The `sleep` of a SuperNode's loop, and what its executor waits for and tells."""

    def __init__(self) -> None:
        """Nothing has come yet, and everything may."""
        self._work, self._done = threading.Event(), threading.Event()
        self._last_message = time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Sleep at most so long: until the answer is there, or for a part of how long no message has come."""
        if seconds > ANSWER_POLL_S:
            waited = time.monotonic() - self._last_message
            time.sleep(min(max(FIRST_PAUSE_S, FRACTION_WAITED * waited), LONGEST_PAUSE_S, seconds))
            return
        self._work.set()
        self._done.wait(seconds)
        self._done.clear()
        self._last_message = time.monotonic()

    def wait_for_work(self, seconds: float) -> None:
        """Wait until a message is there, or so long."""
        self._work.wait(seconds)
        self._work.clear()

    def tell_done(self) -> None:
        """The answer is there: whoever waits for it need not sleep on."""
        self._done.set()
