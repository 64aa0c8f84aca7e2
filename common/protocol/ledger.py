"""What a message's content is made of, part by part, and the line that a file has of each content.

A site's egress ledger and the server's record of what it received are made by this one file, so that they can be
compared: equal bytes have equal lines.  Free of Flower and of torch: a process without them writes ledgers too.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from common.errors import quoted

Part = dict[str, Any]  # name, shape, dtype, num_bytes, sha256
PART_FIELDS = ("name", "shape", "dtype", "num_bytes", "sha256")
RECEIVED_FILE = "received.jsonl"  # the server's record, in the run's folder
RECEIPT = re.compile(
    r"(join|train|evaluate|keys|shares|unmask) (\d{1,9}) (\d{1,15}) ([0-9a-f]{64})"
)  # as `receipt_of` says it
REASON = "error.reason"  # the one part of an error reply
# A line is bounded, whatever a client sends: no reply of ours has more.
LONGEST_NAME, MOST_AXES, MOST_PARTS = 200, 32, 1000
PREVIOUS = "previous"  # in a chained line: `link_of` the line before it, or nothing in the first


def parts_of(content: Mapping[str, Mapping[str, Any]] | str) -> list[Part]:
    """Every array and value of a content, or the reason of a client that could not answer.

    An array's bytes are those that travel; a value's are its JSON.  A reason is kept as `quoted`, a longer name by its
    beginning and its hash, and of more than MOST_PARTS parts one that has the hash of all.
    """
    if isinstance(content, str):
        return [_part(REASON, (), "str", content.encode()) | {"text": quoted(content)}]
    parts = []
    for record, values in content.items():
        if not values:
            parts.append(_part(record, (), "nothing", b""))  # its name leaves
        for key, value in values.items():
            if hasattr(value, "stype"):  # Flower's Array
                parts.append(_part(f"{record}.{key}", value.shape, value.dtype, value.data))
            else:
                parts.append(_part(f"{record}.{key}", (), _kind(value), _plain_bytes(value)))
    if len(parts) > MOST_PARTS:
        rows = json.dumps(sorted([part[field] for field in PART_FIELDS] for part in parts), separators=(",", ":"))
        size = sum(part["num_bytes"] for part in parts)
        return [_part(f"{len(parts)} parts", (), "many", rows.encode()) | {"num_bytes": size}]
    return parts


def _part(name: str, shape: Sequence[int], dtype: str, data: bytes) -> Part:
    sha256 = hashlib.sha256(data).hexdigest()
    axes, kind = list(shape)[:MOST_AXES], _bounded(dtype)
    return {"name": _bounded(name), "shape": axes, "dtype": kind, "num_bytes": len(data), "sha256": sha256}


def _bounded(name: str) -> str:
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}... SHA-256 {hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()}"


def _kind(value: object) -> str:
    """The type's name as it is on both sides: what was numpy's float64 here arrives as a float."""
    return "float" if isinstance(value, float) else type(value).__name__


def _plain_bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value, default=bytes.hex).encode()


def digest_of(parts: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 over the JSON of all parts' fields in order of names, without spaces: equal for equal contents."""
    rows = sorted([part[field] for field in PART_FIELDS] for part in parts)
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def link_of(line: bytes) -> str:
    """What the next line of a ledger says of this one.  line: its bytes, without the line break; none: no line."""
    return hashlib.sha256(line).hexdigest() if line else ""


def reply_line(
    kind: str, *, client: str, run: str, server_round: int, answer_to: str, parts: Sequence[Part]
) -> dict[str, Any]:
    """One reply, now.  kind: "sent" or "received".  answer_to: the kind of the task that it answers."""
    num_bytes = sum(part["num_bytes"] for part in parts)
    return _line(kind, client, run, (answer_to, server_round, num_bytes, digest_of(parts))) | {"parts": list(parts)}


def receipt_of(line: Mapping[str, Any]) -> str:
    """A reply's receipt: what the server says of it to whoever sent it, and nothing of its parts."""
    return f"{line['answer_to']} {line['round']} {line['num_bytes']} {line['sha256']}"


def receipt_line(receipt: str, *, client: str, run: str) -> dict[str, Any]:
    """A receipt, now.  receipt: matches RECEIPT."""
    answer_to, server_round, num_bytes, sha256 = receipt.split()
    return _line("received", client, run, (answer_to, int(server_round), int(num_bytes), sha256))


def _line(kind: str, client: str, run: str, reply: tuple[str, int, int, str]) -> dict[str, Any]:
    answer_to, server_round, num_bytes, sha256 = reply
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "kind": kind,
        "client": client,
        "run": run,
        "round": server_round,
        "answer_to": answer_to,
        "num_bytes": num_bytes,
        "sha256": sha256,
    }
