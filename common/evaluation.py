"""The one evaluation of all modes: sums of the closed set and a histogram of pairs of the open set."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from common.errors import TrainingFailed
from common.faces.batches import evaluation_batches
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.metrics.classification import ClosedSetSums, closed_set_sums
from common.metrics.verification import open_set_scores, pair_histogram
from common.models.recogniser import Recogniser
from common.training import Compute

EVALUATION_BATCH = 128
SPLITS = {"val": (Split.VAL_PICTURES, Split.VAL_PEOPLE), "test": (Split.TEST_PICTURES, Split.TEST_PEOPLE)}


@dataclass(frozen=True, kw_only=True)
class EvaluationSums:
    """What one evaluation adds up; two clients' sums merge by addition."""

    closed: ClosedSetSums
    pairs: NDArray[np.int64]  # [2, 8192]: genuine and impostor pairs by cosine

    def __add__(self, other: "EvaluationSums") -> "EvaluationSums":
        return EvaluationSums(closed=self.closed + other.closed, pairs=self.pairs + other.pairs)

    def scores(self) -> dict[str, float]:
        """accuracy, loss, precision, recall, f1 and roc_auc, eer, tar_at_far_1e-1, _1e-2, _1e-3."""
        return self.closed.scores() | open_set_scores(self.pairs)


@torch.no_grad()
def embed(recogniser: Recogniser, pack: FacePack, indices: NDArray[Any], compute: Compute) -> torch.Tensor:
    """Raw embeddings of the chosen pictures: [len(indices), D] float32 on the CPU.

    Raises TrainingFailed when one is not finite.
    """
    if len(indices) == 0:  # people with too few pictures for a closed set: its sums are zeros, not an error
        return torch.empty(0, recogniser.backbone.linear.out_features)
    compute.place(recogniser)
    recogniser.eval()
    parts = []
    for batch in evaluation_batches(pack.pictures, indices, batch_size=EVALUATION_BATCH, device=compute.device):
        with compute.autocast():
            parts.append(recogniser.embed(compute.laid_out(batch)).float().cpu())
    embeddings = torch.cat(parts)
    if not bool(torch.isfinite(embeddings).all()):
        raise TrainingFailed(f"the model gives embeddings that are not finite on {pack.dataset}'s pictures.")
    return embeddings


@torch.no_grad()
def _closed_set(recogniser: Recogniser, pack: FacePack, split: Split, compute: Compute) -> ClosedSetSums:
    indices = pack.indices(split)
    labels = pack.training_labels[indices]
    logits = recogniser.class_logits(embed(recogniser, pack, indices, compute).to(compute.device)).float().cpu()
    loss_sum = F.cross_entropy(logits, torch.from_numpy(labels), reduction="sum")
    return closed_set_sums(logits.argmax(1).numpy(), labels, float(loss_sum))


def evaluate(recogniser: Recogniser, pack: FacePack, split: str, compute: Compute) -> EvaluationSums:
    """Evaluate on one split ("val" or "test"): the client's own people (closed) and people never seen (open)."""
    pictures, people = SPLITS[split]
    indices = pack.indices(people)
    embeddings = F.normalize(embed(recogniser, pack, indices, compute))
    return EvaluationSums(
        closed=_closed_set(recogniser, pack, pictures, compute),
        pairs=pair_histogram(embeddings.numpy(), pack.person[indices]),
    )
