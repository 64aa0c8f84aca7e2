"""The local record of a run: every metric and event is a line of `spool.jsonl` before anything is sent anywhere.

A line is JSON with "time_ms" (wall clock), "run" ("" for the run itself, else the name of a nested run), and either
"key", "value", "step" (a metric) or "event" and its fields.  JSON has no NaN: non-finite values are the texts "nan",
"inf", "-inf", which `float()` reads back.  `spool.sent.json` says how many bytes of the spool the tracking server has,
and which lines before that wait aside.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

from common.errors import TrackingError
from common.system.files import InUse, Line, bring_to_disk, lock, read_lines, replacing

SPOOL_NAME = "spool.jsonl"
SENT_NAME = "spool.sent.json"
SYNC_INTERVAL_S = 1.0
LOCK_WITHIN_S = 10.0  # children of a program that was killed may hold its lock a little longer
LEAST_FREE_BYTES = 50_000_000  # below this no run begins
LOW_FREE_BYTES = 500_000_000  # below this a run says so, while there is time to make room
LOOK_AT_DISK_S = 10.0
_ENTRIES_AT_ONCE = 1000
_READ_BYTES = 65536

_log = logging.getLogger("facefed.tracking")


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
        with contextlib.suppress(OSError):
            bring_to_disk(folder)  # a power cut shall not take the file's name
        self.num_lost = 0  # lines that a full disk did not take
        self._lock = threading.Lock()
        self._size = self._end_of_lines()
        self._torn = self._size < self.path.stat().st_size
        self._failed = False
        self._low = False
        self._look_at = 0.0
        self._dirty = threading.Event()
        self._closed = threading.Event()
        self._syncer = threading.Thread(target=self._sync_each_second, name="spool-sync", daemon=True)
        self._syncer.start()

    @property
    def size(self) -> int:
        """Bytes of whole lines written so far."""
        return self._size

    def entries(self) -> Iterator[dict[str, Any]]:
        """Every whole entry written so far, also by earlier processes."""
        return entries_of(self.path)

    def append(self, lines: bytes) -> None:
        """Write whole lines.  A disk that is full is reported once and does not raise: training is worth more."""
        with self._lock:
            if self._closed.is_set():
                raise RuntimeError(f"{self.path} is closed: the run has finished")
            rest = b"\n" + lines if self._torn else lines
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
                self._torn = False
                self._size = self._file.tell()
            except OSError as error:
                self._torn = True
                with contextlib.suppress(OSError):
                    self._size = self._end_of_lines()
                self.num_lost += min(rest.count(b"\n"), lines.count(b"\n"))
                if not self._failed:
                    self._failed = True
                    _log.warning("%s cannot be written (%s); metrics are lost until there is room.", self.path, error)
        self._dirty.set()

    def _end_of_lines(self) -> int:
        """Where the last whole line ends; kill -9 or a full disk may have cut the one behind it short."""
        end = self._file.seek(0, os.SEEK_END)
        while end:
            begin = self._file.seek(max(0, end - _READ_BYTES))
            found = self._file.read(end - begin).rfind(b"\n")
            if found >= 0:
                return begin + found + 1
            end = begin
        return 0

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
    try:
        without_locks = lock(file, within_s)
    except InUse:
        raise TrackingError(
            f"{folder} is in use by a run or a `facefed tracking sync` that has not ended; wait for it."
        ) from None
    if without_locks:
        _log.warning(
            "Tracking: %s cannot be locked (%s); see to it yourself that no other program records or sends this run.",
            folder,
            without_locks,
        )


# -- lines -------------------------------------------------------------------------------------------------------------


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


def metric_line(run: str, key: str, value: float, step: int, time_ms: int) -> bytes:
    """One metric as a line of the spool."""
    shown: float | str = value if math.isfinite(value) else str(value)
    return _line({"time_ms": time_ms, "run": run, "key": key, "value": shown, "step": step})


def event_line(run: str, event: str, time_ms: int, fields: Mapping[str, object]) -> bytes:
    """One event ("start", "params", "tags", "artifact", "finish", ...) as a line of the spool."""
    return _line({"time_ms": time_ms, "run": run, "event": event, **fields})


def _line(entry: Mapping[str, object]) -> bytes:
    return json.dumps(entry, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def read_whole_lines(path: Path, begin: int, most: int) -> list[Line]:
    """The lines from byte `begin` on, until `most` of them hold an entry; the last, being written, is left out.

    An entry is a record with all that it must hold; any other is damaged.
    """
    lines: list[Line] = []
    num_entries = 0
    for line in read_lines(path, begin):
        if num_entries >= most or not line.is_whole:  # being written, or torn: not ours yet
            break
        checked = (
            line if line.record is None or _is_entry(line.record) else line._replace(record=None, damage="is no entry")
        )
        lines.append(checked)
        num_entries += checked.record is not None
    return lines


def read_entries(path: Path, begin: int, most: int) -> tuple[list[dict[str, Any]], int, int]:
    """At most `most` whole entries from byte `begin` on: (entries, offset behind them, number of corrupt lines)."""
    lines = read_whole_lines(path, begin, most)
    entries = [line.record for line in lines if line.record is not None]
    return entries, lines[-1].end if lines else begin, sum(bool(line.damage) for line in lines)


def _is_entry(entry: dict[str, Any]) -> bool:
    """Whether it has what it must; its numbers become such."""
    try:
        entry["time_ms"] = int(entry["time_ms"])
        if "event" not in entry:
            entry["value"] = float(entry["value"])
            entry["step"] = int(entry["step"])
            return _has(entry, {"run": str, "key": str})
        return _has(entry, {"run": str, **_FIELDS.get(entry["event"], {})})
    except (ValueError, KeyError, TypeError, OverflowError):
        return False


def _has(entry: Mapping[str, object], fields: Mapping[str, type]) -> bool:
    return all(isinstance(entry.get(name), kind) for name, kind in fields.items())


def entries_of(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole entry of a spool."""
    offset = 0
    while True:
        entries, offset, _ = read_entries(path, offset, _ENTRIES_AT_ONCE)
        yield from entries
        if len(entries) < _ENTRIES_AT_ONCE:
            return


# -- what the server has -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Sent:
    """What a tracking server already has of one spool."""

    uri: str = ""  # without password; another server gets everything from the start
    offset: int = 0  # bytes of the spool
    run_key: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)  # finds a run whose creation was cut off
    run_ids: dict[str, str] = dataclasses.field(default_factory=dict)  # name in the spool -> MLflow's run id
    aside: list[int] = dataclasses.field(default_factory=list)  # where lines begin that the server did not take yet
    experiment_id: str = ""  # of the run itself, where its page is
    nonfinite: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # name in the spool -> metric names
    versions: dict[str, str] = dataclasses.field(default_factory=dict)  # key of a model's event -> registered version
    verdicts: dict[str, str] = dataclasses.field(default_factory=dict)  # likewise -> what became of the champion

    def forget(self) -> None:
        """Start from the spool's first line again."""
        self.offset = 0
        self.aside = []
        self.run_ids, self.experiment_id = {}, ""
        self.nonfinite = {}
        self.versions = {}
        self.verdicts = {}


def load_sent(folder: Path, uri: str) -> Sent:
    """What the server at `uri` (as shown, without password) has of the spool in `folder`; nothing where unknown."""
    try:
        sent = _sound(Sent(**json.loads((folder / SENT_NAME).read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError, RecursionError):
        key = _key_of(folder / SPOOL_NAME)  # without it the server would get the run a second time
        return Sent(uri=uri, run_key=key) if key else Sent(uri=uri)
    if sent.uri != uri:
        sent.uri = uri
        sent.forget()
    with contextlib.suppress(OSError):
        if sent.offset > (folder / SPOOL_NAME).stat().st_size:  # a power cut took lines that the server has
            sent.offset, sent.aside = 0, []
    return sent


def _sound(sent: Sent) -> Sent:
    """The same.  Raises TypeError where a field is of another kind, as in a damaged file."""
    tables: tuple[object, ...] = (sent.run_ids, sent.versions, sent.verdicts, sent.nonfinite)
    sound = (
        _are([sent.uri, sent.run_key, sent.experiment_id], str)
        and _are([sent.offset], int)
        and _are(sent.aside, int)
        and all(isinstance(table, dict) for table in tables)
        and _are([*sent.run_ids.values(), *sent.versions.values(), *sent.verdicts.values()], str)
        and all(_are(names, str) for names in sent.nonfinite.values())
    )
    if not sound or min([sent.offset, *sent.aside]) < 0:
        raise TypeError("a field is of another kind")
    return sent


def _are(values: object, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


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
    with contextlib.suppress(OSError), replacing(folder / SENT_NAME, synced=False) as aside:
        aside.write_text(json.dumps(dataclasses.asdict(sent)), encoding="utf-8")


# -- files beside the spool --------------------------------------------------------------------------------------------


class SavesFigure(Protocol):
    """What a matplotlib Figure offers; matplotlib itself stays in common.plots."""

    def savefig(self, fname: Path, *, format: str) -> None:  # noqa: A002 - matplotlib's word
        """Write the picture."""


class KeptFiles:
    """Writes artifacts of a run or a nested run into its folder: whole, and on the disk before the record says so."""

    def __init__(self, folder: Path, name: str) -> None:
        """name: "" for the run itself, else the nested run's."""
        self._folder = folder
        self._name = name
        self.missing: dict[str, None] = {}  # names that could not be written, in that order

    def place(self, name: str) -> Path:
        """Where an artifact lies in the run's folder; a nested run's in a folder of its name, plots/celeba/roc.png."""
        target = PurePosixPath(name)
        if target.is_absolute() or ".." in target.parts:
            raise ValueError(f"artifact name {name!r} leaves the run's folder")
        return self._folder / target.parent / self._name / target.name

    def write(self, name: str, write: Callable[[Path], object]) -> bool:
        """Have `write` make the artifact at a path that it gets; False, with one warning, when the disk is full."""
        path = self.place(name)
        try:
            with replacing(path) as aside:
                write(aside)
        except OSError as error:
            if not self.missing:
                _log.warning("Tracking: %s cannot be written (%s); the run goes on without it.", path, error)
            self.missing[name] = None
            return False
        self.missing.pop(name, None)
        return True
