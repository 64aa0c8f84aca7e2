"""Brings one fault upon the processes of a deployment, and ends it where it is of those that last."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.chaos.deployment import CLIENTS, SERVERAPP, SUPERLINK, SUPERNODE, TRAINER, Deployment, kill, send
from tests.chaos.fault_points import Watch
from tests.chaos.plan import Fault

TEND_EVERY_S = 0.2
OVER_WITHIN_S = 400.0  # a lost reply is missed after federation.round_timeout_s, a node after Flower's minute

# kind -> the part of the command line of what it kills ("": all of it); None: the program itself, not what it started
_KILLS = {
    "kill server machine": ("server", ""),
    "kill flower-server": ("server", None),
    "kill SuperLink": ("server", SUPERLINK),
    "kill ServerApp": ("server", SERVERAPP),
    "kill client machine": ("client", ""),
    "kill flower-client": ("client", None),
    "kill trainer": ("client", TRAINER),
    "kill SuperNode": ("client", SUPERNODE),
    "corrupt state": ("server", ""),
    "corrupt model": ("server", ""),
    "corrupt private state": ("client", ""),
    "freeze SuperLink": ("server", SUPERLINK),
    "freeze ServerApp": ("server", SERVERAPP),
    "freeze trainer": ("client", TRAINER),
}


class NothingThere(Exception):
    """The process that a fault is for has ended: the fault does not come."""


class Bringer:
    """One fault, ready to come at once: finding processes takes longer than some phases."""

    def __init__(self, deployment: Deployment, fault: Fault) -> None:
        self._deployment, self._fault = deployment, fault
        self.client = CLIENTS[int(10 * fault.choice) % len(CLIENTS)]
        self.detail = ""
        self._targets = self._find()
        self._exits = len(deployment.seen.server_exits) + len(deployment.seen.client_exits)

    def _find(self) -> list[psutil.Process]:
        if self._fault.kind not in _KILLS:
            return []
        side, part = _KILLS[self._fault.kind]
        if part is not None:
            return self._deployment.processes(part, self.client if side == "client" else "")
        program = self._deployment.clients[self.client] if side == "client" else self._deployment.server
        return [psutil.Process(program.process.pid)]

    def bring(self) -> None:
        """Now; returns when it has come, or for one that lasts when it is over."""
        exits = len(self._deployment.seen.server_exits) + len(self._deployment.seen.client_exits)
        if exits != self._exits or not self._targets or not all(map(_lives, self._targets)):
            self._targets = self._find()  # some were started since
        if self._fault.kind in _KILLS and not self._targets:
            raise NothingThere(self._fault.kind)
        name = self._fault.kind.split()[0]
        bringers = {
            "kill": self._kill, "freeze": self._freeze, "full": self._fill, "network": self._cut,
            "corrupt": self._corrupt,
        }  # fmt: skip
        bringers[name]()

    def _last(self, begin: Callable[[], object], end: Callable[[], object]) -> None:
        begin()
        try:
            until = time.monotonic() + self._fault.seconds
            while time.monotonic() < until:
                time.sleep(TEND_EVERY_S)
                self._deployment.tend()
        finally:
            end()

    def _kill(self) -> None:
        if self._fault.kind == "kill MLflow":
            self._last(self._deployment.mlflow.kill, self._deployment.mlflow.start)
        else:
            kill(self._targets)

    def _freeze(self) -> None:
        mlflow = self._deployment.mlflow
        if self._fault.kind == "freeze MLflow":
            self._last(mlflow.freeze, mlflow.thaw)
            return
        ends_by = signal.SIGKILL if self._fault.choice < 0.4 and "SuperLink" not in self._fault.kind else signal.SIGCONT
        self.detail = f"{self._fault.seconds:g} s, then {ends_by.name}"
        self._last(lambda: send(self._targets, signal.SIGSTOP), lambda: send(self._targets, ends_by))

    def _fill(self) -> None:
        disk = self._deployment.disks[self._fault.kind.rpartition(" ")[2]]
        self._last(disk.fill, disk.empty)

    def _cut(self) -> None:
        relay, how = self._deployment.relay, self._fault.kind.rpartition(" ")[2]
        self._last(lambda: relay.cut(how), relay.heal)

    def _corrupt(self) -> None:
        kill(self._targets)
        while any(_lives(process) for process in self._targets):
            time.sleep(0.01)
        self.detail = self._damage()

    def _damage(self) -> str:
        what = self._fault.kind
        if what == "corrupt private state":
            folder = self._deployment.state_dir(self.client) / "private" / self._deployment.run.name
            return damage(newest(folder, "round-*.safetensors"), self._fault.choice)
        kept = self._deployment.run / "checkpoints"
        return damage(newest(kept, "state.json" if what == "corrupt state" else "*.safetensors"), self._fault.choice)


def _lives(process: psutil.Process) -> bool:
    """Without a wait: it would take the exit code from whoever started the process."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def newest(folder: Path, pattern: str) -> Path | None:
    """The file that was written last."""
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns, default=None)


def damage(path: Path | None, choice: float) -> str:
    """Flip one bit of a file, or cut it short, as `choice` in [0, 1) says; returns what was done."""
    if path is None:
        return "no such file yet"
    content = bytearray(path.read_bytes())
    part = (choice * 10) % 1
    if choice < 0.5:
        bit = int(part * 8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        return f"bit {bit} of {path.name} flipped"
    path.write_bytes(content[: int(part * len(content))])
    return f"{path.name} cut from {len(content)} to {int(part * len(content))} bytes"


def wait_until_over(deployment: Deployment, watch: Watch) -> None:
    """Until a round that began after the fault is whole, or the run is done.  Raises AssertionError for a hang."""
    watch.look()
    since, deadline = time.time(), time.monotonic() + OVER_WITHIN_S
    wanted = watch.last_round + 1
    while deployment.tend() != 0:
        watch.look()
        if any(e["kind"] == "round" and e["time"] > since and e["round"] >= wanted for e in watch.events):
            return
        assert time.monotonic() < deadline, f"nothing goes on within {OVER_WITHIN_S:g} s"
        time.sleep(TEND_EVERY_S)
