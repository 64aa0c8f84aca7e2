"""From the scores of validation people to thresholds that can be defended: what each one lets through, and how surely.

A threshold is a cosine from which on two faces count as one person's.  It is chosen on people who were neither trained
nor tested on, from the histograms of their pairs, so a federation's is made of what its clients send anyway.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.cuts import CUTS
from common.errors import DataError
from common.metrics.figures import check_both_kinds, equal_error_rate, people_behind, roc_curve, wilson

FARS: Final = (1e-1, 1e-2, 1e-3, 1e-4)
USUAL_FAR: Final = 1e-3  # what is asked at, where nobody says another and the pairs support it
LEAST_FALSE_ACCEPTS: Final = 10  # expected at a FAR, among the impostor pairs there are, before a threshold is stated
COARSE_BINS: Final = 128  # over cosine in [-1, 1], of the histogram that is kept for pictures
ABOUT: Final = (
    "cosine thresholds from validation people; FAR and TAR as measured on them, with 95 % Wilson intervals: of FAR each"
    " pair of two people counts once, of TAR and EER each person, however many their pictures"
)


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """The lowest cosine at which at most a fraction `far` of impostor pairs is accepted, and what that does.

    measured_far, measured_tar: accepted fractions of impostor and of genuine pairs, in [0, 1], with the ends of their
    95 % intervals.
    """

    far: float
    threshold: float
    measured_far: float
    far_low: float
    far_high: float
    measured_tar: float
    tar_low: float
    tar_high: float


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What a model's validation people say of its scores.

    num_people: as far as the pairs tell (`figures.people_behind`).  eer: the equal error rate, with the ends of its
    95 % interval; eer_threshold: the cosine nearest to it.  rows: FAR descending, as far as the pairs support them.
    unsupported: the FARs that they do not.  genuine, impostor: counts of pairs in COARSE_BINS equal bins over [-1, 1].
    cuts: how the data sets' pictures were cut out -> data sets; empty: nobody wrote it down.
    """

    num_people: int
    num_genuine_pairs: int
    num_impostor_pairs: int
    eer: float
    eer_low: float
    eer_high: float
    eer_threshold: float
    rows: tuple[Threshold, ...]
    unsupported: tuple[float, ...]
    genuine: tuple[int, ...]
    impostor: tuple[int, ...]
    cuts: Mapping[str, int] = field(default_factory=dict)

    def at(self, far: float) -> Threshold:
        """The threshold of one of FARS.  Raises DataError where it is none of them, or has too few pairs behind it."""
        for row in self.rows:
            if row.far == far:
                return row
        known = ", ".join(f"{row.far:g}" for row in self.rows) or "none"
        if far in self.unsupported:
            raise DataError(
                f"no threshold at FAR {far:g}: {LEAST_FALSE_ACCEPTS / far:,.0f} impostor pairs of validation people are"
                f" needed, {self.num_impostor_pairs:,} there are; choose one of: {known}."
            )
        raise DataError(f"no threshold at FAR {far:g}; choose one of: {known}.")

    @property
    def usual(self) -> Threshold | None:
        """At USUAL_FAR, or at the strictest FAR above it that the pairs support; None where they support none."""
        return next((row for row in reversed(self.rows) if row.far >= USUAL_FAR), None)

    def to_json(self) -> dict[str, Any]:
        """As `from_json` reads it, with a line that says what it is."""
        return {"about": ABOUT, **asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Thresholds":
        """The inverse of `to_json`.  Raises ValueError, KeyError or TypeError for anything else."""
        fields = {name: value for name, value in content.items() if name != "about"}
        lists = {name: tuple(int(n) for n in fields[name]) for name in ("genuine", "impostor")}
        rows = tuple(Threshold(**{name: float(value) for name, value in row.items()}) for row in fields["rows"])
        unsupported = tuple(float(far) for far in fields["unsupported"])
        cuts = {cut: int(number) for cut, number in dict(fields.get("cuts", {})).items()}
        if not cuts.keys() <= frozenset(CUTS):
            raise ValueError(f"cuts are {', '.join(CUTS)}")
        return cls(**(fields | lists | {"rows": rows, "unsupported": unsupported, "cuts": cuts}))


def thresholds_from(histograms: Sequence[NDArray[np.int64]], cuts: Mapping[str, int] = {}) -> Thresholds:
    """The thresholds at FARS of one model.

    histograms: one or more [2, NUM_BINS] int64, as `pairs.pair_histogram` counts; each of a client, of other people.
    A FAR is stated where LEAST_FALSE_ACCEPTS impostor pairs are expected at it.  Thresholds are lower edges of bins, so
    that nothing is interpolated and each did what is said of it.  cuts: as Thresholds has them.
    Raises DataError without genuine or without impostor pairs.
    """
    pairs = np.sum(np.stack(histograms), axis=0)
    num_genuine, num_impostor = check_both_kinds(pairs)
    people = [people_behind(own) for own in histograms]
    num_people = max(1, sum(people))
    people_pairs = max(1, min(num_impostor, sum(number * (number - 1) // 2 for number in people)))
    fars, tars = roc_curve(pairs)
    supported = [far for far in FARS if far * num_impostor >= LEAST_FALSE_ACCEPTS]
    error_rate = float(equal_error_rate(fars, tars))
    low, high = wilson(error_rate * num_people, num_people)
    coarse = pairs.reshape(2, COARSE_BINS, -1).sum(axis=2)
    return Thresholds(
        num_people=num_people,
        num_genuine_pairs=num_genuine,
        num_impostor_pairs=num_impostor,
        eer=error_rate,
        eer_low=low,
        eer_high=high,
        eer_threshold=_edge(int(np.argmin(np.abs(fars + tars - 1.0))), len(fars) - 1),
        rows=tuple(_row(far, fars, tars, num_people=num_people, people_pairs=people_pairs) for far in supported),
        unsupported=tuple(far for far in FARS if far not in supported),
        genuine=tuple(coarse[0].tolist()),
        impostor=tuple(coarse[1].tolist()),
        cuts=dict(cuts),
    )


def _row(
    far: float, fars: NDArray[np.float64], tars: NDArray[np.float64], *, num_people: int, people_pairs: int
) -> Threshold:
    """fars, tars: [NUM_BINS + 1], by the number of bins accepted from the top."""
    accepted_bins = int((fars <= far).sum()) - 1  # fars rise
    measured_far, measured_tar = float(fars[accepted_bins]), float(tars[accepted_bins])
    far_low, far_high = wilson(measured_far * people_pairs, people_pairs)
    tar_low, tar_high = wilson(measured_tar * num_people, num_people)
    return Threshold(
        far=far,
        threshold=_edge(accepted_bins, len(fars) - 1),
        measured_far=measured_far,
        far_low=far_low,
        far_high=far_high,
        measured_tar=measured_tar,
        tar_low=tar_low,
        tar_high=tar_high,
    )


def _edge(accepted_bins: int, num_bins: int) -> float:
    """The cosine from which on so many of the upper bins are accepted."""
    return 1.0 - 2.0 * accepted_bins / num_bins
