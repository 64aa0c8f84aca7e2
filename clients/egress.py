"""The egress ledger: one JSON line for each reply, naming everything that leaves this site and its SHA-256.

Between these stand the server's receipts: with each task it says what it received last, so that the site can compare
(`facefed egress report`).  Each line has the hash of the one before it: one that is taken out is missed, with its
receipt too.  What was cut when the client was killed is a line like any other, so a crash breaks nothing.  This file
imports neither torch nor Flower: whoever speaks for the site writes here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.protocol.ledger import PREVIOUS, RECEIPT, link_of, parts_of, receipt_line, reply_line
from common.system.files import append_after

if TYPE_CHECKING:
    from common.protocol.wire import Task

LEDGER = "egress"  # the folder, in a site's state folder
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # it names files here
# Leaves where the ledger cannot be written: always these words, and nothing of this site.
UNRECORDED = "this site cannot write its egress ledger, so it does not answer; the client's own output says why."


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a line tells of the message that it answers; as far as that could be read, where it is no `Task` of ours."""

    kind: str = "unknown"
    run_id: str = "unknown"
    server_round: int = 0


def asked_by(content: Mapping[str, Mapping[str, Any]]) -> Asked:
    """What a message asks, for its line in the ledger; `Asked()` for a message that is none of ours."""
    task = content.get("task", {})
    kind, run_id, server_round = task.get("kind"), task.get("run_id"), task.get("server_round")
    if not (isinstance(kind, str) and isinstance(run_id, str) and isinstance(server_round, int)):
        return Asked()
    if not RUN_ID.fullmatch(run_id):
        return Asked()
    return Asked(kind=kind[:20], run_id=run_id, server_round=server_round)


def record_egress(
    folder: Path,
    client: str,
    request: "Task | Asked",
    content: Mapping[str, Mapping[str, Any]] | str,
    policy: str = "",
    masked: Mapping[str, Any] | None = None,
) -> None:
    """Append what leaves with this content to `folder`/<run>.jsonl and sync it, before it leaves.

    content: a reply, or the reason of a client that could not answer, which leaves too.  policy: the digest of the one
    that it passed.  masked: what is said of a masked reply.  Raises OSError.
    """
    line = reply_line(
        "sent",
        client=client,
        run=request.run_id,
        server_round=request.server_round,
        answer_to=request.kind,
        parts=parts_of(content),
    )
    _append(folder, request, line | ({"policy": policy} if policy else {}) | dict(masked or {}), synced=True)


def record_receipt(folder: Path, client: str, request: "Task | Asked", receipt: str) -> None:
    """Append what the server says it received; the reply to this request, which follows, brings it to the disk.

    receipt: as RECEIPT.  Raises OSError.
    """
    if RECEIPT.fullmatch(receipt):
        line = receipt_line(receipt, client=client, run=request.run_id)
        _append(folder, request, line, synced=False)


def _append(folder: Path, request: "Task | Asked", line: Mapping[str, Any], *, synced: bool) -> None:
    path = folder / f"{request.run_id}.jsonl"
    append_after(path, lambda before: {**line, PREVIOUS: link_of(before)}, synced=synced)


def refusal(folder: Path, client: str, content: Mapping[str, Mapping[str, Any]], reason: str) -> str:
    """The one line to answer with where no answer came about, which is in the ledger by then.

    content: the message's.  Where the ledger cannot be written, it is UNRECORDED instead of the reason.
    """
    try:
        record_egress(folder, client, asked_by(content), reason)
    except OSError:
        return UNRECORDED
    return reason
