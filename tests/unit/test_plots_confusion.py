"""Confusion matrices: the numbers drawn, what is said about groups, and that 5 to 500 people can be read."""

import numpy as np
import pytest

from common.metrics.sums import grouped_confusion
from common.plots.people import confusion, confusion_of_predictions
from tests.unit.pictures import assert_nothing_overlaps


def _predictions(num_people, num_pictures, right=0.7):
    rng = np.random.default_rng(num_people)
    labels = rng.integers(0, num_people, num_pictures)
    other = np.minimum(num_people - 1, rng.exponential(num_people / 4, num_pictures).astype(np.int64))
    return np.where(rng.random(num_pictures) < right, labels, other), labels


def _names(num_people):
    return [f"identity-of-a-long-name-{number}" for number in range(num_people)]


def _cells(axes):
    """(row, column) -> the text there."""
    return {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes.texts}


def _pairs(figure):
    return [text.get_text() for text in figure.axes[1].texts]


def _ticks(axis):
    return [text.get_text() for text in axis.get_ticklabels()]


COUNTS = np.array([[5, 0, 2], [1, 0, 3], [0, 0, 0]])


def test_counts_stand_in_their_cells_and_colours_are_shares_of_the_row():
    figure = confusion(COUNTS, num_people=3, title="celeba", names=["anna", "ben", "carla"])
    axes = figure.axes[0]
    assert _cells(axes) == {(0, 0): "5", (0, 2): "2", (1, 0): "1", (1, 2): "3"}
    (image,) = axes.get_images()
    np.testing.assert_allclose(image.get_array()[:2], [[5 / 7, 0, 2 / 7], [1 / 4, 0, 3 / 4]])
    assert np.ma.getmaskarray(image.get_array())[2].all()  # of nobody there is no share
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted person", "true person")
    assert _ticks(axes.xaxis) == _ticks(axes.yaxis) == ["anna", "ben", "carla"]
    assert figure._suptitle.get_text() == "celeba"
    assert axes.get_title().startswith("3 people, 11 pictures")


def test_the_first_row_is_on_top():
    axes = confusion(COUNTS, num_people=3, title="").axes[0]
    bottom, top = axes.get_ylim()
    assert bottom > top


def test_most_confused_pairs_come_first_and_the_diagonal_is_no_confusion():
    assert _pairs(confusion(COUNTS, num_people=3, title="")) == ["1 → 2: 3", "0 → 2: 2", "1 → 0: 1"]
    named = confusion(COUNTS, num_people=3, title="", names=["anna", "ben", "carla"])
    assert _pairs(named)[0] == "ben → carla: 3"
    assert _pairs(confusion(np.diag([3, 4]), num_people=2, title="")) == ["no picture was\ntaken for another"]


def test_numbers_read_on_their_cells():
    axes = confusion(np.array([[9, 1], [5, 5]]), num_people=2, title="").axes[0]
    inks = {cell: text.get_color() for cell, text in zip(_cells(axes), axes.texts, strict=True)}
    assert (inks[0, 0], inks[0, 1]) == ("#FFFFFF", "#000000")


def test_thirty_are_written_and_more_are_not():
    for num_people, written in ((30, True), (31, False)):
        counts = np.full((num_people, num_people), 1, dtype=np.int64)
        assert bool(confusion(counts, num_people=num_people, title="").axes[0].texts) is written


def test_groups_are_said_and_named_by_their_numbers():
    predicted, labels = np.array([499, 0, 7, 8]), np.array([0, 0, 0, 499])
    counts = grouped_confusion(predicted, labels, 500)
    figure = confusion(counts, num_people=500, title="")
    axes = figure.axes[0]
    assert axes.get_title() == "500 people in 64 groups of 7 or 8, 4 pictures"
    # Class c is in group c * 64 // 500: 0 to 7 in 0, 8 in 1; 63 * 500 / 64 = 492.2, so group 63 begins at 493.
    assert _ticks(axes.xaxis)[0] == "0-7"
    assert _pairs(figure) == ["0-7 → 493-499: 1", "493-499 → 8-15: 1"]
    assert "groups" in figure.axes[1].get_title()
    assert "within a group" in figure.axes[2].get_xlabel()


@pytest.mark.parametrize("num_people", [65, 85, 128, 500])
def test_the_names_of_groups_are_those_of_the_classes_in_them(num_people):
    classes = np.arange(num_people)
    # One error from each class to class 0: where it is counted shows its group.
    counts = grouped_confusion(np.zeros(num_people, dtype=np.int64), classes, num_people)
    figure = confusion(counts, num_people=num_people, title="")
    for text in _pairs(figure):
        first, *rest = text.split(" → ")[0].split("-")
        last = int(rest[0]) if rest else int(first)
        group = int(first) * 64 // num_people
        assert [c for c in classes if c * 64 // num_people == group] == list(range(int(first), last + 1))


def test_few_people_are_all_shown_by_name():
    predicted, labels = np.array([0, 1, 1]), np.array([0, 1, 0])
    axes = confusion_of_predictions(predicted, labels, ["anna", "ben"]).axes[0]
    assert _cells(axes) == {(0, 0): "1", (0, 1): "1", (1, 1): "1"}


def test_of_many_people_the_most_confused_are_shown_and_the_others_are_one():
    names = [f"p{number}" for number in range(100)]
    labels = np.concatenate([np.arange(100), [42, 42, 42, 7]])
    predicted = np.concatenate([np.arange(100), [17, 17, 99, 17]])
    figure = confusion_of_predictions(predicted, labels, names)
    axes = figure.axes[0]
    shown = _ticks(axes.yaxis)
    # Errors of them or for them: p17 and p42 three each, then p7 and p99 one each; the rest in their order.
    assert shown[:6] == ["p17", "p42", "p7", "p99", "p0", "p1"]
    assert (len(shown), shown[-1]) == (26, "all others")
    cells = _cells(axes)
    assert (cells[1, 0], cells[1, 1], cells[1, 3], cells[2, 0], cells[25, 25]) == ("2", "1", "1", "1", "75")
    assert sum(int(text) for text in cells.values()) == 104
    assert _pairs(figure) == ["p42 → p17: 2", "p7 → p17: 1", "p42 → p99: 1"]
    assert axes.get_title().startswith("the 25 most confused of 100 people, 104 pictures")


def test_pairs_are_found_among_everyone_and_not_only_those_shown():
    # 30 pairs of people confused once or twice each: of 60 only 25 are shown, the list is of all.
    names = [f"p{number}" for number in range(60)]
    labels = np.repeat(np.arange(0, 60, 2), 1)
    figure = confusion_of_predictions(labels + 1, labels, names)
    assert len(_pairs(figure)) == 12
    assert int(_cells(figure.axes[0])[25, 25]) == 30 - 13  # p0 to p24 are shown: 12 whole pairs and p24 -> an other


@pytest.mark.parametrize(
    ("counts", "num_people", "names"),
    [(np.zeros((2, 3), dtype=np.int64), 3, None), (np.eye(3, dtype=np.int64), 2, None), (np.eye(2), 2, ["anna"])],
)
def test_what_does_not_fit_is_refused(counts, num_people, names):
    with pytest.raises(ValueError, match=r"must be \[G, G\]|names for"):
        confusion(counts, num_people=num_people, title="", names=names)


@pytest.mark.parametrize("num_people", [1, 5, 30, 60, 85, 500])
def test_nothing_overlaps_from_one_person_to_five_hundred(num_people):
    predicted, labels = _predictions(num_people, 20 * num_people)
    counts = grouped_confusion(predicted, labels, num_people)
    assert_nothing_overlaps(confusion(counts, num_people=num_people, title="celeba"), "numbered")
    assert_nothing_overlaps(confusion_of_predictions(predicted, labels, _names(num_people)), "named")


def test_large_counts_stay_in_their_cells():
    assert_nothing_overlaps(confusion(np.full((30, 30), 123_456), num_people=30, title=""), "large")
