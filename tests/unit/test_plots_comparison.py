"""Comparisons: the figures written, intervals where they belong, contrast, and that nothing overlaps."""

import math

import numpy as np
import pytest

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
    axes = figure.axes[0]
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


def test_each_client_has_a_row_in_each_panel_in_its_own_colour():
    scores = {"vggface2": {"test_acc": 0.5, "roc_auc": 0.8}, "celeba": {"test_acc": 0.25, "roc_auc": math.nan}}
    figure = client_comparison(scores, pooled={"roc_auc": 0.75})
    accuracy, auc = figure.axes
    assert accuracy.get_title() == "accuracy\nown identities"
    assert _rows(accuracy) == ["celeba", "vggface2"]
    assert (_written(accuracy), _written(auc)) == (["0.250", "0.500"], ["none", "0.800"])
    dots = {line.get_color(): list(line.get_xdata()) for line in accuracy.get_lines()}
    assert dots == {style.CLIENT_COLOURS["celeba"]: [0.25], style.CLIENT_COLOURS["vggface2"]: [0.5]}
    assert auc.get_xlabel() == "dashed: all clients, 0.750"
    assert [list(line.get_xdata()) for line in auc.get_lines()] == [[0.75, 0.75], [0.8]]
    assert accuracy.get_xlabel() == ""


def test_of_many_clients_the_lowest_and_the_highest_are_shown_and_that_is_said():
    scores = {f"site-{number}": {"accuracy": number / 100, "eer": 0.1} for number in range(100)}
    figure = client_comparison(scores)
    assert _rows(figure.axes[0]) == [f"site-{number}" for number in (*range(15), *range(85, 100))]
    said = figure._supxlabel.get_text()
    assert said == "the 15 lowest and the 15 highest of 100 clients by accuracy, own identities"


def test_nothing_to_compare_is_said():
    for figure in (method_bars({}, "ROC AUC"), client_comparison({}), client_comparison({"celeba": {}})):
        assert _written(figure.axes[0]) == ["no values were recorded"]


@pytest.mark.parametrize("count", [1, 2, 4, 8, 40])
def test_nothing_overlaps(count):
    names = [f"university-hospital-of-the-north-{number}" for number in range(count)]
    rng = np.random.default_rng(count)
    tested = dict.fromkeys(["celeba", "vggface2", "pooled"], (0.8, 0.78, 0.83))
    scores = {name: {"accuracy": rng.random(), "auc": rng.random(), "eer": 0.1, "f1": rng.random()} for name in names}
    assert_nothing_overlaps(client_comparison(scores, pooled={"eer": 0.3}), "clients")
    if count <= 8:
        assert_nothing_overlaps(method_bars(dict.fromkeys(["fedavg", *names], tested), "ROC AUC"), "methods")
        assert_nothing_overlaps(transfer_matrix(rng.random((count, count)), names, names), "transfer")
