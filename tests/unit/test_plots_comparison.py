"""Comparisons: the figures written, intervals where they belong, contrast, and that nothing overlaps."""

import math

import numpy as np
import pytest

from common.metrics.figures import FIGURES, title_of
from common.plots import style
from common.plots.comparison import client_comparison, method_bars, transfer_matrix
from tests.unit.pictures import assert_nothing_overlaps

SCORES = {
    "local celeba": {"celeba": (0.81, 0.79, 0.83), "vggface2": (0.7, 0.68, 0.72)},
    "fedavg": {"celeba": (0.9, 0.88, 0.92), "vggface2": (0.85, math.nan, math.nan)},
    "centralized": {"vggface2": (0.88, 0.86, 0.9)},
}


def _written(axes):
    return [text.get_text() for text in axes.texts]


def _rows(axes):
    return [text.get_text() for text in axes.get_yticklabels()]


def test_each_model_has_a_dot_an_interval_and_its_figures_on_each_test_set():
    figure = method_bars(SCORES, "ROC AUC")
    celeba, vggface2 = figure.axes
    assert (celeba.get_title(), vggface2.get_title()) == ("tested on celeba", "tested on vggface2")
    assert _rows(celeba) == ["local celeba", "fedavg"]
    assert _rows(vggface2) == ["local celeba", "fedavg", "centralized"]
    assert _written(celeba) == ["0.810 [0.790, 0.830]", "0.900 [0.880, 0.920]"]
    assert _written(vggface2) == ["0.700 [0.680, 0.720]", "0.850", "0.880 [0.860, 0.900]"]
    assert vggface2.get_xlabel() == "ROC AUC"
    lines = [(line.get_color(), list(line.get_xdata()), set(line.get_ydata())) for line in celeba.get_lines()]
    assert lines == [
        (style.ORANGE, [0.79, 0.83], {0}),
        (style.ORANGE, [0.81], {0}),
        (style.BLUE, [0.88, 0.92], {1}),
        (style.BLUE, [0.9], {1}),
    ]
    assert len(vggface2.get_lines()) == 5  # no interval is known for fedavg
    bottom, top = celeba.get_ylim()
    assert bottom > top  # the first row is on top


def test_intervals_are_claimed_only_where_there_are_any():
    assert "intervals" in method_bars(SCORES, "EER")._suptitle.get_text()
    bare = {"fedavg": {"celeba": (0.9, math.nan, math.nan)}}
    assert method_bars(bare, "EER")._suptitle.get_text() == "EER of the models"


def test_the_transfer_matrix_writes_each_value_readably_and_frames_the_own():
    values = np.array([[0.9, 0.7], [math.nan, 0.8], [0.85, 0.84]])
    figure = transfer_matrix(values, ["local celeba", "local vggface2", "fedavg"], ["celeba", "vggface2"])
    axes, bar = figure.axes
    assert bar.get_ylim() == (0.5, 1.0), "colours go from guessing to perfect, whatever the values fill"
    cells = {(text.get_position()[1], text.get_position()[0]): text for text in axes.texts}
    assert {cell: text.get_text() for cell, text in cells.items()} == {
        (0, 0): "0.900", (0, 1): "0.700", (1, 0): "-", (1, 1): "0.800", (2, 0): "0.850", (2, 1): "0.840",
    }  # fmt: skip
    assert cells[0, 0].get_color() == "#FFFFFF"  # on the darkest
    assert cells[0, 1].get_color() == style.BLACK  # on the lightest
    assert cells[1, 0].get_color() == style.BLACK  # on grey
    frames = {(round(patch.get_y() + 0.45), round(patch.get_x() + 0.47)) for patch in axes.patches}
    assert frames == {(0, 0), (1, 1)}
    assert _rows(axes) == ["local celeba", "local vggface2", "fedavg"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["celeba", "vggface2"]


def test_names_must_fit_the_values():
    with pytest.raises(ValueError, match=r"\[2, 1\]"):
        transfer_matrix(np.zeros((2, 2)), ["a", "b"], ["a"])


def test_each_client_has_a_row_in_each_panel_in_its_own_colour_with_its_interval():
    scores = {
        "vggface2": {"test_accuracy": (0.5, 0.4, 0.6), "roc_auc": (0.8, 0.7, 0.9), "loss": (2.0, math.nan, math.nan)},
        "celeba": {"test_accuracy": (0.25, 0.2, 0.3), "roc_auc": (math.nan, math.nan, math.nan)},
    }
    figure = client_comparison(scores, pooled={"roc_auc": (0.75, 0.7, 0.8)}, about="how")
    accuracy, auc = figure.axes  # a loss is nothing that models are compared by
    assert accuracy.get_title() == "accuracy\nown identities"
    assert _rows(accuracy) == ["celeba", "vggface2"]
    assert _written(accuracy) == ["0.250 [0.200, 0.300]", "0.500 [0.400, 0.600]"]
    assert _written(auc) == ["none", "0.800 [0.700, 0.900]"]
    dots = {line.get_color(): list(line.get_xdata()) for line in accuracy.get_lines() if len(line.get_xdata()) == 1}
    assert dots == {style.CLIENT_COLOURS["celeba"]: [0.25], style.CLIENT_COLOURS["vggface2"]: [0.5]}
    assert auc.get_xlabel() == "dashed: all clients, 0.750 [0.700, 0.800]"
    assert accuracy.get_xlabel() == ""
    assert figure.get_supxlabel() == "how"


def test_a_hair_apart_is_drawn_a_hair_apart():
    """0.9150 and 0.9156 on an axis of half a unit: a thousandth of it, not its two ends."""
    scores = {"a": {"roc_auc": (0.9150, 0.89, 0.94), "eer": (0.16, 0.1, 0.2)}, "b": {"roc_auc": (0.9156, 0.89, 0.94)}}
    auc, rate = client_comparison(scores).axes
    assert auc.get_xlim() == pytest.approx((0.49, 1.01))
    assert rate.get_xlim() == pytest.approx((-0.01, 0.51))
    assert [tick.get_text() for tick in auc.get_xticklabels()] == ["0.5", "0.6", "0.7", "0.8", "0.9", "1"]
    below = client_comparison({"a": {"roc_auc": (0.45, 0.31, 0.6)}}).axes[0]
    assert below.get_xlim()[0] < 0.3, "worse than guessing is shown"


def test_no_figure_is_called_by_its_raw_name():
    for row in FIGURES:
        assert row.title, row.name
        assert "_" not in row.title
    assert title_of("ten_fold_accuracy") == "ten-fold accuracy\npeople never seen"
    assert title_of("test_twins_eer") == "equal error rate\ntwins only, never seen"
    with pytest.raises(KeyError):
        title_of("nobody")


@pytest.mark.parametrize(("count", "has_ends"), [(27, True), (1000, False)])
def test_of_many_clients_the_lowest_and_the_highest_have_a_row_and_the_picture_stays_low(count, has_ends):
    def ends(value):
        return (value, value - 0.1, min(1.0, value + 0.1)) if has_ends else (value, math.nan, math.nan)

    scores = {
        f"site-{number}": {"accuracy": ends(0.5), "roc_auc": ends(0.6 + number / (3 * count)), "eer": ends(0.2)}
        for number in range(count)
    }
    figure = client_comparison(scores, pooled={"eer": (0.2, 0.1, 0.3)}, about="how")
    top, accuracy, _ = figure.axes
    assert _rows(top) == [f"site-{number}" for number in (*range(10), *range(count - 10, count))]
    assert top.get_title() == f"ROC AUC, people never seen: the 10 lowest and the 10 highest of {count:,} clients"
    assert accuracy.get_xlabel() == "median 0.50\n80 % in 0.50 to 0.50"
    assert max(len(line.get_xdata()) for line in accuracy.get_lines()) == count
    assert figure.bbox.height <= 1300
    assert_nothing_overlaps(figure, f"{count} clients")


def _with_ends(value):
    return value, max(0.0, value - 0.1), min(1.0, value + 0.1)


def test_nothing_to_compare_is_said():
    for figure in (method_bars({}, "ROC AUC"), client_comparison({}), client_comparison({"celeba": {}})):
        assert _written(figure.axes[0]) == ["no values were recorded"]


@pytest.mark.parametrize("count", [1, 2, 4, 8, 40])
def test_nothing_overlaps(count):
    names = [f"university-hospital-of-the-north-{number}" for number in range(count)]
    rng = np.random.default_rng(count)
    tested = dict.fromkeys(["celeba", "vggface2", "pooled"], (0.8, 0.78, 0.83))
    figures = ("accuracy", "roc_auc", "eer", "f1", "ten_fold_accuracy")
    scores = {name: {figure: _with_ends(rng.random()) for figure in figures} for name in names}
    assert_nothing_overlaps(client_comparison(scores, pooled={"eer": (0.3, 0.2, 0.4)}, about="how"), "clients")
    if count <= 8:
        assert_nothing_overlaps(method_bars(dict.fromkeys(["fedavg", *names], tested), "ROC AUC"), "methods")
        assert_nothing_overlaps(transfer_matrix(rng.random((count, count)), names, names), "transfer")
