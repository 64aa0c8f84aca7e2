"""Reads a site's egress ledger, and compares it reply by reply with what the server says it received.

The server says so in two places: with each task it sends the receipt of the reply before, which the site keeps in its
ledger, and in its own run folder it keeps a record of every reply, which an auditor may lay beside the ledger.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.egress import UNRECORDED
from common.errors import UserError
from common.files import read_lines
from common.ledger import PART_FIELDS, RECEIVED_FILE, digest_of, parts_of

EQUAL, DIFFERS, UNCONFIRMED = "equal", "differs", "not confirmed"
FIXED_WORDS = digest_of(parts_of(UNRECORDED))
_FIELDS: Mapping[str, type] = {"client": str, "run": str, "answer_to": str, "round": int, "num_bytes": int}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One reply, as the site sent it or as the server received it."""

    line: int  # of its file, from 1
    time: str
    client: str
    run: str
    answer_to: str  # join, train, evaluate or unknown
    server_round: int
    num_bytes: int
    sha256: str  # of the reply, as common.ledger.digest_of
    parts: tuple[Mapping[str, Any], ...]  # none in a receipt

    @property
    def what(self) -> str:
        """The reply in words."""
        return f"the answer to {self.answer_to} of round {self.server_round}"


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """What a file says, in the order of its lines."""

    path: Path
    sent: tuple[Entry, ...]
    received: tuple[Entry, ...]
    problems: tuple[str, ...]  # one line each: what of the file cannot be believed


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether one reply that left is what arrived."""

    sent: Entry
    status: str  # EQUAL, DIFFERS or UNCONFIRMED
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A ledger and what the server says."""

    verdicts: tuple[Verdict, ...]
    strange: tuple[str, ...]  # what the server received and no line of the ledger says
    notes: tuple[str, ...]


def _is_part(part: object) -> bool:
    if not isinstance(part, dict):
        return False
    shape, texts = part.get("shape"), (part.get("name"), part.get("dtype"), part.get("sha256"))
    sizes = [part.get("num_bytes"), *shape] if isinstance(shape, list) else [None]
    return all(type(size) is int for size in sizes) and all(isinstance(text, str) for text in texts)


def _whole_entry(number: int, record: Mapping[str, Any]) -> Entry | str:
    """The entry of a line, or what is wrong with it."""
    for field, kind in _FIELDS.items():
        if type(record.get(field)) is not kind:
            return f"has no {field}"
    parts = record.get("parts", [])
    if not isinstance(parts, list) or not all(_is_part(part) for part in parts):
        return "names parts without name, shape, dtype, num_bytes and sha256"
    digest = str(record.get("sha256", ""))
    if parts or record.get("kind", "sent") == "sent":  # a receipt knows the whole only
        if sum(part["num_bytes"] for part in parts) != record["num_bytes"]:
            return "was altered: its parts do not add up to its num_bytes"
        if digest_of(parts) != record.get("sha256", digest_of(parts)):
            return "was altered: its sha256 is not that of its parts"
        digest = digest_of(parts)
    return Entry(
        line=number,
        time=str(record.get("time", "")),
        client=record["client"],
        run=record["run"],
        answer_to=record["answer_to"],
        server_round=record["round"],
        num_bytes=record["num_bytes"],
        sha256=digest,
        parts=tuple(parts),
    )


def read_ledger(path: Path) -> Ledger:
    """A site's ledger or a server's record; damaged lines are told of and left out.  Raises UserError."""
    sent, received, problems = [], [], []
    try:
        for number, line in enumerate(read_lines(path), start=1):
            if line.record is None and not line.damage:
                continue  # it is empty
            entry = line.damage or _whole_entry(number, line.record or {})
            if isinstance(entry, str):
                problems.append(f"{path}, line {number} {entry}.")
            elif (line.record or {}).get("kind", "sent") == "sent":
                sent.append(entry)
            else:
                received.append(entry)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    return Ledger(path=path, sent=tuple(sent), received=tuple(received), problems=tuple(problems))


def site_ledger(path: Path) -> Ledger:
    """`read_ledger` of a site's file, whose lines must be of one site and of the run that names it.

    Raises UserError, also for a file without one whole line.
    """
    ledger = read_ledger(path)
    problems = list(ledger.problems)
    if not ledger.sent:
        raise UserError(f"{path} holds no reply{f' ({problems[0]})' if problems else ''}; is it an egress ledger?")
    client = ledger.sent[0].client
    problems += [
        f"{path}, line {entry.line} is of {entry.client}'s run {entry.run}, not of this ledger's."
        for entry in (*ledger.sent, *ledger.received)
        if (entry.client, entry.run) != (client, path.stem)
    ]
    return Ledger(path=path, sent=ledger.sent, received=ledger.received, problems=tuple(problems))


def server_record(folder: Path, client: str, run: str) -> Ledger:
    """What the server received of that client in that run.  folder: the run's, at the server.  Raises UserError."""
    path = folder / RECEIVED_FILE
    if not path.is_file():
        raise UserError(f"--server-run {folder}: no {RECEIVED_FILE} is there; give the run's folder at the server.")
    whole = read_ledger(path)
    runs = sorted({entry.run for entry in whole.received})
    if run not in runs:
        raise UserError(f"--server-run {folder} is of {', '.join(runs) or 'no run'}; the ledger is of {run}.")
    of_client = tuple(entry for entry in whole.received if entry.client == client and entry.run == run)
    return Ledger(path=path, sent=(), received=of_client, problems=whole.problems)


def compare(sent: Sequence[Entry], received: Iterable[Entry]) -> Comparison:
    """Each reply beside what the server says of it.

    A round that was repeated has several lines, and of some of them nothing may have arrived.  So equal ones are found
    first; what the server has besides is held against the last line of that round that nothing was found for.
    """
    told = {(entry.answer_to, entry.server_round, entry.sha256): entry for entry in received}
    status = {entry.line: Verdict(sent=entry, status=UNCONFIRMED) for entry in sent}
    for entry in sent:
        if (entry.answer_to, entry.server_round, entry.sha256) in told:
            status[entry.line] = Verdict(sent=entry, status=EQUAL)
    known = {(entry.answer_to, entry.server_round, entry.sha256) for entry in sent}
    strange, notes = [], []
    for key, entry in told.items():
        if key in known:
            continue
        if entry.sha256 == FIXED_WORDS:
            notes.append(f"{entry.what} were fixed words: the ledger could not be written then (is the disk full?).")
            continue
        open_lines = [
            one.sent
            for one in status.values()
            if one.status == UNCONFIRMED and (one.sent.answer_to, one.sent.server_round) == key[:2]
        ]
        if open_lines:
            detail = differing_parts(open_lines[-1], entry)
            status[open_lines[-1].line] = Verdict(sent=open_lines[-1], status=DIFFERS, detail=detail)
        else:
            strange.append(
                f"the server received {entry.what} of {entry.num_bytes:,} bytes, SHA-256 {entry.sha256}, which no line"
                " of the ledger says"
            )
    return Comparison(verdicts=tuple(status.values()), strange=tuple(strange), notes=tuple(notes))


def differing_parts(sent: Entry, received: Entry) -> str:
    """Which parts are not the same, or where only the whole is known its size and hash."""
    if not received.parts:
        return (
            f"{sent.num_bytes:,} bytes, SHA-256 {sent.sha256} left; {received.num_bytes:,} bytes, SHA-256"
            f" {received.sha256} arrived"
        )
    here = {str(part["name"]): part for part in sent.parts}
    there = {str(part["name"]): part for part in received.parts}
    fields = PART_FIELDS[1:]
    words = [f"{name} left and did not arrive" for name in here if name not in there]
    words += [f"{name} arrived and did not leave" for name in there if name not in here]
    words += [
        f"{name} arrived as another"
        for name in here
        if name in there and [here[name][f] for f in fields] != [there[name][f] for f in fields]
    ]
    return "; ".join(words)
