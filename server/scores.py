"""The server's view of the scores: sums of all clients merged, then turned into ratios, never the other way round."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from common.errors import DataError
from common.evaluation import EvaluationSums
from common.metrics.classification import ClosedSetSums
from common.wire import Reply, SplitSums

MOST_TOLD_APART: Final = 32  # more clients have no runs, curves and sums of their own, but quantiles over them
INTEGER_SUMS = ("num_examples", "correct", "num_classes")
_ROUND_OPEN = ("roc_auc", "eer", "twins_roc_auc", "twins_eer", "strangers_roc_auc")


def evaluation_sums(sums: SplitSums) -> EvaluationSums:
    """The sums of one reply in the form of `common.evaluation`."""
    values: dict[str, Any] = {k: int(v) if k in INTEGER_SUMS else float(v) for k, v in sums.closed.items()}
    return EvaluationSums(
        closed=ClosedSetSums(**values),
        pairs=sums.pairs,
        folds=sums.folds,
        confusion=sums.confusion,
        twins=sums.twins,
    )


def closed_scores(sums: EvaluationSums) -> dict[str, float]:
    """accuracy, loss, precision, recall, f1; empty when no picture was left for the closed set."""
    return sums.closed.scores() if sums.closed.num_examples > 0 else {}


def open_scores(sums: EvaluationSums) -> dict[str, float]:
    """roc_auc, eer, tar_at_far_*, ten_fold_accuracy; empty when there are no genuine or no impostor pairs.

    Where there are twins also twins_roc_auc, twins_eer and strangers_roc_auc.
    """
    try:
        return sums.open_scores() | _twin_scores(sums)
    except DataError:
        return {}


def _twin_scores(sums: EvaluationSums) -> dict[str, float]:
    """twins_roc_auc, twins_eer, strangers_roc_auc; empty when there are no pairs of twins."""
    try:
        return sums.twin_scores()
    except DataError:
        return {}


def figures(sums: EvaluationSums) -> dict[str, float]:
    """The scores of both sets, as far as there is anything to score."""
    return closed_scores(sums) | open_scores(sums)


def round_metrics(split: str, sums: EvaluationSums) -> dict[str, float]:
    """The round's metrics by the names that the tracking shows: round_test_auc, round_val_auc, ..."""
    closed, open_set = closed_scores(sums), open_scores(sums)
    shown = {"loss": closed.get("loss"), "acc": closed.get("accuracy")}
    shown |= {name.replace("roc_auc", "auc"): open_set.get(name) for name in _ROUND_OPEN}
    return {f"round_{split}_{name}": value for name, value in shown.items() if value is not None}


def client_metrics(split: str, sums: EvaluationSums) -> dict[str, float]:
    """One client's metrics: test_accuracy, test_precision, ..., test_roc_auc, test_eer, test_tar_at_far_1e-3."""
    return {f"{split}_{name}": value for name, value in figures(sums).items()}


def merged_train(replies: Mapping[str, Reply]) -> dict[str, float]:
    """The clients' training sums, added."""
    total: dict[str, float] = {}
    for reply in replies.values():
        for name, value in reply.train.items():
            total[name] = total.get(name, 0.0) + value
    return total


@dataclass
class Tally:
    """One split's sums of a model as the replies come in: pooled, and by client while these are few."""

    split: str
    total: EvaluationSums | None = None  # None: nobody yet
    by_client: dict[str, EvaluationSums] = field(default_factory=dict)  # empty for more than MOST_TOLD_APART
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)  # client -> `client_metrics`, of all

    def add(self, replies: Mapping[str, Reply]) -> None:
        """Add the sums of other clients, which are half a megabyte each."""
        for name, reply in replies.items():
            sums = evaluation_sums(reply.evaluations[self.split])
            self.total = sums if self.total is None else self.total + sums
            self.metrics[name] = client_metrics(self.split, sums)
            if len(self.metrics) <= MOST_TOLD_APART:
                self.by_client[name] = sums
            else:
                self.by_client.clear()


def quantiles(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Of each figure the deciles 1, 5 and 9 over the clients that have it: {"clients_train_loss_p50": 1.2, ...}."""
    values: dict[str, list[float]] = {}
    for own in metrics.values():
        for name, value in own.items():
            values.setdefault(name, []).append(value)
    return {
        f"clients_{name}_p{percent}": float(np.percentile(numbers, percent))
        for name, numbers in values.items()
        for percent in (10, 50, 90)
    }
