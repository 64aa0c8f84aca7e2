"""Models and clients side by side: scores with their intervals, the transfer matrix, the clients of a federation.

And the studies on twins: the variants of an ablation side by side, and the trials of a search.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from common.metrics.figures import AUC, CLOSED, FOLDS, PAIRS, figures_of
from common.plots.style import (
    BLACK,
    BLUE,
    GREY,
    LOCAL,
    ORANGE,
    VERMILLION,
    LineStyle,
    client_styles,
    draw_cells,
    dress,
    method_styles,
    new_figure,
    say,
    shorten,
    write_cells,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Interval = tuple[float, float, float]

MOST_CLIENTS: Final = 30  # rows that can be read; of more the lowest and the highest are shown
_COLUMNS: Final = 3
_ROW_IN: Final = 0.27
_NAME: Final = 26  # characters of a model's or a client's name


def method_bars(scores: "Mapping[str, Mapping[str, Interval]]", metric_name: str) -> "Figure":
    """One dot and its interval for each model on each test set, with the figures written beside them.

    scores: model -> test set -> (value, low, high); low and high NaN where no interval is known.  Models keep the order
    given and their colours.  Dots, not bars, since the axis need not begin at 0.
    metric_name: of the axis, for example "ROC AUC".
    """
    test_sets = list(dict.fromkeys(name for tested in scores.values() for name in tested))
    num_rows = [sum(test_set in tested for tested in scores.values()) for test_set in test_sets]
    height = 1.1 + sum(0.75 + _ROW_IN * rows for rows in num_rows)
    known = any(math.isfinite(low) for tested in scores.values() for _, low, _ in tested.values())
    figure = new_figure(f"{metric_name} of the models" + (", with 95 % intervals" if known else ""), height)
    styles = method_styles(scores)
    panels = figure.subplots(
        max(1, len(test_sets)), 1, sharex=True, squeeze=False, height_ratios=[rows + 1 for rows in num_rows] or [1]
    )[:, 0]
    if not test_sets:
        panels[0].set_axis_off()
        say(panels[0], "no values were recorded")
    for axes, test_set in zip(panels, test_sets, strict=False):
        rows = {name: tested[test_set] for name, tested in scores.items() if test_set in tested}
        last = test_set == test_sets[-1]
        dress(axes, title=f"tested on {shorten(test_set, 60)}", x_label=metric_name if last else "", y_label="")
        _draw_dots(axes, rows, styles)
    return figure


def _draw_dots(axes: "Axes", rows: "Mapping[str, Interval]", styles: Mapping[str, LineStyle]) -> None:
    """A row for each name, from the top; figures in a column at the right, where no dot can be under them."""
    for place, (name, (value, low, high)) in enumerate(rows.items()):
        colour = styles[name].colour
        if math.isfinite(low) and math.isfinite(high):
            axes.plot([low, high], [place, place], color=colour, marker="|", markersize=8, linewidth=2.0)
            text = f"{value:.3f} [{low:.3f}, {high:.3f}]"
        else:
            text = f"{value:.3f}" if math.isfinite(value) else "none"
        if math.isfinite(value):
            axes.plot([value], [place], color=colour, marker=styles[name].marker, markersize=7, linestyle="")
        axes.text(1.01, place, text, transform=axes.get_yaxis_transform(), va="center", ha="left", fontsize=9)
    axes.set_yticks(range(len(rows)), [shorten(name, _NAME) for name in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.06)


def transfer_matrix(
    values: "NDArray[np.float64]", trained_at: Sequence[str], tested_at: Sequence[str], *, metric_name: str = "ROC AUC"
) -> "Figure":
    """How each model does at each holder's test set; a frame marks a holder's own model at home.

    values: [M, T] float, model by test set; NaN (not tested) is grey.
    Raises ValueError when the names do not fit the values.
    """
    import numpy as np

    if values.shape != (len(trained_at), len(tested_at)):
        raise ValueError(f"values {values.shape} must be [{len(trained_at)}, {len(tested_at)}]")
    finite = values[np.isfinite(values)]
    span = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    figure = new_figure(f"Trained at one place, tested at another: {metric_name}", 2.0 + 0.5 * len(trained_at))
    axes = figure.subplots()
    image = draw_cells(axes, values.astype(np.float64), span, aspect="auto")
    texts = [[f"{value:.3f}" if math.isfinite(value) else "-" for value in row] for row in values.tolist()]
    write_cells(axes, image, texts, 6.5 / max(1, len(tested_at)))
    long = max(map(len, tested_at), default=0) * len(tested_at) > 70
    names = [shorten(name, _NAME) for name in tested_at]
    axes.set_xticks(range(len(names)), names, rotation=30 if long else 0, ha="right" if long else "center")
    axes.set_yticks(range(len(trained_at)), [shorten(name, _NAME) for name in trained_at])
    axes.set_xlabel("tested at (framed: a holder's own model at home)")
    axes.set_ylabel("trained at, or how")
    for row, model in enumerate(trained_at):
        for column, place in enumerate(tested_at):
            if model.removeprefix(LOCAL) == place:
                _frame(axes, row, column)
    figure.colorbar(image, ax=axes, label=metric_name)
    return figure


def _frame(axes: "Axes", row: int, column: int) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((column - 0.47, row - 0.45), 0.94, 0.9, fill=False, edgecolor=BLACK, linewidth=1.8))


def client_comparison(
    scores: Mapping[str, Mapping[str, float]],
    *,
    title: str = "The model at each client",
    pooled: Mapping[str, float] | None = None,
) -> "Figure":
    """One panel for each figure, one row for each client; the dashed line is the figure over all clients.

    scores: client -> metric ("accuracy", "roc_auc", "eer", ..., also with "test_" before it) -> value; NaN or absent
    where there is none.  pooled: metric -> the value from the sums of all clients.
    Of more than 30 clients those with the lowest and the highest values of the first metric are shown.
    """
    metrics = list(dict.fromkeys(name for client in scores.values() for name in client))
    shown = _outermost(scores, metrics)
    rows = {name: style for name, style in client_styles(scores).items() if name in shown}
    num_columns = min(_COLUMNS, max(1, len(metrics)))
    num_rows = max(1, math.ceil(len(metrics) / num_columns))
    figure = new_figure(title, 0.9 + num_rows * (1.1 + _ROW_IN * max(1, len(rows))))
    if len(rows) < len(scores):
        half = len(rows) // 2
        by = _named(metrics[0]).replace("\n", ", ")
        figure.supxlabel(f"the {half} lowest and the {half} highest of {len(scores)} clients by {by}", fontsize=10)
    panels = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False).flatten()
    for number, axes in enumerate(panels):
        if number >= len(metrics):
            axes.set_axis_off()
            if not metrics:
                say(axes, "no values were recorded")
            continue
        metric = metrics[number]
        values = {name: (scores[name].get(metric, math.nan), math.nan, math.nan) for name in rows}
        dress(axes, title=_named(metric), x_label="", y_label="")
        if pooled is not None and math.isfinite(pooled.get(metric, math.nan)):
            axes.plot([pooled[metric]] * 2, [-0.6, len(rows) - 0.4], color=BLACK, linestyle="--", linewidth=1.2)
            axes.set_xlabel(f"dashed: all clients, {pooled[metric]:.3f}", fontsize=9)
        _draw_dots(axes, values, rows)
    return figure


def _named(metric: str) -> str:
    name = metric.removeprefix("test_")
    return next(
        (row.title for row in figures_of(CLOSED, PAIRS, FOLDS) if row.title and name == row.name),
        metric,
    )


def _outermost(scores: Mapping[str, Mapping[str, float]], metrics: Sequence[str]) -> set[str]:
    if len(scores) <= MOST_CLIENTS:
        return set(scores)
    known = [name for name in scores if math.isfinite(scores[name].get(metrics[0], math.nan))]
    order = sorted(known, key=lambda name: scores[name][metrics[0]])
    half = MOST_CLIENTS // 2
    return {*order[:half], *order[-half:]}


_PAIR_KINDS: Final[Mapping[str, str]] = {
    "all": "all pairs",
    "twins": "twins only",
    "strangers": "strangers only",
}
_STATES: Final[Mapping[str, Mapping[str, Any]]] = {
    "complete": {"marker": "o", "color": BLUE},
    "pruned": {"marker": "v", "color": GREY},
    "failed": {"marker": "x", "color": VERMILLION},
}
_VARIANT_NAME: Final = 26
_FEWEST_FAMILIES: Final = 10
_MOST_TICKS: Final = 6  # of a setting that had few values, each at its own
_VARIANT_IN: Final = 0.34


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
    first = shorten(str(rows[0]["variant"]), _VARIANT_NAME)
    figure = new_figure(f"Ablation of {over}: people never seen in training", 1.0 + 3 * (0.8 + _VARIANT_IN * len(rows)))
    about = f"ROC AUC with 95 % intervals over {num_families} families; at the right the paired gap to {first}"
    figure.supxlabel(about, fontsize=10)
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(rect=(0, 0, 0.98, 1))  # type: ignore[call-arg]
    panels = figure.subplots(len(_PAIR_KINDS), 1, squeeze=False)[:, 0]
    styles = method_styles([str(row["variant"]) for row in rows])
    for axes, (kind, title) in zip(panels, _PAIR_KINDS.items(), strict=True):
        dress(axes, title=title, x_label="", y_label="")
        for place, row in enumerate(rows):
            style = styles[str(row["variant"])]
            value, low, high = (row[f"{kind}_{AUC}{part}"] for part in ("", "_low", "_high"))
            axes.plot([low, high], [place, place], color=style.colour, marker="|", markersize=8, linewidth=2.0)
            axes.plot([value], [place], color=style.colour, marker=style.marker, markersize=7, linestyle="")
            _write(axes, place, f"{value:.3f} [{low:.3f}, {high:.3f}]", at=1.01)
            is_clear = num_families >= _FEWEST_FAMILIES and _leaves_zero_out(row, kind)
            _write(axes, place, _gap_text(row, kind), at=1.235, weight="bold" if is_clear else "normal")
        axes.set_yticks(range(len(rows)), [shorten(str(row["variant"]), _VARIANT_NAME) for row in rows])
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
