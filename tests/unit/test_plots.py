"""Figures: what they show, that nothing in them overlaps, one colour for one thing, and no window library."""

import builtins
import importlib
import itertools
import math
import subprocess
import sys
import threading
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from common.plots import style
from common.plots.curves import client_curves, convergence, training_curves
from common.plots.verification import det, roc, score_histograms
from common.settings import TrackingSettings
from common.tracking.run import open_run
from tests.unit.pictures import assert_nothing_overlaps

ROOT = Path(__file__).resolve().parents[2]


def _rounds(last):
    return [
        {
            "step": step,
            "train_loss": 10.0 / (step + 1),
            "train_accuracy": step / (last + 1),
            "round_test_loss": 12.0 / (step + 1),
            "val_roc_auc": 0.6 + 0.3 * step / (last + 1),
            "round_test_roc_auc": 0.6 + 0.2 * step / (last + 1),
            "round_test_eer": 0.4 - 0.2 * step / (last + 1),
        }
        for step in range(last + 1)
    ]


def _clients(count, rounds):
    return {f"site-{i}": [{"step": s, "train_loss": 9 / s, "val_roc_auc": 0.6 + s / 200} for s in range(1, rounds + 1)]
            for i in range(1, count + 1)}  # fmt: skip


def _histogram(genuine, impostor, pairs=2000):
    rng = np.random.default_rng(0)
    rows = [np.histogram(rng.normal(mean, 0.1, pairs), 8192, (-1.0, 1.0))[0] for mean in (genuine, impostor)]
    return np.asarray(rows, dtype=np.int64)


def _lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def _figures():
    far = np.linspace(0.0, 1.0, 101)
    for last in (0, 1, 2, 50):
        yield f"convergence of {last} rounds", convergence(_rounds(last))
    for count, rounds in ((1, 1), (2, 2), (12, 50), (16, 10)):
        yield f"{count} clients, {rounds} rounds", client_curves(_clients(count, rounds))
    yield "training", training_curves([{"step": s, "train_loss": 1.0 / s, "learning_rate": 0.1} for s in range(1, 9)])
    yield "roc", roc(dict.fromkeys(style.METHOD_STYLES, (far, far**0.5, 2 / 3)))
    curves = {f"local hospital-of-the-far-north-{i}": (far, far**0.5, 2 / 3) for i in range(8)}
    yield "roc of long names", roc(curves, intervals=dict.fromkeys(curves, (0.6, 0.7)))
    yield "det", det(curves, intervals=dict.fromkeys(curves, (0.3, 0.4)))
    yield "det of one", det({"fedavg": (far, far**0.5, 2 / 3)})
    yield "scores", score_histograms(_histogram(0.5, 0.0), 0.25)


def test_nothing_overlaps_and_nothing_leaves_the_picture():
    for name, figure in _figures():
        assert_nothing_overlaps(figure, name)


def test_convergence_marks_the_round_with_the_best_validation_auc():
    rounds = _rounds(5)
    rounds[3]["val_roc_auc"] = 0.95
    rounds[4]["val_roc_auc"] = 0.95  # the first of equals is meant
    rounds[5]["round_test_roc_auc"] = 0.99  # test is never a choice
    rounds[0]["val_roc_auc"] = 0.99  # nor is the untrained model
    figure = convergence(rounds)
    for axes in figure.axes:
        marks = [line for label, line in _lines(axes).items() if label.startswith("best round: 3")]
        assert [list(mark.get_xdata()) for mark in marks] == [[3, 3]]
    assert "best round: 3 (0.950)" in _lines(figure.axes[3])


def test_losses_with_and_without_a_margin_do_not_share_an_axis():
    titles = [axes.get_title() for axes in convergence(_rounds(5), margin="CosFace margin 0.2").axes]
    assert titles[:2] == ["Training loss, CosFace margin 0.2", "Test loss, no margin"]
    assert [axes.get_title() for axes in convergence(_rounds(5)).axes][:2] == ["Training loss", "Test loss"]


def test_axes_of_an_auc_begin_at_guessing_and_end_at_perfect():
    auc, rate = convergence(_rounds(5)).axes[3:5]
    assert auc.get_ylim() == pytest.approx((0.49, 1.01))
    assert rate.get_ylim() == pytest.approx((-0.01, 0.51))
    (worse,) = convergence([{"step": 1, "val_roc_auc": 0.43}]).axes
    assert worse.get_ylim()[0] < 0.4


def test_curves_hold_the_given_values_in_the_order_of_the_steps():
    rows = [{"step": 2, "train_loss": 1.0}, {"step": 1, "train_loss": 2.0, "round_test_loss": 3.0}]
    figure = convergence(rows)
    training, test = figure.axes  # panels without values are left out
    lines = _lines(training) | _lines(test)
    assert (list(lines["training"].get_xdata()), list(lines["training"].get_ydata())) == ([1, 2], [2.0, 1.0])
    assert (list(lines["test"].get_xdata()), list(lines["test"].get_ydata())) == ([1], [3.0])
    assert training.get_xlabel() == "round"
    assert training.get_ylabel() == "loss (nats)"


def test_values_that_are_missing_or_not_finite_are_left_out():
    rows = [
        {"step": 1, "train_loss": math.nan, "val_roc_auc": 0.7},
        {"step": 2, "train_loss": math.inf},
        {"step": 3, "train_loss": 0.5, "val_roc_auc": math.nan},
    ]
    figure = training_curves(rows)
    loss, auc = figure.axes
    assert list(_lines(loss)["training"].get_xdata()) == [3]
    assert "best epoch: 1 (0.700)" in _lines(auc)


@pytest.mark.parametrize("figure", [convergence([]), client_curves({}), client_curves({"a": []}), training_curves([])])
def test_no_values_say_so(figure):
    assert figure.axes == []
    assert [text.get_text() for text in figure.texts][-1] == "no values were recorded"


def test_sixteen_clients_look_different_and_known_ones_keep_their_colour():
    names = ["vggface2", "celeba", *(f"site-{i}" for i in range(1, 15))]
    styles = style.client_styles(names)
    assert len({(s.colour, s.line) for s in styles.values()}) == 16
    assert len({(s.colour, s.marker) for s in styles.values()}) == 16
    assert styles["celeba"] == style.client_styles(["celeba"])["celeba"]
    assert list(styles)[:4] == ["celeba", "site-1", "site-2", "site-3"]


def test_a_method_has_one_colour_everywhere():
    assert {"local", "centralized", "fedavg", "fedprox", "untrained"} <= set(style.METHOD_STYLES)
    styles = style.method_styles(["fedprox", "mine", "fedavg", "other"])
    assert styles["fedavg"].colour == style.METHOD_STYLES["fedavg"].colour
    assert styles["fedprox"].colour == style.METHOD_STYLES["fedprox"].colour
    assert len({s.colour for s in styles.values()}) == 4


def _seen_by(colour, matrix):
    """sRGB -> linear -> what a dichromat sees (Vienot, Brettel, Mollon 1999, as one 3 x 3 matrix) -> sRGB in [0, 1]."""
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    seen = np.clip(matrix @ linear, 0.0, 1.0)
    return np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)


PROTANOPE = np.array([[0.1124, 0.8876, 0.0], [0.1124, 0.8876, 0.0], [0.0040, -0.0040, 1.0]])
DEUTERANOPE = np.array([[0.2928, 0.7072, 0.0], [0.2928, 0.7072, 0.0], [-0.0223, 0.0223, 1.0]])


@pytest.mark.parametrize(("matrix", "confused"), [(PROTANOPE, "#005600"), (DEUTERANOPE, "#009700")])
@pytest.mark.parametrize("table", [style.SPLIT_COLOURS, style.PAIR_COLOURS, style.CLIENT_COLOURS])
def test_colours_differ_to_colour_blind_readers(matrix, confused, table):
    seen = {name: _seen_by(colour, matrix) for name, colour in table.items()}
    for one, other in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[one] - seen[other]) > 0.15, (one, other)
    # The measure does find a red and a green that such readers confuse.
    assert np.linalg.norm(_seen_by("#E00000", matrix) - _seen_by(confused, matrix)) < 0.1
    assert np.linalg.norm(_seen_by("#E00000", np.eye(3)) - _seen_by(confused, np.eye(3))) > 0.8


@pytest.mark.parametrize("matrix", [PROTANOPE, DEUTERANOPE])
def test_methods_differ_to_colour_blind_readers_by_colour_or_else_by_line_and_marker(matrix):
    locals_alone = [f"local {name}" for name in ("celeba", "vggface2", "twins", "site-1", "site-2", "site-10")]
    styles = style.method_styles([*style.METHOD_STYLES, *locals_alone])
    assert {styles[name].colour for name in locals_alone} == {style.METHOD_STYLES["local"].colour}
    seen = {name: _seen_by(look.colour, matrix) for name, look in styles.items()}
    for one, other in itertools.combinations(styles, 2):
        if np.linalg.norm(seen[one] - seen[other]) <= 0.16:
            assert styles[one].line != styles[other].line, (one, other)
            assert styles[one].marker != styles[other].marker, (one, other)


def test_many_holders_alone_differ_in_line_or_marker_and_do_not_depend_on_the_order():
    names = [f"local site-{number}" for number in range(20)]
    styles = style.method_styles(names)
    assert len(set(styles.values())) == 20
    assert style.method_styles(names[::-1]) == styles


def test_roc_shows_each_curve_on_both_axes_best_first():
    far = np.array([0.0, 0.5, 1.0])
    figure = roc({"local": (far, np.array([0.0, 0.6, 1.0]), 0.55), "fedavg": (far, np.array([0.0, 0.9, 1.0]), 0.7)})
    linear, log = figure.axes
    labels = [text.get_text() for text in linear.get_legend().get_texts()]
    assert labels == ["fedavg, AUC 0.700", "local, AUC 0.550", "chance"]
    assert (linear.get_xscale(), log.get_xscale()) == ("linear", "log")
    for axes in figure.axes:
        line = _lines(axes)["fedavg, AUC 0.700"]
        assert list(line.get_ydata()) == [0.0, 0.9, 1.0]
        assert line.get_color() == style.METHOD_STYLES["fedavg"].colour


def test_roc_says_the_intervals_that_are_known():
    far = np.array([0.0, 0.5, 1.0])
    curves = {"local": (far, np.array([0.0, 0.6, 1.0]), 0.55), "fedavg": (far, np.array([0.0, 0.9, 1.0]), 0.7)}
    figure = roc(curves, intervals={"fedavg": (0.68, 0.7251)})
    (legend,) = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["fedavg, AUC 0.700 [0.680, 0.725]", "local, AUC 0.550", "chance"]


def test_det_is_straight_for_normal_scores_and_dots_the_equal_error_rates_lowest_first():
    normal = NormalDist()
    thresholds = np.linspace(6.0, -4.0, 1001)
    far = np.array([1 - normal.cdf(t) for t in thresholds])
    # Genuine scores shifted by d: FRR(t) = Phi(t - d), so on normal-deviate axes y = -x - d; EER = Phi(-d / 2).
    curves = {
        name: (far, np.array([1 - normal.cdf(t - shift) for t in thresholds]), 0.0)
        for name, shift in (("local celeba", 1.0), ("fedavg", 2.0))
    }
    figure = det(curves)
    (axes,) = figure.axes
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["fedavg, EER 0.159", "local celeba, EER 0.309", "equal error rates"]
    lines = _lines(axes)
    for label, shift in ((labels[0], 2.0), (labels[1], 1.0)):
        x, y = lines[label].get_data()
        assert len(x) > 500
        np.testing.assert_allclose(y, -x - shift, atol=1e-6)
    assert lines[labels[1]].get_color() == style.METHOD_STYLES["local"].colour
    assert lines[labels[1]].get_linestyle() == "--"
    dots = [(line.get_color(), float(line.get_xdata()[0])) for line in axes.get_lines() if len(line.get_xdata()) == 1]
    assert dots == [(style.BLUE, pytest.approx(-1.0, abs=1e-3)), (style.ORANGE, pytest.approx(-0.5, abs=1e-3))]
    ticks = dict(zip((text.get_text() for text in axes.get_xticklabels()), axes.get_xticks(), strict=True))
    assert ticks["50 %"] == pytest.approx(0.0)
    assert ticks["0.5 %"] == pytest.approx(-2.5758, abs=1e-4)  # that percentile of the normal distribution
    # Half of all pairs wrong is guessing: no room beyond it, unless a model is there.
    assert axes.get_xlim() == axes.get_ylim() == (ticks["0.1 %"], ticks["50 %"])
    guessing = det({"untrained": (far, far, 0.5)}).axes[0]
    assert [text.get_text() for text in guessing.get_xticklabels()][-1] == "65 %"


def test_det_of_a_perfect_model_has_no_curve_and_says_so_in_the_legend():
    figure = det({"fedavg": (np.array([0.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0]), 1.0)})
    (axes,) = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["fedavg, EER 0.000", "equal error rates"]
    assert len(_lines(axes)["fedavg, EER 0.000"].get_xdata()) == 0


@pytest.mark.parametrize("level", [0.0, 0.1, 0.3, 0.45, 0.5, 0.6, 0.8, 1.0])
def test_ink_reads_on_every_colour(level):
    """Contrast (WCAG 2.1) = (lighter luminance + 0.05) / (darker + 0.05); a grey's luminance is its linear level."""
    linear = level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4
    contrast = {style.BLACK: (linear + 0.05) / 0.05, "#FFFFFF": 1.05 / (linear + 0.05)}
    assert contrast[style.ink_on((level, level, level))] >= 4.5


def test_long_names_lose_their_middle():
    assert style.shorten("celeba", 6) == "celeba"
    assert style.shorten("hospital-north-1", 9) == "hosp…th-1"
    assert len(style.shorten("hospital-north-1", 10)) == 10


def test_score_densities_have_area_one_and_the_threshold_is_the_given_one_with_its_errors():
    figure = score_histograms(_histogram(0.5, 0.0), 0.3)
    (axes,) = figure.axes
    outlines = [patch for patch in axes.patches if not patch.get_fill()]
    assert len(outlines) == 2
    for patch in outlines:
        values, edges, _ = patch.get_data()
        assert float(np.sum(values * np.diff(edges))) == pytest.approx(1.0)
    (label,) = [text for text in _lines(axes) if text.startswith("threshold")]
    # Two normal densities, sigma 0.1, means 0 and 0.5, cut at 0.3: FAR Phi(-3) = 0.0013, FRR Phi(-2) = 0.0228.
    assert label.startswith("threshold 0.300, from validation: FAR 0.00")
    assert float(label.split()[-1]) == pytest.approx(0.0228, abs=0.008)
    (line,) = [line for line in axes.get_lines() if line.get_label() == label]
    assert list(line.get_xdata()) == [0.3, 0.3]
    assert not [text for text in _lines(score_histograms(_histogram(0.5, 0.0)).axes[0]) if "threshold" in text]


@pytest.mark.parametrize("row", [0, 1])
def test_a_kind_without_pairs_is_said(row):
    histogram = _histogram(0.5, 0.0)
    histogram[row] = 0
    (axes,) = score_histograms(histogram).axes
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert f"{('genuine', 'impostor')[row]} (0 pairs)" in texts
    assert len(texts) == 2  # no threshold


def test_a_tracked_run_keeps_a_figure_as_a_picture(tmp_path):
    from PIL import Image

    run = open_run(
        TrackingSettings(enabled=False, tensorboard="none"),
        uri="",
        folder=tmp_path,
        experiment="e",
        run_name="n",
        tags={},
        params={},
    )
    path = run.log_figure(convergence(_rounds(2)), "plots/convergence.png")
    run.finish("FINISHED")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.size[0] == 1200


def test_matplotlib_comes_late_and_without_pyplot():
    program = """
import sys
from common.plots import comparison, curves, people, verification
assert "matplotlib" not in sys.modules, "imported at once"
curves.convergence([{"step": 1, "val_roc_auc": 0.5}]).savefig(sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules, "pyplot"
"""
    done = subprocess.run(
        [sys.executable, "-c", program, "/dev/null"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_a_figure_waits_for_ipython_where_another_thread_is_importing_it(tmp_path, monkeypatch):
    """MLflow's client imports it in the thread that sends; matplotlib asks for the version of what is half there."""
    from matplotlib.backend_bases import FigureCanvasBase

    for name in [name for name in sys.modules if name.partition(".")[0] == "IPython"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "IPython.py").write_text(
        "import builtins\nbuiltins.ipython_begun.set()\nassert builtins.ipython_goes_on.wait(30)\n"
        "version_info = (9, 0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    begun, goes_on = threading.Event(), threading.Event()
    monkeypatch.setattr(builtins, "ipython_begun", begun, raising=False)
    monkeypatch.setattr(builtins, "ipython_goes_on", goes_on, raising=False)
    FigureCanvasBase._fix_ipython_backend2gui.__func__.cache_clear()
    other = threading.Thread(target=importlib.import_module, args=("IPython",))
    later = threading.Timer(0.3, goes_on.set)
    other.start()
    assert begun.wait(30)
    later.start()
    try:
        assert style.new_figure("a title", 3.0).get_suptitle() == "a title"
        assert goes_on.is_set()
    finally:
        goes_on.set()
        other.join(30)
        sys.modules.pop("IPython", None)
        FigureCanvasBase._fix_ipython_backend2gui.__func__.cache_clear()
