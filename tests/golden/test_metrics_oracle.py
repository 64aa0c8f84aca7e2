"""The metrics against scikit-learn, as an independent implementation."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn import metrics as sklearn_metrics

from common.metrics.figures import closed_scores, eer, roc_auc, tar_at_far
from common.metrics.pairs import pair_histogram
from common.metrics.sums import NUM_BINS, closed_set_sums

Scores = NDArray[np.float64]
Random = np.random.Generator

NUM_GENUINE, NUM_IMPOSTOR = 20_000, 200_000

# What a model's genuine and impostor cosines look like: (genuine, impostor), each a draw of the given size.
DISTRIBUTIONS: dict[str, tuple[Callable[[Random, int], Scores], Callable[[Random, int], Scores]]] = {
    "nothing learned": (lambda r, n: r.normal(0, 0.1, n), lambda r, n: r.normal(0, 0.1, n)),
    "weak model": (lambda r, n: r.normal(0.25, 0.2, n), lambda r, n: r.normal(0.05, 0.15, n)),
    "good model": (lambda r, n: r.beta(8, 4, n) * 0.9, lambda r, n: r.normal(0, 0.08, n)),
    "hard pictures in the tail": (
        lambda r, n: np.where(r.random(n) < 0.1, r.normal(0.05, 0.1, n), r.normal(0.6, 0.1, n)),
        lambda r, n: np.where(r.random(n) < 0.02, r.normal(0.5, 0.1, n), r.normal(0, 0.07, n)),
    ),
    # Measured on real faces, untrained MobileNetV2: mean 0.979, deviation 0.009, the narrowest of the four backbones.
    "cone of an untrained net": (lambda r, n: r.normal(0.981, 0.009, n), lambda r, n: r.normal(0.979, 0.009, n)),
    "worse than chance": (lambda r, n: r.normal(-0.1, 0.2, n), lambda r, n: r.normal(0.1, 0.2, n)),
}


def draw(name: str, seed: int) -> tuple[Scores, Scores]:
    random = np.random.default_rng(seed)
    genuine, impostor = DISTRIBUTIONS[name]
    return np.clip(genuine(random, NUM_GENUINE), -1, 1), np.clip(impostor(random, NUM_IMPOSTOR), -1, 1)


def histogram(genuine: Scores, impostor: Scores) -> NDArray[np.int64]:
    return np.stack([np.histogram(row, bins=NUM_BINS, range=(-1, 1))[0] for row in (genuine, impostor)])


def sklearn_curve(genuine: Scores, impostor: Scores) -> tuple[Scores, Scores, float]:
    """(far, tar, auc) of scikit-learn."""
    truth = np.repeat([1, 0], [len(genuine), len(impostor)])
    scores = np.concatenate([genuine, impostor])
    far, tar, _ = sklearn_metrics.roc_curve(truth, scores, drop_intermediate=False)
    return far, tar, float(sklearn_metrics.roc_auc_score(truth, scores))


def sklearn_eer(far: Scores, tar: Scores) -> float:
    """The middle of FAR and FRR where they are nearest: the usual reading of scikit-learn's curve."""
    nearest = int(np.argmin(np.abs(far + tar - 1)))
    return float((far[nearest] + 1 - tar[nearest]) / 2)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_auc_and_eer_equal_scikit_learns(name: str, seed: int) -> None:
    genuine, impostor = draw(name, seed)
    far, tar, auc = sklearn_curve(genuine, impostor)
    own = histogram(genuine, impostor)
    assert roc_auc(own) == pytest.approx(auc, abs=1e-4)
    assert eer(own) == pytest.approx(sklearn_eer(far, tar), abs=1e-3)


@pytest.mark.parametrize("name", ["weak model", "good model", "hard pictures in the tail"])
@pytest.mark.parametrize("limit", [1e-1, 1e-2, 1e-3])
def test_tar_at_far_equals_scikit_learns(name: str, limit: float) -> None:
    genuine, impostor = draw(name, 2)
    far, tar, _ = sklearn_curve(genuine, impostor)
    expected = tar[far <= limit].max()
    own = tar_at_far(histogram(genuine, impostor), limit)
    assert own <= expected + 1e-12  # a bin's edge is a coarser threshold, and never a looser one
    assert own == pytest.approx(expected, abs=5e-3)


def test_the_whole_way_from_embeddings() -> None:
    random = np.random.default_rng(3)
    person = random.integers(0, 60, 900)
    embeddings = (random.normal(size=(60, 64))[person] * 0.4 + random.normal(size=(900, 64))).astype(np.float32)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    first, second = np.triu_indices(900, k=1)
    scores = (unit[first] * unit[second]).sum(axis=1).astype(np.float64)
    same = person[first] == person[second]
    far, tar, auc = sklearn_curve(scores[same], scores[~same])
    own = pair_histogram(embeddings, person)
    assert 0.7 < auc < 0.99  # neither trivial nor chance
    assert roc_auc(own) == pytest.approx(auc, abs=1e-4)
    assert eer(own) == pytest.approx(sklearn_eer(far, tar), abs=1e-3)


def test_pooled_eer_is_that_of_the_pooled_scores_and_not_the_mean() -> None:
    random = np.random.default_rng(4)

    def client(level: float) -> tuple[Scores, Scores]:
        """Genuine and impostor are well apart, but another client's impostors score like this one's genuine pairs."""
        return random.normal(level + 0.3, 0.08, 5_000), random.normal(level, 0.08, 50_000)

    clients = [client(0.0), client(0.3)]
    pooled = histogram(*clients[0]) + histogram(*clients[1])
    far, tar, auc = sklearn_curve(*(np.concatenate(rows) for rows in zip(*clients, strict=True)))
    assert eer(pooled) == pytest.approx(sklearn_eer(far, tar), abs=1e-3)
    assert roc_auc(pooled) == pytest.approx(auc, abs=1e-4)
    mean = np.mean([eer(histogram(*part)) for part in clients])
    assert eer(pooled) > mean + 0.1


def closed_set(seed: int, num_classes: int = 12, num: int = 150) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(predicted, labels): 60 % right; some classes without example, some never predicted."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, num_classes - 2, num)
    predicted = np.where(random.random(num) < 0.6, labels, random.integers(2, num_classes, num))
    return predicted, labels


def sklearn_scores(predicted: NDArray[np.int64], labels: NDArray[np.int64]) -> dict[str, float]:
    precision, recall, f1, _ = sklearn_metrics.precision_recall_fscore_support(
        labels, predicted, average="macro", zero_division=0
    )
    accuracy = sklearn_metrics.accuracy_score(labels, predicted)
    return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}


@pytest.mark.parametrize("seed", range(5))
def test_closed_set_scores_equal_scikit_learns(seed: int) -> None:
    predicted, labels = closed_set(seed)
    scores = closed_scores(closed_set_sums(predicted, labels, 30.0))
    assert scores.pop("loss") == pytest.approx(0.2)
    assert scores == pytest.approx(sklearn_scores(predicted, labels), abs=1e-12)


def test_sums_over_clients_are_the_macro_average_over_all_their_people() -> None:
    clients = [closed_set(10, num_classes=12), closed_set(11, num_classes=5, num=40)]
    merged = closed_set_sums(*clients[0], 1.0) + closed_set_sums(*clients[1], 2.0)
    # Person 3 of one client is not person 3 of the other.
    union = [np.concatenate([first, second + 100]) for first, second in zip(*clients, strict=True)]
    scores = closed_scores(merged)
    assert scores.pop("loss") == pytest.approx(3.0 / 190)
    assert scores == pytest.approx(sklearn_scores(union[0], union[1]), abs=1e-12)
