"""Every model on the same people: scores with 95 % intervals, and paired replicates for the gaps between models.

Open set: all pairs within each client's test people; intervals by drawing people (`common.metrics.bootstrap`), whole
families where they are known, with the same draws for every model. With twins, the kinds of pairs have figures of their
own, with one threshold for all from validation. Closed set: a client's own people, where the model has a head for them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from common.faces.pack import FacePack
from common.faces.splits import Split
from common.metrics.bootstrap import Drawn, Estimate, interval, replicates
from common.metrics.figures import (
    CLOSED,
    KINDS,
    PAIRS,
    closed_scores,
    compared,
    figure_name,
    kind_scores,
    open_scores,
    threshold_at_best_accuracy,
)
from common.metrics.pairs import pair_counts, pair_histogram
from common.metrics.sums import EvaluationSums, no_twins, pooled
from common.models.recogniser import Recogniser
from common.system.runtime import stream_seed
from common.training.evaluation import embed, evaluate
from common.training.loop import Compute
from simulation.compare.model_loading import ModelFiles
from simulation.compare.model_lookup import FoundModel

NUM_REPLICATES = 1000
POOLED = "pooled"

Replicates = Mapping[str, NDArray[np.float64]]  # figure -> [NUM_REPLICATES]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One model on one test set."""

    figures: Mapping[str, Estimate]
    replicates: Replicates
    sums: EvaluationSums
    num_closed: int  # test pictures of people trained on; 0: no closed set
    no_head: str = field(default="")


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
        indices, person, family = packs[name].shown_in(Split.TEST_PEOPLE)
        embeddings = embed(ready.recogniser, packs[name], indices, compute).numpy()
        own_seed = stream_seed(seed, name, "bootstrap")
        placed = torch.from_numpy(embeddings).to(compute.device if compute.device_kind == "cuda" else "cpu")
        drawn[name] = Drawn.by_seed(placed, person, family, num_replicates=NUM_REPLICATES, seed=own_seed)
        own_sums = drawn[name].sums
        sums[name] = evaluate(
            ready.recogniser,
            packs[name],
            "test",
            compute,
            open_embeddings=embeddings,
            open_pairs=None if own_sums is None else own_sums.histogram,
        )
        no_head[name] = ready.no_head
        if any(pack.family is not None for pack in packs.values()):
            validation += _validation_pairs(ready.recogniser, packs[name], compute)
    total = pooled(sums)
    has_threshold = total.has_kinds and bool(validation.any(axis=1).all())
    threshold = threshold_at_best_accuracy(validation) if has_threshold else None
    places = sums
    if len(clients) > 1:
        places = sums | {POOLED: total}
        no_head[POOLED] = "; ".join(f"{name}: {why}" for name, why in no_head.items() if why)
    found = _replicates(drawn, sums, total, threshold)
    return {
        place: _scored(own, found[place if place in sums else POOLED], no_head[place], threshold)
        for place, own in places.items()
    }


def _validation_pairs(recogniser: Recogniser, pack: FacePack, compute: Compute) -> NDArray[np.int64]:
    """The histogram of all pairs of the validation people, [2, 8192] int64; zeros where there are none."""
    indices, person, family = pack.shown_in(Split.VAL_PEOPLE)
    if not all(pair_counts(person, family)["all"]):
        return no_twins()
    return pair_histogram(embed(recogniser, pack, indices, compute), person)


def _replicates(
    drawn: Mapping[str, Drawn], sums: Mapping[str, EvaluationSums], total: EvaluationSums, threshold: float | None
) -> dict[str, Replicates]:
    """Client, and POOLED for all clients together -> the replicates of its figures.

    drawn, sums: by client.  total: of all clients; its bins are everyone's, so that histograms add up.
    Clients without pairs of twins have no replicates of kinds; their strangers count among all clients'.
    """
    found: dict[str, dict[str, NDArray[np.float64]]] = {place: {} for place in (*drawn, POOLED)}
    for kind in KINDS if total.has_kinds else KINDS[:1]:
        with_pairs = [name for name in drawn if kind != "twins" or sums[name].twins.any()]
        counts = {name: drawn[name].counts(kind, total.of_kind(kind), threshold) for name in with_pairs}
        every = {of: np.sum([own[of] for own in counts.values()], axis=0) for of in counts[with_pairs[0]]}
        for place, own in {**counts, POOLED: every}.items():
            has_kinds = place == POOLED or sums[place].has_kinds
            shown = {of: counted for of, counted in own.items() if has_kinds or (kind == "all" and of == PAIRS)}
            found[place] |= {figure_name(kind, name): values for name, values in replicates(shown).items()}
    return dict(found)


def _scored(sums: EvaluationSums, drawn: Replicates, no_head: str, threshold: float | None) -> Scored:
    num_closed = 0 if no_head else sums.closed.num_examples
    values = open_scores(sums)
    if num_closed:
        values |= closed_scores(sums.closed)
    if sums.has_kinds:
        for kind in KINDS:
            own = kind_scores(sums.of_kind(kind), kind, threshold)
            values |= {figure_name(kind, name): value for name, value in own.items()}
    rows = compared()
    figures = {}
    for name, value in values.items():
        if name in rows:
            ends = rows[name].ends
            low, high = math.nan, math.nan
            if name in drawn:
                low, high = interval(drawn[name])
            elif ends is not None:
                low, high = ends(sums.closed if rows[name].of == CLOSED else sums.folds)
            figures[name] = Estimate(value=value, low=low, high=high)
    return Scored(figures=figures, replicates=drawn, sums=sums, num_closed=num_closed, no_head=no_head)


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
