"""Figures of open-set verification: ROC and DET curves of compared models, the scores of genuine and impostor pairs."""

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Final

from common.metrics.figures import equal_error_rate, judged
from common.plots.style import BLACK, GREY, PAIR_COLOURS, LineStyle, dress, method_styles, new_figure, shorten

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Curve = tuple[NDArray[np.float64], NDArray[np.float64], float]
    Interval = tuple[float, float]

LOWEST_FAR: Final = 1e-4  # below it a few thousand impostor pairs say nothing
_SHOWN_BINS: Final = 100  # over the scores that occur
_MOST_INSIDE: Final = 4  # models whose legend fits under the curves
_LONGEST_INSIDE: Final = 34  # characters
_NAME: Final = 32
_DET_TICKS: Final = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
_DET_LOW, _DET_HIGH = 0.001, 0.5  # of both axes: half of all pairs wrong is guessing
_DET_ROOM: Final = 0.9  # of the highest rate; an equal error rate above it moves the end of the axes


def roc(
    curves: "Mapping[str, Curve]",
    *,
    intervals: "Mapping[str, Interval] | None" = None,
    title: str = "Verification of people never seen in training",
) -> "Figure":
    """ROC curves on a linear and on a logarithmic FAR axis, best AUC first in the legend.

    curves: model -> (far, tar, auc); far and tar [K] in [0, 1], both ascending, as `metrics.figures.roc_curve`
    returns them.  Names out of `style.METHOD_STYLES` keep their look.  Up to 10 models.
    intervals: model -> (low, high) of its AUC, for the legend.
    """
    order = sorted(curves, key=lambda name: -curves[name][2])
    labels = {name: _label(name, "AUC", curves[name][2], intervals) for name in order}
    below = len(order) > _MOST_INSIDE or any(len(label) > _LONGEST_INSIDE for label in labels.values())
    figure = new_figure(title, 5.2 + (0.2 * (len(order) + 2) / 2) * below)
    styles = method_styles(curves)
    linear, log = figure.subplots(1, 2)
    for name in order:
        far, tar, _ = curves[name]
        for axes in (linear, log):
            _draw_curve(axes, far, tar, styles[name], labels[name])
    chance = _log_grid()
    linear.plot([0, 1], [0, 1], color=GREY, linewidth=1.0, linestyle=(0, (1, 2)), label="chance")
    log.plot(chance, chance, color=GREY, linewidth=1.0, linestyle=(0, (1, 2)))
    dress(linear, title="Linear", x_label="false accept rate (FAR)", y_label="true accept rate (TAR)")
    dress(
        log, title="Where it matters: few false accepts", x_label="FAR, logarithmic", y_label="true accept rate (TAR)"
    )
    linear.set_xlim(-0.01, 1.01)
    log.set_xscale("log")
    log.set_xlim(LOWEST_FAR, 1.0)
    for axes in (linear, log):
        axes.set_ylim(-0.01, 1.01)
    if below:  # inside it would cover the curves
        handles, shown = linear.get_legend_handles_labels()
        figure.legend(handles, shown, loc="outside lower center", fontsize=9, ncols=2, handlelength=3.5)
    else:
        linear.legend(loc="lower right", fontsize=9, framealpha=0.9)
    return figure


def det(curves: "Mapping[str, Curve]", *, intervals: "Mapping[str, Interval] | None" = None) -> "Figure":
    """DET curves (Martin et al., Eurospeech 1997): both error rates on normal-deviate axes, lowest EER first.

    curves: model -> (far, tar, auc), as for `roc`.  Scores that are normally distributed give straight lines; the dot
    on each curve is its equal error rate.  Up to 10 models.  Both axes go from 0.1 % to 50 %, where guessing lies, and
    further only where a model guesses or does worse.
    intervals: model -> (low, high) of its EER, for the legend.
    """
    figure = new_figure("Errors in verifying people never seen in training (DET)", 6.0)
    axes = figure.subplots()
    styles = method_styles(curves)
    rates = {name: float(equal_error_rate(far, tar)) for name, (far, tar, _) in curves.items()}
    for name in sorted(rates, key=lambda name: rates[name]):
        far, tar, _ = curves[name]
        shown = (far > 0.0) & (far < 1.0) & (tar > 0.0) & (tar < 1.0)  # 0 and 1 lie at infinity
        label = _label(name, "EER", rates[name], intervals)
        _draw_curve(axes, _deviates(far[shown]), _deviates(1.0 - tar[shown]), styles[name], label)
        if 0.0 < rates[name] < 1.0:
            middle = _deviates([rates[name]])
            axes.plot(middle, middle, color=styles[name].colour, marker=styles[name].marker, markersize=7)
    highest = next(
        (tick for tick in _DET_TICKS if tick >= max([_DET_HIGH, *(r / _DET_ROOM for r in rates.values())])), 0.95
    )
    ends = _deviates([_DET_LOW, highest])
    axes.plot(ends, ends, color=GREY, linewidth=1.0, linestyle=(0, (1, 2)), label="equal error rates", zorder=1)
    dress(axes, title="", x_label="false accept rate (FAR)", y_label="false reject rate (FRR = 1 - TAR)")
    ticked = [tick for tick in _DET_TICKS if tick <= highest]
    ticks = [f"{100 * tick:g} %" for tick in ticked]
    axes.set_xticks(_deviates(ticked), ticks)
    axes.set_yticks(_deviates(ticked), ticks)
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    # Beside the curves: which corner is free depends on how good the models are.
    handles, shown_labels = axes.get_legend_handles_labels()
    figure.legend(handles, shown_labels, loc="outside right center", fontsize=9, handlelength=3.5)
    return figure


def _draw_curve(axes: "Axes", x: "NDArray[np.float64]", y: "NDArray[np.float64]", style: LineStyle, label: str) -> None:
    axes.plot(x, y, color=style.colour, linestyle=style.line, linewidth=1.8, label=label)


def _label(name: str, what: str, value: float, intervals: "Mapping[str, Interval] | None") -> str:
    label = f"{shorten(name, _NAME)}, {what} {value:.3f}"
    if intervals is None or name not in intervals:
        return label
    low, high = intervals[name]
    return f"{label} [{low:.3f}, {high:.3f}]"


def _deviates(rates: "Sequence[float] | NDArray[np.float64]") -> "NDArray[np.float64]":
    """The standard normal deviate of each rate in (0, 1)."""
    import numpy as np

    normal = NormalDist()
    return np.array([normal.inv_cdf(float(rate)) for rate in rates])


def _log_grid() -> "NDArray[np.float64]":
    import numpy as np

    return np.logspace(np.log10(LOWEST_FAR), 0.0, 100)


def score_histograms(histogram: "NDArray[np.int64]", threshold: float | None = None) -> "Figure":
    """How the cosine scores of genuine and impostor pairs spread; the less they overlap, the better.

    histogram: [2, bins] int64 over [-1, 1], row 0 genuine and row 1 impostor pairs, as
    `metrics.pairs.pair_histogram` returns it (or a sum of such).  Each row is shown as a density of its own,
    since there are far more impostor pairs.  threshold: a cosine, the dashed line, chosen on validation people: it is
    the one by which the model decides, and its errors on these pairs are written beside it.  None: no line.
    """
    figure = new_figure("Scores of pairs of people never seen in training", 4.8)
    axes = figure.subplots()
    low, high = _shown_range(histogram)
    bins_together = max(1, round((high - low) / 2.0 * histogram.shape[1] / _SHOWN_BINS))
    for row, kind in enumerate(PAIR_COLOURS):
        _draw_density(axes, histogram[row], kind, bins_together)
    if threshold is not None:
        label = f"threshold {threshold:.3f}, from validation: {_errors(histogram, threshold)}"
        axes.axvline(threshold, color=BLACK, linewidth=1.2, linestyle="--", label=label)
        low, high = max(-1.0, min(low, threshold - 0.01)), min(1.0, max(high, threshold + 0.01))
    dress(axes, title="", x_label="cosine similarity of a pair", y_label="density (the area of each kind is 1)")
    axes.set_xlim(low, high)
    axes.set_ylim(0.0, 1.25 * axes.dataLim.ymax or 1.0)  # room for the legend
    axes.legend(loc="upper left", fontsize=10, framealpha=0.9)
    return figure


def _draw_density(axes: "Axes", counts: "NDArray[np.int64]", kind: str, bins_together: int) -> None:
    import numpy as np

    total = int(counts.sum())
    label = f"{kind} ({total:,} pairs)"
    if total == 0:
        axes.plot([], [], color=PAIR_COLOURS[kind], label=label)
        return
    edges = np.append(np.arange(0, len(counts), bins_together), len(counts))
    widths = np.diff(edges) * (2.0 / len(counts))
    density = np.add.reduceat(counts, edges[:-1]) / total / widths
    places = -1.0 + edges * (2.0 / len(counts))
    axes.stairs(density, places, fill=True, color=PAIR_COLOURS[kind], alpha=0.35)
    axes.stairs(density, places, color=PAIR_COLOURS[kind], linewidth=1.6, label=label)


def _errors(histogram: "NDArray[np.int64]", threshold: float) -> str:
    """The parts of impostor pairs accepted and of genuine pairs rejected, as far as there are any of them."""
    genuine, impostor = judged(histogram, threshold).tolist()
    parts = [f"FAR {impostor[1] / sum(impostor):.3f}"] if sum(impostor) else []
    parts += [f"FRR {genuine[0] / sum(genuine):.3f}"] if sum(genuine) else []
    return ", ".join(parts) or "no pairs"


def _shown_range(histogram: "NDArray[np.int64]") -> tuple[float, float]:
    """The scores that occur, with a little room: untrained backbones crowd near 1."""
    import numpy as np

    used = np.flatnonzero(histogram.sum(axis=0))
    if not len(used):
        return -1.0, 1.0
    num_bins = histogram.shape[1]
    low, high = -1.0 + used[0] * 2.0 / num_bins, -1.0 + (used[-1] + 1) * 2.0 / num_bins
    room = 0.03 * max(high - low, 0.05)
    return max(-1.0, low - room), min(1.0, high + room)
