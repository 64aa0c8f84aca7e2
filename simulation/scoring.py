"""Every model on the same people: scores with 95 % intervals, and paired replicates for the gaps between models.

Open set: all pairs within each client's test people; intervals by drawing people (`common.metrics.bootstrap`), whole
families where they are known, with the same draws for every model. With twins, the kinds of pairs have figures of their
own (`simulation.kinds`). Closed set: a client's own people, where the model has a head for them.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from common.evaluation import EvaluationSums, embed, evaluate, pooled
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.metrics.bootstrap import bootstrap_scores, coarse_bins, interval, person_weights
from common.metrics.folds import NUM_FOLDS, ten_fold_accuracy
from common.metrics.twin_report import pair_counts
from common.metrics.twins import no_twins, threshold_at_best_accuracy
from common.metrics.verification import pair_histogram
from common.models.recogniser import Recogniser
from common.runtime import stream_seed
from common.training import Compute
from simulation.found_models import FoundModel
from simulation.kinds import PREFIXED, Drawn, Pairs, kind_replicates, kind_values
from simulation.ready_models import ModelFiles
from simulation.tested import POOLED

NUM_REPLICATES = 1000
TEN_FOLD, ACCURACY = "ten_fold_accuracy", "accuracy"
OPEN_FIGURES = ("roc_auc", "eer", "tar_at_far_1e-1", "tar_at_far_1e-2", "tar_at_far_1e-3", TEN_FOLD, *PREFIXED)
CLOSED_FIGURES = (ACCURACY, "precision", "recall", "f1")
_HALF_WIDTH = 1.959964  # standard deviations of a 95 % interval


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure and its 95 % interval; NaN ends where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One model on one test set."""

    figures: Mapping[str, Estimate]
    replicates: Mapping[str, NDArray[np.float64]]  # figure -> [NUM_REPLICATES]
    pairs: NDArray[np.int64]  # [2, 8192]
    num_closed: int  # test pictures of people trained on; 0: no closed set
    no_head: str = field(default="")
    twins: NDArray[np.int64] = field(default_factory=no_twins)  # [2, 8192]: of `pairs` those of twins

    @property
    def kinds(self) -> Pairs | None:
        """The pairs by kind, where there are such of twins and of strangers."""
        pairs = Pairs(every=self.pairs, twins=self.twins)
        return pairs if pairs.has_kinds else None


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
    drawn: dict[str, Drawn] = {}
    no_head: dict[str, str] = {}
    validation = no_twins()
    for name in clients:
        ready = files.at(name, packs[name], num_people)
        drawn[name] = _drawn(ready.recogniser, packs[name], compute, stream_seed(seed, name, "bootstrap"))
        sums[name] = evaluate(ready.recogniser, packs[name], "test", compute, open_embeddings=drawn[name].embeddings)
        no_head[name] = ready.no_head
        if any(pack.family is not None for pack in packs.values()):
            validation += _validation_pairs(ready.recogniser, packs[name], compute)
    bins = coarse_bins(pooled(sums).pairs)  # of all clients, so that theirs add up
    histograms = {name: drawn[name].histograms(bins, "all") for name in clients}
    scored = {name: _scored(sums[name], histograms[name], no_head[name]) for name in clients}
    if len(clients) > 1:
        lacking = "; ".join(f"{name}: {why}" for name, why in no_head.items() if why)
        scored[POOLED] = _scored(pooled(sums), np.sum(list(histograms.values()), axis=0), lacking)
    return _with_kinds(scored, drawn, sums, validation)


def _drawn(recogniser: Recogniser, pack: FacePack, compute: Compute, seed: int) -> Drawn:
    indices, person, family = pack.shown_in(Split.TEST_PEOPLE)
    return Drawn(
        embeddings=embed(recogniser, pack, indices, compute).numpy(),
        person=person,
        family=family,
        weights=person_weights(len(np.unique(family)), NUM_REPLICATES, seed),
    )


def _validation_pairs(recogniser: Recogniser, pack: FacePack, compute: Compute) -> NDArray[np.int64]:
    """The histogram of all pairs of the validation people, [2, 8192] int64; zeros where there are none."""
    indices, person, family = pack.shown_in(Split.VAL_PEOPLE)
    if not all(pair_counts(person, family)["all"]):
        return no_twins()
    return pair_histogram(embed(recogniser, pack, indices, compute), person)


def _with_kinds(
    scored: Mapping[str, Scored],
    drawn: Mapping[str, Drawn],
    sums: Mapping[str, EvaluationSums],
    validation: NDArray[np.int64],
) -> dict[str, Scored]:
    """With the figures of the kinds of pairs, where there are any: one threshold for all, from validation."""
    pairs = {name: Pairs(every=own.pairs, twins=own.twins) for name, own in sums.items()}
    total = Pairs(every=pooled(sums).pairs, twins=pooled(sums).twins)
    if not total.has_kinds:
        return dict(scored)
    threshold = threshold_at_best_accuracy(validation) if validation.any(axis=1).all() else None
    replicates = kind_replicates(drawn, pairs, total, threshold)
    found = dict(scored)
    for place, one in scored.items():
        if one.kinds is not None:
            own = replicates["" if place == POOLED else place]
            intervals = {name: interval(values) for name, values in own.items()}
            figures = {
                name: Estimate(value=value, low=intervals[name][0], high=intervals[name][1])
                for name, value in kind_values(one.kinds, threshold).items()
            }
            found[place] = dataclasses.replace(
                one, figures={**one.figures, **figures}, replicates={**one.replicates, **own}
            )
    return found


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
    return Scored(
        figures=figures,
        replicates=replicates,
        pairs=sums.pairs,
        num_closed=num_closed,
        no_head=no_head,
        twins=sums.twins,
    )


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
