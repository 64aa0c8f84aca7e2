"""`facefed egress report`: what left this site, round by round, and whether it is what the server received."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from clients.egress import LEDGER
from common.console import table
from common.errors import EXIT_DONE, EXIT_FAILED, UserError, unknown_name
from simulation.egress_ledger import (
    DIFFERS,
    EQUAL,
    UNCONFIRMED,
    Comparison,
    Entry,
    Ledger,
    Verdict,
    compare,
    server_record,
    site_ledger,
)

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
    lines = [f"{first.client}: what left for run {first.run}, by {report.ledger.path}", "", table(rows), ""]
    return [*lines, *_conclusion(report)]


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
    return [*lines, *report.comparison.notes]


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
        "notes": [*report.comparison.notes, OUTSIDE],
    }
