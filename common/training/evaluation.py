"""The one evaluation of all modes: sums of the closed set, histograms of pairs of the open set."""

import hashlib
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from common.errors import TrainingFailed
from common.faces.batches import evaluation_batches
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.metrics.design import PairDesign, most_pairs_of_a_person, num_pairs_of, pair_design
from common.metrics.folds import choose_pairs, fold_histogram, pair_scores
from common.metrics.pairs import designed_histogram, pair_histogram, pair_histograms
from common.metrics.sums import ClosedSetSums, EvaluationSums, closed_set_sums, grouped_confusion, no_twins
from common.models.recogniser import Recogniser
from common.system.progress import Tick, no_tick
from common.system.runtime import stream_seed
from common.training.loop import Compute

TEST_PAIRS = "test pairs"  # of `people_digest`, where a site keys it with its secret before it leaves
EVALUATION_BATCH = 64  # on a CPU a tenth faster than 128
CLOSED_BLOCK: Final = 2**25  # logits at once: 128 MiB, and as much again for their loss
SPLITS = {"val": (Split.VAL_PICTURES, Split.VAL_PEOPLE), "test": (Split.TEST_PICTURES, Split.TEST_PEOPLE)}


def people_digest(pack: FacePack, split: str, max_pairs: int | str = "all", person_pairs: int = 0) -> str:
    """A digest of who is on which picture of the open set of a split ("val" or "test"), and which pairs are scored.

    Models may be compared only on equal test pairs, and equal digests mean equal pairs. It does not depend on how the
    pictures were aligned or how large they are, nor on max_pairs and person_pairs while there are no more.
    """
    _, people = SPLITS[split]
    shown = pack.person[pack.indices(people)]
    named = "\n".join(pack.people[person] for person in shown.tolist())
    if pack.family is not None:  # which pairs are of twins is decided by it
        named += "\n\n" + "\n".join(pack.people[first] for first in pack.family[shown].tolist())
    if isinstance(max_pairs, int) and num_pairs_of(len(shown)) > max_pairs:
        named += f"\n\nat most {max_pairs} pairs"
    if person_pairs:
        design = design_of(pack, split, max_pairs, person_pairs)
        named += f"\n\nat most {person_pairs} of a person" if design is not None and design.is_cut else ""
    return hashlib.sha256(f"{pack.dataset}\n{named}".encode("utf-8", "surrogateescape")).hexdigest()[:16]


def design_of(pack: FacePack, split: str, max_pairs: int | str, person_pairs: int = 0) -> PairDesign | None:
    """Which pairs of a split's open set are scored; None: all.  The same for every model, round and machine.

    max_pairs: in all, or "all".  person_pairs: that one person may be in; 0: any number.
    """
    person = pack.person[pack.indices(SPLITS[split][1])]
    is_small = isinstance(max_pairs, str) or num_pairs_of(len(person)) <= max_pairs
    if is_small and (person_pairs == 0 or most_pairs_of_a_person(person, None) <= person_pairs):
        return None
    seed = stream_seed("pairs", people_digest(pack, split))
    return pair_design(person, most=max_pairs, seed=seed, most_of_person=person_pairs)


@torch.inference_mode()
def embed(
    recogniser: Recogniser, pack: FacePack, indices: NDArray[Any], compute: Compute, tick: Tick = no_tick
) -> torch.Tensor:
    """Raw embeddings of the chosen pictures: [len(indices), D] float32 on the CPU.

    tick: is told after each batch how many pictures it had.  Raises TrainingFailed when one is not finite.
    """
    if len(indices) == 0:  # people with too few pictures for a closed set: its sums are zeros, not an error
        return torch.empty(0, recogniser.embedding_size)
    compute.place(recogniser)
    recogniser.eval()
    parts: list[torch.Tensor] = []
    batches = evaluation_batches(pack.pictures, indices, batch_size=EVALUATION_BATCH, device=compute.device)
    with compute.autocast():  # around all of them, so that the weights are rounded once
        for batch in batches:
            parts.append(recogniser.embed(compute.laid_out(batch)).float())
            tick(len(batch))
    embeddings = torch.cat(parts).cpu()
    if not bool(torch.isfinite(embeddings).all()):
        raise TrainingFailed(f"the model gives embeddings that are not finite on {pack.dataset}'s pictures.")
    return embeddings


@torch.no_grad()
def _in_blocks(
    recogniser: Recogniser, embeddings: torch.Tensor, compute: Compute
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Which embeddings, and their logits [block, C] float32 on the training device, without margin.

    A block has so many rows that its logits are CLOSED_BLOCK numbers at most: never pictures x people.
    """
    rows = max(1, CLOSED_BLOCK // recogniser.head.identity_vectors.shape[0])
    for start in range(0, len(embeddings), rows):
        block = slice(start, start + rows)
        yield block, recogniser.class_logits(embeddings[block].to(compute.device)).float()


def closed_set_predictions(
    recogniser: Recogniser, pack: FacePack, split: Split, compute: Compute
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(predicted, labels), [N] int64 each: the most likely of the client's own people, and who it is."""
    predicted, labels, _ = _predicted(recogniser, pack, split, compute)
    return predicted, labels


def _predicted(
    recogniser: Recogniser, pack: FacePack, split: Split, compute: Compute, tick: Tick = no_tick
) -> tuple[NDArray[np.int64], NDArray[np.int64], float]:
    """`closed_set_predictions`, and the cross-entropy summed over the pictures."""
    indices = pack.indices(split)
    labels = pack.training_labels[indices]
    predicted, loss_sum = np.empty(len(indices), dtype=np.int64), 0.0
    for block, logits in _in_blocks(recogniser, embed(recogniser, pack, indices, compute, tick), compute):
        predicted[block] = logits.argmax(1).cpu().numpy()
        loss_sum += float(F.cross_entropy(logits, torch.from_numpy(labels[block]).to(logits.device), reduction="sum"))
    return predicted, labels, loss_sum


def _closed_set(
    recogniser: Recogniser, pack: FacePack, split: Split, compute: Compute, tick: Tick
) -> tuple[ClosedSetSums, NDArray[np.int64]]:
    """The sums of one client's own people, and how they are confused."""
    predicted, labels, loss_sum = _predicted(recogniser, pack, split, compute, tick)
    num_people = recogniser.head.identity_vectors.shape[0]
    return closed_set_sums(predicted, labels, loss_sum), grouped_confusion(predicted, labels, num_people)


def evaluate(
    recogniser: Recogniser,
    pack: FacePack,
    split: str,
    compute: Compute,
    *,
    open_embeddings: NDArray[np.float32] | None = None,
    open_pairs: NDArray[np.int64] | None = None,
    max_pairs: int | str = "all",
    person_pairs: int = 0,
    tick: Tick = no_tick,
) -> EvaluationSums:
    """Evaluate on one split ("val" or "test"): the client's own people (closed) and people never seen (open).

    open_embeddings: [N, D] of the split's open set in the pack's order, where the caller has them already.
    open_pairs: [2, NUM_BINS] of them, where the caller has counted them too and there are no families.
    max_pairs, person_pairs: of the open set, and that one person is in; where there are more, the pairs of `design_of`
    are scored.  tick: as `embed` has it, of the pictures of `num_scored`; pairs are scored after the last.
    """
    pictures, people = SPLITS[split]
    indices = pack.indices(people)
    embeddings = embed(recogniser, pack, indices, compute, tick).numpy() if open_embeddings is None else open_embeddings
    closed, confusion = _closed_set(recogniser, pack, pictures, compute, tick)
    chosen = choose_pairs(pack.person[indices], seed=stream_seed("folds", people_digest(pack, split)))
    if open_pairs is None:
        pairs, twins = _open_set(embeddings, pack, indices, design_of(pack, split, max_pairs, person_pairs), compute)
    else:
        pairs, twins = open_pairs, no_twins()
    return EvaluationSums(
        closed=closed,
        pairs=pairs,
        folds=fold_histogram(pair_scores(embeddings, chosen), chosen),
        confusion=confusion,
        twins=twins,
    )


def num_scored(pack: FacePack, split: str) -> int:
    """How many pictures `evaluate` looks at."""
    return sum(len(pack.indices(part)) for part in SPLITS[split])


def _open_set(
    embeddings: NDArray[np.float32],
    pack: FacePack,
    indices: NDArray[np.int64],
    design: PairDesign | None,
    compute: Compute,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The histograms of all pairs and of the twins' among them; zeros where a virtual client has no open set.

    They are worked out on the training device where that is a GPU.  Where families are known, a design's twins are
    those among its impostors' pictures.
    """
    person = pack.person[indices]
    if len(indices) == 0:
        return no_twins(), no_twins()
    placed = torch.from_numpy(embeddings)
    if compute.device_kind == "cuda":
        placed = placed.to(compute.device)
    if pack.family is not None:
        chosen = np.arange(len(indices)) if design is None else design.impostor
        return pair_histograms(placed[torch.from_numpy(chosen)], person[chosen], pack.family[person[chosen]])
    if design is None:
        return pair_histogram(placed, person), no_twins()
    return designed_histogram(placed, person, design), no_twins()
