"""What a message's content is made of, part by part, and files with a JSON line for each content.

A site's egress ledger and the server's record of what it received are made by this one file, so that they can be
compared: equal bytes have equal lines.  Free of Flower and of torch: a process without them writes ledgers too.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Part = dict[str, Any]  # name, shape, dtype, num_bytes, sha256
PART_FIELDS = ("name", "shape", "dtype", "num_bytes", "sha256")
RECEIVED_FILE = "received.jsonl"  # the server's record, in the run's folder
REASON = "error.reason"  # the one part of an error reply


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a file: what it says, or why it says nothing."""

    number: int  # from 1
    record: Mapping[str, Any] | None
    damage: str = ""


def parts_of(content: Mapping[str, Mapping[str, Any]] | str) -> list[Part]:
    """Every array and value of a content, or the reason of a client that could not answer.

    An array's bytes are those that travel; a value's are its JSON.
    """
    if isinstance(content, str):
        return [_part(REASON, (), "str", content.encode()) | {"text": content}]
    parts = []
    for record, values in content.items():
        if not values:
            parts.append(_part(record, (), "nothing", b""))  # its name leaves
        for key, value in values.items():
            if hasattr(value, "stype"):  # Flower's Array
                parts.append(_part(f"{record}.{key}", value.shape, value.dtype, value.data))
            else:
                parts.append(_part(f"{record}.{key}", (), _kind(value), _plain_bytes(value)))
    return parts


def _part(name: str, shape: Sequence[int], dtype: str, data: bytes) -> Part:
    sha256 = hashlib.sha256(data).hexdigest()
    return {"name": name, "shape": list(shape), "dtype": dtype, "num_bytes": len(data), "sha256": sha256}


def _kind(value: object) -> str:
    """The type's name as it is on both sides: what was numpy's float64 here arrives as a float."""
    return "float" if isinstance(value, float) else type(value).__name__


def _plain_bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value, default=bytes.hex).encode()


def digest_of(parts: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 over the JSON of all parts' fields in order of names, without spaces: equal for equal contents."""
    rows = sorted([part[field] for field in PART_FIELDS] for part in parts)
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def append_line(path: Path, record: Mapping[str, Any], *, synced: bool) -> None:
    """Add one line to a file, which is made where it is missing; a line that was cut before is left behind, ended.

    synced: be on the disk before this returns.  Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        is_cut = file.read(1) not in (b"", b"\n")
        file.write((b"\n" if is_cut else b"") + json.dumps(record).encode() + b"\n")
        file.flush()
        if synced:
            os.fsync(file.fileno())
    if synced and end == 0:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # without it a power cut may take the new file's name
        finally:
            os.close(folder)


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a file, those that are damaged among them; empty ones are left out.  Raises OSError."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                record = json.loads(raw)
            except (ValueError, RecursionError):
                why = "is no JSON" if raw.endswith(b"\n") else "is cut: whoever wrote it was stopped"
                yield Line(number=number, record=None, damage=why)
                continue
            is_record = isinstance(record, dict)
            yield Line(number=number, record=record if is_record else None, damage="" if is_record else "is no record")
