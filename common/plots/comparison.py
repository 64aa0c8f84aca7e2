"""Models and clients side by side: scores with their intervals, the transfer matrix, the clients of a federation."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from common.plots.heatmap import draw_cells, write_cells
from common.plots.style import BLACK, LOCAL, LineStyle, client_styles, dress, method_styles, new_figure, say, shorten

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
_METRICS: Final[Mapping[str, str]] = {
    "accuracy": "accuracy\nown identities",
    "acc": "accuracy\nown identities",
    "precision": "precision\nown identities",
    "recall": "recall\nown identities",
    "f1": "F1\nown identities",
    "loss": "loss (nats)",
    "roc_auc": "ROC AUC\npeople never seen",
    "auc": "ROC AUC\npeople never seen",
    "eer": "equal error rate\npeople never seen",
    "tar_at_far_1e-1": "TAR at FAR 0.1\npeople never seen",
    "tar_at_far_1e-2": "TAR at FAR 0.01\npeople never seen",
    "tar_at_far_1e-3": "TAR at FAR 0.001\npeople never seen",
}


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
    return _METRICS.get(metric.removeprefix("test_"), metric)


def _outermost(scores: Mapping[str, Mapping[str, float]], metrics: Sequence[str]) -> set[str]:
    if len(scores) <= MOST_CLIENTS:
        return set(scores)
    known = [name for name in scores if math.isfinite(scores[name].get(metrics[0], math.nan))]
    order = sorted(known, key=lambda name: scores[name][metrics[0]])
    half = MOST_CLIENTS // 2
    return {*order[:half], *order[-half:]}
