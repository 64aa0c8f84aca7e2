"""`facefed egress report`: what left this site, round by round, and whether it is what the server received.

A site's egress ledger is read, and compared reply by reply with what the server says it received. The server says so in
two places: with each task it sends the receipt of the reply before, which the site keeps in its ledger, and in its own
run folder it keeps a record of every reply, which an auditor may lay beside the ledger.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from clients.egress import LEDGER, UNRECORDED
from common.errors import EXIT_DONE, EXIT_FAILED, UserError, escaped, unknown_name
from common.protocol.ledger import PART_FIELDS, PREVIOUS, RECEIVED_FILE, digest_of, link_of, parts_of
from common.system.console import table
from common.system.files import Line, read_lines

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
    sha256: str  # of the reply, as common.protocol.ledger.digest_of
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
    notes: tuple[str, ...] = ()  # one line each: what is to be known of it


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


class Chain:
    """The links of a ledger's lines, one after the other: each line says the hash of the one before it.

    A site writes a line before its reply leaves.  So a line that was cut, and that the next one has the hash of, was
    cut when the client was stopped, and its reply did not leave; one that nothing follows may have been cut by anybody.
    """

    def __init__(self) -> None:
        """No line yet."""
        self._before, self._cut, self._is_chained, self._is_damaged = b"", 0, False, False
        self.num_unchained = 0
        self.stopped: list[int] = []  # the lines that were cut when the client was stopped
        self.loose: list[int] = []  # the lines that do not follow the one before them

    def take(self, number: int, line: Line) -> None:
        """The next line.  Whether it follows is not told behind one that is damaged."""
        link, before = (line.record or {}).get(PREVIOUS), link_of(self._before)
        cut, self._cut = self._cut, number if line.record is None else 0
        was_damaged, self._is_damaged, self._before = self._is_damaged, False, line.text
        if line.record is None:
            return
        if link is None and not self._is_chained:
            self.num_unchained += 1
            return
        self._is_chained = True
        if link == before:
            self.stopped += [cut] if cut else []
        elif not (was_damaged or cut):
            self.loose.append(number)

    def damaged(self) -> None:
        """The last line was damaged, so that the next one cannot have its hash."""
        self._is_damaged = True


def read_ledger(path: Path, chain: Chain | None = None) -> Ledger:
    """A site's ledger or a server's record; damaged lines are told of and left out.  Raises UserError.

    chain: checks the links of a site's.
    """
    sent, received, problems = list[Entry](), list[Entry](), dict[int, str]()
    try:
        for number, line in enumerate(read_lines(path), start=1):
            if line.record is None and not line.damage:
                continue  # it is empty
            if chain:
                chain.take(number, line)
            entry = line.damage or _whole_entry(number, line.record or {})
            if isinstance(entry, str):
                problems[number] = f"{path}, line {number} {entry}."
                if chain:
                    chain.damaged()
                continue
            (sent if (line.record or {}).get("kind", "sent") == "sent" else received).append(entry)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    notes = []
    for number in chain.stopped if chain else ():
        problems.pop(number, None)
        notes.append(f"line {number} was cut when the client was stopped; its reply did not leave.")
    if chain and chain.num_unchained:
        notes.append(
            f"{chain.num_unchained} lines are not chained (an earlier FaceFed wrote them): that one of those was taken"
            " out, with its receipt, is seen with --server-run only."
        )
    told = tuple(problems[number] for number in sorted(problems))
    return Ledger(path=path, sent=tuple(sent), received=tuple(received), problems=told, notes=tuple(notes))


def site_ledger(path: Path) -> Ledger:
    """`read_ledger` of a site's file, whose lines must be of one site and of the run that names it.

    Raises UserError, also for a file without one whole line.
    """
    chain = Chain()
    ledger = read_ledger(path, chain)
    problems = list(ledger.problems)
    if not ledger.sent:
        raise UserError(f"{path} holds no reply{f' ({problems[0]})' if problems else ''}; is it an egress ledger?")
    client = ledger.sent[0].client
    others = {
        entry.line: f"{path}, line {entry.line} is of {entry.client}'s run {entry.run}, not of this ledger's."
        for entry in (*ledger.sent, *ledger.received)
        if (entry.client, entry.run) != (client, path.stem)
    }
    problems += [
        f"{path}, line {number} does not follow the line before it: lines were taken out, or that one was altered."
        for number in chain.loose
        if not {number, number - 1} & others.keys()
    ]
    problems += others.values()
    return dataclasses.replace(ledger, problems=tuple(problems))


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


SITES = Path(".facefed") / "clients"
STRANGERS = "unknown"  # the ledger of messages that were of no run of ours
SHOWN_HEX = 16  # of a SHA-256 in the table; --json has all of it
OUTSIDE = (
    "Not in a ledger: Flower's own protocol (the site's public key and node id, heartbeats, times and sizes of"
    " messages), and what the site itself sends to an MLflow of its own (--tracking-uri)."
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Whose ledgers, and what to hold against them."""

    name: str = ""
    state_dir: Path | None = None
    run: str = ""
    server_run: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """One ledger, compared."""

    ledger: Ledger
    comparison: Comparison
    problems: tuple[str, ...]
    num_strangers: int  # messages of no run of ours that were refused, in any run's time

    @property
    def is_good(self) -> bool:
        """Whether nothing differs, nothing is missing and nothing is damaged."""
        differs = any(verdict.status == DIFFERS for verdict in self.comparison.verdicts)
        return not (differs or self.comparison.strange or self.problems)


def _state_folders(request: Request) -> list[Path]:
    """The state folders that are meant: the one that was named, or all of this folder's sites."""
    if request.state_dir:
        folders = [request.state_dir]
    elif request.name:
        folders = [SITES / request.name]
        there = sorted(path.name for path in SITES.glob("*") if path.is_dir())
        if there and request.name not in there:
            raise UserError(unknown_name("--name", request.name, there))
    else:
        folders = sorted(path.parent for path in SITES.glob(f"*/{LEDGER}"))
    if not folders:
        raise UserError(
            f"no site has an egress ledger in {SITES.resolve()}; give --state-dir DIR, as flower-client got it (of a"
            " simulation: runs/clients/NAME)."
        )
    return folders


def _ledger_file(folder: Path, run: str) -> Path:
    """The ledger of that run, an id or a folder, or of the newest one.  Raises UserError."""
    runs = {path.stem: path for path in (folder / LEDGER).glob("*.jsonl")}
    known = sorted(name for name in runs if name != STRANGERS)
    if not runs:
        raise UserError(f"{folder} holds no egress ledger; it is the folder that flower-client got as --state-dir.")
    wanted = Path(run).name if run else (known or [STRANGERS])[-1]
    if wanted not in runs:
        raise UserError(unknown_name(f"--run (in {folder / LEDGER})", wanted, known[::-1][:5]))
    return runs[wanted]


def read_report(path: Path, server_run: Path | None) -> Report:
    """A ledger compared with its receipts, and with the server's record where that is given.  Raises UserError."""
    ledger = site_ledger(path)
    received, problems = list(ledger.received), list(ledger.problems)
    if server_run:
        at_server = server_record(server_run, ledger.sent[0].client, path.stem)
        received += at_server.received  # they name parts, so they come last and count
        problems += at_server.problems
    strangers = path.with_name(f"{STRANGERS}.jsonl")
    num_strangers = len(strangers.read_bytes().splitlines()) if strangers.is_file() and strangers != path else 0
    return Report(
        ledger=ledger,
        comparison=compare(ledger.sent, received),
        problems=tuple(problems),
        num_strangers=num_strangers,
    )


def report_egress(request: Request, out: TextIO, *, shape: str) -> int:
    """Print the reports; shape: text or json.  Returns the exit code: 1 where anything differs or is damaged.

    Raises UserError.
    """
    reports = [read_report(_ledger_file(folder, request.run), request.server_run) for folder in _state_folders(request)]
    if shape == "json":
        out.write(json.dumps([as_json(report) for report in reports], indent=2) + "\n")
    else:
        out.write("\n\n".join("\n".join(as_lines(report)) for report in reports) + f"\n\n{OUTSIDE}\n")
    return EXIT_DONE if all(report.is_good for report in reports) else EXIT_FAILED


# ---- as text


def as_lines(report: Report) -> list[str]:
    """The report for a person: each reply, its arrays one by one and its values record by record."""
    verdicts = report.comparison.verdicts
    first = verdicts[0].sent
    rows = [["round", "answer to", "what", "shape", "dtype", "bytes", "SHA-256", "received by the server"]]
    totals, last = _totals(verdicts), {verdict.sent.server_round: verdict.sent.line for verdict in verdicts}
    for verdict in verdicts:
        entry = verdict.sent
        head = [str(entry.server_round), entry.answer_to]
        for what in _contents(entry):
            rows.append([*head, *what, ""])
            head = ["", ""]
        rows.append(["", "", "the reply", "", "", f"{entry.num_bytes:,}", entry.sha256[:SHOWN_HEX], verdict.status])
        if last[entry.server_round] == entry.line:
            rows.append(
                ["", "", f"all of round {entry.server_round}", "", "", f"{totals[entry.server_round]:,}", "", ""]
            )
    title = f"{first.client}: what left for run {first.run}, by {report.ledger.path}"
    return [escaped(title), "", table(rows), "", *map(escaped, _conclusion(report))]


def _totals(verdicts: Sequence[Verdict]) -> dict[int, int]:
    """The bytes of each round, of repeated ones all."""
    totals: dict[int, int] = {}
    for entry in (verdict.sent for verdict in verdicts):
        totals[entry.server_round] = totals.get(entry.server_round, 0) + entry.num_bytes
    return totals


def _contents(entry: Entry) -> list[list[str]]:
    """A row for each array, and one for the values of each record."""
    rows, values = [], dict[str, list[Mapping[str, Any]]]()
    for part in entry.parts:
        if part["shape"]:
            shape = " x ".join(str(size) for size in part["shape"])
            rows.append(
                [str(part["name"]), shape, str(part["dtype"]), f"{part['num_bytes']:,}", part["sha256"][:SHOWN_HEX]]
            )
        else:
            values.setdefault(str(part["name"]).partition(".")[0], []).append(part)
    for record, held in values.items():
        names = f"{record}: {len(held)} value{'s' if len(held) != 1 else ''}"
        texts = "; ".join(str(part["text"]) for part in held if "text" in part)
        rows.append([texts or names, "", "", f"{sum(part['num_bytes'] for part in held):,}", ""])
    return rows


def _names_of_values(entries: Sequence[Entry]) -> list[str]:
    """The names of what is no array, once for each record."""
    names: dict[str, dict[str, None]] = {}
    for entry in entries:
        for part in entry.parts:
            record, _, key = str(part["name"]).partition(".")
            if not part["shape"]:
                names.setdefault(record, {})[key] = None
    return [f"values of {record}: {', '.join(keys)}" for record, keys in names.items() if record != "error"]


def _conclusion(report: Report) -> list[str]:
    verdicts = report.comparison.verdicts
    counted = {
        status: sum(verdict.status == status for verdict in verdicts) for status in (EQUAL, DIFFERS, UNCONFIRMED)
    }
    words = ", ".join(f"{number} {status}" for status, number in counted.items() if number)
    lines = _names_of_values([verdict.sent for verdict in verdicts])
    lines += [f"total: {len(verdicts)} replies, {sum(_totals(verdicts).values()):,} bytes; {words}"]
    if counted[UNCONFIRMED]:
        lines.append(
            "not confirmed: a reply is confirmed by the server's next task, so the last one has none; another one may"
            " never have arrived. --server-run compares with the server's own record."
        )
    if report.num_strangers:
        lines.append(f"{report.num_strangers} messages that were of no run of ours were refused: --run {STRANGERS}")
    lines += [f"DIFFERS: {v.sent.what} (line {v.sent.line}): {v.detail}." for v in verdicts if v.status == DIFFERS]
    lines += [f"NOT IN THE LEDGER: {line}." for line in report.comparison.strange]
    lines += [f"DAMAGED: {line}" for line in report.problems]
    return [*lines, *report.ledger.notes, *report.comparison.notes]


# ---- as JSON


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    entry = verdict.sent
    return {
        "line": entry.line,
        "time": entry.time,
        "round": entry.server_round,
        "answer_to": entry.answer_to,
        "num_bytes": entry.num_bytes,
        "sha256": entry.sha256,
        "status": verdict.status,
        "detail": verdict.detail,
        "parts": list(entry.parts),
    }


def as_json(report: Report) -> dict[str, Any]:
    """The report for a program, with every part."""
    verdicts = report.comparison.verdicts
    totals = _totals(verdicts)
    return {
        "client": verdicts[0].sent.client,
        "run": verdicts[0].sent.run,
        "ledger": str(report.ledger.path),
        "is_good": report.is_good,
        "num_bytes": sum(totals.values()),
        "num_bytes_by_round": {str(number): size for number, size in totals.items()},
        "replies": [_verdict_json(verdict) for verdict in verdicts],
        "not_in_the_ledger": list(report.comparison.strange),
        "damaged": list(report.problems),
        "notes": [*report.ledger.notes, *report.comparison.notes, OUTSIDE],
    }
