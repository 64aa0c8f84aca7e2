"""Writes logs as wandb does, for what its own small files in tests/data/wandb do not hold; shares no code with us."""

import json
import struct
import zlib
from pathlib import Path

DATA = Path(__file__).parents[1] / "data" / "wandb"
OLD, NEW = DATA / "wandb-0.16.6", DATA / "wandb-0.31.0"
HEAD = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
BLOCK = 32768


def log_of(folder):
    """The one log below a folder."""
    (log,) = folder.glob("wandb/*run-*/*.wandb")
    return log


def varint(number):
    number &= (1 << 64) - 1
    out = b""
    while number > 0x7F:
        out += bytes((number & 0x7F | 0x80,))
        number >>= 7
    return out + bytes((number,))


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def item(path, value):
    key = b"".join(field(2, name) for name in path) if isinstance(path, tuple) else field(1, path)
    return key + field(16, json.dumps(value))


def items(number, values):
    return b"".join(field(number, item(path, value)) for path, value in values.items())


def run_record(*, run_id="r1", project="p", name="a run", config=None, seconds=1_700_000_000, entity="", host=""):
    body = (
        field(1, run_id)
        + field(2, entity)
        + field(3, project)
        + field(8, name)
        + field(13, host)
        + field(17, field(1, seconds) + field(2, 5_000_000))
    )
    return field(17, body + field(4, items(1, config or {})))


def row_record(step, values, seconds):
    return field(2, items(1, {**values, "_timestamp": seconds, "_step": step}) + field(2, field(1, step)))


def summary_record(values):
    return field(3, items(1, values))


def exit_record(code=0):
    return field(18, field(1, code))


def framed(records):
    """The records in LevelDB's log format, with wandb's head; returns the bytes and where each record begins."""
    out, begins = bytearray(HEAD), []
    for record in records:
        rest, first = record, True
        begins.append(None)
        while first or rest:
            left = BLOCK - len(out) % BLOCK
            if left < 7:
                out += bytes(left)
                continue
            part, rest = rest[: left - 7], rest[left - 7 :]
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[first, not rest]
            begins[-1] = len(out) if first else begins[-1]
            out += struct.pack("<IHB", zlib.crc32(bytes((kind,)) + part), len(part), kind) + part
            first = False
    return bytes(out), begins


def write_log(folder, records, name="offline-run-20260101_000000-r1"):
    path = folder / "wandb" / name / "run-r1.wandb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(framed(records)[0])
    return path
