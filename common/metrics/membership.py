"""Membership inference for people: does a model show whom it was trained on by how it embeds them?

A model that has learnt a person by heart puts that person's pictures nearer to each other, and farther from all others,
than those of somebody whom it has never seen.  So a person's score is the one similarity less the other, and the attack
says "trained on" above a threshold that people held out have set (arXiv:1610.05820 attacks classifiers likewise; for
people in face recognition arXiv:2304.02782).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.metrics.bootstrap import interval
from common.metrics.figures import wilson

FPR: Final = 0.01
NUM_REPLICATES: Final = 2000
Numbers = NDArray[np.float64]


def person_scores(embeddings: NDArray[np.float32], person: NDArray[np.int64]) -> tuple[NDArray[np.int64], Numbers]:
    """(people, their scores): mean cosine within a person's pictures less the mean with all others'.

    embeddings: [N, D] of any length.  person: [N] int64.  Who has a single picture has no score and is not returned.
    """
    unit = embeddings.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    people, own, count = np.unique(person, return_inverse=True, return_counts=True)
    sums = np.zeros((len(people), unit.shape[1]))
    np.add.at(sums, own, unit)
    squares = np.zeros(len(people))
    np.add.at(squares, own, (unit**2).sum(axis=1))
    whole = sums.sum(axis=0)
    within = ((sums**2).sum(axis=1) - squares) / np.maximum(count * (count - 1), 1)
    between = (sums @ whole - (sums**2).sum(axis=1)) / np.maximum(count * (len(person) - count), 1)
    scored = (count > 1) & (count < len(person))
    return people[scored], (within - between)[scored]


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Membership:
    """What the attack reached."""

    auc: Estimate  # of trained on against held out, both halves; 0.5 is chance
    tpr: Estimate  # of people trained on, above the threshold
    fpr: Estimate  # of the held-out people who did not set the threshold
    num_members: int
    num_calibrating: int
    num_held_out: int  # the others

    @property
    def is_at_chance(self) -> bool:
        """Whether the interval of the AUC does not lie above one half."""
        return self.auc.low <= 0.5

    def to_json(self) -> dict[str, Any]:
        """As `from_json` reads it, with the verdict beside the figures."""
        return {**asdict(self), "is_at_chance": self.is_at_chance}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Membership":
        """The inverse of `to_json`.  Raises ValueError, KeyError or TypeError for anything else."""

        def rate(name: str) -> Estimate:
            return Estimate(*(float(content[name][part]) for part in ("value", "low", "high")))

        return cls(
            auc=rate("auc"),
            tpr=rate("tpr"),
            fpr=rate("fpr"),
            num_members=int(content["num_members"]),
            num_calibrating=int(content["num_calibrating"]),
            num_held_out=int(content["num_held_out"]),
        )


def _auc(members: Numbers, others: Numbers) -> float:
    """The probability that a member's score is the higher one, ties half (Mann and Whitney)."""
    order = np.sort(others)
    below, up_to = np.searchsorted(order, members, "left"), np.searchsorted(order, members, "right")
    return float((below + up_to).sum() / (2.0 * len(members) * len(others)))


def membership(members: Numbers, calibrating: Numbers, held_out: Numbers, *, seed: int = 0) -> Membership:
    """The attack on people with these scores, [n] each, at least two.

    The threshold is the lowest that at most one in a hundred of `calibrating` reach; of fewer than a hundred nobody.
    Intervals: of the AUC people drawn anew, 2,000 times; of rates Wilson's.  Raises ValueError for fewer people.
    """
    for name, scores in (("members", members), ("calibrating", calibrating), ("held out", held_out)):
        if len(scores) < 2:
            raise ValueError(f"{len(scores)} {name} are too few for an attack; there must be two or more of each")
    allowed = int(FPR * len(calibrating))
    threshold = np.sort(calibrating)[::-1][allowed]
    hits, wrong = int((members > threshold).sum()), int((held_out > threshold).sum())
    others = np.concatenate([calibrating, held_out])
    random = np.random.default_rng(seed)
    drawn = [
        _auc(random.choice(members, len(members)), random.choice(others, len(others))) for _ in range(NUM_REPLICATES)
    ]
    return Membership(
        auc=Estimate(_auc(members, others), *interval(np.array(drawn))),
        tpr=Estimate(hits / len(members), *wilson(hits, len(members))),
        fpr=Estimate(wrong / len(held_out), *wilson(wrong, len(held_out))),
        num_members=len(members),
        num_calibrating=len(calibrating),
        num_held_out=len(held_out),
    )
