"""The egress ledger: one JSON line for each reply, naming everything that left this site and its SHA-256."""

import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from common.wire import Task, describe


def ledger_line(client: str, task: Task, content: RecordDict | str) -> str:
    """What leaves with this content: time, run, round, and name, shape, dtype, bytes and SHA-256 of each part.

    content: a reply, or the reason of a client that could not answer, which leaves too.
    """
    rows: list[dict[str, Any]]
    if isinstance(content, str):
        rows = [{"name": "error.reason", "shape": [], "dtype": "str", "data": content.encode(), "text": content}]
    else:
        rows = describe(content)
    parts = [
        {key: value for key, value in row.items() if key != "data"}
        | {"num_bytes": len(row["data"]), "sha256": hashlib.sha256(row["data"]).hexdigest()}
        for row in rows
    ]
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "client": client,
        "run": task.run_id,
        "round": task.server_round,
        "answer_to": task.kind,
        "num_bytes": sum(part["num_bytes"] for part in parts),
        "parts": parts,
    }
    return json.dumps(record)


def record_egress(folder: Path, client: str, task: Task, content: RecordDict | str) -> None:
    """Append the line to `folder`/<run>.jsonl and sync it, before the reply leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{task.run_id}.jsonl").open("a", encoding="utf-8") as file:
        file.write(ledger_line(client, task, content) + "\n")
        file.flush()
        os.fsync(file.fileno())
