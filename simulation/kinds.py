"""A model's figures on twins and on strangers apart, with intervals over families, where clients know of families.

They stand among a model's other figures by names that open with the kind of pairs: twins_roc_auc, strangers_eer. Those
of all pairs have no such beginning, but for all_accuracy: `accuracy` is of the closed set.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.metrics.bootstrap import (
    accuracy_bins,
    bootstrap_accuracy,
    bootstrap_histograms,
    bootstrap_scores,
    coarse_bins,
)
from common.metrics.twin_report import ACCURACY, FIGURES
from common.metrics.twins import KINDS, accuracy_at, histogram_of, kind_scores

PREFIXED: Final = tuple(f"{kind}_{name}" for kind in KINDS for name in FIGURES if kind != "all" or name == ACCURACY)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One client's test people as a model embeds them, and how often each replicate draws each family."""

    embeddings: NDArray[np.float32]  # [N, D]
    person: NDArray[np.int64]  # [N]
    family: NDArray[np.int64]  # [N]; each person their own where the data set knows of none
    weights: NDArray[np.int64]  # [B, U]

    def histograms(self, bins: NDArray[np.int64], kind: str) -> NDArray[np.float64]:
        """[B, 2, COARSE_BINS] of one kind of pairs; clients' add up."""
        return bootstrap_histograms(self.embeddings, self.person, self.weights, bins, family=self.family, kind=kind)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The histograms of all pairs and of the twins' among them, [2, 8192] int64 each; sums of clients' are such too."""

    every: NDArray[np.int64]
    twins: NDArray[np.int64]

    def of(self, kind: str) -> NDArray[np.int64]:
        """The histogram of one of KINDS."""
        return histogram_of(kind, self.every, self.twins)

    @property
    def has_kinds(self) -> bool:
        """Whether there are genuine and impostor pairs of twins and of strangers, so that they have figures."""
        return all(bool(self.of(kind).any(axis=1).all()) for kind in KINDS)


def figure_name(kind: str, figure: str) -> str:
    """The name of a kind's figure among a model's: "twins_eer", "all_accuracy"; "roc_auc" of all pairs."""
    return figure if kind == "all" and figure != ACCURACY else f"{kind}_{figure}"


def kind_of(name: str) -> str:
    """The kind of pairs that a figure of this name is of."""
    return next((kind for kind in KINDS if name.startswith(f"{kind}_")), "all")


def kind_values(pairs: Pairs, threshold: float | None) -> dict[str, float]:
    """All figures by kind, by the names of `figure_name`; without accuracy where there is no threshold.

    threshold: cosine, from validation.
    """
    values: dict[str, float] = {}
    for kind in KINDS:
        if kind != "all":
            values |= {figure_name(kind, n): value for n, value in kind_scores(pairs.of(kind), kind).items()}
        if threshold is not None:
            values[figure_name(kind, ACCURACY)] = accuracy_at(pairs.of(kind), threshold)
    return values


def kind_replicates(
    drawn: Mapping[str, Drawn], pairs: Mapping[str, Pairs], pooled: Pairs, threshold: float | None
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Client, and "" for all clients together -> the names of `kind_values` -> replicates [B].

    drawn, pairs: by client.  pooled: of all clients; its bins are everyone's, so that histograms add up.
    Clients without pairs of twins have no replicates of their own; their strangers count among all clients'.
    """
    found: dict[str, dict[str, NDArray[np.float64]]] = {"": {}}
    found |= {name: {} for name in drawn if pairs[name].has_kinds}
    for kind in KINDS:
        with_pairs = [name for name in drawn if kind != "twins" or pairs[name].twins.any()]
        if kind != "all":
            bins = coarse_bins(pooled.of(kind))
            counts = {name: drawn[name].histograms(bins, kind) for name in with_pairs}
            for name in found:
                scores = bootstrap_scores(counts[name] if name else _sum(counts))
                found[name] |= {figure_name(kind, figure): values for figure, values in scores.items()}
        if threshold is not None:
            counts = {name: drawn[name].histograms(accuracy_bins(threshold), kind) for name in with_pairs}
            for name in found:
                found[name][figure_name(kind, ACCURACY)] = bootstrap_accuracy(counts[name] if name else _sum(counts))
    return found


def _sum(counts: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    total: NDArray[np.float64] = np.sum(list(counts.values()), axis=0)
    return total
