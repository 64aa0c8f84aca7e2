"""Figures of studies on twins: the variants of an ablation side by side, and the trials of a search."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from common.plots.style import BLUE, GREY, ORANGE, VERMILLION, dress, method_styles, new_figure, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KINDS: Final[Mapping[str, str]] = {
    "all": "all pairs",
    "twins": "twins only",
    "strangers": "strangers only",
}
_STATES: Final[Mapping[str, Mapping[str, Any]]] = {
    "complete": {"marker": "o", "color": BLUE},
    "pruned": {"marker": "v", "color": GREY},
    "failed": {"marker": "x", "color": VERMILLION},
}
_NAME: Final = 26
_FEWEST_FAMILIES: Final = 10
_MOST_TICKS: Final = 6  # of a setting that had few values, each at its own
_ROW_IN: Final = 0.34


class TrialPoint(NamedTuple):
    """One trial of a search."""

    number: int
    state: str  # complete, pruned, failed
    value: float  # NaN where there is none; of a pruned trial that of its last epoch
    params: Mapping[str, float | str | bool]


def ablation_dots(rows: Sequence[Mapping[str, Any]], over: str, *, num_families: int) -> "Figure":
    """AUC of each variant on all pairs, twins only and strangers only, with 95 % intervals over families.

    rows: "variant", and for each kind KIND_roc_auc, KIND_roc_auc_low, KIND_roc_auc_high in [0, 1]; all but the first
    also KIND_gap, KIND_gap_low, KIND_gap_high: how much higher than the first one's, paired.
    num_families: in the test.  From 10 on a gap whose interval leaves zero out is set in bold: with fewer, draws of
    families are too much alike to tell.  Dots, not bars, since the axes need not begin at 0.
    """
    first = shorten(str(rows[0]["variant"]), _NAME)
    figure = new_figure(f"Ablation of {over}: people never seen in training", 1.0 + 3 * (0.8 + _ROW_IN * len(rows)))
    about = f"ROC AUC with 95 % intervals over {num_families} families; at the right the paired gap to {first}"
    figure.supxlabel(about, fontsize=10)
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(rect=(0, 0, 0.98, 1))  # type: ignore[call-arg]
    panels = figure.subplots(len(_KINDS), 1, squeeze=False)[:, 0]
    styles = method_styles([str(row["variant"]) for row in rows])
    for axes, (kind, title) in zip(panels, _KINDS.items(), strict=True):
        dress(axes, title=title, x_label="", y_label="")
        for place, row in enumerate(rows):
            style = styles[str(row["variant"])]
            value, low, high = (row[f"{kind}_roc_auc{part}"] for part in ("", "_low", "_high"))
            axes.plot([low, high], [place, place], color=style.colour, marker="|", markersize=8, linewidth=2.0)
            axes.plot([value], [place], color=style.colour, marker=style.marker, markersize=7, linestyle="")
            _write(axes, place, f"{value:.3f} [{low:.3f}, {high:.3f}]", at=1.01)
            is_clear = num_families >= _FEWEST_FAMILIES and _leaves_zero_out(row, kind)
            _write(axes, place, _gap_text(row, kind), at=1.235, weight="bold" if is_clear else "normal")
        axes.set_yticks(range(len(rows)), [shorten(str(row["variant"]), _NAME) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.margins(x=0.06)
    return figure


def _gap_text(row: Mapping[str, Any], kind: str) -> str:
    if f"{kind}_gap" not in row:
        return ""
    gap, low, high = (row[f"{kind}_gap{part}"] for part in ("", "_low", "_high"))
    return f"{gap:+.3f} [{low:+.3f}, {high:+.3f}]"


def _leaves_zero_out(row: Mapping[str, Any], kind: str) -> bool:
    """Whether the gap's interval does."""
    return bool(row.get(f"{kind}_gap_low", 0.0) > 0 or row.get(f"{kind}_gap_high", 0.0) < 0)


def _write(axes: "Axes", place: int, text: str, *, at: float, weight: str = "normal") -> None:
    """A text beside a row, right of the axes, where no dot can be under it."""
    axes.text(
        at, place, text, transform=axes.get_yaxis_transform(), va="center", ha="left", fontsize=8.5, fontweight=weight
    )


def search_trials(
    trials: Sequence[TrialPoint], *, metric: str, best_is: str, logarithmic: Sequence[str] = ()
) -> "Figure":
    """The value of each trial with the best so far, and the value against each setting that was searched over.

    metric: its name.  best_is: "highest" or "lowest".  logarithmic: the settings with a logarithmic axis.
    Pruned trials stand with their last epoch's value, failed ones as crosses at the lower edge of the first panel.
    One trial at least is complete.
    """
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    num_rows = 1 + math.ceil(len(names) / 2)
    figure = new_figure(f"Search by {metric}: {best_is} is best", 0.6 + 2.9 * num_rows)
    grid = figure.add_gridspec(num_rows, 2)
    top = figure.add_subplot(grid[0, :])
    dress(top, title="trials in their order", x_label="trial", y_label=metric)
    _draw_trials(top, trials, best_is)
    for number, name in enumerate(names):
        is_last_alone = number == len(names) - 1 and number % 2 == 0
        place = grid[1 + number // 2, :] if is_last_alone else grid[1 + number // 2, number % 2]
        axes = figure.add_subplot(place)
        dress(axes, title="", x_label=shorten(name, 40), y_label=metric)
        _draw_setting(axes, trials, name, scale="log" if name in logarithmic else "linear")
    return figure


def _draw_trials(axes: "Axes", trials: Sequence[TrialPoint], best_is: str) -> None:
    for state, look in _STATES.items():
        shown = [trial for trial in trials if trial.state == state]
        if state == "failed" and shown:
            axes.plot(
                [trial.number for trial in shown], [0.03] * len(shown), transform=axes.get_xaxis_transform(),
                label="failed", linestyle="", **look,
            )  # fmt: skip
        elif shown:
            axes.plot([t.number for t in shown], [t.value for t in shown], label=state, linestyle="", **look)
    complete = [trial for trial in trials if trial.state == "complete"]
    choose = max if best_is == "highest" else min
    best = [choose(trial.value for trial in complete[: place + 1]) for place in range(len(complete))]
    end = max(trial.number for trial in trials)
    axes.step(
        [*(trial.number for trial in complete), end], [*best, best[-1]], where="post", color=ORANGE, linewidth=1.6,
        label="best so far", zorder=1,
    )  # fmt: skip
    axes.set_xlim(-0.5, end + 0.5)
    axes.set_xticks(range(0, end + 1, 1 + end // 20))
    axes.legend(loc="best", fontsize=9, framealpha=0.9)


def _draw_setting(axes: "Axes", trials: Sequence[TrialPoint], name: str, *, scale: str) -> None:
    """The value against one setting; texts and switches stand side by side in the order of their names."""
    with_value = [t for t in trials if name in t.params and math.isfinite(t.value)]
    seen = {trial.params[name] for trial in trials if name in trial.params}
    words = sorted(str(value) for value in seen) if any(isinstance(value, str | bool) for value in seen) else []
    for state, look in _STATES.items():
        shown = [trial for trial in with_value if trial.state == state]
        at = [words.index(str(t.params[name])) if words else float(t.params[name]) for t in shown]
        if shown:
            axes.plot(at, [trial.value for trial in shown], linestyle="", **look)
    if words:
        axes.set_xticks(range(len(words)), [shorten(word, 16) for word in words])
        axes.set_xlim(-0.5, len(words) - 0.5)
    elif scale == "log":
        axes.set_xscale("log")
    elif len(seen) <= _MOST_TICKS:
        axes.set_xticks(sorted(float(value) for value in seen), [f"{value:.3g}" for value in sorted(map(float, seen))])
