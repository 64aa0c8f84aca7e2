"""Closed-set sums by hand, and that they merge."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from common.errors import DataError
from common.metrics.figures import closed_scores
from common.metrics.sums import ClosedSetSums, closed_set_sums, grouped_confusion


def test_by_hand() -> None:
    # class 0: 1 of 2 predicted right, 1 of 2 found; class 1: 1 of 2, 1 of 1; class 3 never predicted; class 2 nowhere;
    # class 5 predicted once, wrongly.
    labels, predicted = np.array([0, 0, 1, 3, 3]), np.array([0, 1, 1, 0, 5])
    sums = closed_set_sums(predicted, labels, 2.5)
    assert (sums.num_examples, sums.correct, sums.loss_sum, sums.num_classes) == (5, 2, 2.5, 4)
    assert sums.precision_sum == pytest.approx(0.5 + 0.5)
    assert sums.recall_sum == pytest.approx(0.5 + 1.0)
    assert sums.f1_sum == pytest.approx(0.5 + 2 / 3)
    assert closed_scores(sums) == {
        "accuracy": pytest.approx(0.4),
        "loss": pytest.approx(0.5),
        "precision": pytest.approx(0.25),
        "recall": pytest.approx(0.375),
        "f1": pytest.approx((0.5 + 2 / 3) / 4),
    }


def test_sums_add_field_by_field() -> None:
    one = ClosedSetSums(
        num_examples=1, correct=2, loss_sum=3.0, num_classes=4, precision_sum=5.0, recall_sum=6.0, f1_sum=7.0
    )
    assert one + one == ClosedSetSums(
        num_examples=2, correct=4, loss_sum=6.0, num_classes=8, precision_sum=10.0, recall_sum=12.0, f1_sum=14.0
    )


def test_fields_are_plain_numbers() -> None:
    sums = closed_set_sums(np.array([0, 1]), np.array([0, 1]), np.float32(1.0))
    kinds = {name: type(value) for name, value in vars(sums).items()}
    whole = {"num_examples", "correct", "num_classes"}
    assert kinds == {name: int if name in whole else float for name in kinds}


def test_no_pictures_are_an_error_and_not_zero() -> None:
    empty = closed_set_sums(np.array([], dtype=np.int64), np.array([], dtype=np.int64), 0.0)
    with pytest.raises(DataError, match="no pictures"):
        closed_scores(empty)
    one = closed_set_sums(np.array([1]), np.array([1]), 0.5)
    assert closed_scores(one + empty) == closed_scores(one)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="must be of one length"):
        closed_set_sums(np.array([1, 2]), np.array([1]), 0.0)


def test_confusion_counts_true_in_rows_and_predicted_in_columns() -> None:
    counts = grouped_confusion(np.array([0, 2, 2, 1]), np.array([0, 0, 2, 0]), 3)
    assert counts.tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 1]]
    assert counts.dtype == np.int64


def test_confusion_groups_classes_when_there_are_many() -> None:
    # 5 classes in 2 groups, c * 2 // 5: classes 0, 1, 2 and classes 3, 4.
    labels, predicted = np.array([0, 1, 2, 3, 4]), np.array([2, 3, 2, 3, 0])
    assert grouped_confusion(predicted, labels, 5, most=2).tolist() == [[2, 1], [1, 1]]
    assert grouped_confusion(predicted, labels, 5, most=5).trace() == 2


def test_confusion_of_parts_adds_up_to_that_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 500, (2, 3000))
    parts = [grouped_confusion(predicted[half], labels[half], 500) for half in (slice(1234), slice(1234, None))]
    whole = grouped_confusion(predicted, labels, 500)
    assert whole.shape == (64, 64)
    assert whole.sum() == 3000
    np.testing.assert_array_equal(parts[0] + parts[1], whole)
    oracle = confusion_matrix(labels * 64 // 500, predicted * 64 // 500, labels=range(64))
    np.testing.assert_array_equal(whole, oracle)


def test_confusion_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="one length"):
        grouped_confusion(np.array([0, 1]), np.array([0]), 2)
    for predicted, labels in (([0, 2], [0, 1]), ([0, 1], [0, -1])):
        with pytest.raises(ValueError, match=r"must be in \[0, 2\)"):
            grouped_confusion(np.array(predicted), np.array(labels), 2)
    nothing = np.array([], dtype=np.int64)
    assert grouped_confusion(nothing, nothing, 3).sum() == 0
    with pytest.raises(ValueError, match="at least 1"):
        grouped_confusion(nothing, nothing, 0)
