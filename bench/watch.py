"""Run one side of a comparison as a process of its own, and say what its whole process tree cost.

Orphans stay ours: this process is made the one that they fall back to, so a daemon's CPU time and memory count too.
Linux only, like the figures.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

LOOK_EVERY_S = 0.2
GROWN = 1.02  # the exact but slow measure of memory is taken when the quick one is so much above its highest
PR_SET_CHILD_SUBREAPER = 36
TORCH = "libtorch_cpu"
PART = "BENCH_PART"  # in a process's environment, inherited by all that it starts: which part of the side it is
COMMAND_WORDS = 4
LONGEST_COMPLAINT = 400  # characters


class SideFailed(Exception):
    """A side ended badly; the message is the end of what it said."""


@dataclass
class Tree:
    """What a process tree has used so far."""

    cpu_s: float = 0.0
    peak_mib: float = 0.0  # proportional set size: shared pages count once
    # (process, its start) -> its command: clients' processes that ever loaded torch
    clients_with_torch: dict[tuple[int, float], str] = field(default_factory=dict)
    _own_s: dict[tuple[int, float], float] = field(default_factory=dict)
    _highest_rss: float = 0.0

    def look(self, processes: Sequence[psutil.Process]) -> None:
        """Take one sample."""
        resident = 0.0
        for process in processes:
            with contextlib.suppress(psutil.Error, OSError):
                key = (process.pid, process.create_time())
                times = process.cpu_times()
                self._own_s[key] = times.user + times.system
                resident += process.memory_info().rss
                if key not in self.clients_with_torch and is_client_with_torch(process.pid):
                    self.clients_with_torch[key] = " ".join(process.cmdline()[:COMMAND_WORDS])
        self.cpu_s = sum(self._own_s.values())
        if resident > self._highest_rss * GROWN:
            self._highest_rss = resident
            self.peak_mib = max(self.peak_mib, proportional_mib(processes))


def is_client_with_torch(pid: int) -> bool:
    """Whether a process belongs to a client and has torch in its memory now."""
    if f"{PART}=client".encode() not in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        return False
    return TORCH in Path(f"/proc/{pid}/maps").read_text()


def proportional_mib(processes: Sequence[psutil.Process]) -> float:
    """Memory of the processes, pages that several of them share counted once."""
    total = 0.0
    for process in processes:
        with contextlib.suppress(OSError, ValueError):
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 1024
    return total


def _busy_s() -> float:
    """CPU-seconds that the whole machine has worked since it started, or that its host kept for others."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq + times.steal


def own_orphans() -> None:
    """Let what loses its parent fall back to this process instead of init."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def _end(process: subprocess.Popen, known: Sequence[psutil.Process]) -> None:
    """End the side and all that it started, by their own handles."""
    for one in known:
        with contextlib.suppress(psutil.Error):
            one.kill()
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _sample(tree: Tree, known: dict[int, psutil.Process], ended: threading.Event) -> None:
    me = psutil.Process()
    while not ended.wait(LOOK_EVERY_S):
        children = me.children(recursive=True)
        known.update({one.pid: one for one in children})
        tree.look(children)


def run_side(
    command: Sequence[str], *, cwd: Path, environment: Mapping[str, str] | None = None, timeout_s: float = 900.0
) -> dict:
    """Run a side to its end.

    Returns the JSON object of the last line it printed (empty if that is none), with seconds, cpu_s and peak_mib of its
    process tree, `started` (seconds since the epoch), torch_processes (of clients, see PART), and others_cores: how
    many cores the rest of the machine kept busy meanwhile.  Raises SideFailed.
    """
    own_orphans()
    tree, known, ended = Tree(), {}, threading.Event()
    busy, mine = _busy_s(), sum(psutil.Process().cpu_times()[:2])
    started, began = time.time(), time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command, cwd=cwd, env=dict(environment) if environment else None, stdin=subprocess.DEVNULL, stdout=out,
            stderr=err, text=True, start_new_session=True,
        )  # fmt: skip
        sampler = threading.Thread(target=_sample, args=(tree, known, ended), daemon=True)
        sampler.start()
        try:
            code = process.wait(timeout=timeout_s)
            seconds = time.perf_counter() - began
        except subprocess.TimeoutExpired:
            raise SideFailed(f"{command[0]} took more than {timeout_s:g} s") from None
        finally:
            ended.set()
            sampler.join()
            _end(process, list(known.values()))
        rest = _busy_s() - busy - tree.cpu_s - (sum(psutil.Process().cpu_times()[:2]) - mine)
        out.seek(0), err.seek(0)
        said, complaint = out.read(), err.read()
    if code != 0:
        raise SideFailed(f"exit code {code}: {' '.join((complaint or said).split())[-LONGEST_COMPLAINT:]}")
    measured = {
        "seconds": seconds, "cpu_s": tree.cpu_s, "peak_mib": tree.peak_mib, "started": started,
        "torch_processes": len(tree.clients_with_torch), "others_cores": max(0.0, rest / seconds),
        "torch_commands": sorted(tree.clients_with_torch.values()),
    }  # fmt: skip
    return measured | _last_object(said)


def _last_object(said: str) -> dict:
    lines = said.strip().splitlines()
    with contextlib.suppress(ValueError, IndexError):
        found = json.loads(lines[-1])
        if isinstance(found, dict):
            return found
    return {}
