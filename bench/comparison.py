"""A comparison: sides that take turns, what is claimed of them, and the arithmetic from single values to a table."""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.watch import SideFailed

# What one run of a side gives: numbers by name; a list of them where one run gives several, such as rounds.
Figures = dict[str, Any]


class NotInstalled(Exception):
    """A side's program is not on this machine."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One line of the table: a figure of our side, the peer's, and what was to be reached."""

    what: str
    ours: str  # the side
    figure: str
    peer: str = ""  # the side; none: the figure stands alone
    peer_figure: str = ""  # where it has another name there
    unit: str = "s"
    goal: float | None = None
    of: str = "ratio"  # what the goal is set for: the ratio ours / peer, or our value
    at_least: bool = False

    def goal_text(self) -> str:
        """Such as `<= 0.6 x`."""
        if self.goal is None:
            return ""
        unit = "x" if self.of == "ratio" else self.unit
        return f"{'>=' if self.at_least else '<='} {self.goal:g} {unit}".rstrip()


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a side runs, and how much is asked of it."""

    scratch: Path
    quick: bool


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Sides by name, in the order in which they take turns."""

    name: str
    what: str
    sides: Mapping[str, Callable[[Place], Figures]]
    claims: Sequence[Claim]
    repeats: int = 2
    quick_repeats: int = 1
    prepare: Callable[[Place], str] | None = None  # once before the first turn; returns a note
    in_all: bool = True  # whether it is run when no name is given


@dataclass(kw_only=True)
class Result:
    """Every value of one comparison."""

    what: str
    runs: dict[str, list[Figures]]
    claims: list[dict]
    absent: dict[str, str] = field(default_factory=dict)  # side -> why it has no values
    note: str = ""

    def to_json(self) -> dict:
        return dataclasses.asdict(self)


def turns(sides: Iterable[str], repeats: int) -> list[str]:
    """A B A B ...: each repeat has one turn of each side."""
    return [side for _ in range(repeats) for side in sides]


def measure(comparison: Comparison, place: Place, say: Callable[[str], None]) -> Result:
    """Run all turns.  A side that fails or is not installed gets no further turn and is named in `absent`."""
    note = comparison.prepare(place) if comparison.prepare else ""
    runs: dict[str, list[Figures]] = {side: [] for side in comparison.sides}
    absent: dict[str, str] = {}
    for side in turns(comparison.sides, comparison.quick_repeats if place.quick else comparison.repeats):
        if side in absent:
            continue
        say(f"{comparison.name}: {side} ...")
        try:
            runs[side].append(comparison.sides[side](place))
        except NotInstalled as reason:
            absent[side] = f"not installed ({reason})"
        except SideFailed as failure:
            absent[side] = f"failed: {failure}"
        if side in absent:
            say(f"{comparison.name}: {side}: {absent[side]}")
        else:
            say(f"{comparison.name}: {side}: {runs[side][-1]}")
    claims = [dataclasses.asdict(claim) for claim in comparison.claims]
    return Result(what=comparison.what, runs=runs, claims=claims, absent=absent, note=note)


def values(runs: Sequence[Mapping[str, Any]], figure: str) -> list[float]:
    """All values of a figure over the runs of a side; lists are joined, runs without it skipped."""
    found: list[float] = []
    for run in runs:
        value = run.get(figure, [])
        found.extend(value if isinstance(value, list) else [value])
    return found


def median(runs: Sequence[Mapping[str, Any]], figure: str) -> float | None:
    """The median of all values of a figure, or None where there are none."""
    found = values(runs, figure)
    return statistics.median(found) if found else None


@dataclass(frozen=True, kw_only=True)
class Line:
    """A claim with its medians."""

    claim: Claim
    ours: float | None
    peer: float | None
    ratio: float | None
    costs: tuple[float | None, ...]  # CPU-seconds of our side and the peer's, then peak MiB of both

    @property
    def reached(self) -> bool | None:
        """Whether the goal is; None without a goal or a value."""
        value = self.ratio if self.claim.of == "ratio" else self.ours
        if self.claim.goal is None or value is None:
            return None
        return value >= self.claim.goal if self.claim.at_least else value <= self.claim.goal


def line(claim: Claim, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Line:
    """The medians of a claim and their ratio, ours / peer."""
    our_runs, peer_runs = runs.get(claim.ours, []), runs.get(claim.peer, [])
    ours, peer = median(our_runs, claim.figure), median(peer_runs, claim.peer_figure or claim.figure)
    costs = tuple(median(of, figure) for figure in ("cpu_s", "peak_mib") for of in (our_runs, peer_runs))
    ratio = ours / peer if ours is not None and peer else None
    return Line(claim=claim, ours=ours, peer=peer, ratio=ratio, costs=costs)


def lines(result: Mapping[str, Any]) -> list[Line]:
    """All lines of one comparison, from its JSON."""
    return [line(Claim(**claim), result["runs"]) for claim in result["claims"]]


def shown(value: float | None) -> str:
    """Three significant digits, or a dash."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The Markdown table of all comparisons."""
    head = ("what", "ours", "peer", "ratio", "goal", "", "CPU-s ours / peer", "peak MiB ours / peer")
    rows = [head, tuple("---" if cell in ("what", "goal", "") else "---:" for cell in head)]
    for name, result in results.items():
        for one in lines(result):
            claim = one.claim
            peer = shown(one.peer) if one.peer is not None else result["absent"].get(claim.peer, "-").split(":")[0]
            verdict = {True: "reached", False: "missed", None: ""}[one.reached]
            cpu, memory = (f"{shown(a)} / {shown(b)}" for a, b in (one.costs[:2], one.costs[2:]))
            ours = f"{shown(one.ours)} {claim.unit}".rstrip() if one.ours is not None else "-"
            against = f" against {claim.peer}" if claim.peer else ""
            peer = f"{peer} {claim.unit}".rstrip() if one.peer is not None else peer
            what = f"{name}: {claim.what}{against}"
            rows.append((what, ours, peer, shown(one.ratio), claim.goal_text(), verdict, cpu, memory))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
