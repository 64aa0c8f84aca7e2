"""The one evaluation of all modes: sums of the closed set, histograms of pairs of the open set."""

import hashlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from common.errors import TrainingFailed
from common.faces.batches import evaluation_batches
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.metrics.folds import choose_pairs, fold_histogram, pair_scores
from common.metrics.pairs import pair_histogram, pair_histograms
from common.metrics.sums import ClosedSetSums, EvaluationSums, closed_set_sums, grouped_confusion, no_twins
from common.models.recogniser import Recogniser
from common.system.runtime import stream_seed
from common.training.loop import Compute

TEST_PAIRS = "test pairs"  # of `people_digest`, where a site keys it with its secret before it leaves
EVALUATION_BATCH = 64  # on a CPU a tenth faster than 128
SPLITS = {"val": (Split.VAL_PICTURES, Split.VAL_PEOPLE), "test": (Split.TEST_PICTURES, Split.TEST_PEOPLE)}


def people_digest(pack: FacePack, split: str) -> str:
    """A digest of who is on which picture of the open set of a split ("val" or "test").

    Models may be compared only on equal test pairs, and equal digests mean equal pairs. It does not depend on how the
    pictures were aligned or how large they are.
    """
    _, people = SPLITS[split]
    shown = pack.person[pack.indices(people)]
    named = "\n".join(pack.people[person] for person in shown.tolist())
    if pack.family is not None:  # which pairs are of twins is decided by it
        named += "\n\n" + "\n".join(pack.people[first] for first in pack.family[shown].tolist())
    return hashlib.sha256(f"{pack.dataset}\n{named}".encode("utf-8", "surrogateescape")).hexdigest()[:16]


@torch.inference_mode()
def embed(recogniser: Recogniser, pack: FacePack, indices: NDArray[Any], compute: Compute) -> torch.Tensor:
    """Raw embeddings of the chosen pictures: [len(indices), D] float32 on the CPU.

    Raises TrainingFailed when one is not finite.
    """
    if len(indices) == 0:  # people with too few pictures for a closed set: its sums are zeros, not an error
        return torch.empty(0, recogniser.embedding_size)
    compute.place(recogniser)
    recogniser.eval()
    parts: list[torch.Tensor] = []
    batches = evaluation_batches(pack.pictures, indices, batch_size=EVALUATION_BATCH, device=compute.device)
    with compute.autocast():  # around all of them, so that the weights are rounded once
        parts.extend(recogniser.embed(compute.laid_out(batch)).float() for batch in batches)
    embeddings = torch.cat(parts).cpu()
    if not bool(torch.isfinite(embeddings).all()):
        raise TrainingFailed(f"the model gives embeddings that are not finite on {pack.dataset}'s pictures.")
    return embeddings


@torch.no_grad()
def _class_logits(recogniser: Recogniser, pack: FacePack, indices: NDArray[Any], compute: Compute) -> torch.Tensor:
    """[len(indices), C] float32 on the CPU, without margin."""
    return recogniser.class_logits(embed(recogniser, pack, indices, compute).to(compute.device)).float().cpu()


def closed_set_predictions(
    recogniser: Recogniser, pack: FacePack, split: Split, compute: Compute
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(predicted, labels), [N] int64 each: the most likely of the client's own people, and who it is."""
    indices = pack.indices(split)
    return _class_logits(recogniser, pack, indices, compute).argmax(1).numpy(), pack.training_labels[indices]


def _closed_set(
    recogniser: Recogniser, pack: FacePack, split: Split, compute: Compute
) -> tuple[ClosedSetSums, NDArray[np.int64]]:
    """The sums of one client's own people, and how they are confused."""
    indices = pack.indices(split)
    labels = pack.training_labels[indices]
    logits = _class_logits(recogniser, pack, indices, compute)
    loss_sum = F.cross_entropy(logits, torch.from_numpy(labels), reduction="sum")
    predicted = logits.argmax(1).numpy()
    return closed_set_sums(predicted, labels, float(loss_sum)), grouped_confusion(predicted, labels, logits.shape[1])


def evaluate(
    recogniser: Recogniser,
    pack: FacePack,
    split: str,
    compute: Compute,
    *,
    open_embeddings: NDArray[np.float32] | None = None,
) -> EvaluationSums:
    """Evaluate on one split ("val" or "test"): the client's own people (closed) and people never seen (open).

    open_embeddings: [N, D] of the split's open set in the pack's order, where the caller has them already.
    """
    pictures, people = SPLITS[split]
    indices = pack.indices(people)
    embeddings = embed(recogniser, pack, indices, compute).numpy() if open_embeddings is None else open_embeddings
    closed, confusion = _closed_set(recogniser, pack, pictures, compute)
    chosen = choose_pairs(pack.person[indices], seed=stream_seed("folds", people_digest(pack, split)))
    pairs, twins = _open_set(embeddings, pack, indices)
    return EvaluationSums(
        closed=closed,
        pairs=pairs,
        folds=fold_histogram(pair_scores(embeddings, chosen), chosen),
        confusion=confusion,
        twins=twins,
    )


def _open_set(
    embeddings: NDArray[np.float32], pack: FacePack, indices: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The histograms of all pairs and of the twins' among them; zeros where a virtual client has no open set."""
    person = pack.person[indices]
    if len(indices) == 0:
        return no_twins(), no_twins()
    if pack.family is None:
        return pair_histogram(embeddings, person), no_twins()
    return pair_histograms(embeddings, person, pack.family[person])
