"""What the figures of studies show, read from their axes."""

import math

import pytest

from common.plots.comparison import TrialPoint, ablation_dots, search_trials
from tests.unit.pictures import assert_nothing_overlaps


def row(variant: str, auc: float, gap: tuple[float, float, float] | None = None) -> dict[str, object]:
    found: dict[str, object] = {"variant": variant}
    for kind in ("all", "twins", "strangers"):
        found |= {f"{kind}_roc_auc": auc, f"{kind}_roc_auc_low": auc - 0.1, f"{kind}_roc_auc_high": auc + 0.05}
        if gap:
            found |= dict(zip((f"{kind}_gap", f"{kind}_gap_low", f"{kind}_gap_high"), gap, strict=True))
    return found


def test_an_ablation_has_a_panel_for_each_kind_of_pairs_and_a_row_for_each_variant():
    rows = [row("sa", 0.6), row("glca", 0.65, (0.05, -0.01, 0.1)), row("dcal", 0.7, (0.1, 0.02, 0.2))]
    figure = ablation_dots(rows, "model.attention", num_families=12)
    assert [axes.get_title() for axes in figure.axes] == ["all pairs", "twins only", "strangers only"]
    for axes in figure.axes:
        assert [label.get_text() for label in axes.get_yticklabels()] == ["sa", "glca", "dcal"]
        dots = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 1]
        assert [float(dot[0]) for dot in dots] == [0.6, 0.65, 0.7]
        assert axes.get_xlim() == figure.axes[0].get_xlim(), "one span for all panels"
        spans = [list(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2]
        assert spans[0] == pytest.approx([0.5, 0.65])
        texts = {text.get_text(): text.get_fontweight() for text in axes.texts if text.get_text()}
        assert texts["+0.050 [-0.010, +0.100]"] == "normal"
        assert texts["+0.100 [+0.020, +0.200]"] == "bold", "a gap whose interval leaves zero out"
        assert texts["0.600 [0.500, 0.650]"] == "normal"


def test_few_families_are_too_few_for_a_clear_gap():
    figure = ablation_dots([row("sa", 0.6), row("dcal", 0.7, (0.1, 0.02, 0.2))], "model.attention", num_families=3)
    assert "over 3 families" in figure.get_supxlabel()
    assert {text.get_fontweight() for axes in figure.axes for text in axes.texts} == {"normal"}


def trials() -> list[TrialPoint]:
    return [
        TrialPoint(0, "complete", 0.5, {"training.lr": 1e-3, "model.head": "softmax", "model.depth": 2}),
        TrialPoint(1, "failed", math.nan, {"training.lr": 1e-2, "model.head": "softmax", "model.depth": 2}),
        TrialPoint(2, "pruned", 0.4, {"training.lr": 2e-3, "model.head": "cosface", "model.depth": 4}),
        TrialPoint(3, "complete", 0.7, {"training.lr": 3e-3, "model.head": "cosface", "model.depth": 4}),
        TrialPoint(4, "complete", 0.6, {"training.lr": 4e-3, "model.head": "cosface", "model.depth": 4}),
    ]


@pytest.mark.parametrize(("best_is", "expected"), [("highest", [0.5, 0.7, 0.7]), ("lowest", [0.5, 0.5, 0.5])])
def test_a_search_shows_the_best_so_far(best_is, expected):
    figure = search_trials(trials(), metric="val_roc_auc", best_is=best_is, logarithmic=["training.lr"])
    top, lr, head, depth = figure.axes
    lines = {line.get_label(): line for line in top.lines}
    assert list(lines["best so far"].get_ydata())[:3] == expected
    assert list(lines["best so far"].get_xdata())[:3] == [0, 3, 4]
    assert list(lines["complete"].get_xdata()) == [0, 3, 4]
    assert list(lines["pruned"].get_xdata()) == [2]
    assert list(lines["failed"].get_xdata()) == [1]
    assert (lr.get_xscale(), head.get_xscale()) == ("log", "linear")
    assert [axes.get_xlabel() for axes in (lr, depth)] == [
        "learning rate (training.lr), logarithmic",
        "depth (model.depth)",
    ]
    assert {axes.get_ylabel() for axes in figure.axes} == {"ROC AUC"}
    assert len({axes.get_ylim() for axes in figure.axes}) == 1, "one span for all panels"
    assert_nothing_overlaps(figure, "search")
    assert [label.get_text() for label in depth.get_xticklabels()] == ["2", "4"]
    assert [label.get_text() for label in head.get_xticklabels()] == ["cosface", "softmax"]
    shown = [list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in head.lines]
    assert shown == [[(1, 0.5), (0, 0.7), (0, 0.6)], [(0, 0.4)]]


def test_a_single_trial_can_be_drawn(tmp_path):
    figure = search_trials(trials()[:1], metric="val_roc_auc", best_is="highest")
    figure.savefig(tmp_path / "a.png", format="png")
    assert (tmp_path / "a.png").stat().st_size > 0


@pytest.mark.parametrize("high", [2e-4, 5e-4, 1e-2, 1.0])
def test_ticks_of_a_logarithmic_setting_stand_apart(high):
    points = [
        TrialPoint(n, "complete", 0.6, {"training.weight_decay": 1e-4 * (high / 1e-4) ** (n / 9)}) for n in range(10)
    ]
    figure = search_trials(points, metric="val_eer", best_is="lowest", logarithmic=["training.weight_decay"])
    assert_nothing_overlaps(figure, f"up to {high}")
    assert len([label for label in figure.axes[1].get_xticklabels() if label.get_text()]) >= 2
