"""Closed-set scores (identities seen in training) from sums that merge over clients."""

from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError

MOST_GROUPS: Final = 64  # of people in a confusion matrix that is kept or sent


@dataclass(frozen=True, kw_only=True)
class ClosedSetSums:
    """What one client sends of its closed-set evaluation. The per-class scores are summed over its classes.

    The people of different clients are different people, so adding two clients' sums gives the sums over the union of
    their classes. Two parts of one client's pictures must not be added: they have classes in common.
    """

    num_examples: int
    correct: int
    loss_sum: float  # summed over examples
    num_classes: int  # that occur in the labels or in the predictions
    precision_sum: float
    recall_sum: float
    f1_sum: float

    def __add__(self, other: "ClosedSetSums") -> "ClosedSetSums":
        values: dict[str, Any] = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return ClosedSetSums(**values)

    def scores(self) -> dict[str, float]:
        """accuracy, loss (mean over examples), precision, recall, f1 (macro averages over classes).

        Raises DataError when there is no example: an empty score is an error, not zero.
        """
        if self.num_examples == 0 or self.num_classes == 0:
            raise DataError("closed-set scores of no pictures; give the split at least one picture of each person.")
        return {
            "accuracy": self.correct / self.num_examples,
            "loss": self.loss_sum / self.num_examples,
            "precision": self.precision_sum / self.num_classes,
            "recall": self.recall_sum / self.num_classes,
            "f1": self.f1_sum / self.num_classes,
        }


def closed_set_sums(predicted: NDArray[np.int64], labels: NDArray[np.int64], loss_sum: float) -> ClosedSetSums:
    """Sums over all of one client's predictions of one split.

    predicted, labels: [N] int64, the client's own class numbers.  loss_sum: the loss summed over the N examples.
    A class that is never predicted has precision 0, one without examples recall 0 (scikit-learn's zero_division=0);
    classes that occur in neither do not count.
    Raises ValueError when the two arrays are not of one length.
    """
    if predicted.ndim != 1 or predicted.shape != labels.shape:
        raise ValueError(f"predicted {predicted.shape} and labels {labels.shape} must be of one length")
    classes, numbers = np.unique(np.concatenate([predicted, labels]), return_inverse=True)
    num_classes = len(classes)
    predicted_number, label_number = numbers[: len(predicted)], numbers[len(predicted) :]
    hits = np.bincount(label_number[predicted_number == label_number], minlength=num_classes)
    num_predicted = np.bincount(predicted_number, minlength=num_classes)
    num_true = np.bincount(label_number, minlength=num_classes)
    return ClosedSetSums(
        num_examples=len(labels),
        correct=int(hits.sum()),
        loss_sum=float(loss_sum),
        num_classes=num_classes,
        precision_sum=float((hits / np.maximum(num_predicted, 1)).sum()),
        recall_sum=float((hits / np.maximum(num_true, 1)).sum()),
        f1_sum=float((2 * hits / (num_predicted + num_true)).sum()),  # never 0: each class occurs somewhere
    )


def grouped_confusion(
    predicted: NDArray[np.int64], labels: NDArray[np.int64], num_classes: int, most: int = MOST_GROUPS
) -> NDArray[np.int64]:
    """How often pictures of one class were taken for another; classes are merged into groups when there are many.

    predicted, labels: [N] int64 in [0, num_classes), one client's own class numbers.
    Returns [G, G] int64, rows true and columns predicted, with G = min(num_classes, most): class c counts in group
    c * G // num_classes, which is c itself when num_classes <= most.  Parts of one client's pictures merge by addition;
    two clients' classes are different people, whose counts say nothing when added.
    Raises ValueError when the arrays are not of one length or a number is out of range.
    """
    if predicted.ndim != 1 or predicted.shape != labels.shape:
        raise ValueError(f"predicted {predicted.shape} and labels {labels.shape} must be of one length")
    if num_classes < 1 or most < 1:
        raise ValueError(f"num_classes = {num_classes} and most = {most} must be at least 1")
    for numbers in (predicted, labels):
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < num_classes:
            raise ValueError(f"class numbers {numbers.min()} to {numbers.max()} must be in [0, {num_classes})")
    num_groups = min(num_classes, most)
    cells = (labels * num_groups // num_classes) * num_groups + predicted * num_groups // num_classes
    return np.bincount(cells, minlength=num_groups**2).reshape(num_groups, num_groups).astype(np.int64)
