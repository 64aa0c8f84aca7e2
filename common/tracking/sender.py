"""The thread that sends a spool to MLflow in batches, waits when the server is away, and goes on when it is back."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common.tracking.address import shown_uri
from common.tracking.spool import Sent, Spool, read_lines, save_sent

LINES_PER_BATCH = 2000
PAUSE_S = 0.5  # between batches, so that steps gather
RETRY_FIRST_S = 1.0
RETRY_LAST_S = 30.0

_log = logging.getLogger("facefed.tracking")

Send = Callable[[Sequence[Mapping[str, Any]]], None]


class StartOver(Exception):
    """What was sent is gone from the server; everything has to be sent again."""


class Sender:
    """Sends what the spool holds beyond `sent.offset`; never raises and never blocks the caller of `wake`."""

    def __init__(self, spool: Spool, sent: Sent, connect: Callable[[], Send], uri: str) -> None:
        """connect: makes the function that sends entries (it may raise while the server is away)."""
        self._spool = spool
        self._sent = sent
        self._connect = connect
        self._uri = uri
        self._send: Send | None = None
        self._failures = 0  # since the last success
        self._rounds = 0  # finished attempts to send everything
        self._changed = threading.Condition()
        self._wanted = threading.Event()
        self._hurry = threading.Event()
        self._closing = False
        self._abandoned = False
        self._thread = threading.Thread(target=self._loop, name="tracking-sender", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def wake(self) -> None:
        """Say that the spool has grown."""
        self._wanted.set()

    @property
    def unsent_bytes(self) -> int:
        """How much of the spool the server lacks."""
        return self._spool.size - self._sent.offset

    def run_id(self, run: str) -> str:
        """MLflow's id of a run of this spool; empty while unknown."""
        return self._sent.run_ids.get(run, "")

    @property
    def run_key(self) -> str:
        """What finds this spool's runs on any server."""
        return self._sent.run_key

    def version(self, key: str) -> str:
        """The registered version of the model whose event has this key; empty while there is none."""
        return self._sent.versions.get(key, "")

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything is sent; False when an attempt fails meanwhile or the time is up."""
        deadline = time.monotonic() + timeout_s
        target = self._spool.size
        with self._changed:
            # The attempt in progress may have read the spool before its last line: the next one counts.
            last_round = self._rounds + 2
            self._hurry.set()
            self._wanted.set()
            while self._sent.offset < target and self._thread.is_alive():
                left = deadline - time.monotonic()
                if left <= 0 or (self._failures and self._rounds >= last_round):
                    return False
                self._changed.wait(left)
                self._hurry.set()
                self._wanted.set()
        return self._sent.offset >= target

    def close(self, timeout_s: float) -> bool:
        """Send the rest, at most `timeout_s` long, and end.  Returns whether everything was sent."""
        self._closing = True
        self._hurry.set()
        self._wanted.set()
        self._thread.join(timeout_s)
        self._abandoned = self._thread.is_alive()  # it hangs in a call; the caller reports what is unsent
        return self.unsent_bytes <= 0

    def _loop(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            last = self._closing
            well = self._attempt()
            with self._changed:
                self._rounds += 1
                self._changed.notify_all()
            if last:
                return
            if not well:
                self._wanted.set()
            self._hurry.wait(PAUSE_S if well else min(RETRY_FIRST_S * 2 ** (self._failures - 1), RETRY_LAST_S))
            self._hurry.clear()

    def _attempt(self) -> bool:
        try:
            if self._send is None:
                self._send = self._connect()
            while self._send_some(self._send):
                pass
        except Exception as error:  # whatever it is: training goes on, and the spool keeps the rest
            self._report_failure(error)
            return False
        if self._failures:
            _log.warning("Tracking: %s takes records again; what was kept is sent.", shown_uri(self._uri))
        self._failures = 0
        return True

    def _send_some(self, send: Send) -> bool:
        entries, offset, corrupt = read_lines(self._spool.path, self._sent.offset, LINES_PER_BATCH)
        if corrupt:
            _log.warning("Tracking: %d corrupt lines of %s are skipped.", corrupt, self._spool.path)
        if offset == self._sent.offset:
            return False
        try:
            send(entries)
        except StartOver as reason:
            _log.warning("Tracking: %s; a new run gets the whole record.", reason)
            return True
        self._sent.offset = offset
        save_sent(self._spool.path.parent, self._sent)
        return True

    def _report_failure(self, error: Exception) -> None:
        self._failures += 1
        if self._failures == 1 and not self._abandoned:
            _log.warning(
                "Tracking: %s cannot be used now (%s). Training goes on; everything is kept in %s and sent later.",
                shown_uri(self._uri),
                short_reason(error).replace(self._uri, shown_uri(self._uri)),
                self._spool.path,
            )


def short_reason(error: BaseException) -> str:
    """One line of an exception: of its innermost operating system error ("Connection refused"), else its own."""
    innermost = error
    cause: BaseException | None = error
    while cause is not None:
        innermost = cause if isinstance(cause, OSError) else innermost
        cause = cause.__cause__ or cause.__context__
    return (str(innermost).splitlines() or [type(innermost).__name__])[0][:300]
