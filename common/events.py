"""What happens in a run, as JSON lines in its folder: written by the ServerApp, shown by whoever started it.

One mechanism serves both engines: the ServerApp may be a thread of this process or a process of its own.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EVENTS_FILE = "events.jsonl"
STOP_FILE = "stop"  # its presence asks the ServerApp to end the run
SHOWN = "facefed: "  # opens a log line of the ClientApp that flower-client shows to its user
LAST_TASK_FILE = "last-task"  # in a client's state folder: the run whose last task was answered
OUTCOME_FILE = "outcome.json"  # {"exit_code": 0, "line": ""}, written when the run is over


class EventLog:
    """Appends one line for each event, readable at once by another process."""

    def __init__(self, folder: Path) -> None:
        """folder: the run's folder, which is created."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / EVENTS_FILE

    def emit(self, kind: str, **values: object) -> None:
        """values: JSON.

        kind: joined, gathered, waiting, members, refused, round, scored, resumed, stopped_early, saving, warning,
        finished or failed.
        """
        line = json.dumps({"kind": kind, "time": time.time(), **values})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


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
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                event = _parsed(line)
                if event is not None:
                    yield event


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The event of a line, or None where the line is damaged: a full disk may cut one, and the next goes on in it."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("kind"), str) else None
