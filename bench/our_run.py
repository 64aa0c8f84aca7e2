"""The figures of one of our own runs, from its record (`spool.jsonl`): when rounds ended, and where their time went."""

import json
import statistics
from collections import defaultdict
from pathlib import Path

from common.metrics.names import BYTES_DOWN, BYTES_UP, ROUND_SECONDS, seconds_of

# Of a client's round what is no overhead: training and scoring, by the client's own clock.
WORK = (seconds_of("train"), seconds_of("evaluate"))
FIRST_STEADY = 2


def newest_run(folder: Path) -> Path:
    """The newest run below `folder`/runs."""
    return max(path for path in (folder / "runs").iterdir() if path.name != "clients")


def _metrics(run: Path) -> tuple[dict[tuple[str, str, int], float], dict[int, float]]:
    """(client or "", metric, round) -> value, and round -> when its end was told, in seconds since the epoch.

    That is when the next round's messages are on their way, so it is no clock for the rounds themselves.
    """
    found, ends = {}, {}
    for text in (run / "spool.jsonl").read_bytes().splitlines():
        entry = json.loads(text)
        if "key" in entry:
            found[entry["run"], entry["key"], entry["step"]] = entry["value"]
        if entry.get("key") == ROUND_SECONDS:
            ends[entry["step"]] = entry["time_ms"] / 1000
    return found, ends


def figures(run: Path) -> dict:
    """round_seconds (a list, of steady rounds), round_1_ended, overhead_seconds, bytes, and each phase's median.

    Rounds follow on each other by the server's clock; `from_told_seconds`, the mean by when their ends were told, is a
    check of it from outside.
    """
    found, ends = _metrics(run)
    steady = [step for step in sorted(ends) if step >= FIRST_STEADY]
    phases: dict[str, list[float]] = defaultdict(list)
    working: dict[int, float] = defaultdict(float)
    clients = {client for client, _, _ in found if client}
    for step in steady:
        for client in clients:
            spent = sum(found[client, part, step] for part in WORK)
            working[step] = max(working[step], spent)  # of the slowest client: the others wait for it
    for (client, metric, step), value in found.items():
        if step in steady and metric.endswith("_seconds"):
            phases[f"{'client' if client else 'server'} {metric.removeprefix('time/')}"].append(value)
    rounds = {step: found["", ROUND_SECONDS, step] for step in steady}
    return {
        "round_seconds": list(rounds.values()),
        "overhead_seconds": [rounds[step] - working[step] for step in steady],
        "work_seconds": [working[step] for step in steady],
        "from_told_seconds": (ends[steady[-1]] - ends[1]) / len(steady) if steady else None,
        "round_1_ended": ends[1],
        "bytes_per_round": [found["", BYTES_DOWN, step] + found["", BYTES_UP, step] for step in steady],
        "phases": {name: statistics.median(values) for name, values in sorted(phases.items())},
    }
