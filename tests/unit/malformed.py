"""Damage for files, made from a seed: bytes flipped, cut, doubled; lines of tables; parts of JSON and TOML."""

import copy
import json
import random

WEIRD = [
    None, True, -1, 0, 10**400, 2**63, 1e308, float("nan"), float("inf"), "", "x" * 5000, "\x00", "\x1b[31m", "../../x",
    "/etc/passwd", [], {}, [[]], [None], {"a": {}}, "٣", "1e5",
]  # fmt: skip
TOKENS = [
    b"nan", b"-1", b"1e999", b"9" * 400, b"../../../etc/passwd", b"/etc/passwd", b"\x00", b"\xff\xfe", b"\r", b"\n\n",
    b'"', b",", b"[" * 3000, b"{" * 3000, b"\x1b[2J", b"a b c d", b"\xef\xbb\xbf", "\u202e".encode(), b"\\",
    b"x" * 200_000,
]  # fmt: skip


def damaged_bytes(content: bytes, seed: int) -> bytes:
    """The content with one to three faults."""
    rng = random.Random(seed)
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at, to = sorted(rng.randint(0, len(data)) for _ in range(2))
        how = rng.randrange(8)
        if how == 0 and data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif how == 1:
            del data[at:]
        elif how == 2:
            del data[at:to]
        elif how == 3:
            data[at:at] = data[at:to]
        elif how == 4:
            data[at:to] = bytes(to - at)
        elif how == 5:
            data[at:at] = rng.choice(TOKENS)
        elif how == 6:
            data[at : at + 8] = rng.randbytes(8)
        else:
            data[:8] = rng.choice([2**63 - 1, 2**40, len(data), 0, 10**6]).to_bytes(8, "little")
    return bytes(data)


def damaged_text(content: bytes, seed: int) -> bytes:
    """A table or a text with a field, a column or lines spoilt."""
    rng = random.Random(seed)
    lines = content.split(b"\n")
    for _ in range(rng.randint(1, 2)):
        row = rng.randrange(len(lines))
        fields = lines[row].replace(b",", b" , ").split()
        how = rng.randrange(5)
        if how == 0 and fields:
            fields[rng.randrange(len(fields))] = rng.choice(TOKENS)
            lines[row] = b" ".join(fields)
        elif how == 1 and fields:
            del fields[rng.randrange(len(fields))]
            lines[row] = b" ".join(fields)
        elif how == 2:
            lines[row:row] = [rng.choice(lines)]
        elif how == 3:
            del lines[row]
            lines = lines or [b""]
        else:
            lines = [line.rpartition(b" ")[0] for line in lines]
    return b"\n".join(lines)


def damaged_json(content: bytes, seed: int) -> bytes:
    """JSON of which one to three parts are something else, gone, or nested deeply."""
    rng = random.Random(seed)
    value = copy.deepcopy(json.loads(content))
    for _ in range(rng.randint(1, 3)):
        holder, key = None, None
        here = value
        while isinstance(here, dict | list) and here and (holder is None or rng.random() < 0.7):
            holder, key = here, rng.choice(list(here) if isinstance(here, dict) else range(len(here)))
            here = holder[key]
        if holder is None:
            continue
        if rng.random() < 0.2:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(rng.choice(WEIRD))
    text = json.dumps(value).encode()
    return text.replace(b"null", b"[" * 20_000 + b"]" * 20_000, 1) if rng.random() < 0.05 else text
