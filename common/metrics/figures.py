"""Every figure that models are judged by, one row each: what scores, logs, draws, compares or chooses reads this table.

A new figure of the sums there are is a row of FIGURES with its function.  A function of pairs takes any leading axes,
so that one serves the figure itself and all replicates of its bootstrap.  Figures of a kind of pairs stand among a
model's others by names that open with the kind: twins_roc_auc, strangers_eer.

NumPy is imported inside the functions, since every program's `--help` passes by here.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from common.errors import DataError
from common.metrics.names import of_split, seconds_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from common.metrics.sums import ClosedSetSums, EvaluationSums

    Histograms = NDArray[np.int64] | NDArray[np.float64]
    Values = NDArray[np.float64]

KINDS: Final = ("all", "twins", "strangers")  # of pairs; see `common.metrics.pairs`
# Which of the sums a figure is made of: a field of `EvaluationSums`, or the pairs as they are judged by a threshold.
CLOSED, PAIRS, FOLDS, JUDGED = "closed", "pairs", "folds", "judged"
FEW_PEOPLE: Final = 10  # with fewer behind a figure, other people would give quite another
AUC: Final = "roc_auc"  # by which the best round, epoch and model is chosen
_DEVIATIONS: Final = 1.959964  # of a 95 % interval


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A row of the table."""

    name: str
    of: str  # CLOSED, PAIRS, FOLDS or JUDGED
    # PAIRS: of histograms [..., 2, bins], row 0 genuine and row 1 impostor; JUDGED: of `judged` ones, [..., 2, 2];
    # [...] float64 then, with NaN where one has no genuine or no impostor pair.  Only the order of bins counts: a
    # bootstrap has fewer, and of unequal width.  CLOSED, FOLDS: of that field, a float.
    values: Callable[[Any], Any]
    is_best: str = "highest"  # or "lowest"
    title: str = ""  # above a panel of a picture: what it is, and on a second line of whom; "": its name
    guessing: float | None = None  # what guessing reaches, whoever is guessed; None: about the worst there is, 0 or 1
    in_rounds: bool = False  # stands in the record of each round and epoch, and a sweep may choose by it
    kinds: tuple[str, ...] = ()  # beside all pairs, in records and gaps
    is_compared: bool = True  # stands in comparisons of models
    has_gap: bool = False  # gaps between models are shown
    told: str = ""  # what the line of a scored model calls it, on the terminal; "": it is not there
    head: str = ""  # of its column in a comparison's table; "": none
    kind_head: str = ""  # likewise in the table of the kinds of pairs
    words: Mapping[str, str] = field(default_factory=dict)  # what a report explains of it: word -> meaning
    # The ends of its 95 % interval, of CLOSED or FOLDS; a figure of pairs is drawn (`common.metrics.bootstrap`).
    ends: Callable[[Any], tuple[float, float]] | None = None
    ends_method: str = ""  # how they are made

    @property
    def label(self) -> str:
        """Its title without the people that it is of."""
        return (self.title or self.name).partition("\n")[0]

    @property
    def span(self) -> tuple[float, float]:
        """Where an axis of it begins and ends: from guessing to perfect, so that no picture magnifies chance.

        Of figures in [0, 1]; a value outside widens it.
        """
        if self.guessing is None:
            return 0.0, 1.0
        return (self.guessing, 1.0) if self.is_best == "highest" else (0.0, self.guessing)


def check_both_kinds(histogram: "Histograms") -> tuple[int, int]:
    """How many genuine and impostor pairs a histogram [2, NUM_BINS] holds.  Raises DataError when one is none."""
    from common.metrics.sums import NUM_BINS

    if histogram.shape != (2, NUM_BINS):
        raise ValueError(f"a pair histogram is [2, {NUM_BINS}], not {list(histogram.shape)}")
    num_genuine, num_impostor = (int(total) for total in histogram.sum(axis=1))
    if num_genuine == 0 or num_impostor == 0:
        raise DataError(
            f"open-set scores of {num_genuine} genuine and {num_impostor} impostor pairs; "
            "give at least two people, one of them with two pictures."
        )
    return num_genuine, num_impostor


def roc_curve(histograms: "Histograms") -> "tuple[Values, Values]":
    """The ROC curve at every bin's lower edge, thresholds descending.

    histograms: [..., 2, bins] as `pairs.pair_histogram` counts, or sums or replicates of such.
    Returns (far, tar), each [..., bins + 1] float64 from 0 to 1: the accepted fraction of impostor and genuine pairs.
    Of several histograms one without genuine or impostor pairs has a curve of NaN.  Raises DataError when a single one
    [2, NUM_BINS] is such.
    """
    import numpy as np

    if histograms.ndim == 2:
        check_both_kinds(histograms)
    totals = histograms.sum(axis=-1)
    accepted = np.zeros((*histograms.shape[:-1], histograms.shape[-1] + 1))
    np.cumsum(histograms[..., ::-1], axis=-1, out=accepted[..., 1:])
    accepted /= np.where((totals > 0).all(axis=-1, keepdims=True), totals, np.nan)[..., None]
    return accepted[..., 1, :], accepted[..., 0, :]


def roc_auc(histograms: "Histograms") -> "Values":
    """Probability that a genuine pair scores above an impostor pair; pairs in one bin count half.

    histograms: [..., 2, bins], as `roc_curve` takes and refuses them.  Returns [...] float64 in [0, 1].
    """
    import numpy as np

    far, tar = roc_curve(histograms)
    return np.asarray(np.trapezoid(tar, far, axis=-1))


def eer(histograms: "Histograms") -> "Values":
    """Equal error rate: `equal_error_rate` of the ROC curve.

    histograms: [..., 2, bins], as `roc_curve` takes and refuses them.  Returns [...] float64 in [0, 1].
    """
    return equal_error_rate(*roc_curve(histograms))


def equal_error_rate(far: "Values", tar: "Values") -> "Values":
    """Where FAR = 1 - TAR, linear between two points of a curve.

    far, tar: [..., K], both ascending from 0 to 1.  Returns [...] float64; NaN of a curve of NaN.
    """
    import numpy as np

    gap = far + tar - 1.0  # FAR - FRR: rises from -1
    after = np.maximum(np.argmax(gap >= 0.0, axis=-1), 1)[..., None]
    gap_before, gap_after = (np.take_along_axis(gap, place, axis=-1) for place in (after - 1, after))
    far_before, far_after = (np.take_along_axis(far, place, axis=-1) for place in (after - 1, after))
    crossing: Values = far_before - gap_before / (gap_after - gap_before) * (far_after - far_before)
    return crossing[..., 0]


def tar_at_far(histograms: "Histograms", far: float) -> "Values":
    """The largest TAR that a threshold (a bin's edge) reaches with FAR <= far. Nothing is interpolated.

    So the figure is one that was reached, and with fewer than 1 / far impostor pairs it is the TAR at FAR 0.
    histograms: [..., 2, bins], as `roc_curve` takes and refuses them.  far: in [0, 1].  Returns [...] float64.
    Raises ValueError when far is no fraction.
    """
    import numpy as np

    if not 0.0 <= far <= 1.0:
        raise ValueError(f"far = {far} must be in [0, 1]")
    fars, tars = roc_curve(histograms)
    last = (fars <= far).sum(axis=-1, keepdims=True) - 1  # far rises along the curve
    return np.take_along_axis(tars, last, axis=-1)[..., 0]


def accepted_from(threshold: float) -> int:
    """The first bin, in [0, NUM_BINS], whose scores are all at or above a threshold."""
    import numpy as np

    from common.metrics.sums import NUM_BINS

    return int(np.clip(np.ceil((threshold + 1.0) * NUM_BINS / 2.0 - 1e-6), 0, NUM_BINS))


def judged(histogram: "NDArray[np.int64]", threshold: float) -> "NDArray[np.int64]":
    """How many pairs are rejected and accepted: [2, 2] int64 of a histogram [2, NUM_BINS].

    threshold: cosine; a bin is accepted when its lower edge is not below.
    """
    import numpy as np

    first = accepted_from(threshold)
    return np.stack([histogram[:, :first].sum(axis=1), histogram[:, first:].sum(axis=1)], axis=1)


def balanced_accuracy(judged_pairs: "Histograms") -> "Values":
    """Accuracy where both kinds of pairs weigh alike: the mean of accepted genuine and of rejected impostor pairs.

    (As with LFW's as many of one as of the other. Of all pairs nearly all are impostors, and "always different" would
    be right for nearly all.)  judged_pairs: [..., 2, 2 or more], as `judged` counts: bin 1 is what was accepted, other
    bins what was not.  Returns [...] float64; NaN where there is no genuine or no impostor pair.
    """
    import numpy as np

    totals = judged_pairs.sum(axis=-1)
    accepted = judged_pairs[..., 1] / np.where(totals > 0, totals, np.nan)
    accuracy: Values = (accepted[..., 0] + 1.0 - accepted[..., 1]) / 2.0
    return accuracy


def accuracy_at(histogram: "NDArray[np.int64]", threshold: float) -> float:
    """`balanced_accuracy` of a histogram [2, NUM_BINS] at a cosine.  Raises DataError without pairs of both sorts."""
    _require_pairs(histogram)
    return float(balanced_accuracy(judged(histogram, threshold)))


def threshold_at_best_accuracy(histogram: "NDArray[np.int64]") -> float:
    """The cosine, a bin's lower edge, from which on pairs are best taken for genuine ones.

    histogram: [2, NUM_BINS], of all pairs of *validation* people: a threshold chosen on the pairs it is then tried on
    flatters. Best is by `balanced_accuracy`; of equally good edges the middle one is taken, so a gap is cut in its
    middle.  Raises DataError when there is no genuine or no impostor pair.
    """
    import numpy as np

    _require_pairs(histogram)
    far, tar = roc_curve(histogram)
    accuracy = (tar + 1.0 - far) / 2.0
    best = np.flatnonzero(accuracy >= accuracy.max() - 1e-12)
    accepted_bins = int(best[(len(best) - 1) // 2])
    return 1.0 - 2.0 * accepted_bins / int(histogram.shape[1])


def known_threshold(histogram: "NDArray[np.int64]") -> float | None:
    """`threshold_at_best_accuracy` of the validation people's pairs; None where they have not both kinds."""
    return threshold_at_best_accuracy(histogram) if bool(histogram.any(axis=1).all()) else None


def ten_fold_accuracy(folds: "NDArray[np.int64]") -> float:
    """The mean of `folds.ten_fold_accuracy`."""
    from common.metrics import folds as ten_folds

    mean, _ = ten_folds.ten_fold_accuracy(folds)
    return mean


def fold_ends(folds: "NDArray[np.int64]") -> tuple[float, float]:
    """The mean over folds, with 1.96 standard errors of it on both sides (the deviation LFW's protocol reports)."""
    from common.metrics import folds as ten_folds

    mean, deviation = ten_folds.ten_fold_accuracy(folds)
    half = _DEVIATIONS * deviation / math.sqrt(ten_folds.NUM_FOLDS)
    return max(0.0, mean - half), min(1.0, mean + half)


def wilson(total: float, num: float) -> tuple[float, float]:
    """The 95 % score interval of a fraction (Wilson, JASA 22, 1927), which takes what is counted as independent.

    total: of `num` values in [0, 1], num > 0.  Of values that are not all 0 or 1 it is wider than need be, since
    none in [0, 1] spread more at one mean.
    """
    rate, square = total / num, _DEVIATIONS**2 / num
    middle = (rate + square / 2) / (1 + square)
    half = math.sqrt(rate * (1 - rate) * square + square**2 / 4) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


_OVER_PEOPLE: Final = "Wilson, over people, at its widest"

FIGURES: Final[tuple[Figure, ...]] = (
    Figure(
        name=AUC,
        of=PAIRS,
        values=roc_auc,
        title="ROC AUC\npeople never seen",
        guessing=0.5,
        in_rounds=True,
        told="AUC",
        kinds=("twins", "strangers"),
        has_gap=True,
        head="AUC",
        kind_head="AUC",
        words={
            "AUC": "probability that a pair of pictures of one person scores above a pair of two people; 0.5 is"
            " guessing."
        },
    ),
    Figure(
        name="eer",
        of=PAIRS,
        values=eer,
        is_best="lowest",
        title="equal error rate\npeople never seen",
        guessing=0.5,
        in_rounds=True,
        told="EER",
        kinds=("twins",),
        has_gap=True,
        head="EER",
        kind_head="EER",
        words={
            "EER": "equal error rate: the part of impostor pairs accepted where it equals that of genuine pairs"
            " rejected."
        },
    ),
    Figure(
        name="tar_at_far_1e-1",
        of=PAIRS,
        values=partial(tar_at_far, far=1e-1),
        title="TAR at FAR 0.1\npeople never seen",
        kind_head="TAR@FAR 1e-1",
    ),
    Figure(
        name="tar_at_far_1e-2",
        of=PAIRS,
        values=partial(tar_at_far, far=1e-2),
        title="TAR at FAR 0.01\npeople never seen",
        has_gap=True,
        head="TAR@FAR 1e-2",
        kind_head="1e-2",
        words={
            "TAR@FAR 1e-2, 1e-3": "the part of genuine pairs accepted when at most 1 % or 0.1 % of impostor pairs are."
        },
    ),
    Figure(
        name="tar_at_far_1e-3",
        of=PAIRS,
        values=partial(tar_at_far, far=1e-3),
        title="TAR at FAR 0.001\npeople never seen",
        has_gap=True,
        head="TAR@FAR 1e-3",
        kind_head="1e-3",
    ),
    Figure(
        name="ten_fold_accuracy",
        of=FOLDS,
        values=ten_fold_accuracy,
        title="ten-fold accuracy\npeople never seen",
        guessing=0.5,
        told="ten-fold accuracy",
        head="ten-fold",
        words={
            "ten-fold": "part of balanced pairs judged rightly, each tenth by the threshold that is best on the other"
            " nine."
        },
        ends=fold_ends,
        ends_method="1.96 standard errors over folds",
    ),
    Figure(
        name="accuracy",
        of=JUDGED,
        values=balanced_accuracy,
        title="accuracy at one threshold\npeople never seen",
        guessing=0.5,
        kind_head="accuracy",
        words={
            "accuracy": "mean of the parts of genuine pairs accepted and of impostor pairs rejected, by one threshold"
            " for all kinds: the best one for all pairs of the validation people."
        },
    ),
    Figure(
        name="accuracy",
        of=CLOSED,
        values=lambda closed: closed.correct / closed.num_examples,
        title="accuracy\nown identities",
        in_rounds=True,
        told="accuracy",
        head="own people",
        words={"own people": "accuracy among one client's own people, on pictures that were not trained on."},
        ends=lambda closed: wilson(closed.correct, closed.num_examples),
        ends_method="Wilson, over pictures",
    ),
    Figure(
        name="loss",
        of=CLOSED,
        values=lambda closed: closed.loss_sum / closed.num_examples,  # the mean over examples
        is_best="lowest",
        title="loss (nats)",
        in_rounds=True,
        is_compared=False,
    ),
    # Macro averages over classes.
    Figure(
        name="precision",
        of=CLOSED,
        values=lambda closed: closed.precision_sum / closed.num_classes,
        title="precision\nown identities",
        ends=lambda closed: wilson(closed.precision_sum, closed.num_classes),
        ends_method=_OVER_PEOPLE,
    ),
    Figure(
        name="recall",
        of=CLOSED,
        values=lambda closed: closed.recall_sum / closed.num_classes,
        title="recall\nown identities",
        ends=lambda closed: wilson(closed.recall_sum, closed.num_classes),
        ends_method=_OVER_PEOPLE,
    ),
    Figure(
        name="f1",
        of=CLOSED,
        values=lambda closed: closed.f1_sum / closed.num_classes,
        title="F1\nown identities",
        ends=lambda closed: wilson(closed.f1_sum, closed.num_classes),
        ends_method=_OVER_PEOPLE,
    ),
)


def people_behind(histogram: "NDArray[np.int64]") -> int:
    """How many people all pairs of their pictures, [2, NUM_BINS], are of, if each has equally many pictures.

    N pictures make N (N - 1) / 2 pairs; with k_i pictures of each person G genuine ones are the sum of
    k_i (k_i - 1) / 2, so that of n people with N / n pictures each N^2 = n (2 G + N).  With unequal numbers the result
    is smaller than the number of people (Cauchy-Schwarz), as those with few pictures weigh little.  0: no pairs.
    """
    genuine, impostor = (int(total) for total in histogram.sum(axis=1))
    if genuine + impostor == 0:
        return 0
    pictures = (1.0 + math.sqrt(1.0 + 8.0 * (genuine + impostor))) / 2.0
    return max(1, round(pictures * pictures / (2.0 * genuine + pictures)))


def figures_of(*sums: str) -> list[Figure]:
    """The rows of some of CLOSED, PAIRS, FOLDS and JUDGED, in the table's order."""
    return [figure for figure in FIGURES if figure.of in sums]


def figure_name(kind: str, name: str) -> str:
    """The name of a kind's figure among a model's: "twins_eer"; "roc_auc" of all pairs, but "all_accuracy".

    (`accuracy` alone is of the closed set.)
    """
    is_plain = kind == "all" and name not in {figure.name for figure in figures_of(JUDGED)}
    return name if is_plain else f"{kind}_{name}"


def kind_of(name: str) -> str:
    """The kind of pairs that a figure of this name is of."""
    return next((kind for kind in KINDS if name.startswith(f"{kind}_")), "all")


def row_of(name: str) -> Figure:
    """The row of a figure by its name among a model's, of a kind of pairs too.

    "val_", "test_" or "round_test_" may stand before it.  Raises KeyError for a name that is no figure's.
    """
    bare = _without_split(name)
    kind = next((kind for kind in KINDS if bare.startswith(f"{kind}_")), "")
    rows = figures_of(PAIRS, JUDGED) if kind else figures_of(CLOSED, PAIRS, FOLDS)
    return {row.name: row for row in rows}[bare.removeprefix(f"{kind}_")]


def title_of(name: str) -> str:
    """What a picture calls a figure, and on a second line of whom it is, for a name as `row_of` takes it."""
    row, kind = row_of(name), kind_of(_without_split(name))
    return row.title or row.name if kind == "all" else f"{row.label}\n{kind} only, never seen"


def _without_split(name: str) -> str:
    return name.removeprefix("round_").removeprefix("test_").removeprefix("val_")


def recorded() -> Iterator[tuple[str, Figure]]:
    """What the record of each round and epoch holds of a model: each figure's name, and its row."""
    for kind in KINDS:
        for figure in figures_of(PAIRS, FOLDS):
            if figure.in_rounds and (kind == "all" or kind in figure.kinds):
                yield figure_name(kind, figure.name), figure
    for figure in figures_of(CLOSED):
        if figure.in_rounds:
            yield figure.name, figure


def validated() -> dict[str, tuple[str, Figure]]:
    """Metric of an epoch -> the figure's name among `known_scores`, and its row; a sweep may choose by any."""
    return {of_split("val", name): (name, row) for name, row in recorded()}


def compared() -> dict[str, Figure]:
    """What a comparison may hold of a model on a test set, in its order: all pairs, the kinds of pairs, own people."""
    rows = {figure.name: figure for figure in figures_of(PAIRS, FOLDS) if figure.is_compared}
    rows |= {figure_name(kind, row.name): row for kind in KINDS for row in figures_of(PAIRS, JUDGED) if row.is_compared}
    return rows | {figure.name: figure for figure in figures_of(CLOSED) if figure.is_compared}


def gap_figures() -> list[str]:
    """The figures whose gaps between models are shown."""
    return [
        figure_name(kind, figure.name)
        for kind in KINDS
        for figure in figures_of(PAIRS)
        if figure.has_gap and (kind == "all" or kind in figure.kinds)
    ]


def closed_scores(closed: "ClosedSetSums") -> dict[str, float]:
    """The figures of own people.  Raises DataError when there is no example: an empty score is an error, not zero."""
    if closed.num_examples == 0 or closed.num_classes == 0:
        raise DataError("closed-set scores of no pictures; give the split at least one picture of each person.")
    return {figure.name: float(figure.values(closed)) for figure in figures_of(CLOSED)}


def open_set_scores(histogram: "NDArray[np.int64]") -> dict[str, float]:
    """The figures of one histogram of pairs, [2, NUM_BINS].  Raises DataError without genuine or impostor pairs."""
    check_both_kinds(histogram)
    return {figure.name: float(figure.values(histogram)) for figure in figures_of(PAIRS)}


def kind_scores(histogram: "NDArray[np.int64]", kind: str, threshold: float | None = None) -> dict[str, float]:
    """`open_set_scores` of one kind's histogram and, where a threshold is given, those of the judged pairs.

    threshold: a cosine, from validation.  Raises DataError, naming the kind, when there is no genuine or no impostor
    pair of it.
    """
    _require_pairs(histogram, f"{kind}: ")
    found = open_set_scores(histogram)
    if threshold is None:
        return found
    by_threshold = judged(histogram, threshold)
    return found | {figure.name: float(figure.values(by_threshold)) for figure in figures_of(JUDGED)}


def open_scores(sums: "EvaluationSums") -> dict[str, float]:
    """The figures of people never seen, of all pairs.  Raises DataError without genuine or without impostor pairs."""
    found = open_set_scores(sums.pairs)
    return found | {figure.name: float(figure.values(sums.folds)) for figure in figures_of(FOLDS)}


def scores(sums: "EvaluationSums") -> dict[str, float]:
    """`closed_scores` and `open_scores`.  Raises DataError when a set is empty."""
    return closed_scores(sums.closed) | open_scores(sums)


def twin_scores(sums: "EvaluationSums") -> dict[str, float]:
    """The figures of twins alone, and of all pairs but those of siblings, as far as their rows name the kinds.

    Those of strangers are missing where all are of one family.  Raises DataError when there are no pairs of twins.
    """
    found: dict[str, float] = {}
    for kind in KINDS[1:]:
        histogram = sums.of_kind(kind)
        if kind == "twins" or histogram[1].any():
            own = kind_scores(histogram, kind)
            found |= {f"{kind}_{figure.name}": own[figure.name] for figure in figures_of(PAIRS) if kind in figure.kinds}
    return found


def known_scores(sums: "EvaluationSums") -> dict[str, float]:
    """`closed_scores`, `open_scores` and `twin_scores`, as far as there is anything to score."""
    found = closed_scores(sums.closed) if sums.closed.num_examples > 0 else {}
    for part in (open_scores, twin_scores):
        try:
            found |= part(sums)
        except DataError:
            break  # twins are among the pairs
    return found


def train_metrics(train: Mapping[str, float]) -> dict[str, float]:
    """train_loss, train_accuracy, gradient_norm, images_per_second from a reply's (or merged) training sums.

    The warm-up of new heads has figures of its own, where there was one.  With differential privacy the first three are
    not there: their sums stay at the client.
    """
    pictures, steps = max(train["num_pictures"], 1.0), max(train["num_steps"], 1.0)
    warmup = {"num_warmup_pictures": train["num_warmup_pictures"], seconds_of("warmup"): train["warmup_seconds"]}
    sums = {"train_loss": ("loss_sum", pictures), "train_accuracy": ("correct", pictures)}
    sums |= {"gradient_norm": ("gradient_norm_sum", steps)}
    figures = {name: train[field] / number for name, (field, number) in sums.items() if field in train}
    figures |= {
        "images_per_second": train["num_pictures"] / max(train["seconds"], 1e-9),
        seconds_of("receive"): train["receive_seconds"],
        seconds_of("evaluate"): train["evaluate_seconds"],
        seconds_of("train"): train["seconds"],
        seconds_of("send"): train["send_seconds"],
    }
    # Told where it happened: a device had no room for whole batches.
    figures |= {"num_halvings": train["num_halvings"]} if train["num_halvings"] > 0 else {}
    return figures | warmup if train["num_warmup_pictures"] > 0 else figures


def own_seconds(train: Mapping[str, float]) -> float:
    """How long a client worked on a training task by its own clock, in all its phases."""
    return sum(value for name, value in train.items() if name == "seconds" or name.endswith("_seconds"))


def _require_pairs(histogram: "NDArray[np.int64]", what: str = "") -> None:
    num_genuine, num_impostor = (int(total) for total in histogram.sum(axis=1))
    if num_genuine == 0 or num_impostor == 0:
        raise DataError(
            f"{what}scores of {num_genuine} genuine and {num_impostor} impostor pairs; twins need two siblings with "
            "pictures, strangers two families, and somebody two pictures."
        )
