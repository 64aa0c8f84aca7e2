"""Models and clients side by side: scores with their intervals, the transfer matrix, the clients of a federation.

And the studies on twins: the variants of an ablation side by side, and the trials of a search.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from common.metrics.figures import AUC, row_of, title_of
from common.plots.style import (
    BLACK,
    BLUE,
    GREY,
    LOCAL,
    ORANGE,
    SKY,
    VERMILLION,
    LineStyle,
    client_styles,
    draw_cells,
    dress,
    method_styles,
    new_figure,
    say,
    shorten,
    span_x_axis,
    widened,
    write_cells,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Interval = tuple[float, float, float]

MOST_CLIENTS: Final = 10  # with a row in each panel; of more so many of the lowest and of the highest in one
_COLUMNS: Final = 2
_SMALL_COLUMNS: Final = 3
_FEW_TICKS: Final = 6
_NOTHING: Final = (math.nan, math.nan, math.nan)
_ROW_IN: Final = 0.27
_NAME: Final = 26  # characters of a model's or a client's name


def method_bars(
    scores: "Mapping[str, Mapping[str, Interval]]", metric_name: str, *, span: tuple[float, float] = (0.0, 1.0)
) -> "Figure":
    """One dot and its interval for each model on each test set, with the figures written beside them.

    scores: model -> test set -> (value, low, high); low and high NaN where no interval is known.  Models keep the order
    given and their colours.  Dots, not bars, since the axis need not begin at 0.
    metric_name: of the axis, for example "ROC AUC".  span: of the axis, as the figure's row has it; wider where a value
    or an interval lies outside.
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
    span_x_axis(panels[0], span, [number for own in scores.values() for ends in own.values() for number in ends])
    return figure


def _draw_dots(axes: "Axes", rows: "Mapping[str, Interval]", styles: Mapping[str, LineStyle]) -> None:
    """A row for each name, from the top; figures in a column at the right, where no dot can be under them."""
    for place, (name, (value, low, high)) in enumerate(rows.items()):
        colour = styles[name].colour
        if math.isfinite(low) and math.isfinite(high):
            axes.plot([low, high], [place, place], color=colour, marker="|", markersize=8, linewidth=2.0)
        if math.isfinite(value):
            axes.plot([value], [place], color=colour, marker=styles[name].marker, markersize=7, linestyle="")
        text = _with_interval(value, low, high)
        axes.text(1.01, place, text, transform=axes.get_yaxis_transform(), va="center", ha="left", fontsize=9)
    axes.set_yticks(range(len(rows)), [shorten(name, _NAME) for name in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)


def transfer_matrix(
    values: "NDArray[np.float64]",
    trained_at: Sequence[str],
    tested_at: Sequence[str],
    *,
    metric_name: str = "ROC AUC",
    span: tuple[float, float] = (0.5, 1.0),
) -> "Figure":
    """How each model does at each holder's test set; a frame marks a holder's own model at home.

    values: [M, T] float, model by test set; NaN (not tested) is grey.  span: of the colours, as the figure's row has
    it, so that a small difference looks small; wider where a value lies outside.
    Raises ValueError when the names do not fit the values.
    """
    if values.shape != (len(trained_at), len(tested_at)):
        raise ValueError(f"values {values.shape} must be [{len(trained_at)}, {len(tested_at)}]")
    span = widened(span, values.ravel().tolist())
    figure = new_figure(f"Trained at one place, tested at another: {metric_name}", 2.0 + 0.5 * len(trained_at))
    axes = figure.subplots()
    image = draw_cells(axes, values, span, aspect="auto")
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
    scores: "Mapping[str, Mapping[str, Interval]]",
    *,
    title: str = "The model at each client",
    pooled: "Mapping[str, Interval] | None" = None,
    about: str = "",
) -> "Figure":
    """One panel for each figure that models are compared by, each on its own whole span, with intervals.

    scores: client -> metric ("accuracy", "roc_auc", "eer", ..., also with "test_" before it) -> (value, low, high);
    NaN or absent where there is none.  pooled: metric -> that of all clients' sums.  about: how intervals were made.
    Up to 10 clients have a row in each panel.  Of more, the 10 lowest and the 10 highest have a row in one panel, that
    of the AUC; the others show all clients, sorted by value, so that the picture stays as high for 1,000.
    """
    metrics = [name for name in dict.fromkeys(m for own in scores.values() for m in own) if row_of(name).is_compared]
    if not metrics:
        figure = new_figure(title, 3.0)
        axes = figure.subplots()
        axes.set_axis_off()
        say(axes, "no values were recorded")
        return figure
    styles, pooled = client_styles(scores), pooled or {}
    if len(scores) <= MOST_CLIENTS:
        num_rows = math.ceil(len(metrics) / _COLUMNS)
        figure = new_figure(title, 0.9 + num_rows * (1.15 + _ROW_IN * len(styles)))
        panels = figure.subplots(num_rows, _COLUMNS, sharey=True, squeeze=False).flatten()
        for axes, metric in zip(panels, metrics, strict=False):
            _draw_clients(axes, metric, {name: scores[name].get(metric, _NOTHING) for name in styles}, styles, pooled)
        for axes in panels[len(metrics) :]:
            axes.set_axis_off()
        figure.supxlabel(about, fontsize=10)
        return figure
    return _many_clients(scores, metrics, pooled, title=title, about=about)


def _many_clients(
    scores: "Mapping[str, Mapping[str, Interval]]",
    metrics: Sequence[str],
    pooled: "Mapping[str, Interval]",
    *,
    title: str,
    about: str,
) -> "Figure":
    first = next((name for name in metrics if row_of(name).name == AUC), metrics[0])
    others = [name for name in metrics if name != first]
    values = {metric: {name: own.get(metric, _NOTHING) for name, own in scores.items()} for metric in metrics}
    known = [name for name in client_styles(scores) if math.isfinite(values[first][name][0])]
    order = sorted(known, key=lambda name: values[first][name][0])
    shown = order if len(order) <= 2 * MOST_CLIENTS else [*order[:MOST_CLIENTS], *order[-MOST_CLIENTS:]]
    num_rows = math.ceil(len(others) / _SMALL_COLUMNS)
    top_in, small_in = 1.2 + _ROW_IN * max(1, len(shown)), 2.45
    figure = new_figure(title, 0.9 + top_in + small_in * num_rows)
    grid = figure.add_gridspec(1 + num_rows, _SMALL_COLUMNS, height_ratios=[top_in, *[small_in] * num_rows])
    top = figure.add_subplot(grid[0, :])
    _draw_clients(top, first, {name: values[first][name] for name in shown}, client_styles(shown), pooled)
    label = title_of(first).replace("\n", ", ")
    if len(shown) < len(order):
        label += f": the {MOST_CLIENTS} lowest and the {MOST_CLIENTS} highest of {len(order):,} clients"
    top.set_title(label, fontsize=11)
    for number, metric in enumerate(others):
        axes = figure.add_subplot(grid[1 + number // _SMALL_COLUMNS, number % _SMALL_COLUMNS])
        _draw_spread(axes, metric, list(values[metric].values()), pooled)
    figure.supxlabel(about, fontsize=10)
    return figure


def _draw_clients(
    axes: "Axes",
    metric: str,
    values: "Mapping[str, Interval]",
    styles: Mapping[str, LineStyle],
    pooled: "Mapping[str, Interval]",
) -> None:
    """A row for each client, from the top, on the figure's whole span."""
    dress(axes, title=title_of(metric), x_label="", y_label="")
    _draw_pooled(axes, metric, pooled)
    _draw_dots(axes, values, {name: styles[name] for name in values})
    _span(axes, metric, [*values.values(), pooled.get(metric, _NOTHING)])


def _draw_spread(axes: "Axes", metric: str, values: "Sequence[Interval]", pooled: "Mapping[str, Interval]") -> None:
    """All clients as dots, sorted by value, without names."""
    import numpy as np

    known = sorted((value for value in values if math.isfinite(value[0])), key=lambda value: value[0])
    dress(axes, title=title_of(metric), x_label="", y_label="clients")
    _draw_pooled(axes, metric, pooled, has_value=False)
    for place, (_, low, high) in enumerate(known):
        if math.isfinite(low):
            axes.plot([low, high], [place, place], color=SKY, linewidth=max(0.3, min(2.0, 60.0 / len(known))))
    of_all = [value for value, _, _ in known]
    axes.plot(of_all, range(len(known)), color=BLUE, marker=".", markersize=4, linestyle="")
    if known:
        low, middle, high = np.quantile(of_all, (0.1, 0.5, 0.9))
        axes.set_xlabel(f"median {middle:.2f}\n80 % in {low:.2f} to {high:.2f}", fontsize=9)
    axes.set_ylim(-1.0, max(1.0, float(len(known))))
    axes.set_yticks([0, len(known)], ["0", f"{len(known):,}"])
    _span(axes, metric, [*known, pooled.get(metric, _NOTHING)], num_ticks=_FEW_TICKS - 1)


def _draw_pooled(axes: "Axes", metric: str, pooled: "Mapping[str, Interval]", *, has_value: bool = True) -> None:
    """All clients' figure as a dashed line, its interval as a band."""
    value, low, high = pooled.get(metric, _NOTHING)
    if not math.isfinite(value):
        return
    if math.isfinite(low):
        axes.axvspan(low, high, color=BLACK, alpha=0.07, linewidth=0)
    axes.axvline(value, color=BLACK, linestyle="--", linewidth=1.2)
    if has_value:
        axes.set_xlabel(f"dashed: all clients, {_with_interval(value, low, high)}", fontsize=9)


def _span(axes: "Axes", metric: str, values: "Sequence[Interval]", *, num_ticks: int = _FEW_TICKS) -> None:
    row = row_of(metric)
    span_x_axis(axes, row.span, [number for value in values for number in value], num_ticks=num_ticks)
    if row.guessing is not None:
        axes.axvline(row.guessing, color=GREY, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1)


def _with_interval(value: float, low: float, high: float) -> str:
    if not math.isfinite(value):
        return "none"
    return f"{value:.3f} [{low:.3f}, {high:.3f}]" if math.isfinite(low) and math.isfinite(high) else f"{value:.3f}"


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
_SETTINGS: Final[Mapping[str, str]] = {"lr": "learning rate"}  # whose name is not its words
_VARIANT_NAME: Final = 26
_DECADES: Final = 2.0  # of a logarithmic axis that is long enough for ticks at powers of ten
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
    families are too much alike to tell.  Dots, not bars, since the axes need not begin at 0: all three have one span,
    from guessing to perfect, wider where an interval lies outside.
    """
    ends = [float(row[f"{kind}_{AUC}{part}"]) for row in rows for kind in _PAIR_KINDS for part in ("_low", "_high")]
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
        span_x_axis(axes, row_of(AUC).span, ends)
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

    metric: the figure's name on validation, such as val_roc_auc.  best_is: "highest" or "lowest".  logarithmic: the
    settings with a logarithmic axis.  All panels have the figure's own span, wider where a value lies outside.
    Pruned trials stand with their last epoch's value, failed ones as crosses at the lower edge of the first panel.
    One trial at least is complete.
    """
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    num_rows = 1 + math.ceil(len(names) / 2)
    what, people = row_of(metric).label, title_of(metric).partition("\n")[2]
    figure = new_figure(f"Search by validation's {what}, {people}: {best_is} is best", 0.6 + 2.9 * num_rows)
    span = widened(row_of(metric).span, [trial.value for trial in trials])
    room = 0.03 * (span[1] - span[0])
    grid = figure.add_gridspec(num_rows, 2)
    top = figure.add_subplot(grid[0, :])
    dress(top, title="trials in their order", x_label="trial", y_label=what)
    _draw_trials(top, trials, best_is)
    top.set_ylim(span[0] - room, span[1] + room)
    for number, name in enumerate(names):
        is_last_alone = number == len(names) - 1 and number % 2 == 0
        place = grid[1 + number // 2, :] if is_last_alone else grid[1 + number // 2, number % 2]
        axes = figure.add_subplot(place)
        dress(axes, title="", x_label=_said(name, is_log=name in logarithmic), y_label=what)
        _draw_setting(axes, trials, name, scale="log" if name in logarithmic else "linear")
        axes.set_ylim(span[0] - room, span[1] + room)
    return figure


def _said(setting: str, *, is_log: bool) -> str:
    """A setting in words, with its name: learning rate (training.lr)."""
    key = setting.rpartition(".")[2]
    words = f"{_SETTINGS.get(key, key.replace('_', ' '))} ({setting})"
    return f"{shorten(words, 60)}{', logarithmic' if is_log else ''}"


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
        _tick_log(axes, [float(value) for value in seen])
    elif len(seen) <= _MOST_TICKS:
        axes.set_xticks(sorted(float(value) for value in seen), [f"{value:.3g}" for value in sorted(map(float, seen))])


def _tick_log(axes: "Axes", values: Sequence[float]) -> None:
    """Few ticks on a logarithmic axis: at powers of ten, or, where these are hardly any, evenly between its ends."""
    import numpy as np
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = min(values), max(values)
    if math.log10(high / low) >= _DECADES:
        axes.xaxis.set_major_locator(LogLocator(numticks=_MOST_TICKS))
    else:
        ticks = list(dict.fromkeys(float(f"{tick:.2g}") for tick in np.geomspace(low, high, 4)))
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
