"""The lines of a spool: what each must hold, how they are written, and how they are read back.

A line is JSON with "time_ms" (wall clock), "run" ("" for the run itself, else the name of a nested run), and either
"key", "value", "step" (a metric) or "event" and its fields.  JSON has no NaN: non-finite values are the texts "nan",
"inf", "-inf", which `float()` reads back.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

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


class Line(NamedTuple):
    """One whole line of a spool."""

    begin: int  # its first byte in the file
    end: int  # the byte behind it
    entry: dict[str, Any] | None  # None: nothing that can be sent
    is_corrupt: bool  # else, without an entry, it is empty


def metric_line(run: str, key: str, value: float, step: int, time_ms: int) -> bytes:
    """One metric as a line of the spool."""
    shown: float | str = value if math.isfinite(value) else str(value)
    return _line({"time_ms": time_ms, "run": run, "key": key, "value": shown, "step": step})


def event_line(run: str, event: str, time_ms: int, fields: Mapping[str, object]) -> bytes:
    """One event ("start", "params", "tags", "artifact", "finish", ...) as a line of the spool."""
    return _line({"time_ms": time_ms, "run": run, "event": event, **fields})


def _line(entry: Mapping[str, object]) -> bytes:
    return json.dumps(entry, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def read_whole_lines(path: Path, offset: int, most: int) -> list[Line]:
    """The lines from byte `offset` on, until `most` of them hold an entry; the last, being written, is left out."""
    lines: list[Line] = []
    num_entries = 0
    with path.open("rb") as file:
        file.seek(offset)
        while num_entries < most:
            text = file.readline()
            if not text.endswith(b"\n"):  # being written, or torn: not ours yet
                break
            entry = _parsed(text)
            lines.append(Line(offset, offset + len(text), entry, entry is None and bool(text.strip())))
            offset += len(text)
            num_entries += entry is not None
    return lines


def read_lines(path: Path, offset: int, most: int) -> tuple[list[dict[str, Any]], int, int]:
    """At most `most` whole entries from byte `offset` on: (entries, offset behind them, number of corrupt lines)."""
    lines = read_whole_lines(path, offset, most)
    entries = [line.entry for line in lines if line.entry is not None]
    return entries, lines[-1].end if lines else offset, sum(line.is_corrupt for line in lines)


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(text)
        entry["time_ms"] = int(entry["time_ms"])
        if "event" not in entry:
            entry["value"] = float(entry["value"])
            entry["step"] = int(entry["step"])
            return entry if _has(entry, {"run": str, "key": str}) else None
        return entry if _has(entry, {"run": str, **_FIELDS.get(entry["event"], {})}) else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _has(entry: Mapping[str, object], fields: Mapping[str, type]) -> bool:
    return all(isinstance(entry.get(name), kind) for name, kind in fields.items())
