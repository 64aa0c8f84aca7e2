"""The pairs that a model gets most wrong: two people who look alike to it, and one person who does not."""

import heapq
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.metrics.pairs import unit_length


class ScoredPair(NamedTuple):
    """Two pictures by position, and the cosine of their embeddings."""

    score: float
    first: int
    second: int


Embeddings = NDArray[np.float32] | Tensor


def hardest_impostors(embeddings: Embeddings, person: NDArray[np.int64], number: int) -> list[ScoredPair]:
    """The pictures of two people that score highest, one pair of each two people, highest first; at most `number`.

    embeddings: [N, D] float, of any length.  person: [N] int64, who each picture shows.  Exact: every pair is scored,
    person by person, in the memory of one person's scores.  Raises TrainingFailed when an embedding is not finite.
    """
    order, unit, starts = _by_person(embeddings, person)
    ends = [*starts[1:], len(order)]
    best: list[tuple[float, int, int]] = []  # a heap: score, and the two people by number
    for one, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if end == len(order):
            break
        highest = (unit[start:end] @ unit[end:].T).amax(0).numpy()
        of_others = np.maximum.reduceat(highest, np.array(starts[one + 1 :]) - end)
        for other in np.argsort(-of_others, kind="stable")[:number]:
            heapq.heappush(best, (float(of_others[other]), one, one + 1 + int(other)))
            if len(best) > number:
                heapq.heappop(best)
    found = []
    for _, one, other in sorted(best, reverse=True):
        scores = unit[starts[one] : ends[one]] @ unit[starts[other] : ends[other]].T
        row, column = divmod(int(scores.argmax()), scores.shape[1])
        places = int(order[starts[one] + row]), int(order[starts[other] + column])
        found.append(ScoredPair(float(scores[row, column]), *places))
    return found


def hardest_genuine(embeddings: Embeddings, person: NDArray[np.int64], number: int) -> list[ScoredPair]:
    """The two pictures of one person that score lowest, one pair of each person, lowest first; as above."""
    order, unit, starts = _by_person(embeddings, person)
    found = []
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        if end - start > 1:
            scores = unit[start:end] @ unit[start:end].T
            scores += 4.0 * torch.ones_like(scores).tril()  # a picture with itself, and each pair's second time
            row, column = divmod(int(scores.argmin()), end - start)
            found.append(ScoredPair(float(scores[row, column]), int(order[start + row]), int(order[start + column])))
    return heapq.nsmallest(number, found)


def _by_person(embeddings: Embeddings, person: NDArray[np.int64]) -> tuple[NDArray[np.int64], Tensor, list[int]]:
    """The places of the pictures person by person, their embeddings of length 1 likewise, and where each begins."""
    order = np.argsort(person, kind="stable")
    unit = unit_length(torch.as_tensor(embeddings)).cpu()[torch.from_numpy(order)]
    return order, unit, np.unique(person[order], return_index=True)[1].tolist()
