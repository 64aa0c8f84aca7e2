"""Sends what a run kept in its spool while its server was away, after the run's own process has ended.

Each point is there once after any number of cut-off sendings: MLflow drops a point that it has already (same name,
value, time, step), runs and models carry a key that finds them again, and RUN/spool.sent.json says how far we came.
"""

import collections
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from common.errors import EXIT_DONE, FaceFedError, TrackingError, escaped
from common.redact import shown_uri
from common.tracking.address import resolve_uri
from common.tracking.delivery import Delivery, quieten
from common.tracking.sender import LINES_PER_BATCH, Forwarder, StartOver, backlog, short_reason
from common.tracking.spool import SENT_NAME, SPOOL_NAME, Sent, entries_of, hold, load_sent, read_entries, save_sent

_HIDDEN = "***@"  # what `shown_uri` puts for a user name and password

_log = logging.getLogger("facefed.tracking")


class ServerUnusable(TrackingError):
    """No run can be sent there."""


@dataclass(frozen=True, kw_only=True)
class Synced:
    """What one sending did."""

    folder: Path
    uri: str  # without password
    sent: Mapping[str, int]  # "metric" and the events' names -> how many were sent now
    num_corrupt: int  # damaged lines of the whole spool: skipped, and kept in it
    run_id: str  # MLflow's


@dataclass(frozen=True, kw_only=True)
class Unsent:
    """What a run's spool holds that its server lacks."""

    folder: Path
    uri: str  # without password; empty where the run was recorded with tracking off
    num_bytes: int


def unsent(folder: Path) -> Unsent:
    """How much of a run's spool no server has yet; asks no server.  Raises TrackingError."""
    path = _spool_of(folder)
    uri = _remembered_uri(folder)
    return Unsent(folder=folder, uri=uri, num_bytes=backlog(path, load_sent(folder, uri)).num_bytes)


def sync_runs(runs: Sequence[str], out: Path, uri: str, stdout: TextIO, stderr: TextIO) -> int:
    """Send several runs, a line for each; returns 0, or the exit code of the last that failed.

    runs: folders, or ids below `out`.  A run that cannot be sent does not keep the others; a server that cannot does.
    """
    exit_code = EXIT_DONE
    for run in runs:
        folder = Path(run) if Path(run).is_dir() else out / run
        try:
            stdout.write(_line(sync_run(folder if folder.is_dir() else Path(run), uri)))
        except ServerUnusable:
            raise
        except FaceFedError as error:
            stderr.write(f"facefed: {escaped(str(error))}\n")
            exit_code = error.exit_code
    return exit_code


def _line(synced: Synced) -> str:
    done = ", ".join(f"{count} {kind}" for kind, count in sorted(synced.sent.items())) or "nothing was left"
    damaged = f"; {synced.num_corrupt} damaged lines are skipped and kept in {SPOOL_NAME}" if synced.num_corrupt else ""
    return f"{synced.folder} -> {synced.uri} run {synced.run_id}: {done}{damaged}\n"


def sync_run(folder: Path, uri: str = "") -> Synced:
    """Send the rest of a run's record; a second call finds nothing to send.

    folder: the run's.  uri: as `--tracking-uri` takes it, relative to the current folder; empty for the run's own.
    Raises TrackingError when `folder` is no run's or its run still writes, and when the server cannot be used;
    FaceFedError when the server goes away in the middle or does not take a file (the same call goes on).
    """
    path = _spool_of(folder)
    address = resolve_uri(uri, Path.cwd()) if uri else _own_uri(folder)
    with path.open("r+b") as file:
        hold(file, folder, 0.0)
        return _send_all(folder, address)


def _spool_of(folder: Path) -> Path:
    path = folder / SPOOL_NAME
    if not path.is_file():
        raise TrackingError(f"{folder} is no run's folder: it has no {SPOOL_NAME}; name one such as runs/RUN-ID.")
    return path


def _remembered_uri(folder: Path) -> str:
    try:
        return str(json.loads((folder / SENT_NAME).read_text(encoding="utf-8"))["uri"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def _own_uri(folder: Path) -> str:
    uri = _remembered_uri(folder)
    if not uri:
        raise TrackingError(f"{folder} does not say where to send it; give --tracking-uri.")
    if _HIDDEN in uri:
        raise TrackingError(f"{folder} was recorded at {uri}, whose password is not kept; give --tracking-uri.")
    return uri


def _send_all(folder: Path, uri: str) -> Synced:
    quieten()
    sent = load_sent(folder, shown_uri(uri))
    delivery = _connect(uri, folder, sent)
    path = folder / SPOOL_NAME
    forwarder = Forwarder(path, sent, delivery)
    counted: collections.Counter[str] = collections.Counter()
    try:
        if backlog(path, sent).num_bytes and delivery.is_gone():
            _log.warning("Tracking: %s was deleted at %s; a new run gets the whole record.", folder, shown_uri(uri))
            sent.forget()
        _forward(forwarder, sent, counted)
        delivery.end_killed(_last_words(path))
    except FaceFedError:
        raise
    except Exception as error:  # MLflow raises what its database or network library raises
        left = backlog(path, sent).num_bytes
        raise FaceFedError(
            f"{folder}: {shown_uri(uri)} stopped taking records ({_reason(error, uri)}), {left} bytes are left; run"
            " this again."
        ) from None
    finally:
        save_sent(folder, sent)
    if sent.aside:
        reason = "" if forwarder.refusal is None else f" ({_reason(forwarder.refusal, uri)})"
        raise FaceFedError(
            f"{folder}: {shown_uri(uri)} has every record, but {len(sent.aside)} of the run's files it did not"
            f" take{reason}; run this again."
        )
    return Synced(
        folder=folder,
        uri=shown_uri(uri),
        sent=counted,
        num_corrupt=_num_corrupt(path),
        run_id=sent.run_ids.get("", ""),
    )


def _forward(forwarder: Forwarder, sent: Sent, counted: collections.Counter[str]) -> None:
    def count(entry: Mapping[str, object]) -> None:
        counted[str(entry.get("event", "metric"))] += 1

    while True:
        try:
            if not forwarder.send_some(LINES_PER_BATCH, count):
                break
        except StartOver:
            sent.aside.clear()
    forwarder.retry_aside(lambda: None, count)


def _reason(error: Exception, uri: str) -> str:
    return short_reason(error).replace(uri, shown_uri(uri))


def _connect(uri: str, folder: Path, sent: Sent) -> Delivery:
    try:
        delivery = Delivery(uri, folder, sent)
        delivery.check()
    except Exception as error:
        raise ServerUnusable(
            f"{shown_uri(uri)} cannot be used ({_reason(error, uri)}); {_what_to_do(error)}."
        ) from None
    return delivery


def _what_to_do(error: Exception) -> str:
    code = getattr(error, "error_code", "")
    if code == "UNAUTHENTICATED":
        return "give the user name and password in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    if code == "PERMISSION_DENIED":
        return "see that the server's --allowed-hosts has this name and that you may write there"
    return "start the server or give another --tracking-uri"


def _last_words(path: Path) -> dict[str, int]:
    """When each run of a spool that never finished wrote last, in milliseconds; nested runs first."""
    last: dict[str, int] = {}
    finished: dict[str, bool] = {}
    for entry in entries_of(path):
        last[entry["run"]] = entry["time_ms"]
        finished[entry["run"]] = entry.get("event") == "finish"
    return {run: time_ms for run, time_ms in sorted(last.items(), reverse=True) if not finished[run]}


def _num_corrupt(path: Path) -> int:
    """Damaged lines, and a last line that was cut short."""
    total, offset = 0, 0
    while True:
        _, after, corrupt = read_entries(path, offset, LINES_PER_BATCH)
        total += corrupt
        if after == offset:
            return total + (offset < path.stat().st_size)
        offset = after
