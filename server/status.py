"""`flower-server --status-port`: who is in, who is missing since when, rounds, scores, bytes, refusals; read-only.

What is shown follows from the run's events alone (`RUN/events.jsonl`), so it costs the run nothing and holds what a
person at the terminal saw: names of sites, counts, pooled figures.  A site's own score is there where the run has it;
with differential privacy there is none.  Everything is a GET without a parameter; the page runs no script and loads
nothing from elsewhere.
"""

import contextlib
import html
import ipaddress
import json
import logging
import queue
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Final, Self

from common.errors import UserError, one_line
from common.metrics.figures import AUC
from common.metrics.names import BYTES_DOWN, BYTES_UP, of_split
from common.system.events import EventReader
from common.system.processes import host_port, is_loopback, parse_address, require_free_port

log = logging.getLogger("facefed.server")

OPTION: Final = "--status-port"
LOOK_EVERY_S: Final = 0.5
REFRESH_S: Final = 5
MOST_SHOWN: Final = 100  # of rounds, refusals and warnings each; how many there are is said
ANSWER_WITHIN_S: Final = 10.0  # from the moment that a thread takes a connection
MOST_AT_ONCE: Final = 4  # connections that are answered at a time
MOST_WAITING: Final = 16  # beside them; whoever comes then is turned away
TOO_MANY: Final = (
    b"HTTP/1.0 503 Service Unavailable\r\nContent-Type: text/plain; charset=utf-8\r\nRetry-After: 5\r\n"
    b"Connection: close\r\n\r\ntoo many look at this page now; try again in some seconds\n"
)
VAL, TEST = of_split("val", AUC), of_split("test", AUC)
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def status_address(text: str) -> tuple[str, int]:
    """PORT of this machine alone, or HOST:PORT -> (host, port).  Raises UserError."""
    if text.isascii() and text.isdigit() and 0 < int(text) < 65536:
        return "127.0.0.1", int(text)
    if ":" not in text:
        raise UserError(f"{OPTION} {text}: write a port from 1 to 65535, or HOST:PORT.")
    return parse_address(text, OPTION)


# -- what is known -----------------------------------------------------------------------------------------------------


@dataclass
class SiteStatus:
    """One site as the events tell of it; times are seconds since 1970."""

    state: str  # joined | working | answered | left out
    since: float  # in that state
    seen: float  # its last sign of life
    words: str = ""  # how far it is, or why it was left out
    device: str = ""
    num_refusals: int = 0
    val_auc: float | None = None  # its own, of the model that was scored last; None: the run has none to show

    def becomes(self, state: str, when: float, words: str = "", *, is_sign: bool = True) -> None:
        """It changes its state, or tells more in it."""
        if state != self.state:
            self.state, self.since = state, when
        self.words = words
        if is_sign:
            self.seen = when


@dataclass
class FederationStatus:
    """A run's events, added up to what stands on the page.  `take` each in order, then `as_json`."""

    run_id: str
    state: str = "starting"  # starting | waiting | training | evaluating | saving | finished | failed
    line: str = ""  # why it failed
    model: str = ""
    round: int = 0
    num_rounds: int = 0
    best_round: int = 0
    num_wanted: int = 0
    num_here: int = 0
    missing_since: float | None = None  # too few are here, from then on
    began: float = 0.0
    num_refusals: int = 0
    sites: dict[str, SiteStatus] = field(default_factory=dict)
    rounds: dict[int, dict[str, Any]] = field(default_factory=dict)
    refusals: list[dict[str, Any]] = field(default_factory=list)
    num_warnings: int = 0
    warnings: list[dict[str, Any]] = field(default_factory=list)

    def take(self, event: Mapping[str, Any]) -> None:
        """One more event; a kind that is not known changes nothing."""
        when = float(event.get("time", 0.0))
        self.began = self.began or when
        work = _TAKE.get(event["kind"])
        if work is not None:
            work(self, event, when)

    def as_json(self, now: float) -> dict[str, Any]:
        """Everything that is known, for /status.json."""
        return {
            "run": self.run_id,
            "state": self.state,
            "line": self.line,
            "model": self.model,
            "round": self.round,
            "rounds": self.num_rounds,
            "best_round": self.best_round,
            "now": _utc(now),
            "began": _utc(self.began) if self.began else None,
            "seconds_left": self._seconds_left(now),
            "clients": {"here": self.num_here, "wanted": self.num_wanted, "missing_since": self._missing()},
            "sites": {name: self._site(site) for name, site in sorted(self.sites.items())},
            "bytes": {way: sum(row.get(way, 0.0) for row in self.rounds.values()) for way in (BYTES_DOWN, BYTES_UP)},
            "rounds_table": [{"round": number, **row} for number, row in sorted(self.rounds.items())],
            "num_refusals": self.num_refusals,
            "refusals": self.refusals,
            "num_warnings": self.num_warnings,
            "warnings": self.warnings,
        }

    def _missing(self) -> str | None:
        return None if self.missing_since is None else _utc(self.missing_since)

    def _site(self, site: SiteStatus) -> dict[str, Any]:
        is_missing = site.state == "left out"
        return {
            "state": site.state,
            "since": _utc(site.since),
            "seen": _utc(site.seen),
            "missing_since": _utc(site.seen) if is_missing else None,
            "words": site.words,
            "device": site.device,
            "refusals": site.num_refusals,
            "val_auc": site.val_auc,
        }

    def _seconds_left(self, now: float) -> float | None:
        """Of training, by the mean of the newest rounds; None before the first is whole, and without training."""
        newest: list[float] = [row["seconds"] for _, row in sorted(self.rounds.items()) if "seconds" in row][-5:]
        if self.state not in ("training", "waiting") or not newest or not self.num_rounds:
            return None
        usual, done = sum(newest) / len(newest), max(number for number, row in self.rounds.items() if "seconds" in row)
        spent = max(0.0, now - float(self.rounds[done]["ended"]))
        return max(0.0, (self.num_rounds - done) * usual - spent)

    # -- one method for each kind of event

    def _begun(self, event: Mapping[str, Any], _when: float) -> None:
        self.model = str(event.get("model", ""))

    def _joined(self, event: Mapping[str, Any], when: float) -> None:
        name = str(event["client"])
        counted = f"{event['people']:,} people, {event['pictures']:,} training pictures"
        self.sites[name] = SiteStatus("joined", when, when, counted, str(event["device"]))
        self._here(len(event["here"]), int(event["wanted"]), when)

    def _waiting(self, event: Mapping[str, Any], when: float) -> None:
        self.state = "waiting"
        self._here(len(event["here"]), int(event["wanted"]), when)
        for name, words in event.get("at_work", {}).items():
            site = self.sites.setdefault(name, SiteStatus("working", when, when))
            site.becomes("working", when, str(words))

    def _gathered(self, event: Mapping[str, Any], when: float) -> None:
        self._here(int(event["clients"]), int(event["wanted"]), when)

    def _members(self, event: Mapping[str, Any], when: float) -> None:
        self.num_rounds = int(event["rounds"])
        self._here(int(event["clients"]), self.num_wanted, when)

    def _here(self, here: int, wanted: int, when: float) -> None:
        self.num_here, self.num_wanted = here, wanted
        if here >= wanted:
            self.missing_since = None
        elif self.missing_since is None:
            self.missing_since = when

    def _asked(self, event: Mapping[str, Any], when: float) -> None:
        is_training = event["task"] == "train"
        self.state, self.round = "training" if is_training else "evaluating", int(event["round"])
        for name in event.get("names", ()):
            site = self.sites.setdefault(name, SiteStatus("working", when, when))
            site.becomes("working", when, is_sign=False)

    def _progress(self, event: Mapping[str, Any], when: float) -> None:
        site = self.sites.setdefault(str(event["client"]), SiteStatus("working", when, when))
        site.becomes("working", when, str(event["words"]))

    def _answered(self, event: Mapping[str, Any], when: float) -> None:
        site = self.sites.get(str(event.get("client", "")))
        if site is not None and site.state == "working":
            site.becomes("answered", when)

    def _refused(self, event: Mapping[str, Any], when: float) -> None:
        name, reason = str(event.get("client", "")), str(event["reason"])
        self.num_refusals += 1
        told = {"time": _utc(when), "client": name, "round": event.get("round"), "reason": reason}
        self.refusals = [*self.refusals, told][-MOST_SHOWN:]
        if name in self.sites:
            self.sites[name].becomes("left out", when, reason, is_sign=False)
            self.sites[name].num_refusals += 1

    def _round(self, event: Mapping[str, Any], when: float) -> None:
        row = self.rounds.setdefault(int(event["round"]), {})
        row |= {"clients": event["clients"], "seconds": event["seconds"], "ended": when}
        row |= {name: event[name] for name in ("train_loss", BYTES_DOWN, BYTES_UP) if event.get(name) is not None}

    def _scored(self, event: Mapping[str, Any], _when: float) -> None:
        self.best_round = int(event.get("best_round", self.best_round))
        row = self.rounds.setdefault(int(event["round"]), {})
        row |= {name: event[name] for name in (VAL, TEST) if event.get(name) is not None}
        for name, value in event.get("sites", {}).items():
            if name in self.sites:
                self.sites[name].val_auc = value

    def _warning(self, event: Mapping[str, Any], when: float) -> None:
        self.num_warnings += 1
        self.warnings = [*self.warnings, {"time": _utc(when), "line": str(event.get("line", ""))}][-MOST_SHOWN:]

    def _ended(self, event: Mapping[str, Any], _when: float) -> None:
        self.state, self.line = str(event["kind"]), str(event.get("line", ""))


_TAKE: Final = {
    "begun": FederationStatus._begun,  # noqa: SLF001 - this class's own, by the kind of event
    "joined": FederationStatus._joined,  # noqa: SLF001
    "waiting": FederationStatus._waiting,  # noqa: SLF001
    "gathered": FederationStatus._gathered,  # noqa: SLF001
    "members": FederationStatus._members,  # noqa: SLF001
    "asked": FederationStatus._asked,  # noqa: SLF001
    "progress": FederationStatus._progress,  # noqa: SLF001
    "answered": FederationStatus._answered,  # noqa: SLF001
    "refused": FederationStatus._refused,  # noqa: SLF001
    "round": FederationStatus._round,  # noqa: SLF001
    "scored": FederationStatus._scored,  # noqa: SLF001
    "warning": FederationStatus._warning,  # noqa: SLF001
    "stopped_early": FederationStatus._warning,  # noqa: SLF001
    "saving": FederationStatus._ended,  # noqa: SLF001
    "finished": FederationStatus._ended,  # noqa: SLF001
    "failed": FederationStatus._ended,  # noqa: SLF001
}


def _clock(when: str) -> str:
    """A time of the status as it stands on the page, where one line says that all are UTC."""
    return when[:19].replace("T", " ")


def _utc(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).isoformat(timespec="seconds")


# -- the page ----------------------------------------------------------------------------------------------------------

_STYLE: Final = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881;--good:#1a7f37;--busy:#0969da;--bad:#cf222e}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem}
h1{font-size:1.4rem;margin:0}h2{font-size:1.05rem;margin:2rem 0 .5rem}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.6rem;margin:1.2rem 0}
.facts div{background:var(--soft);border:1px solid var(--line);border-radius:.5rem;padding:.5rem .8rem}
.facts b{display:block;font-size:1.25rem;font-weight:600}.facts span,.note{opacity:.7;font-size:.85rem}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.35rem .7rem;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;opacity:.7;font-size:.85rem}td:first-child,td:nth-child(3){white-space:nowrap}.n{text-align:right;font-variant-numeric:tabular-nums}
.answered,.joined{color:var(--good)}.working{color:var(--busy)}.out,.failed{color:var(--bad)}.best td{font-weight:600}
"""


def page(status: Mapping[str, Any]) -> str:
    """The status as HTML.  status: of `as_json`."""
    parts = [_facts(status), _sites(status), _rounds(status), _refusals(status), _warnings(status)]
    title = f"{status['run']}: {status['state']}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="{REFRESH_S}">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(str(status['run']))}</h1>"
        f'<div class="note">{html.escape(str(status["model"]))}</div>{"".join(parts)}'
        f'<p class="note">{_clock(status["now"])} UTC, as all times here; anew every {REFRESH_S} s. The same as JSON:'
        ' <a href="/status.json">/status.json</a>. Nothing can be changed here.</p></body></html>'
    )


def _facts(status: Mapping[str, Any]) -> str:
    clients, bytes_of = status["clients"], status["bytes"]
    left = status["seconds_left"]
    facts = {
        "state": status["state"],
        "round": f"{status['round']} of {status['rounds']}" if status["rounds"] else "-",
        "clients here": f"{clients['here']} of {clients['wanted']}",
        "best round": str(status["best_round"] or "-"),
        "time left": "-" if left is None else _duration(left),
        "sent, received": f"{_mb(bytes_of[BYTES_DOWN])}, {_mb(bytes_of[BYTES_UP])}",
        "left out": str(status["num_refusals"]),
    }
    cells = "".join(f"<div><span>{name}</span><b>{html.escape(text)}</b></div>" for name, text in facts.items())
    told = f'<p class="failed">{html.escape(status["line"])}</p>' if status["line"] else ""
    if clients["missing_since"]:
        since = _clock(clients["missing_since"])
        told += f"<p>{clients['wanted'] - clients['here']} more clients are needed, since {since}.</p>"
    return f'<div class="facts">{cells}</div>{told}'


def _sites(status: Mapping[str, Any]) -> str:
    sites = status["sites"]
    if not sites:
        return ""
    with_scores = any(site["val_auc"] is not None for site in sites.values())
    head = [
        "site",
        "state",
        "since",
        "last heard of",
        "how far, or why",
        *(["own val AUC"] if with_scores else []),
        "left out",
    ]
    rows = []
    for name, site in sites.items():
        kind = "out" if site["missing_since"] else site["state"]
        cells = [
            f"<td>{html.escape(name)}</td><td class='{kind}'>{site['state']}</td><td>{_clock(site['since'])}</td>",
            f"<td>{_clock(site['seen'])}</td><td>{html.escape(site['words'])}</td>",
            f"<td class='n'>{_figure(site['val_auc'])}</td>" if with_scores else "",
            f"<td class='n'>{site['refusals']}</td>",
        ]
        rows.append("".join(cells))
    return _table("Sites", head, rows)


def _rounds(status: Mapping[str, Any]) -> str:
    every = status["rounds_table"]
    if not every:
        return ""
    head = ["round", "clients", "seconds", "train loss", "val AUC", "test AUC", "sent", "received"]
    rows, best = [], status["best_round"]
    for row in reversed(every[-MOST_SHOWN:]):
        cells = [
            str(row["round"]), str(row.get("clients", "-")), _figure(row.get("seconds"), 1),
            *(_figure(row.get(name)) for name in ("train_loss", VAL, TEST)),
            *(_mb(row[way]) if way in row else "-" for way in (BYTES_DOWN, BYTES_UP)),
        ]  # fmt: skip
        mark = " class='best'" if row["round"] == best and best else ""
        rows.append((mark, "".join(f"<td class='n'>{cell}</td>" for cell in cells)))
    more = f"the last {MOST_SHOWN} of {len(every)}; 0 is the model before any training" * (len(every) > MOST_SHOWN)
    return _table("Rounds", head, [cells for _, cells in rows], marks=[mark for mark, _ in rows], note=more)


def _refusals(status: Mapping[str, Any]) -> str:
    rows = [
        f"<td>{_clock(one['time'])}</td><td>{html.escape(one['client'] or '-')}</td>"
        f"<td class='n'>{'-' if one['round'] is None else one['round']}</td><td>{html.escape(one['reason'])}</td>"
        for one in reversed(status["refusals"])
    ]
    note = _last_of(status["num_refusals"])
    return _table("Left out", ["when", "site", "round", "why"], rows, note=note) if rows else ""


def _warnings(status: Mapping[str, Any]) -> str:
    rows = [
        f"<td>{_clock(one['time'])}</td><td>{html.escape(one['line'])}</td>" for one in reversed(status["warnings"])
    ]
    note = _last_of(status["num_warnings"])
    return _table("Told", ["when", ""], rows, note=note) if rows else ""


def _last_of(number: int) -> str:
    """What is said where not all are shown."""
    return f"the last {MOST_SHOWN} of {number}" if number > MOST_SHOWN else ""


def _table(title: str, head: list[str], rows: list[str], *, marks: list[str] | None = None, note: str = "") -> str:
    aligned = ["class='n'" in cell.partition(">")[0] for cell in rows[0].split("<td")[1:]]  # as the cells below
    columns = zip(head, aligned, strict=True)
    begin = "".join(f"<th class='n'>{name}</th>" if is_number else f"<th>{name}</th>" for name, is_number in columns)
    body = "".join(f"<tr{mark}>{row}</tr>" for mark, row in zip(marks or [""] * len(rows), rows, strict=True))
    told = f'<p class="note">{note}</p>' if note else ""
    return f'<h2>{title}</h2>{told}<div class="wide"><table><tr>{begin}</tr>{body}</table></div>'


def _figure(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


# -- the server --------------------------------------------------------------------------------------------------------


class StatusServer:
    """Answers on a port of its own, from threads, until it is closed."""

    def __init__(self, run_folder: Path, host: str, port: int) -> None:
        """host, port: of `status_address`; port 0: one that is free.  Raises UserError where it cannot listen."""
        require_free_port(host, port, OPTION)
        self._status, self._reader = FederationStatus(run_folder.name), EventReader(run_folder)
        self._lock = threading.Lock()
        self._server = _Listener(self, host, port)
        self.host, self.port = host, int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(LOOK_EVERY_S,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def line(self) -> str:
        """Where it is, and who can read it."""
        who = "this machine alone" if is_loopback(self.host) else "whoever reaches it reads it, without a password"
        return f"http://{host_port(self.host, self.port)}/ (read-only; {who})"

    def now(self, when: float) -> dict[str, Any]:
        """The status at that time, with all that was told until then."""
        with self._lock:
            for event in self._reader.new_events():
                self._status.take(event)
            return self._status.as_json(when)


class _Listener(HTTPServer):
    """Answers from a fixed number of threads; a fixed number of others wait for one, and who comes then gets 503.

    `http.server`'s own starts a thread for each connection, as many as somebody opens.
    """

    request_queue_size = MOST_WAITING  # so many connections at once are seen, and then answered or turned away

    def __init__(self, status: StatusServer, host: str, port: int) -> None:
        if ":" in host:
            self.address_family = socket.AF_INET6
        self.status = status
        self._waiting: queue.Queue[tuple[socket.socket, Any] | None] = queue.Queue(MOST_WAITING)
        super().__init__((host, port), _Handler)
        self._threads = [threading.Thread(target=self._work, name="status", daemon=True) for _ in range(MOST_AT_ONCE)]
        for thread in self._threads:
            thread.start()

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as http.server has it
        """Let a thread have it that is free, now or soon."""
        try:
            self._waiting.put_nowait((request, client_address))
        except queue.Full:
            self._turn_away(request)

    def _turn_away(self, request: socket.socket) -> None:
        """Without waiting for what it asks for, or for its reading the answer."""
        with contextlib.suppress(OSError):
            request.setblocking(False)  # noqa: FBT003 - as socket has it
            request.sendall(TOO_MANY)
            request.recv(65536)  # what is unread when a connection is closed makes the other side drop the answer
        self.shutdown_request(request)

    def _work(self) -> None:
        while (taken := self._waiting.get()) is not None:
            request, client_address = taken
            limit = threading.Timer(ANSWER_WITHIN_S, _hang_up, [request])
            limit.start()
            try:
                self.finish_request(request, client_address)
            except Exception:
                self.handle_error(request, client_address)
            finally:
                limit.cancel()
                self.shutdown_request(request)

    def server_close(self) -> None:
        """No more is answered; who waits is turned away."""
        super().server_close()
        while True:
            try:
                taken = self._waiting.get_nowait()
            except queue.Empty:
                break
            if taken is not None:
                self._turn_away(taken[0])
        for _ in self._threads:
            self._waiting.put(None)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002, ANN401 - as http.server has it
        """Whoever looks may go in the middle: that is nothing to tell, and anything else is a line, no traceback."""
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):
            log.warning("the status page could not answer: %s: %s", type(error).__name__, one_line(str(error)))


def _hang_up(request: socket.socket) -> None:
    """End a connection under the thread that reads or writes it, however little and long the other side sends."""
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    timeout = ANSWER_WITHIN_S
    server: _Listener

    def do_GET(self) -> None:
        if not self._is_for_us():
            self._answer(HTTPStatus.FORBIDDEN, "text/plain; charset=utf-8", "this address is not ours\n")
            return
        status = self.server.status.now(datetime.now(UTC).timestamp())
        if self.path == "/":
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", page(status))
        elif self.path == "/status.json":
            self._answer(HTTPStatus.OK, "application/json", json.dumps(status) + "\n")
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", "here are / and /status.json\n")

    do_HEAD = do_GET  # noqa: N815 - as http.server calls it

    def _is_for_us(self) -> bool:
        """Whether the browser meant this machine: else a page of anybody's could lead its own name here and read."""
        if not is_loopback(self.server.status.host):
            return True
        name = (self.headers.get("Host") or "").rpartition(":")[0].removeprefix("[").removesuffix("]")
        try:
            return name == "localhost" or ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    def _answer(self, code: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(code)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        """Nothing of Python's version."""
        return "facefed"

    def log_message(self, *_: object) -> None:
        """Nobody wants a line for each look."""
