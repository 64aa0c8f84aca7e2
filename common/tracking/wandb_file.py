"""Reads the log that Weights & Biases keeps beside a run (`run-ID.wandb`), without the wandb package.

The file: 7 bytes ":W&B", 0xBEE1 (uint16), version 0 (uint8), then LevelDB's log format: blocks of 32,768 bytes (the
first one counts from the file's start) with chunks of crc32 (uint32, zlib's, over type and data), length (uint16), type
(uint8: 1 whole, 2 first, 3 middle, 4 last) and data, all little-endian; the last 0 to 6 bytes of a block are zeros.
Checked against files of wandb 0.16.6 and 0.31.0.  A record's data is a protobuf message; `fields` takes one apart.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from common.errors import TrackingError

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
