"""What happens in a run, as JSON lines in its folder: written by the ServerApp, shown by whoever started it.

One mechanism serves both engines: the ServerApp may be a thread of this process or a process of its own.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.system.files import append_line, read_lines

EVENTS_FILE = "events.jsonl"
STOP_FILE = "stop"  # its presence asks the ServerApp to end the run
SHOWN = "facefed: "  # opens a log line of the ClientApp that flower-client shows to its user
LAST_TASK_FILE = "last-task"  # in a client's state folder: the run whose last task was answered
RUN_FILE = "run.json"  # what kind of run a folder holds
OUTCOME_FILE = "outcome.json"  # {"exit_code": 0, "line": ""}, written when the run is over


class EventLog:
    """Appends one line for each event, readable at once by another process."""

    def __init__(self, folder: Path) -> None:
        """folder: the run's folder, which is created."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / EVENTS_FILE

    def emit(self, kind: str, **values: object) -> None:
        """values: JSON.

        kind: starting, begun, joined, gathered, waiting, members, refused, asked, progress, answered, round, scored,
        resumed, stopped_early, saving, warning, finished or failed.
        """
        append_line(self.path, {"kind": kind, "time": time.time(), **values}, synced=False)


class EventReader:
    """Reads the events that were added since the last look."""

    def __init__(self, folder: Path, *, only_new: bool = False) -> None:
        """folder: the run's folder; it need not exist yet.  only_new: leave out what an earlier process wrote."""
        self._path = folder / EVENTS_FILE
        self._offset = self._path.stat().st_size if only_new and self._path.exists() else 0

    def new_events(self) -> Iterator[dict[str, Any]]:
        """The whole lines that are new; a line still being written is left for the next look."""
        if not self._path.exists():
            return
        for line in read_lines(self._path, self._offset):
            if not line.is_whole:
                return
            self._offset = line.end
            if line.record is not None and isinstance(line.record.get("kind"), str):  # a full disk may cut a line
                yield line.record
