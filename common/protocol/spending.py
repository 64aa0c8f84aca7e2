"""The file that says what noisy releases have cost: a chained line for each, on the disk before the release leaves.

Sums are of mu^2 (`common/privacy/accounting.py`).  A site has one for each data set, a server with the noise of sites
one for each run.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from common.protocol.ledger import PREVIOUS, link_of
from common.system.files import Line, append_after, read_lines

COST, SPENT = "squared_mu", "spent"  # of a line: what it cost, and the sum so far
RUN_FILE: Final = "privacy.jsonl"  # of a run, in its folder


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What is gone, in mu^2."""

    in_all: float = 0.0
    in_run: float = 0.0


def spent_in(path: Path, run_id: str = "") -> Spent:
    """What the file says is spent, in all and of a run.

    A line that was cut as it was written stands for a release that never left.  One that is damaged otherwise counts as
    the dearest that can be read: each line carries the sum so far, so what stood before a good line is known.
    """
    in_all, in_run, dearest = 0.0, 0.0, 0.0
    for line in _lines(path):
        cost = _number((line.record or {}).get(COST))
        if line.record is None or cost == 0.0:
            in_all += dearest if line.is_whole else 0.0
            continue
        dearest = max(dearest, cost)
        in_all = max(in_all + cost, _number(line.record.get(SPENT)))
        if line.record.get("run") == run_id:
            in_run += cost
    return Spent(in_all=in_all, in_run=in_run)


def releases_in(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that can be read, in order."""
    for line in _lines(path):
        if line.record is not None and _number(line.record.get(COST)) > 0.0:
            yield line.record


def _lines(path: Path) -> Iterator[Line]:
    if path.is_file():
        yield from (line for line in read_lines(path) if line.text)


def _number(value: object) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return max(0.0, float(value)) if is_number else 0.0  # type: ignore[arg-type]


def write_spend(
    path: Path, run_id: str, cost: float, words: Mapping[str, Any], allow: Callable[[Spent], None] = lambda _: None
) -> None:
    """Write down a release, and return once that survives a power cut; nobody else writes meanwhile.

    cost: in mu^2, > 0.  words: what else the line says.  allow: is told what was spent before, and may raise; then
    nothing is written.  Raises OSError where it cannot be.
    """

    def line(before: bytes) -> dict[str, Any]:
        spent = spent_in(path, run_id)
        allow(spent)
        time = datetime.now(UTC).isoformat(timespec="seconds")
        sums = {COST: cost, SPENT: spent.in_all + cost, PREVIOUS: link_of(before)}
        return {"time": time, "run": run_id, **words, **sums}

    append_after(path, line, synced=True)
