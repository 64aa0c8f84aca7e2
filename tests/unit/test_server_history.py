"""The choice of the best round, and pooled scores from merged counts."""

import dataclasses

import pytest
from sklearn.metrics import roc_auc_score
from tiny_federation import sums_with

from common.metrics.figures import scores
from common.metrics.sums import pooled
from server.record.history import History, Tally, client_metrics


def score(history, step, split, by_client):
    total = pooled(by_client)
    metrics = {name: client_metrics(split, sums) for name, sums in by_client.items()}
    return history.score(step, Tally(split, total, by_client, metrics))


def test_the_best_is_the_first_of_the_highest_validation_auc_and_never_round_0():
    history = History()
    for step, auc in enumerate((0.99, 0.60, 0.75, 0.75, 0.70)):
        score(history, step, "val", {"alpha": sums_with(auc)})
    assert (history.best_round, history.best_val_auc) == (2, pytest.approx(0.75))


def test_where_no_clients_own_is_known_the_pooled_auc_chooses():
    history = History()
    for step, auc in enumerate((0.99, 0.60, 0.75, 0.70)):
        history.score(step, Tally("val", sums_with(auc)))  # of a masked sum
    assert (history.best_round, history.best_val_auc) == (2, pytest.approx(0.75))


def test_test_scores_are_kept_and_choose_nothing():
    history = History()
    score(history, 1, "val", {"alpha": sums_with(0.8)})
    score(history, 2, "val", {"alpha": sums_with(0.7)})
    score(history, 2, "test", {"alpha": sums_with(1.0)})
    assert history.best_round == 1
    assert (history.tested(1), history.tested(2)) == (False, True)


def test_pooled_auc_is_that_of_all_pairs_and_no_mean_of_the_clients_aucs():
    """beta's scores lie 2,500 bins above alpha's, so beta's impostors beat alpha's genuine pairs.

    Each client alone: AUC 1.0. Together, scikit-learn over the 200 + 200 scores says 0.75.
    """
    alpha = sums_with(1.0)
    shifted = dataclasses.replace(alpha, pairs=alpha.pairs.copy())
    shifted.pairs[:, 2500:] = alpha.pairs[:, :-2500]
    shifted.pairs[:, :2500] = 0
    both = {"alpha": alpha, "beta": shifted}
    metrics = score(History(), 1, "val", both)
    labels = [1] * 100 + [0] * 100 + [1] * 100 + [0] * 100
    scores = [5000] * 100 + [4000] * 100 + [7500] * 100 + [6500] * 100
    assert metrics["val_roc_auc"] == pytest.approx(roc_auc_score(labels, scores))
    assert metrics["val_roc_auc"] == pytest.approx(0.75)


def test_pooled_loss_and_accuracy_weigh_pictures_and_not_clients():
    """1 of 4 and 3 of 4 right are 4 of 8; with 12 more all wrong at the second: 4 of 20.  Loss: (2 + 2) / 20."""
    small = sums_with(0.5)
    large = dataclasses.replace(small, closed=dataclasses.replace(small.closed, num_examples=16, correct=3))
    metrics = score(History(), 1, "test", {"a": small, "b": large})
    assert metrics["round_test_accuracy"] == pytest.approx(4 / 20)
    assert metrics["round_test_loss"] == pytest.approx(4.0 / 20)


def test_rows_are_in_the_order_of_rounds_with_the_clients_beside():
    history = History()
    score(history, 1, "val", {"alpha": sums_with(0.8)})
    score(history, 0, "val", {"alpha": sums_with(0.5)})
    history.at(1).clients["alpha"] = {"val_roc_auc": 0.8}
    assert [row["step"] for row in history.rows()] == [0.0, 1.0]
    assert history.client_rows() == {"alpha": [{"step": 1.0, "val_roc_auc": 0.8}]}


def test_pooling_one_client_changes_nothing():
    one = sums_with(0.6)
    assert scores(pooled({"alpha": one})) == scores(one)


def test_validations_since_the_best_counts_models_scored_and_no_better():
    """Test scores do not count, nor does a round whose validation was not scored; a better model starts anew."""
    history = History()
    assert history.validations_since_best() == 0
    for step, auc, expected in ((0, 0.9, 1), (1, 0.6, 0), (2, 0.5, 1), (4, 0.6, 2), (5, 0.7, 0), (6, 0.7, 1)):
        score(history, step, "val", {"alpha": sums_with(auc)})
        assert history.validations_since_best() == (expected if step > 0 else 0)
    score(history, 7, "test", {"alpha": sums_with(0.9)})
    assert history.validations_since_best() == 1
