"""Errors by group as a person reads them: lines for a terminal, and a table for a model's card."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from common.metrics.groups import ByGroup, worst_to_best
from common.system.console import table

RATES: Final = ("fmr", "fnmr")
GROUPS_FILE: Final = "groups.json"


def group_lines(found: Sequence[ByGroup], least_people: int) -> list[str]:
    """What is shown on the terminal, model by model."""
    lines = []
    for one in found:
        if one.threshold is None:
            lines += ["", f"{one.model} by group: too few validation pairs for a threshold"]
            continue
        at = f"cosine {one.threshold.threshold:.4f}, FAR {one.threshold.far:g} on validation people"
        lines += ["", f"{one.model} by group, at its threshold ({at}), with 95 % intervals:"]
        rows = [("group", "people", "FMR", "FNMR"), *_rows(one)]
        lines += table(rows).split("\n") if one.errors else ["no group has people enough"]
        lines += _rest(one, least_people)
    return lines


def group_section(one: ByGroup, least_people: int) -> str:
    """The same of one model, for its card: Markdown."""
    if one.threshold is None:
        return "Too few validation pairs for a threshold."
    rows = [("group", "people", "FMR", "FNMR"), ("---",) * 4, *_rows(one)]
    shown = [f"| {' | '.join(row)} |" for row in rows] if one.errors else ["No group has people enough."]
    at = f"At cosine {one.threshold.threshold:.4f} (FAR {one.threshold.far:g} on validation people), 95 % intervals."
    return "\n".join([at, "", *shown, "", *_rest(one, least_people)]).rstrip()


def group_content(found: Sequence[ByGroup], least_people: int) -> dict[str, Any]:
    """The same for groups.json; a ratio to none is null."""
    models = [{**asdict(one), "worst_to_best": {rate: _finite(_ratio(one, rate)) for rate in RATES}} for one in found]
    return {"least_people": least_people, "models": models}


def group_metrics(one: ByGroup) -> dict[str, float]:
    """The rates of each group, and the ratios, by what they are called in a record."""
    found = {f"groups/{row.group}/{rate}": float(getattr(row, rate)) for row in one.errors for rate in RATES}
    ratios = {f"groups/{rate}_worst_to_best": _ratio(one, rate) for rate in RATES}
    return found | {name: ratio for name, ratio in ratios.items() if math.isfinite(ratio)}


def _rows(one: ByGroup) -> list[tuple[str, str, str, str]]:
    return [
        (
            row.group,
            f"{row.num_people:,}",
            _rate(row.fmr, row.fmr_low, row.fmr_high),
            _rate(row.fnmr, row.fnmr_low, row.fnmr_high),
        )
        for row in one.errors
    ]


def _rest(one: ByGroup, least_people: int) -> list[str]:
    lines = []
    if len(one.errors) > 1:
        lines.append(f"worst to best: FMR {_ratio_words(one, 'fmr')}, FNMR {_ratio_words(one, 'fnmr')}")
    return lines + ([f"left out, fewer than {least_people} people: {_counts(one.too_small)}"] if one.too_small else [])


def _counts(people: Mapping[str, int]) -> str:
    return ", ".join(f"{group} {number}" for group, number in people.items())


def _rate(rate: float, low: float, high: float) -> str:
    return f"{rate:.4f} ({low:.4f} to {high:.4f})"


def _ratio(one: ByGroup, rate: str) -> float:
    return worst_to_best([getattr(row, rate) for row in one.errors])


def _ratio_words(one: ByGroup, rate: str) -> str:
    ratio = _ratio(one, rate)
    return "not finite (the best has none)" if math.isinf(ratio) else f"{ratio:.1f}"


def _finite(ratio: float) -> float | None:
    return ratio if math.isfinite(ratio) else None
