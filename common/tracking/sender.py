"""The thread that sends a spool to MLflow in batches, waits when the server is away, and goes on when it is back."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial

from common.redact import shown_uri
from common.tracking.forward import Backlog, Forwarder, Server, backlog
from common.tracking.spool import Sent, Spool

LINES_PER_BATCH = 2000
PAUSE_S = 0.5  # between batches, so that steps gather
RETRY_FIRST_S = 1.0
RETRY_LAST_S = 30.0

_log = logging.getLogger("facefed.tracking")


class StartOver(Exception):
    """What was sent is gone from the server; everything has to be sent again."""


class Sender:
    """Sends what the spool holds beyond `sent.offset`; never raises and never blocks the caller of `wake`."""

    def __init__(self, spool: Spool, sent: Sent, connect: Callable[[], Server], uri: str) -> None:
        """connect: makes what takes entries (it may raise while the server is away)."""
        self._spool = spool
        self._sent = sent
        self._connect = connect
        self._uri = uri
        self._forwarder: Forwarder | None = None
        self._failures = 0  # since the last success
        self._refusals = 0  # attempts in a row after which a file still waited aside
        self._retry_at = 0.0  # of these files; monotonic clock
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

    def backlog(self) -> Backlog:
        """What the server lacks of the spool."""
        return backlog(self._spool.path, self._sent)

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
            self._press()
            while not self._has_sent(target) and self._thread.is_alive():
                left = deadline - time.monotonic()
                if left <= 0 or ((self._failures or self._sent.aside) and self._rounds >= last_round):
                    return False
                self._changed.wait(left)
                self._press()
        return self._has_sent(target)

    def close(self, timeout_s: float) -> bool:
        """Send the rest, at most `timeout_s` long, and end.  Returns whether everything was sent."""
        self._closing = True
        self._press()
        self._thread.join(timeout_s)
        self._abandoned = self._thread.is_alive()  # it hangs in a call; the caller reports what is unsent
        return self._has_sent(self._spool.size)

    def _press(self) -> None:
        self._retry_at = 0.0
        self._hurry.set()
        self._wanted.set()

    def _has_sent(self, target: int) -> bool:
        return self._sent.offset >= target and not self._sent.aside

    def _loop(self) -> None:
        while True:
            self._wanted.wait(max(0.0, self._retry_at - time.monotonic()) if self._sent.aside else None)
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
            self._hurry.wait(PAUSE_S if well else _pause_s(self._failures))
            self._hurry.clear()

    def _attempt(self) -> bool:
        try:
            if self._forwarder is None:
                self._forwarder = Forwarder(self._spool.path, self._sent, self._connect())
            self._forwarder.begin()
            is_due = bool(self._sent.aside) and time.monotonic() >= self._retry_at
            self._drain(self._forwarder)
            if is_due or self._closing:
                self._forwarder.retry_aside(partial(self._drain, self._forwarder), _ignore)
        except Exception as error:  # whatever it is: training goes on, and the spool keeps the rest
            self._report_failure(error)
            return False
        if self._failures:
            _log.warning("Tracking: %s takes records again; what was kept is sent.", shown_uri(self._uri))
        self._failures = 0
        self._look_aside(self._forwarder)
        return True

    def _drain(self, forwarder: Forwarder) -> None:
        while True:
            try:
                lines = forwarder.send_some(LINES_PER_BATCH, _ignore)
            except StartOver as reason:
                self._sent.aside.clear()
                _log.warning("Tracking: %s; a new run gets the whole record.", reason)
                continue
            if not lines:
                return
            corrupt = sum(bool(line.damage) for line in lines)
            if corrupt:
                _log.warning("Tracking: %d corrupt lines of %s are skipped.", corrupt, self._spool.path)

    def _look_aside(self, forwarder: Forwarder) -> None:
        """After an attempt in which the records were taken: say once that files were not, and once that they were."""
        if not self._sent.aside:
            if self._refusals:
                _log.warning("Tracking: %s takes files again; what was kept is sent.", shown_uri(self._uri))
            self._refusals = 0
            return
        self._refusals += 1
        self._retry_at = time.monotonic() + _pause_s(self._refusals)
        if self._refusals == 1 and not self._abandoned:
            _log.warning(
                "Tracking: %s takes records, but %d of the run's files not now (%s); kept in %s and sent later.",
                shown_uri(self._uri),
                len(self._sent.aside),
                "" if forwarder.refusal is None else self._reason(forwarder.refusal),
                self._spool.path.parent,
            )

    def _report_failure(self, error: Exception) -> None:
        self._failures += 1
        if self._failures == 1 and not self._abandoned:
            _log.warning(
                "Tracking: %s cannot be used now (%s). Training goes on; everything is kept in %s and sent later.",
                shown_uri(self._uri),
                self._reason(error),
                self._spool.path,
            )

    def _reason(self, error: Exception) -> str:
        return short_reason(error).replace(self._uri, shown_uri(self._uri))


def _pause_s(failures: int) -> float:
    doublings = min(failures - 1, 60)  # a night without the server would overflow
    return min(RETRY_FIRST_S * 2.0**doublings, RETRY_LAST_S)


def _ignore(_entry: Mapping[str, object]) -> None:
    """The thread counts nothing."""


def short_reason(error: BaseException) -> str:
    """One line of an exception: of its innermost operating system error ("Connection refused"), else its own."""
    innermost = error
    cause: BaseException | None = error
    while cause is not None:
        innermost = cause if isinstance(cause, OSError) else innermost
        cause = cause.__cause__ or cause.__context__
    return (str(innermost).splitlines() or [type(innermost).__name__])[0][:300]
