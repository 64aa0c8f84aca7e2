"""Fault points: tells when a run is in a phase of a round, from what its programs write anyway.

Server phases last milliseconds here, so a fault point is a line that opens the phase, and a part of how long it lasts:

    line in the run's folder                              what the server does next
    ----------------------------------------------------  -----------------------------------------------------------
    event `scored` of round r - 2 (test split)             aggregates; asks who is there; sends round r
    spool: the run's train_loss of round r                 records round r (while round r + 1 is trained)
    event `round` r                                        writes checkpoint r, then waits for round r + 1
    a client's line `round r: training`                    waits; the client trains
    first line of round r in an egress ledger              a reply leaves: the server receives it
    event `scored` of round r - 1 (val split)              merges scores, then adds up and steps
    event `saving`, or the last model's scores             ends the run: pictures, models, the record's end
"""

import json
import time
from pathlib import Path

from tests.chaos.deployment import Deployment
from tests.chaos.plan import Fault

LOOK_EVERY_S = 0.003
# How long a phase lasts here, seconds; the fault comes after a part of it.
LASTS_S = {
    "wait": 0.25, "send": 0.06, "train": 0.3, "receive": 0.15, "aggregate": 0.01, "checkpoint": 0.02,
    "evaluate": 0.003, "log": 0.003, "finish": 6.0,
}  # fmt: skip


class Tail:
    """The whole lines of a file as they come; the file need not be there yet."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def new_lines(self) -> list[str]:
        """Since the last look."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except OSError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.decode(errors="replace").splitlines()


class Watch:
    """Follows one run."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._tails: dict[Path, Tail] = {}
        self.events: list[dict] = []
        self._recorded = 0  # the last round in the spool
        self._left = 0  # the last round of which a reply left
        self._trained = 0  # the last round that a client said to train

    @property
    def last_round(self) -> int:
        """The last whole round that was told."""
        return max((event["round"] for event in self.events if event["kind"] == "round"), default=0)

    def look(self) -> None:
        """Take in what is new."""
        run = self._deployment.run
        if run is None:
            return
        for line in self._new(run / "events.jsonl"):
            try:
                self.events.append(json.loads(line))
            except ValueError:  # a full disk cut it
                continue
        for line in self._new(run / "spool.jsonl"):
            if '"run":"","key":"train_loss"' in line:
                self._recorded = json.loads(line)["step"]
        self._look_at_clients(run)

    def _look_at_clients(self, run: Path) -> None:
        for name, client in self._deployment.clients.items():
            for line in self._new(self._deployment.state_dir(name) / "egress" / f"{run.name}.jsonl"):
                if '"answer_to": "train"' in line:
                    self._left = json.loads(line)["round"]
            for line in self._new(client.log.with_suffix(".out")):
                if line.endswith(": training"):
                    self._trained = int(line.split()[1].rstrip(":"))

    def _new(self, path: Path) -> list[str]:
        return self._tails.setdefault(path, Tail(path)).new_lines()

    def _has_scored(self, step: int, split: str) -> bool:
        return any(
            event["kind"] == "scored" and event["round"] >= step and event["split"] == split for event in self.events
        )

    def has_begun(self, phase: str, step: int, rounds: int) -> bool:
        """Whether the run has come to that phase of round `step`, or is past it."""
        begun = {
            "wait": lambda: self.last_round >= step - 1,
            "train": lambda: self._trained >= step,
            "receive": lambda: self._left >= step,
            "evaluate": lambda: self._has_scored(step - 1, "val"),
            "aggregate": lambda: self._has_scored(step - 1, "test"),
            "send": lambda: self._has_scored(step - 2, "test"),
            "log": lambda: self._recorded >= step,
            "checkpoint": lambda: self.last_round >= step,
            "finish": lambda: self._has_scored(rounds, "test"),
        }
        return begun[phase]()

    def wait_for(self, fault: Fault, rounds: int, timeout_s: float) -> bool:
        """Until the run is at the fault's point, tending it meanwhile; False when it is over before."""
        deadline = time.monotonic() + timeout_s
        tend_at = 0.0
        self.look()
        # A round that has not passed this phase yet: the plan's is the first in which the fault may come.
        step = fault.server_round
        while fault.phase != "finish" and step < rounds and self.has_begun(fault.phase, step, rounds):
            step += 1
        while not self.has_begun(fault.phase, step, rounds):
            assert time.monotonic() < deadline, f"{fault}: its point does not come within {timeout_s:g} s"
            if time.monotonic() > tend_at:
                if self._deployment.tend() == 0:
                    return False
                tend_at = time.monotonic() + 0.2
            time.sleep(LOOK_EVERY_S)
            self.look()
        time.sleep(fault.fraction * LASTS_S[fault.phase])
        return self._deployment.tend() != 0

    def where(self) -> dict[str, object]:
        """The last thing that the run told, and how long ago: where a fault really came."""
        self.look()
        if not self.events:
            return {}
        last = self.events[-1]
        return {
            "last_event": last["kind"],
            "last_event_round": last.get("round", 0),
            "split": last.get("split", ""),
            "ms_later": round(1000 * (time.time() - last["time"])),
        }
