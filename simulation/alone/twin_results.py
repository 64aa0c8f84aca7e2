"""What a run on twins tells beside the scores of all: each figure for all pairs, twins only and strangers only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.faces.pack import FacePack
from common.metrics.bootstrap import Drawn, twin_figures
from common.metrics.figures import AUC, KINDS, roc_curve, threshold_at_best_accuracy
from common.metrics.pairs import pair_counts, pair_histograms
from common.metrics.sums import histogram_of
from common.models.recogniser import Recogniser
from common.plots import verification
from common.system.runtime import stream_seed
from common.tracking.run import SavesFigure
from common.training.evaluation import SPLITS, embed
from common.training.loop import Compute

NUM_REPLICATES = 1_000


@dataclass(frozen=True, kw_only=True)
class TwinResults:
    """The scores of one model on one data set's test people, and what may be drawn of them."""

    threshold: float  # cosine, chosen on validation people
    figures: Mapping[str, Mapping[str, Mapping[str, float]]]  # kind -> figure -> value, low, high
    curve: SavesFigure

    def metrics(self) -> dict[str, float]:
        """For the tracking: test_twins_roc_auc, test_twins_roc_auc_low, ..., and the threshold."""
        named = {"test_threshold": self.threshold}
        for kind, figures in self.figures.items():
            for figure, values in figures.items():
                named |= named_parts(f"test_{kind}_{figure}", values)
        return named

    def content(self) -> dict[str, object]:
        """For metrics.json."""
        return {"threshold": self.threshold, "figures": dict(self.figures)}


def named_parts(name: str, figure: Mapping[str, float]) -> dict[str, float]:
    """A figure's value under `name`, its interval's ends under NAME_low and NAME_high."""
    return {name if part == "value" else f"{name}_{part}": value for part, value in figure.items()}


def twin_lines(twins: Mapping[str, Any]) -> list[str]:
    """What a run on twins shows at its end: of each kind of pairs the AUC with its interval, EER and accuracy.

    twins: as `TwinResults.content` gives it.
    """
    lines = [f"\ntest people never seen, threshold {twins['threshold']:.3f} from validation (95 % over families):\n"]
    for kind, figures in twins["figures"].items():
        auc, eer, accuracy = (figures[name] for name in (AUC, "eer", "accuracy"))
        lines.append(
            f"  {kind:9} AUC {auc['value']:.3f} [{auc['low']:.3f}, {auc['high']:.3f}]  EER {eer['value']:.3f}"
            f"  accuracy {accuracy['value']:.3f}\n"
        )
    return lines


def missing_pairs(pack: FacePack) -> str:
    """Which pairs the test or the validation people lack for figures of twins, in words; "" when nothing is missing.

    pack: of a data set with families.
    """
    problems = []
    for split in ("val", "test"):
        _, person, family = pack.shown_in(SPLITS[split][1])
        for kind, (genuine, impostor) in pair_counts(person, family).items():
            if min(genuine, impostor) == 0:
                problems.append(f"{split} has {genuine} genuine and {impostor} impostor pairs of {kind}")
    return "; ".join(problems)


def twin_results(recogniser: Recogniser, pack: FacePack, compute: Compute, *, seed: int) -> TwinResults:
    """Score the model on the test people; the threshold comes from the validation people.

    pack: of a data set with families.
    Raises DataError when validation has no genuine or no impostor pair, or a kind of pairs is missing in test.
    """
    threshold = threshold_at_best_accuracy(pair_histograms(*_open_set(recogniser, pack, "val", compute))[0])
    test, person, family = _open_set(recogniser, pack, "test", compute)
    own_seed = stream_seed(seed, "families")
    drawn = Drawn.by_seed(test, person, family, num_replicates=NUM_REPLICATES, seed=own_seed)
    figures = twin_figures(drawn, threshold)
    histograms = pair_histograms(test, person, family)
    auc = {kind: figures[kind][AUC] for kind in KINDS}
    curves = {kind: (*roc_curve(histogram_of(kind, *histograms)), auc[kind]["value"]) for kind in KINDS}
    intervals = {kind: (auc[kind]["low"], auc[kind]["high"]) for kind in KINDS}
    return TwinResults(threshold=threshold, figures=figures, curve=verification.roc(curves, intervals=intervals))


def _open_set(
    recogniser: Recogniser, pack: FacePack, split: str, compute: Compute
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Embeddings of a split's people never seen in training, and who they are."""
    indices, person, family = pack.shown_in(SPLITS[split][1])
    return embed(recogniser, pack, indices, compute).numpy(), person, family
