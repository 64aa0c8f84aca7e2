"""Every model on the same people: scores with 95 % intervals, and paired replicates for the gaps between models.

Open set: all pairs within each client's test people; intervals by drawing people (`common.metrics.bootstrap`), with the
same draws for every model. Closed set: a client's own people, where the model has a head for them.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from common.config import DataSettings
from common.errors import DataError, UserError
from common.evaluation import EvaluationSums, embed, evaluate, people_digest, pooled
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.metrics.bootstrap import bootstrap_histograms, bootstrap_scores, coarse_bins, interval, person_weights
from common.metrics.folds import NUM_FOLDS, ten_fold_accuracy
from common.runtime import stream_seed
from common.training import Compute
from simulation.found_models import FoundModel
from simulation.ready_models import ModelFiles

POOLED = "pooled"
NUM_REPLICATES = 1000
TEN_FOLD, ACCURACY = "ten_fold_accuracy", "accuracy"
OPEN_FIGURES = ("roc_auc", "eer", "tar_at_far_1e-1", "tar_at_far_1e-2", "tar_at_far_1e-3", TEN_FOLD)
CLOSED_FIGURES = (ACCURACY, "precision", "recall", "f1")
_HALF_WIDTH = 1.959964  # standard deviations of a 95 % interval
# What may differ: the same people are shown, only cut out in another way.
_HARMLESS = ("image_size", "alignment", "box_margin", "max_quarantined_fraction")

Packs = Mapping[DataSettings, Mapping[str, FacePack]]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure and its 95 % interval; NaN ends where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True, kw_only=True)
class TestSet:
    """What stands behind the figures: one client's test people, or all clients'."""

    name: str  # a client's, or POOLED
    num_people: int
    num_pictures: int
    num_genuine: int
    num_impostor: int
    digest: str = ""

    def __add__(self, other: "TestSet") -> "TestSet":
        return TestSet(
            name=POOLED,
            num_people=self.num_people + other.num_people,
            num_pictures=self.num_pictures + other.num_pictures,
            num_genuine=self.num_genuine + other.num_genuine,
            num_impostor=self.num_impostor + other.num_impostor,
        )


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One model on one test set."""

    figures: Mapping[str, Estimate]
    replicates: Mapping[str, NDArray[np.float64]]  # figure -> [NUM_REPLICATES]
    pairs: NDArray[np.int64]  # [2, 8192]
    num_closed: int  # test pictures of people trained on; 0: no closed set
    no_head: str = field(default="")


def check_same_pairs(models: Sequence[FoundModel], packs: Packs, clients: Sequence[str]) -> None:
    """Raise UserError unless all models are tested, and were after training, on the same pairs of each client."""
    first = models[0]
    for client in clients:
        wanted = people_digest(packs[first.settings.data][client], "test")
        for model in models:
            if people_digest(packs[model.settings.data][client], "test") != wanted:
                raise UserError(_different_pairs(first, model, client))
            recorded = model.test_pairs.get(client) or wanted
            if recorded != wanted:
                raise UserError(
                    f"{model.name} ({model.source}) was tested on other pairs of {client} than there are now"
                    f" (digest {recorded}, now {wanted}): the data set has changed since; give that run's data set with"
                    f" --data-dir {client}=DIR, or train {model.name} again."
                )


def _different_pairs(one: FoundModel, other: FoundModel, client: str) -> str:
    ours, theirs = dataclasses.asdict(one.settings.data), dataclasses.asdict(other.settings.data)
    settings = [
        f"data.{key} = {ours[key]} and {theirs[key]}"
        for key in ours
        if ours[key] != theirs[key] and key not in _HARMLESS
    ]
    # Otherwise other pictures were quarantined, which depends on how they are cut out.
    seen = "; ".join(settings) or "other pictures were left out"
    return (
        f"{one.name} ({one.source}) and {other.name} ({other.source}) are tested on different pairs of {client}:"
        f" {seen}; train one again with the other's setting, or name another run with --run {other.name}=RUN."
    )


def describe(name: str, pack: FacePack) -> TestSet:
    """A client's test people.  Raises DataError when there are fewer than two, or no genuine pair."""
    person = pack.person[pack.indices(Split.TEST_PEOPLE)]
    pictures = np.unique(person, return_counts=True)[1]
    num_genuine = int((pictures * (pictures - 1) // 2).sum())
    test_set = TestSet(
        name=name,
        num_people=len(pictures),
        num_pictures=len(person),
        num_genuine=num_genuine,
        num_impostor=len(person) * (len(person) - 1) // 2 - num_genuine,
        digest=people_digest(pack, "test"),
    )
    if test_set.num_people < 2 or num_genuine == 0:
        raise DataError(
            f"{name}: the test set has {test_set.num_people} people and {num_genuine} genuine pairs, so nothing can be"
            " compared; give at least two people, one of them with two pictures."
        )
    return test_set


def score(
    model: FoundModel, packs: Mapping[str, FacePack], clients: Sequence[str], compute: Compute, seed: int
) -> dict[str, Scored]:
    """One model on each client's test set and, with several clients, on all of them pooled.

    packs: client -> its pack with this model's data settings.  seed: of the bootstrap; the same for models compared.
    Raises CheckpointError, TrainingFailed or DataError.
    """
    files = ModelFiles(model)
    num_people = {name: pack.num_classes for name, pack in packs.items()}
    sums: dict[str, EvaluationSums] = {}
    embeddings: dict[str, NDArray[np.float32]] = {}
    no_head: dict[str, str] = {}
    for name in clients:
        ready = files.at(name, packs[name], num_people)
        people = packs[name].indices(Split.TEST_PEOPLE)
        embeddings[name] = embed(ready.recogniser, packs[name], people, compute).numpy()
        sums[name] = evaluate(ready.recogniser, packs[name], "test", compute, open_embeddings=embeddings[name])
        no_head[name] = ready.no_head
    bins = coarse_bins(pooled(sums).pairs)  # of all clients, so that theirs add up
    histograms = {}
    for name in clients:
        person = packs[name].person[packs[name].indices(Split.TEST_PEOPLE)]
        weights = person_weights(len(np.unique(person)), NUM_REPLICATES, stream_seed(seed, name, "bootstrap"))
        histograms[name] = bootstrap_histograms(embeddings[name], person, weights, bins)
    scored = {name: _scored(sums[name], histograms[name], no_head[name]) for name in clients}
    if len(clients) > 1:
        lacking = "; ".join(f"{name}: {why}" for name, why in no_head.items() if why)
        scored[POOLED] = _scored(pooled(sums), np.sum(list(histograms.values()), axis=0), lacking)
    return scored


def _scored(sums: EvaluationSums, histograms: NDArray[np.float64], no_head: str) -> Scored:
    values = sums.open_scores()
    replicates = bootstrap_scores(histograms)
    figures = {}
    for name, value in values.items():
        low, high = interval(replicates[name]) if name in replicates else (math.nan, math.nan)
        figures[name] = Estimate(value=value, low=low, high=high)
    figures[TEN_FOLD] = _ten_fold(sums)
    num_closed = 0 if no_head else sums.closed.num_examples
    if num_closed:
        closed = sums.closed.scores()
        figures |= {name: Estimate(value=closed[name]) for name in CLOSED_FIGURES}
        figures[ACCURACY] = wilson(sums.closed.correct, num_closed)
    return Scored(figures=figures, replicates=replicates, pairs=sums.pairs, num_closed=num_closed, no_head=no_head)


def _ten_fold(sums: EvaluationSums) -> Estimate:
    """Mean over folds, with 1.96 standard errors of the mean on both sides (the deviation LFW's protocol reports)."""
    mean, deviation = ten_fold_accuracy(sums.folds)
    half = _HALF_WIDTH * deviation / math.sqrt(NUM_FOLDS)
    return Estimate(value=mean, low=max(0.0, mean - half), high=min(1.0, mean + half))


def wilson(correct: int, num_pictures: int) -> Estimate:
    """A fraction with its 95 % score interval (Wilson, JASA 22, 1927), which takes pictures as independent."""
    rate, square = correct / num_pictures, _HALF_WIDTH**2 / num_pictures
    middle = (rate + square / 2) / (1 + square)
    half = math.sqrt(rate * (1 - rate) * square + square**2 / 4) / (1 + square)
    return Estimate(value=rate, low=max(0.0, middle - half), high=min(1.0, middle + half))


@dataclass(frozen=True, kw_only=True)
class Gap:
    """How much better one model's figure is than another's on one test set; positive: the first is higher."""

    minuend: str
    subtrahend: str
    test_set: str
    figure: str
    gap: Estimate

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.gap.low > 0.0 or self.gap.high < 0.0


def gap(scored: Mapping[str, Mapping[str, Scored]], one: str, other: str, test_set: str, figure: str) -> Gap:
    """The gap of two models with the interval of its paired replicates.

    scored: model -> test set -> Scored, with the same bootstrap seed.
    """
    first, second = scored[one][test_set], scored[other][test_set]
    low, high = interval(first.replicates[figure] - second.replicates[figure])
    value = first.figures[figure].value - second.figures[figure].value
    return Gap(
        minuend=one,
        subtrahend=other,
        test_set=test_set,
        figure=figure,
        gap=Estimate(value=value, low=low, high=high),
    )
