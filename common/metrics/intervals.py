"""95 % intervals of a model's figures: from sums alone, as a federation's server has them, or with people drawn.

Where embeddings are at hand people are drawn (`common.metrics.bootstrap`).  Sums do not say how much people differ,
only how many they are, so of pairs the interval from sums is the widest that so few people can give: each counts once,
as if all its pairs were alike.  It is several times as wide as one of people who are drawn.
"""

import math
from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.metrics.bootstrap import Drawn, interval, replicates
from common.metrics.figures import CLOSED, PAIRS, known_scores, people_behind, row_of, wilson
from common.metrics.sums import EvaluationSums, pooled

Interval = tuple[float, float, float]  # a figure and the ends of its interval, NaN where it has none
Intervals = dict[str, Interval]  # by the figure's name
FROM_SUMS: Final = (
    "95 % intervals from sums, at their widest: each test person counts once (Wilson); ten-fold: over its folds"
)
FROM_PEOPLE: Final = "95 % intervals: people drawn (bootstrap); own identities: Wilson; ten-fold: over its folds"


def intervals_from_sums(by_client: Mapping[str, EvaluationSums]) -> tuple[dict[str, Intervals], Intervals]:
    """Every known figure with its interval, of each client and of all of them together.

    by_client: at least one.  Figures without an interval, such as the loss, have NaN ends.
    """
    people = {client: people_behind(sums.pairs) for client, sums in by_client.items()}
    of_each = {client: _estimates(sums, people[client]) for client, sums in by_client.items()}
    return of_each, _estimates(pooled(by_client), sum(people.values()))


def _estimates(sums: EvaluationSums, num_people: int) -> Intervals:
    found: Intervals = {}
    for name, value in known_scores(sums).items():
        row = row_of(name)
        if row.of == PAIRS:
            found[name] = (value, *wilson(value * num_people, num_people))
        elif row.ends is not None:
            found[name] = (value, *row.ends(sums.closed if row.of == CLOSED else sums.folds))
        else:
            found[name] = (value, math.nan, math.nan)
    return found


def intervals_of_people(
    by_client: Mapping[str, EvaluationSums], drawn: Mapping[str, Drawn]
) -> tuple[dict[str, Intervals], Intervals]:
    """The same, but those of all pairs with people drawn; of twins and strangers alone they stay at their widest.

    drawn: client -> its test people, with a seed of its own.
    """
    of_each, of_all = intervals_from_sums(by_client)
    every = pooled(by_client).pairs
    counts = {client: own.counts("all", every, None)[PAIRS] for client, own in drawn.items()}
    of_all |= _drawn_over(of_all, np.sum(list(counts.values()), axis=0))
    return {client: of_each[client] | _drawn_over(of_each[client], counts[client]) for client in of_each}, of_all


def _drawn_over(known: Mapping[str, Interval], counts: NDArray[np.float64]) -> Intervals:
    found: Intervals = {}
    for name, values in replicates({PAIRS: counts}).items():
        if name in known:
            found[name] = (known[name][0], *interval(values))
    return found
