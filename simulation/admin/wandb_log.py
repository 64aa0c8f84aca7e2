"""Reads the log that Weights & Biases keeps beside a run (`run-ID.wandb`), without the wandb package.

The file: 7 bytes ":W&B", 0xBEE1 (uint16), version 0 (uint8), then LevelDB's log format: blocks of 32,768 bytes (the
first one counts from the file's start) with chunks of crc32 (uint32, zlib's, over type and data), length (uint16), type
(uint8: 1 whole, 2 first, 3 middle, 4 last) and data, all little-endian; the last 0 to 6 bytes of a block are zeros.
Checked against files of wandb 0.16.6 and 0.31.0.  A record's data is a protobuf message; `fields` takes one apart.

Field numbers are those of wandb's public wandb_internal.proto, alike in 0.16 and 0.31.  Older versions write a nested
value as one JSON text, newer ones each leaf with its path; both come out as nested dictionaries here.
"""

import dataclasses
import json
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeGuard

from common.errors import TrackingError

# -- the file ----------------------------------------------------------------------------------------------------------


BLOCK_BYTES: Final = 32_768
CUT_SHORT: Final = "the file ends inside a record"
_HEAD: Final = struct.Struct("<4sHB")
_CHUNK: Final = struct.Struct("<IHB")
_IDENT, _MAGIC, _VERSION = b":W&B", 0xBEE1, 0
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # the wire types of protobuf
_LONGEST_VARINT: Final = 10


class Record(NamedTuple):
    """A whole record; it lies at [offset, end) of the file, in bytes."""

    offset: int
    end: int
    data: bytes


class Damage(NamedTuple):
    """Bytes that are no record, from `offset` on; reading went on behind them where it could."""

    offset: int
    what: str


class _Chunk(NamedTuple):
    kind: int
    data: bytes


class Malformed(ValueError):
    """Bytes that are no protobuf message."""


def read_records(path: Path) -> Iterator[Record | Damage]:
    """The records of a log in their order, and what is damaged or cut short between them.

    Raises TrackingError (one line) when the file is no log of Weights & Biases at all.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TrackingError(f"{path} cannot be read: {error.strerror}.") from error
    _check_head(path, content)
    yield from _records(content)


def _check_head(path: Path, content: bytes) -> None:
    hint = "name a folder that holds wandb's offline-run-* folders, or a run-ID.wandb file"
    if not content:
        raise TrackingError(f"{path} is empty: wandb wrote nothing to it; {hint}.")
    if len(content) < _HEAD.size or content[:4] != _IDENT:
        raise TrackingError(
            f"{path} is no Weights & Biases log: it begins with {content[:4]!r}, not {_IDENT!r}; {hint}."
        )
    _, magic, version = _HEAD.unpack_from(content)
    if (magic, version) != (_MAGIC, _VERSION):
        raise TrackingError(
            f"{path} is a Weights & Biases log of an unknown kind (magic {magic:#x}, version {version}; known: "
            f"{_MAGIC:#x}, version {_VERSION}); sync it with the wandb that wrote it."
        )


def _records(content: bytes) -> Iterator[Record | Damage]:
    """Puts chunks together; what is left of a record behind damage is passed over without a second report."""
    parts: list[bytes] = []
    started = -1  # where a record of several chunks began; -1 outside of one
    lost = False
    for begin, end, chunk in _chunks(content):
        if isinstance(chunk, str):
            yield Damage(begin if started < 0 else started, chunk)
            started, lost = -1, True
            continue
        goes_on = chunk.kind in (_MIDDLE, _LAST)
        if goes_on == (started < 0) and not lost:
            yield Damage(begin if started < 0 else started, "a part of a record without the rest of it")
        if not goes_on:
            started, parts, lost = begin, [], False
        elif started < 0:
            continue
        parts.append(chunk.data)
        if chunk.kind in (_WHOLE, _LAST):
            yield Record(started, end, b"".join(parts))
            started = -1
    if started >= 0:
        yield Damage(started, CUT_SHORT)


def _chunks(content: bytes) -> Iterator[tuple[int, int, _Chunk | str]]:
    """Begin, end and chunk, or what is wrong there; behind that the search goes on."""
    position = _past_padding(_HEAD.size)
    while position < len(content):
        chunk = _chunk_at(content, position)
        end = _next_sound(content, position) if isinstance(chunk, str) else position + _CHUNK.size + len(chunk.data)
        yield position, end, chunk
        position = _past_padding(end)


def _past_padding(position: int) -> int:
    left = BLOCK_BYTES - position % BLOCK_BYTES
    return position + left if left < _CHUNK.size else position


def _chunk_at(content: bytes, position: int) -> _Chunk | str:
    """The chunk at `position`, or what is wrong there."""
    if len(content) - position < _CHUNK.size:
        return CUT_SHORT
    crc, length, kind = _CHUNK.unpack_from(content, position)
    begin = position + _CHUNK.size
    if kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST):
        return f"no record begins here (type {kind})"
    if position % BLOCK_BYTES + _CHUNK.size + length > BLOCK_BYTES:
        return f"a record of {length} bytes that does not fit its block"
    if begin + length > len(content):
        return CUT_SHORT
    data = content[begin : begin + length]
    if zlib.crc32(data, zlib.crc32(bytes((kind,)))) != crc:
        return "a record whose checksum is wrong"
    return _Chunk(kind, data)


def _next_sound(content: bytes, damaged: int) -> int:
    """Where to read on: right behind the damaged chunk if a sound one follows there, else at the next block."""
    next_block = damaged + BLOCK_BYTES - damaged % BLOCK_BYTES
    if len(content) - damaged < _CHUNK.size:
        return next_block
    behind = _past_padding(damaged + _CHUNK.size + _CHUNK.unpack_from(content, damaged)[1])
    sound = behind <= next_block and isinstance(_chunk_at(content, behind), _Chunk)
    return behind if sound else next_block


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message: number, and an integer >= 0 or the bytes of a text or nested message.

    Groups are unknown here, as in proto3.  Raises Malformed.
    """
    position, end = 0, len(message)
    while position < end:
        key, position = _varint(message, position)
        number, wire = key >> 3, key & 7
        if number == 0:
            raise Malformed("field number 0")
        if wire == _VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire == _BYTES:
            size, position = _varint(message, position)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise Malformed(f"wire type {wire}")
        if position + size > end:
            raise Malformed("a field is cut short")
        yield number, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """The base-128 integer at `position` and the position behind it."""
    value = 0
    for index in range(_LONGEST_VARINT):
        if position + index >= len(message):
            raise Malformed("a number is cut short")
        byte = message[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise Malformed("a number is too long")


def signed(value: int | bytes) -> int:
    """A varint as int32 or int64 (protobuf writes negative ones as their 64-bit complement).  Raises Malformed."""
    if isinstance(value, bytes):
        raise Malformed("bytes where a number was expected")
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def text(value: int | bytes) -> str:
    """A field as text.  Raises Malformed."""
    return raw(value).decode("utf-8", "replace")


def raw(value: int | bytes) -> bytes:
    """A field as bytes, for a nested message.  Raises Malformed."""
    if isinstance(value, int):
        raise Malformed("a number where bytes were expected")
    return value


# -- what its records mean ---------------------------------------------------------------------------------------------


_HISTORY, _SUMMARY, _CONFIG, _STATS, _ARTIFACT, _RUN, _EXIT = 2, 3, 5, 7, 8, 17, 18  # fields of Record
_ITEM_KEY, _ITEM_NESTED_KEY, _ITEM_JSON = 1, 2, 16  # of a history, summary or config item
_RUN_CONFIG, _RUN_SUMMARY, _RUN_TAGS, _RUN_START = 4, 5, 10, 17
_RUN_TEXTS: Final = {
    1: "run_id", 2: "entity", 3: "project", 6: "group", 7: "job_type", 8: "name", 9: "notes", 12: "sweep_id",
}  # fmt: skip
_NOT_CARRIED: Final = {_STATS: "system metrics", _ARTIFACT: "artifact versions"}
_MOST: Final = 1 << 53  # beyond this a step or time is nonsense, and no database takes it
_OF_WANDB: Final = "_wandb"  # its own notes in config and summary

Tree = dict[str, Any]


@dataclasses.dataclass
class RunFacts:
    """All of a log but its history."""

    run_id: str = ""
    entity: str = ""
    project: str = ""
    name: str = ""
    notes: str = ""
    group: str = ""
    job_type: str = ""
    sweep_id: str = ""
    tags: list[str] = dataclasses.field(default_factory=list)
    start_ms: int = 0  # wall clock; 0 where the log does not tell
    config: Tree = dataclasses.field(default_factory=dict)
    summary: Tree = dataclasses.field(default_factory=dict)
    exit_code: int | None = None  # None: the run did not end, or its end is not in the log
    num_records: int = 0
    num_rows: int = 0
    end: int = 0  # bytes up to the end of the last whole record
    damages: list[Damage] = dataclasses.field(default_factory=list)
    not_carried: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def sound_end(self) -> int:
        """Bytes up to which every record was read."""
        return min([self.end, *(damage.offset for damage in self.damages)])


class Row(NamedTuple):
    """One row of the history, logged at `step` and `time_ms` (wall clock); it begins at `offset` of the file."""

    offset: int
    step: int
    time_ms: int
    values: Tree


def read_facts(log: Path) -> RunFacts:
    """Read all of a log but its history.  Raises TrackingError when it is none, or has not one whole record."""
    facts = RunFacts()
    for found in read_records(log):
        if isinstance(found, Damage):
            facts.damages.append(found)
            continue
        try:
            _take(facts, found.data)
        except Malformed as error:
            facts.damages.append(Damage(found.offset, f"a record that is no protobuf message ({error})"))
        facts.num_records += 1
        facts.end = found.end
    if not facts.num_records:
        raise TrackingError(
            f"{log} has no whole record: wandb was stopped before it wrote one, or the file is cut off."
        )
    facts.run_id = facts.run_id or log.stem.removeprefix("run-")
    for tree in (facts.config, facts.summary):
        tree.pop(_OF_WANDB, None)
    return facts


def _take(facts: RunFacts, message: bytes) -> None:
    for number, value in fields(message):
        if number == _HISTORY:
            facts.num_rows += 1
        elif number == _SUMMARY:
            _update(facts.summary, raw(value))
        elif number == _CONFIG:
            _update(facts.config, raw(value))
        elif number == _RUN:
            _take_run(facts, raw(value))
        elif number == _EXIT:
            facts.exit_code = signed(dict(fields(raw(value))).get(1, 0))
        elif number in _NOT_CARRIED:
            name = _NOT_CARRIED[number]
            facts.not_carried[name] = facts.not_carried.get(name, 0) + 1


def _take_run(facts: RunFacts, message: bytes) -> None:
    """A run's record; a later one tells only what has changed."""
    tags = []
    for number, value in fields(message):
        if number in _RUN_TEXTS:
            setattr(facts, _RUN_TEXTS[number], text(value))
        elif number == _RUN_TAGS:
            tags.append(text(value))
        elif number == _RUN_START:
            parts = dict(fields(raw(value)))
            facts.start_ms = signed(parts.get(1, 0)) * 1000 + signed(parts.get(2, 0)) // 1_000_000
        elif number == _RUN_CONFIG:
            _update(facts.config, raw(value))
        elif number == _RUN_SUMMARY:
            _update(facts.summary, raw(value))
    facts.tags = tags or facts.tags


def _update(tree: Tree, message: bytes) -> None:
    """A config or summary record: field 1 sets items, field 2 removes them."""
    for number, value in fields(message):
        if number == 1:
            path, content = _item(raw(value))
            _put(tree, path, content)
        elif number == 2:
            path, _ = _item(raw(value))
            _drop(tree, path)


def read_history(log: Path, start_ms: int) -> Iterator[Row]:
    """The rows of a log's history in their order; damaged ones, which `read_facts` reports, are left out.

    start_ms: stands in for the time of a row that has none.
    """
    count = 0
    for found in read_records(log):
        if isinstance(found, Damage):
            continue
        for message in _history_messages(found):
            try:
                row = _row(found.offset, message, count, start_ms)
            except Malformed:
                continue
            count = row.step + 1
            yield row


def _history_messages(record: Record) -> list[bytes]:
    try:
        return [raw(value) for number, value in fields(record.data) if number == _HISTORY]
    except Malformed:
        return []


def _row(offset: int, message: bytes, next_step: int, start_ms: int) -> Row:
    values: Tree = {}
    step: int | None = None
    for number, value in fields(message):
        if number == 1:
            path, content = _item(raw(value))
            _put(values, path, content)
        elif number == 2:
            step = signed(dict(fields(raw(value))).get(1, 0))
    told = values.pop("_step", None)
    if isinstance(told, int) and abs(told) < _MOST:
        step = told
    runtime, stamp = values.pop("_runtime", None), values.pop("_timestamp", None)
    values.pop(_OF_WANDB, None)
    time_ms = start_ms
    if is_number(stamp) and 0 <= stamp * 1000 < _MOST:
        time_ms = int(stamp * 1000)
    elif is_number(runtime) and 0 <= runtime * 1000 < _MOST:
        time_ms = start_ms + int(runtime * 1000)
    return Row(offset, next_step if step is None else step, time_ms, values)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _item(message: bytes) -> tuple[Sequence[str], Any]:
    """The path and the content of a history, summary or config item; what is no JSON stays a text."""
    key, nested, content = "", [], ""
    for number, value in fields(message):
        if number == _ITEM_KEY:
            key = text(value)
        elif number == _ITEM_NESTED_KEY:
            nested.append(text(value))
        elif number == _ITEM_JSON:
            content = text(value)
    try:
        return nested or [key], json.loads(content)
    except (ValueError, RecursionError):
        return nested or [key], content


def _put(tree: Tree, path: Sequence[str], value: object) -> None:
    for name in path[:-1]:
        below = tree.get(name)
        if not isinstance(below, dict):
            below = tree[name] = {}
        tree = below
    tree[path[-1]] = value


def _drop(tree: Tree, path: Sequence[str]) -> None:
    for name in path[:-1]:
        below = tree.get(name)
        if not isinstance(below, dict):
            return
        tree = below
    tree.pop(path[-1], None)


def leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of each leaf; media (a dictionary with `_type`), lists and empty ones are leaves."""
    for name, value in tree.items():
        if isinstance(value, dict) and value and "_type" not in value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
