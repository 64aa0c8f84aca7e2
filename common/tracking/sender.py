"""A spool's way to a server: in its order, from a thread in batches, which waits when the server is away.

A file that the server does not take now waits aside: the artifact store may be full, forbidden or down while metrics
would be taken.  What waits is noted in spool.sent.json, so that a later attempt, the next process and
`facefed tracking sync` try it again.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from common.errors import escaped
from common.redact import shown_uri
from common.system.files import Line
from common.system.processes import proxy_before
from common.tracking.address import SERVERS
from common.tracking.spool import Sent, Spool, read_whole_lines, save_sent

_UPLOADS = ("artifact", "model")
_COUNTED_AT_ONCE = 1000

Count = Callable[[Mapping[str, Any]], None]


class Server(Protocol):
    """Takes entries; what it has already does no harm."""

    def send(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Send them in their order.  Raises whatever keeps the server from taking one now."""

    def check(self) -> None:
        """Raises what keeps the server from answering anything at all."""


class Backlog(NamedTuple):
    """What a server lacks of a spool."""

    num_records: int  # metrics and events
    num_files: int  # artifacts and models
    num_bytes: int  # of the spool's lines for both


class Forwarder:
    """Sends what a spool holds beyond `sent.offset`, and then what waits aside.  Raises what the server raises."""

    def __init__(self, path: Path, sent: Sent, server: Server) -> None:
        """path: the spool.  sent: what the server has; kept up to date, in memory and on the disk."""
        self._path = path
        self._sent = sent
        self._server = server
        self._is_refused = False  # an upload failed since `begin`
        self.refusal: Exception | None = None  # the latest of an upload

    def begin(self) -> None:
        """Begin an attempt; the first upload that fails in it sends the later ones aside untried: each may be slow."""
        self._is_refused = False

    def send_some(self, most: int, count: Count) -> list[Line]:
        """Send the next `most` entries; empty when there are none.  count: told of each entry that the server took."""
        lines = read_whole_lines(self._path, self._sent.offset, most)
        for is_upload, group in itertools.groupby(lines, key=_is_upload):
            if is_upload:
                for line in group:
                    self._send_or_set_aside(line, count)
            else:
                self._send(list(group), count)
        return lines

    def _send(self, lines: Sequence[Line], count: Count) -> None:
        entries = _entries(lines)
        self._server.send(entries)
        self._sent.offset = lines[-1].end
        save_sent(self._path.parent, self._sent)
        for entry in entries:
            count(entry)

    def _send_or_set_aside(self, line: Line, count: Count) -> None:
        is_taken = not self._is_refused and self._upload(line)
        if not is_taken:
            self._sent.aside.append(line.begin)
        self._sent.offset = line.end
        save_sent(self._path.parent, self._sent)
        if is_taken:
            count(line.record or {})

    def _upload(self, line: Line) -> bool:
        """Whether the server took it; raises when the server as a whole is away, for then the file is not at fault."""
        try:
            self._server.send(_entries([line]))
        except Exception as error:  # MLflow raises what its artifact store or network library raises
            self._server.check()
            self._is_refused = True
            self.refusal = error
            return False
        return True

    def retry_aside(self, before_each: Callable[[], None], count: Count) -> None:
        """Try each upload that waits.  before_each: sends what else has come, which is worth more."""
        for begin in list(self._sent.aside):
            before_each()
            if begin not in self._sent.aside:
                continue
            found = read_whole_lines(self._path, begin, 1)
            if found and _is_upload(found[0]) and not self._upload(found[0]):
                continue
            self._sent.aside.remove(begin)
            save_sent(self._path.parent, self._sent)
            for entry in _entries(found):
                count(entry)


def backlog(path: Path, sent: Sent) -> Backlog:
    """What the server lacks of the spool at `path`; a last line that was cut short counts with its bytes only."""
    offset, num_records, num_files = sent.offset, 0, len(sent.aside)
    while lines := read_whole_lines(path, offset, _COUNTED_AT_ONCE):
        offset = lines[-1].end
        num_files += sum(map(_is_upload, lines))
        num_records += sum(line.record is not None and not _is_upload(line) for line in lines)
    waiting = (read_whole_lines(path, begin, 1) for begin in sent.aside)
    num_bytes = sum(lines[0].end - lines[0].begin for lines in waiting if lines)
    return Backlog(num_records, num_files, num_bytes + max(0, path.stat().st_size - sent.offset))


def _is_upload(line: Line) -> bool:
    return line.record is not None and line.record.get("event") in _UPLOADS


def _entries(lines: Sequence[Line]) -> list[dict[str, Any]]:
    return [line.record for line in lines if line.record is not None]


# -- the thread --------------------------------------------------------------------------------------------------------


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

    def verdict(self, key: str) -> str:
        """What became of the champion when that version was registered; empty where it was no candidate."""
        return self._sent.verdicts.get(key, "")

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
        reason = short_reason(error).replace(self._uri, shown_uri(self._uri))
        parts = urlsplit(self._uri)
        proxy = proxy_before(parts.hostname or "", parts.scheme) if parts.scheme in SERVERS else None
        return f"{reason}, by way of {proxy}" if proxy else reason


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
    return escaped((str(innermost).splitlines() or [type(innermost).__name__])[0][:300])  # a server's words, often
