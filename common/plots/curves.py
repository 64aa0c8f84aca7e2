"""Curves over rounds and epochs: a federation's convergence, each client's progress, one holder's training."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from common.metrics.figures import AUC, PAIRS, figures_of, row_of
from common.metrics.names import of_split
from common.plots.style import (
    BLACK,
    BLUE,
    SPLIT_COLOURS,
    LineStyle,
    client_styles,
    dress,
    grid_of_axes,
    marker_for,
    new_figure,
    widened,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, float]]


class Panel(NamedTuple):
    """One set of axes: its title, its y axis, and the curves it may hold (metric -> what the legend says)."""

    title: str
    y_label: str
    lines: Mapping[str, str]
    span: tuple[float, float] | None = None  # of the y axis, wider where a value lies outside; None: what there is


_VAL_AUC: Final = of_split("val", AUC)
_ROUND_PANELS: Final = (
    Panel(
        "Identities seen in training",
        "accuracy (0 to 1)",
        {"train_accuracy": "train", of_split("test", "accuracy"): "test"},
    ),
)
_EPOCH_PANELS: Final = (
    Panel("Identities seen in training", "accuracy (0 to 1)", {"train_accuracy": "train", "val_accuracy": "val"}),
    Panel("People never seen", "ROC AUC (0 to 1)", {_VAL_AUC: "val"}, row_of(AUC).span),
    Panel("Schedule", "learning rate", {"learning_rate": "learning rate"}),
)
_CLIENT_PANELS: Final = (
    Panel("Training loss", "loss (nats)", {"train_loss": ""}),
    Panel("Training accuracy, own identities", "accuracy (0 to 1)", {"train_accuracy": ""}),
    Panel("Validation loss", "loss (nats)", {"val_loss": ""}),
    Panel("Validation accuracy, own identities", "accuracy (0 to 1)", {"val_accuracy": ""}),
    Panel("Validation, people never seen", "ROC AUC (0 to 1)", {_VAL_AUC: ""}),
    Panel("Test accuracy, own identities", "accuracy (0 to 1)", {of_split("test", "accuracy"): ""}),
    Panel("Test, people never seen", "ROC AUC (0 to 1)", {of_split("test", AUC): ""}),
)
_WORDS: Final[Mapping[str, str]] = {"train": "training", "val": "validation", "test": "test"}
_PANEL_HEIGHT_IN: Final = 3.1


def convergence(rounds: Rows, *, margin: str = "") -> "Figure":
    """Scores of the global model over the rounds, with the best round (highest `val_roc_auc`) marked.

    margin: what makes the training loss another than the test loss, such as "CosFace margin 0.2"; "": nothing.
    rounds: in any order; each has "step" (the round; 0 is the initial model) and some of train_loss,
    train_accuracy, round_test_loss, round_test_accuracy, val_roc_auc, round_test_roc_auc, val_eer, round_test_eer.
    Missing and non-finite values leave a gap.  Panels without any value are left out.
    """
    losses = _loss_panels({"train_loss": "train"}, {of_split("test", "loss"): "test"}, margin)
    panels = (*losses, *_ROUND_PANELS, *_open_panels())
    return _curves(rounds, panels, title="Convergence of the global model", x_label="round", auc=_VAL_AUC)


def _loss_panels(training: Mapping[str, str], scored: Mapping[str, str], margin: str) -> list[Panel]:
    """The loss that is minimised and that of scoring, apart: with a margin in one alone they are not comparable."""
    (split,) = scored.values()
    return [
        Panel(f"Training loss{', ' + margin if margin else ''}", "loss (nats)", training),
        Panel(f"{_WORDS[split].capitalize()} loss{', no margin' if margin else ''}", "loss (nats)", scored),
    ]


def _open_panels() -> list[Panel]:
    """One for each figure of pairs in a round's record."""
    return [
        Panel(
            f"People never seen: {row.label}",
            f"{row.label} (0 to 1)",
            {of_split(split, row.name): split for split in ("val", "test")},
            row.span,
        )
        for row in figures_of(PAIRS)
        if row.in_rounds
    ]


def training_curves(epochs: Rows, *, margin: str = "") -> "Figure":
    """One holder's training over the epochs, with the best epoch (highest `val_roc_auc`) marked.

    epochs: each has "step" (the epoch) and some of train_loss, train_accuracy, val_loss, val_accuracy, val_roc_auc,
    learning_rate.  margin: as `convergence` has it.
    """
    panels = (*_loss_panels({"train_loss": "train"}, {"val_loss": "val"}, margin), *_EPOCH_PANELS)
    return _curves(epochs, panels, title="Training", x_label="epoch", auc=_VAL_AUC)


def client_curves(curves: Mapping[str, Rows]) -> "Figure":
    """Each client's own curves over the rounds, one panel for each metric, one style for each client.

    curves: client -> rows with "step" (the round) and some of train_loss, train_accuracy, val_loss, val_accuracy,
    val_roc_auc, round_test_accuracy, round_test_roc_auc.  Readable for up to 16 clients.
    """
    panels = [panel for panel in _CLIENT_PANELS if any(_has(rows, panel) for rows in curves.values())]
    styles = client_styles(curves)
    figure = new_figure("Each client's own curves", 0.9 + _PANEL_HEIGHT_IN * max(1, math.ceil(len(panels) / 2)))
    for panel, axes in zip(panels, grid_of_axes(figure, len(panels)), strict=True):
        (metric,) = panel.lines
        for client, style in styles.items():
            _draw(axes, curves[client], metric, style, client)
        _finish(axes, panel, "round")
    if panels:
        handles = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
        shown = [client for client in styles if client in handles]
        # Beside the panels: inside them it would cover the curves of many clients.
        figure.legend([handles[client] for client in shown], shown, loc="outside right upper", title="client")
    else:
        _say_nothing_to_show(figure)
    return figure


def _curves(rows: Rows, panels: Sequence[Panel], *, title: str, x_label: str, auc: str) -> "Figure":
    shown = [panel for panel in panels if _has(rows, panel)]
    figure = new_figure(title, 0.7 + _PANEL_HEIGHT_IN * max(1, math.ceil(len(shown) / 2)))
    best = _best(rows, auc)
    for panel, axes in zip(shown, grid_of_axes(figure, len(shown)), strict=True):
        for metric, split in panel.lines.items():
            style = LineStyle(SPLIT_COLOURS.get(split, BLUE), "-", "o")
            _draw(axes, rows, metric, style, _WORDS.get(split, split))
        _finish(axes, panel, x_label)
        if panel.span is not None:
            low, high = widened(panel.span, [value for metric in panel.lines for value in _points(rows, metric)[1]])
            axes.set_ylim(low - 0.02 * (high - low), high + 0.02 * (high - low))
        if best is not None:
            label = f"best {x_label}: {best[0]:g}" + (f" ({best[1]:.3f})" if auc in panel.lines else "")
            axes.axvline(best[0], color=BLACK, linewidth=1.0, linestyle=(0, (2, 3)), label=label, zorder=1)
        axes.legend(loc="best", fontsize=9, framealpha=0.85)
    if not shown:
        _say_nothing_to_show(figure)
    return figure


def _has(rows: Rows, panel: Panel) -> bool:
    return any(_points(rows, metric)[0] for metric in panel.lines)


def _points(rows: Rows, metric: str) -> tuple[list[float], list[float]]:
    """Steps and finite values of a metric, in the order of the steps."""
    found = sorted((row["step"], row[metric]) for row in rows if math.isfinite(row.get(metric, math.nan)))
    return [step for step, _ in found], [value for _, value in found]


def _best(rows: Rows, auc: str) -> tuple[float, float] | None:
    """The step with the highest AUC and that AUC; the first of equals.  Step 0 is never chosen: it is untrained."""
    steps, values = _points([row for row in rows if row["step"] > 0], auc)
    if not values:
        return None
    highest = max(values)
    return steps[values.index(highest)], highest


def _draw(axes: "Axes", rows: Rows, metric: str, style: LineStyle, label: str) -> None:
    steps, values = _points(rows, metric)
    if steps:
        axes.plot(
            steps,
            values,
            color=style.colour,
            linestyle=style.line,
            marker=marker_for(style, len(steps)),
            markersize=4,
            linewidth=1.6,
            label=label,
        )


def _finish(axes: "Axes", panel: Panel, x_label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    dress(axes, title=panel.title, x_label=x_label, y_label=panel.y_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, steps=[1, 2, 5, 10]))
    first, last = axes.dataLim.intervalx
    if first == last:  # a single point: without room the axis would count in millionths
        axes.set_xlim(first - 1.0, first + 1.0)


def _say_nothing_to_show(figure: "Figure") -> None:
    figure.text(0.5, 0.45, "no values were recorded", ha="center", va="center", fontsize=12)
