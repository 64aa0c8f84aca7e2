"""Writes a run's log as Weights & Biases does: protobuf records in LevelDB's log format; shares no code with us."""

import json
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

HEAD = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
BLOCK = 32768
START_S = 1_700_000_000


def varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    out = b""
    while number > 0x7F:
        out += bytes((number & 0x7F | 0x80,))
        number >>= 7
    return out + bytes((number,))


def field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def items(values: dict[str, object]) -> bytes:
    return b"".join(field(1, field(1, name) + field(16, json.dumps(value))) for name, value in values.items())


def row(step: int, values: dict[str, float]) -> bytes:
    told = {**values, "_timestamp": START_S + step / 10, "_runtime": step / 10, "_step": step}
    return field(2, items(told) + field(2, field(1, step)))


def framed(records: Iterable[bytes]) -> tuple[bytes, list[int]]:
    """The records in LevelDB's log format, with wandb's head; returns the bytes and where each record begins."""
    out, begins = bytearray(HEAD), list[int]()
    for record in records:
        rest, first = record, True
        while first or rest:
            left = BLOCK - len(out) % BLOCK
            if left < 7:
                out += bytes(left)
                continue
            part, rest = rest[: left - 7], rest[left - 7 :]
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[first, not rest]
            begins += [len(out)] if first else []
            out += struct.pack("<IHB", zlib.crc32(bytes((kind,)) + part), len(part), kind) + part
            first = False
    return bytes(out), begins


def write_run(folder: Path, num_steps: int, num_values: int) -> Path:
    """An offline run of `num_steps` steps with `num_values` metrics each; returns wandb's folder."""
    about = field(1, "r1") + field(3, "bench") + field(8, "a run") + field(17, field(1, START_S))
    rows = (
        row(step, {f"value_{number}": (step * num_values + number) / 7 for number in range(num_values)})
        for step in range(num_steps)
    )
    records = [field(17, about), *rows, field(18, field(1, 0))]
    log = folder / "wandb" / "offline-run-20260101_000000-r1" / "run-r1.wandb"
    log.parent.mkdir(parents=True)
    content, _ = framed(records)
    log.write_bytes(content)
    return folder / "wandb"
