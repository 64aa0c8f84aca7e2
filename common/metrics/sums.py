"""What one evaluation adds up: the one value that clients send, the server merges and keeps, and figures are made of.

A new sum is a field here, with its shape in COUNTS or its name among the numbers, and what counts it in
`common/training/evaluation.py`: the wire and the checkpoint carry whatever `EvaluationSums.numbers` and `arrays` hold.
"""

import functools
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.metrics.figures import KINDS
from common.metrics.folds import FOLD_BINS, NUM_FOLDS

NUM_BINS: Final = 8192  # over cosine in [-1, 1]: 0.000244 each
MOST_GROUPS: Final = 64  # of people in a confusion matrix that is kept or sent
# The arrays in the order in which they travel, with their shapes.  None: square and at most MOST_GROUPS wide, of one
# client's people, so it is not merged; the one such stands last.
COUNTS: Final[Mapping[str, tuple[int, ...] | None]] = {
    "pairs": (2, NUM_BINS),
    "folds": (NUM_FOLDS, 2, FOLD_BINS),
    "twins": (2, NUM_BINS),
    "confusion": None,
}


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

    def at_most(self, num_pictures: int) -> "ClosedSetSums":
        """The same shares of so many pictures, and of so many classes, at most; itself where there are no more."""
        if max(self.num_examples, self.num_classes) <= num_pictures:
            return self
        examples, classes = min(self.num_examples, num_pictures), min(self.num_classes, num_pictures)
        of_examples, of_classes = examples / max(self.num_examples, 1), classes / max(self.num_classes, 1)
        return ClosedSetSums(
            num_examples=examples,
            correct=int(self.correct * of_examples),
            loss_sum=self.loss_sum * of_examples,
            num_classes=classes,
            precision_sum=self.precision_sum * of_classes,
            recall_sum=self.recall_sum * of_classes,
            f1_sum=self.f1_sum * of_classes,
        )

    def __add__(self, other: "ClosedSetSums") -> "ClosedSetSums":
        values: dict[str, Any] = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return ClosedSetSums(**values)


CLOSED_FIELDS: Final = tuple(field.name for field in fields(ClosedSetSums))
WHOLE_NUMBERS: Final = tuple(field.name for field in fields(ClosedSetSums) if field.type is int)


def no_twins() -> NDArray[np.int64]:
    """The counts of a data set without families: [2, NUM_BINS] zeros."""
    return np.zeros((2, NUM_BINS), dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class EvaluationSums:
    """What one evaluation adds up; two clients' sums merge by addition."""

    closed: ClosedSetSums
    pairs: NDArray[np.int64]  # [2, NUM_BINS]: genuine and impostor pairs by cosine
    folds: NDArray[np.int64]  # [NUM_FOLDS, 2, FOLD_BINS]: the pairs of ten-fold accuracy, likewise
    confusion: NDArray[np.int64] | None = None  # [G, G] of one client's people; None for several clients' sum
    twins: NDArray[np.int64] = field(default_factory=no_twins)  # [2, NUM_BINS]: of `pairs` those of twins

    def __add__(self, other: "EvaluationSums") -> "EvaluationSums":
        """Both clients' sums. Their people differ, so there is no common confusion matrix."""
        merged = {name: getattr(self, name) + getattr(other, name) for name, shape in COUNTS.items() if shape}
        return EvaluationSums(closed=self.closed + other.closed, **merged)

    def at_most(self, num_pictures: int) -> "EvaluationSums":
        """The same shares, counted as if the pictures were so many at most; itself where they can be.

        So many pictures have n (n - 1) / 2 pairs. Counts are rounded down.
        """
        most = num_pictures * (num_pictures - 1) // 2
        counts = {name: _scaled(getattr(self, name), most) for name in ("pairs", "folds")}
        closed = self.closed.at_most(num_pictures)
        if closed is self.closed and all(counts[name] is getattr(self, name) for name in counts):
            return self
        # By the factor of all pairs, so that no bin has more of them than pairs.
        share = min(1.0, most / max(float(self.pairs.sum(dtype=np.float64)), 1.0))
        twins = np.minimum(np.floor(self.twins * share).astype(np.int64), counts["pairs"])
        return replace(self, closed=closed, twins=twins, **counts)

    def numbers(self) -> dict[str, float]:
        """The sums that are single numbers, by name."""
        return asdict(self.closed)

    def arrays(self) -> dict[str, NDArray[np.int64]]:
        """The counts by name, in the order of COUNTS; without those that are not there."""
        return {name: counts for name in COUNTS if (counts := getattr(self, name)) is not None}

    @classmethod
    def from_parts(cls, numbers: Mapping[str, Any], arrays: Mapping[str, NDArray[np.int64]]) -> "EvaluationSums":
        """The inverse of `numbers` and `arrays`.  Raises ValueError, KeyError or TypeError for parts of none."""
        for name, counts in arrays.items():
            wanted = COUNTS[name] or counts.shape[:1] * 2
            if counts.dtype != np.int64 or counts.shape != wanted or bool((counts < 0).any()):
                raise ValueError(f"{name} is {counts.dtype} {counts.shape}, or negative")
        return cls(closed=ClosedSetSums(**numbers), **arrays)

    def of_kind(self, kind: str) -> NDArray[np.int64]:
        """The pairs of one of KINDS, [2, NUM_BINS]."""
        return histogram_of(kind, self.pairs, self.twins)

    @property
    def has_pairs(self) -> bool:
        """Whether there are genuine and impostor pairs, so that they have figures."""
        return bool(self.pairs.any(axis=1).all())

    @property
    def has_kinds(self) -> bool:
        """Whether there are genuine and impostor pairs of each of KINDS."""
        return all(bool(self.of_kind(kind).any(axis=1).all()) for kind in KINDS)


# Of a split that a client does not share: it adds nothing to a sum.
NOTHING: Final = EvaluationSums(
    closed=ClosedSetSums(
        num_examples=0, correct=0, loss_sum=0.0, num_classes=0, precision_sum=0.0, recall_sum=0.0, f1_sum=0.0
    ),
    pairs=no_twins(),
    folds=np.zeros((NUM_FOLDS, 2, FOLD_BINS), dtype=np.int64),
)


def open_set_only(sums: EvaluationSums) -> EvaluationSums:
    """The same without what a head says of its own people: of a model whose head nobody has trained."""
    return replace(sums, closed=NOTHING.closed, confusion=np.zeros((0, 0), dtype=np.int64))


def _scaled(counts: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """The counts, or as many times fewer of each as makes `most` of them all."""
    total = float(counts.sum(dtype=np.float64))
    return counts if total <= most else np.floor(counts * (most / total)).astype(np.int64)


def pooled(by_client: Mapping[str, EvaluationSums]) -> EvaluationSums:
    """All clients' sums added: pairs within each client's people, summed."""
    return functools.reduce(operator.add, by_client.values())


def stranger_histogram(pairs: NDArray[np.int64], twins: NDArray[np.int64]) -> NDArray[np.int64]:
    """All genuine pairs, and the impostor pairs of strangers: [2, NUM_BINS] int64.

    pairs, twins: as `pairs.pair_histograms` returns them, or sums of such.
    """
    return np.stack([pairs[0], pairs[1] - twins[1]])


def histogram_of(kind: str, pairs: NDArray[np.int64], twins: NDArray[np.int64]) -> NDArray[np.int64]:
    """The histogram of one of KINDS, [2, NUM_BINS] int64, from that of all pairs and that of the twins' pairs."""
    return {"all": pairs, "twins": twins, "strangers": stranger_histogram(pairs, twins)}[kind]


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
