"""The local record of a run: every metric and event is a line of `spool.jsonl` before anything is sent anywhere.

A line is JSON with "time_ms" (wall clock), "run" ("" for the run itself, else the name of a nested run), and either
"key", "value", "step" (a metric) or "event" and its fields.  JSON has no NaN: non-finite values are the texts "nan",
"inf", "-inf", which `float()` reads back.  `spool.sent.json` says how many bytes of it the tracking server has.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import math
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import TrackingError

SPOOL_NAME = "spool.jsonl"
SENT_NAME = "spool.sent.json"
SYNC_INTERVAL_S = 1.0
LOCK_WITHIN_S = 10.0  # children of a program that was killed may hold its lock a little longer
LEAST_FREE_BYTES = 50_000_000  # below this no run begins
LOW_FREE_BYTES = 500_000_000  # below this a run says so, while there is time to make room
LOOK_AT_DISK_S = 10.0
_ENTRIES_AT_ONCE = 1000
# What each event must hold; a line without it is corrupt.
_FIELDS: Mapping[str, Mapping[str, type]] = {
    "start": {"experiment": str, "name": str, "tags": dict, "params": dict},
    "params": {"values": dict},
    "tags": {"values": dict},
    "dataset": {"name": str, "digest": str, "context": str, "profile": dict},
    "artifact": {"file": str, "name": str},
    "model": {"model_key": str, "name": str, "folder": str, "step": int, "tags": dict, "metrics": list, "people": str},
    "finish": {"status": str},
}

_log = logging.getLogger("facefed.tracking")


def metric_line(run: str, key: str, value: float, step: int, time_ms: int) -> bytes:
    """One metric as a line of the spool."""
    shown: float | str = value if math.isfinite(value) else str(value)
    return _line({"time_ms": time_ms, "run": run, "key": key, "value": shown, "step": step})


def event_line(run: str, event: str, time_ms: int, fields: Mapping[str, object]) -> bytes:
    """One event ("start", "params", "tags", "artifact", "finish", ...) as a line of the spool."""
    return _line({"time_ms": time_ms, "run": run, "event": event, **fields})


def _line(entry: Mapping[str, object]) -> bytes:
    return json.dumps(entry, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def now_ms() -> int:
    """Wall-clock time in milliseconds, as MLflow counts it."""
    return time.time_ns() // 1_000_000


class Spool:
    """Appends lines to RUN/spool.jsonl; a line is with the operating system at once, on the disk within a second."""

    def __init__(self, folder: Path) -> None:
        """folder: the run's folder; made where it is missing.  An earlier spool in it is continued.

        Raises TrackingError when another process writes or sends it, and when the disk is full.
        """
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_full_disk(folder)
        self.path = folder / SPOOL_NAME
        self._file = self.path.open("a+b", buffering=0)
        try:
            hold(self._file, folder, LOCK_WITHIN_S)
        except TrackingError:
            self._file.close()
            raise
        self._size = self.path.stat().st_size
        self._lock = threading.Lock()
        self._torn = self._ends_torn()
        self._failed = False
        self._low = False
        self._look_at = 0.0
        self._dirty = threading.Event()
        self._closed = threading.Event()
        self._syncer = threading.Thread(target=self._sync_each_second, name="spool-sync", daemon=True)
        self._syncer.start()

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._size

    def entries(self) -> Iterator[dict[str, Any]]:
        """Every whole entry written so far, also by earlier processes."""
        return entries_of(self.path)

    def append(self, lines: bytes) -> None:
        """Write whole lines.  A disk that is full is reported once and does not raise: training is worth more."""
        with self._lock:
            if self._closed.is_set():
                raise RuntimeError(f"{self.path} is closed: the run has finished")
            try:
                self._write(b"\n" + lines if self._torn else lines)
            except OSError as error:
                self._torn = True
                if not self._failed:
                    self._failed = True
                    _log.warning("%s cannot be written (%s); metrics are lost until there is room.", self.path, error)
        self._dirty.set()

    def _write(self, data: bytes) -> None:
        while data:
            written = self._file.write(data)
            self._size += written
            data = data[written:]
        self._torn = False

    def _ends_torn(self) -> bool:
        """Whether the last line was cut short, as kill -9 or a full disk leaves it."""
        if self._size == 0:
            return False
        self._file.seek(-1, os.SEEK_END)
        return self._file.read(1) != b"\n"

    def _sync_each_second(self) -> None:
        while not self._closed.wait(SYNC_INTERVAL_S):
            if self._dirty.is_set():
                self._dirty.clear()
                self._sync()
            if time.monotonic() >= self._look_at:
                self._look_at = time.monotonic() + LOOK_AT_DISK_S
                self._look_at_disk()

    def _look_at_disk(self) -> None:
        """Say once when the disk fills up, before checkpoints and records fail."""
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self.path.parent).free
            if free < LOW_FREE_BYTES and not self._low:
                _log.warning(
                    "Tracking: only %d MB are free for %s; make room, or checkpoints and metrics will be lost.",
                    free // 10**6,
                    self.path.parent,
                )
            self._low = free < LOW_FREE_BYTES

    def _sync(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # reported by the next append
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Bring everything to the disk and stop."""
        self._closed.set()
        self._syncer.join()
        with self._lock:
            self._sync()
            self._file.close()


def _refuse_full_disk(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE_BYTES:
        raise TrackingError(
            f"{folder} has {free // 10**6} MB free and a run needs {LEAST_FREE_BYTES // 10**6} MB to begin; make room"
            " or choose another folder with --out."
        )


def hold(file: BinaryIO, folder: Path, within_s: float) -> None:
    """Take the lock of a run's spool, until the file is closed or the process dies.

    Raises TrackingError when another process keeps it for longer than `within_s`.
    """
    deadline = time.monotonic() + within_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TrackingError(
                    f"{folder} is in use by a run or a `facefed tracking sync` that has not ended; wait for it."
                ) from None
            time.sleep(0.1)
        except OSError:  # a file system without locks
            return
        else:
            return


def entries_of(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole entry of a spool."""
    offset = 0
    while True:
        entries, offset, _ = read_lines(path, offset, _ENTRIES_AT_ONCE)
        yield from entries
        if len(entries) < _ENTRIES_AT_ONCE:
            return


def read_lines(path: Path, offset: int, most: int) -> tuple[list[dict[str, Any]], int, int]:
    """At most `most` whole entries from byte `offset` on: (entries, offset behind them, number of corrupt lines)."""
    entries: list[dict[str, Any]] = []
    corrupt = 0
    with path.open("rb") as file:
        file.seek(offset)
        while len(entries) < most:
            line = file.readline()
            if not line.endswith(b"\n"):  # being written, or torn: not ours yet
                break
            offset += len(line)
            entry = _parsed(line)
            if entry is not None:
                entries.append(entry)
            elif line.strip():
                corrupt += 1
    return entries, offset, corrupt


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
        entry["time_ms"] = int(entry["time_ms"])
        if "event" not in entry:
            entry["value"] = float(entry["value"])
            entry["step"] = int(entry["step"])
            return entry if _has(entry, {"run": str, "key": str}) else None
        return entry if _has(entry, {"run": str, **_FIELDS.get(entry["event"], {})}) else None
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def _has(entry: Mapping[str, object], fields: Mapping[str, type]) -> bool:
    return all(isinstance(entry.get(name), kind) for name, kind in fields.items())


@dataclasses.dataclass
class Sent:
    """What a tracking server already has of one spool."""

    uri: str = ""  # without password; another server gets everything from the start
    offset: int = 0  # bytes of the spool
    run_key: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)  # finds a run whose creation was cut off
    run_ids: dict[str, str] = dataclasses.field(default_factory=dict)  # name in the spool -> MLflow's run id
    nonfinite: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # name in the spool -> metric names
    versions: dict[str, str] = dataclasses.field(default_factory=dict)  # key of a model's event -> registered version

    def forget(self) -> None:
        """Start from the spool's first line again."""
        self.offset = 0
        self.run_ids = {}
        self.nonfinite = {}
        self.versions = {}


def load_sent(folder: Path, uri: str) -> Sent:
    """What the server at `uri` (as shown, without password) has of the spool in `folder`; nothing where unknown."""
    try:
        sent = Sent(**json.loads((folder / SENT_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        key = _key_of(folder / SPOOL_NAME)  # without it the server would get the run a second time
        return Sent(uri=uri, run_key=key) if key else Sent(uri=uri)
    if sent.uri != uri:
        sent.uri = uri
        sent.forget()
    with contextlib.suppress(OSError):
        if sent.offset > (folder / SPOOL_NAME).stat().st_size:  # a power cut took lines that the server has
            sent.offset = 0
    return sent


def _key_of(path: Path) -> str:
    """The key that a run wrote into its spool when it began; empty where it did not."""
    try:
        keys = (
            entry.get("run_key") for entry in entries_of(path) if entry.get("event") == "start" and not entry["run"]
        )
        return next((key for key in keys if isinstance(key, str)), "")
    except OSError:
        return ""


def save_sent(folder: Path, sent: Sent) -> None:
    """Replace the note atomically; losing it (the disk is full) costs a repeated sending, which adds nothing."""
    part = folder / f"{SENT_NAME}.part"
    with contextlib.suppress(OSError):
        part.write_text(json.dumps(dataclasses.asdict(sent)), encoding="utf-8")
        part.replace(folder / SENT_NAME)
