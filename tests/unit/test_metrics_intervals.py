"""Intervals from sums alone are never narrower than those of people who are drawn."""

import math

import numpy as np

from common.metrics.bootstrap import Drawn
from common.metrics.figures import FIGURES, wilson
from common.metrics.folds import choose_pairs, fold_histogram, pair_scores
from common.metrics.intervals import intervals_from_sums, intervals_of_people
from common.metrics.pairs import pair_histogram
from common.metrics.sums import ClosedSetSums, EvaluationSums


def people(num_people: int, num_pictures: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of people with as many pictures each, and who each shows."""
    random = np.random.default_rng(seed)
    person = np.repeat(np.arange(num_people), num_pictures)
    own = random.normal(size=(num_people, 16))[person]
    return (own + 1.2 * random.normal(size=(len(person), 16))).astype(np.float32), person


def sums_of(embeddings: np.ndarray, person: np.ndarray) -> EvaluationSums:
    chosen = choose_pairs(person, seed=1)
    closed = ClosedSetSums(
        num_examples=40, correct=30, loss_sum=9.0, num_classes=8, precision_sum=6.0, recall_sum=5.0, f1_sum=4.0
    )
    folds = fold_histogram(pair_scores(embeddings, chosen), chosen)
    return EvaluationSums(closed=closed, pairs=pair_histogram(embeddings, person), folds=folds)


def test_every_compared_figure_has_an_interval_and_it_is_never_narrower_than_with_people_drawn():
    held = {"a": people(15, 6, 3), "b": people(25, 4, 4)}
    sums = {client: sums_of(*own) for client, own in held.items()}
    drawn = {
        client: Drawn.by_seed(embeddings, person, person, num_replicates=200, seed=number)
        for number, (client, (embeddings, person)) in enumerate(held.items())
    }
    widest, widest_of_all = intervals_from_sums(sums)
    found, of_all = intervals_of_people(sums, drawn)
    for wide, narrow in ((widest["a"], found["a"]), (widest["b"], found["b"]), (widest_of_all, of_all)):
        assert wide.keys() == narrow.keys() >= {row.name for row in FIGURES if row.is_compared and row.of != "judged"}
        for name, (value, low, high) in narrow.items():
            if name == "loss":
                assert math.isnan(low)
                continue
            assert low <= value <= high, name
            assert wide[name][0] == value
            assert wide[name][2] - wide[name][1] >= high - low - 1e-12, name
    assert found["a"]["roc_auc"] != widest["a"]["roc_auc"]
    assert found["a"]["f1"] == (0.5, *wilson(4.0, 8))
    more = {client: sums[client] for client in ("a",)} | {f"b{n}": sums["b"] for n in range(4)}
    span = [high - low for _, low, high in (intervals_from_sums(sums)[1]["eer"], intervals_from_sums(more)[1]["eer"])]
    assert span[1] < span[0], "more people, less doubt"
