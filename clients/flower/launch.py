"""`flower-client`: keeps a site's SuperNode and trainer running, across runs and servers, until told to stop."""

import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clients.flower.handshake import QUESTIONS, WITHIN_S, examine
from clients.flower.own_lines import follow, mark_of
from clients.flower.trainer import KEY, Trainer
from clients.site import SiteSettings
from clients.state_folder import state_folder_held
from common.errors import FaceFedError, InterruptedRun, UserError, one_line
from common.system.certs import ClientFiles
from common.system.events import LAST_TASK_FILE, SHOWN
from common.system.processes import (
    can_connect,
    child_environment,
    has_address,
    host_port,
    is_healthy,
    proxy_before,
    start,
    stop,
)
from common.system.progress import FILE as PROGRESS
from common.system.progress import Amount, read_amounts

log = logging.getLogger("facefed.client")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
LOOK_EVERY_S, MISSES = 0.5, 3
# Flower's words for a key that the server does not know: at once, or in the middle.  A server may forge them: it may
# refuse whom it likes, in any words.
REFUSED = re.compile(r"\[code: 2004\]|401 Unauthorized")
LONGEST_LINE = 1000  # characters of what is shown
REFUSED_FOR_S = 30.0  # a server that starts may not have read its keys yet
AGAIN = "again"  # as in common.protocol.wire, which would bring torch along
GONE_AFTER_S = 60.0  # so long without a heartbeat the server takes a site for connected, and waits for its answer


@dataclass(frozen=True, kw_only=True)
class ClientOptions:
    """Which server, and for how long to try."""

    host: str
    port: int
    connect_timeout_s: float
    once: bool  # end after the first run
    tls: ClientFiles | None = None

    @property
    def where(self) -> str:
        """The server's address."""
        return host_port(self.host, self.port)


class Launch:
    """One site's SuperNode and its restarts."""

    def __init__(
        self,
        site: SiteSettings,
        options: ClientOptions,
        say: Callable[[str], object],
        *,
        under_way: Callable[[Amount | None], object] = bool,
    ) -> None:
        """say: shows one line to the user.  under_way: how far the training of a round is; None: there is none."""
        self._site, self._options, self._tell, self._under_way = site, options, say, under_way
        self._scored = ""  # the round whose model was last said to be evaluated
        self._stop = threading.Event()
        self._round, self._is_again = "", False
        self._answered_last = False
        self._connected = self._refused = self._interrupted = False
        self._refused_since = float("inf")
        self._give_up_at = float("inf")  # until the first connection
        self._proxy = proxy_before(options.host, "https" if options.tls else "http")

    def _say(self, line: str) -> None:
        """Show one line, and no more than that: it may quote what a server or a library said."""
        self._tell(one_line(line, LONGEST_LINE))

    def request_stop(self) -> None:
        """Ask to end; safe in a signal handler."""
        self._stop.set()

    def run(self) -> None:
        """Serve until stopped, or with `once` until a run is over.

        Raises UserError when no connection came about within the connect timeout or the state folder is in use;
        InterruptedRun when stopped; FaceFedError when no trainer can start, and with `once` when the server goes in the
        middle of a run.
        """
        with state_folder_held(self._site.state_dir, self._site.name, say=self._say):
            self._last_task().unlink(missing_ok=True)
            with Trainer(self._site, self._show) as trainer:  # it imports torch while we wait for the server
                self._give_up_at = time.monotonic() + self._options.connect_timeout_s
                self._wait_for_server(trainer)
                self._serve(trainer)

    def _last_node(self) -> Path:
        return self._site.state_dir / "node-id"

    def _last_task(self) -> Path:
        return self._site.state_dir / LAST_TASK_FILE

    def _wait_for_server(self, trainer: Trainer) -> None:
        """Wait with back-off until the server is there.

        Raises UserError, also where it is another; InterruptedRun; FaceFedError where no trainer can start.
        """
        pause, said = FIRST_PAUSE_S, False
        while not self._reaches():
            left = self._give_up_at - time.monotonic()
            if left <= 0:
                raise UserError(
                    f"no server at {self._options.where}{self._by_proxy()} within"
                    f" {self._options.connect_timeout_s:g} s (--connect-timeout); {self._what_to_check()}."
                )
            if not said:
                self._say(
                    f"no server at {self._options.where}{self._by_proxy()} yet{self._unknown_name()}; trying again"
                )
                said = True
            if self._stop.wait(min(pause, left)):
                raise InterruptedRun("stopped by the user")
            trainer.keep_alive()
            pause = min(pause * 2, LONGEST_PAUSE_S)
        if self._proxy is None:
            within_s = min(WITHIN_S, max(1.0, (self._give_up_at - time.monotonic()) / QUESTIONS))
            examine(self._options.host, self._options.port, self._options.tls, within_s=within_s)

    def _reaches(self) -> bool:
        """Whether the server is there, on the way that Flower takes."""
        host, port, tls = self._options.host, self._options.port, self._options.tls
        if self._proxy is None:
            return can_connect(host, port)
        return is_healthy(host, port, ca=tls.ca if tls else None, proxy=self._proxy)

    def _unknown_name(self) -> str:
        """Where the server's name means nothing to this machine, a word on it."""
        host = self._options.host
        if self._proxy is not None or has_address(host):
            return ""
        return f": this machine finds no address for the name {host}"

    def _by_proxy(self) -> str:
        return f" by way of {self._proxy}" if self._proxy else ""

    def _what_to_check(self) -> str:
        if self._proxy is None:
            unknown = self._unknown_name().removeprefix(": ")
            return f"{unknown}; correct --server" if unknown else "start flower-server there, or check the address"
        host = self._options.host
        return f"start flower-server there, or set no_proxy={host} if this machine reaches it without the proxy"

    def _require_in_time(self) -> None:
        """Raise UserError where the server is there and no connection has come about within the connect timeout."""
        if time.monotonic() < self._give_up_at:
            return
        why = "it does not accept this site's key" if self._refused else f"see {self._site.state_dir}/supernode.log"
        raise UserError(
            f"the server at {self._options.where} answers{self._by_proxy()}, but no connection came about within"
            f" {self._options.connect_timeout_s:g} s (--connect-timeout); {why}."
        )

    def _serve(self, trainer: Trainer) -> None:
        pause = FIRST_PAUSE_S
        while True:
            started = time.monotonic()
            if self._one_supernode(trainer):
                return
            self._judge_refusal()
            if self._options.once and self._round:
                raise FaceFedError(f"the server went in round {self._round}, before the run was over.")
            # A SuperNode ends when its server goes; the next server does not know it, so it starts afresh.
            pause = FIRST_PAUSE_S if time.monotonic() - started > LONGEST_PAUSE_S else min(pause * 2, LONGEST_PAUSE_S)
            if self._stop.wait(pause):
                raise InterruptedRun("stopped by the user")
            self._wait_for_server(trainer)

    def _judge_refusal(self) -> None:
        """Say that the server does not accept this site's key; raise UserError once it has said so for a while."""
        tls = self._options.tls
        if not (self._refused and tls):
            self._refused_since = float("inf")
            return
        where = f"the server at {self._options.where}"
        self._refused_since = min(self._refused_since, time.monotonic())
        # Where the server's welcome was lost on its way, the server takes us for connected, and lets nobody else in.
        patience_s = GONE_AFTER_S + REFUSED_FOR_S if self._interrupted else REFUSED_FOR_S
        if time.monotonic() - self._refused_since >= patience_s:
            raise UserError(
                f"{where} does not accept this site's key ({tls.fingerprint}): it is not registered there, or was"
                " revoked, or another client uses it. Ask its operator, who registers keys with `facefed certs add`."
            )
        self._say(f"{where} does not accept this site's key ({tls.fingerprint}); trying again")

    def _one_supernode(self, trainer: Trainer) -> bool:
        """Run one SuperNode until it ends or its server goes; True when a run is over and one was asked for."""
        state = self._site.state_dir
        self._round = ""
        self._answered_last = self._connected = self._refused = False
        self._scored = ""
        process = start(
            self._command(trainer.folder), environment=child_environment(state / "flwr"), output=subprocess.PIPE
        )
        mark = mark_of((trainer.folder / KEY).read_bytes())
        reader = follow(process, state / "supernode.log", mark, self._notice_node, self._overhear)
        try:
            return self._until_over(process, trainer)
        finally:
            stop(process)
            reader.join(timeout=5)

    def _until_over(self, process: subprocess.Popen[bytes], trainer: Trainer) -> bool:
        """Until the SuperNode ends or its server goes; True when that was the end of the one run asked for.

        To leave right after the last answer would be too early: Flower throws away what a node sent that has left
        before the server looked, and the server takes the answers of the others first.
        """
        where = f"the server at {self._options.where}"
        misses, reached = 0, time.monotonic()
        while process.poll() is None and not self._is_lost(misses, reached):
            if self._stop.wait(LOOK_EVERY_S):
                raise InterruptedRun("stopped by the user")
            trainer.keep_alive()
            self._under_way(next(iter(read_amounts(self._site.state_dir / PROGRESS)), None))
            self._require_in_time()
            if self._reaches():
                if misses >= MISSES:
                    self._say(f"{where} is reached again")
                misses, reached = 0, time.monotonic()
                continue
            misses += 1
            if misses == MISSES and self._in_a_run():
                self._say(f"{where} cannot be reached; trying again")
        if self._options.once and self._answered_last:
            return True
        if not self._refused:
            what = "ended" if self._answered_last else "is lost"
            self._say(f"{where} {what}; waiting for the next one")
        return False

    def _in_a_run(self) -> bool:
        return bool(self._round) and not self._answered_last

    def _is_lost(self, misses: int, reached: float) -> bool:
        """In a run the SuperNode has an answer to give: it goes on trying for as long as the server may want it."""
        return misses >= MISSES and not (self._in_a_run() and time.monotonic() - reached < GONE_AFTER_S)

    def _command(self, meeting: Path) -> list[str]:
        """Others can read it: what the site keeps for itself is told to the trainer alone."""
        return [
            sys.executable,
            "-P",
            "-m",
            "clients.flower.supernode",
            str(meeting),
            self._site.name,
            str(self._last_node()),
            *self._trust(),
            "--superlink",
            self._options.where,
        ]

    def _trust(self) -> list[str]:
        """Paths, never what is in them."""
        tls = self._options.tls
        if tls is None:
            return ["--insecure"]
        return ["--root-certificates", str(tls.ca), "--auth-supernode-private-key", str(tls.key)]

    def _show(self, line: str) -> None:
        """A line of the trainer's for the user."""
        self._say(line.partition(SHOWN)[2])

    def _overhear(self, line: str) -> None:
        """A line that is none of ours; it may only say that we are not wanted."""
        if REFUSED.search(line):
            self._refused = not self._connected  # in the middle it is another server, or a key that was revoked

    def _notice_node(self, line: str) -> None:
        """A line of the SuperNode's process, as `clients.flower.own_lines` words it."""
        word, _, value = line.strip().partition(" ")
        if word == "round":
            self._is_again = value == AGAIN  # it is asked for an answer that it works on, and nothing new
            self._round = self._round if self._is_again else value
        elif word == "retries":
            self._interrupted = self._interrupted or not self._connected
        elif word == "node":
            self._connected, self._interrupted, self._give_up_at = True, False, float("inf")
            self._last_node().write_text(value, encoding="utf-8")
            self._say(f"connected to {self._options.where}")
        elif word == "receives" and self._is_again:
            return
        elif word == "receives" and value == "train":
            self._say(f"round {self._round}: training")
        elif word == "receives" and self._scored != self._round:  # again: the best is the last, or it is asked again
            self._scored = self._round
            self._say(f"model of round {self._round}: evaluating")
        elif word == "sent" and self._last_task().exists():
            self._say("the run is over")
            self._answered_last = True
            self._last_task().unlink(missing_ok=True)
