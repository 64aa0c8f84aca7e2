"""A spool's way to a server: in its order, save that a file which the server does not take now waits aside.

The artifact store may be full, forbidden or down while metrics would be taken.  What waits is noted in
spool.sent.json, so that a later attempt, the next process and `facefed tracking sync` try it again.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from common.files import Line
from common.tracking.spool import Sent, read_whole_lines, save_sent

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
