"""Exact search among enrolled templates: every one is compared, a block at a time.  Pure maths."""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

BLOCK_ROWS: Final = 16_384  # templates at once: their scores for one face take 64 KiB and stay in the cache


class Matches(NamedTuple):
    """Of each face asked about, the people it is most like, best first; people who score alike by their number."""

    people: Int64  # [Q, K], numbers in the gallery
    scores: Float32  # [Q, K], cosine of the person's best template


def best_matches(templates: Float32, first_rows: Int64, faces: Float32, top: int) -> Matches:
    """The `top` people whose templates are most like each face; of a person the best template counts.

    templates: [N, D] float32 of length 1, one person's after the other's; it may be a file that is mapped into memory.
    first_rows: [P] int64 ascending from 0, where each person's templates begin; everybody has one at least.
    faces: [Q, D] float32 of length 1.  top: >= 1; K = min(top, P).
    Memory beside the arguments: 4 Q (P + BLOCK_ROWS) bytes.  Raises ValueError for shapes that do not fit.
    """
    if faces.ndim != 2 or templates.ndim != 2 or faces.shape[1] != templates.shape[1]:
        raise ValueError(f"faces {faces.shape} and templates {templates.shape} must be [Q, D] and [N, D]")
    best = person_scores(templates, first_rows, faces)
    kept = min(top, len(first_rows))
    people = np.stack([_highest(row, kept) for row in best]) if len(best) else np.zeros((0, kept), dtype=np.int64)
    return Matches(people, np.take_along_axis(best, people, axis=1))


def person_scores(templates: Float32, first_rows: Int64, faces: Float32) -> Float32:
    """The cosine of each face and each person's best template, [Q, P] float32.  Arguments as of `best_matches`."""
    num_people = len(first_rows)
    best = np.full((len(faces), num_people), -np.inf, dtype=np.float32)
    one_each = len(templates) == num_people
    for begin in range(0, len(templates), BLOCK_ROWS):
        scores = faces @ templates[begin : begin + BLOCK_ROWS].T
        if one_each:
            best[:, begin : begin + BLOCK_ROWS] = scores
            continue
        # The block may begin in the middle of a person's templates, whose earlier ones are in `best` already.
        first = int(np.searchsorted(first_rows, begin, side="right")) - 1
        last = int(np.searchsorted(first_rows, begin + scores.shape[1], side="left"))
        starts = np.maximum(first_rows[first:last] - begin, 0)
        there = best[:, first:last]
        np.maximum(there, np.maximum.reduceat(scores, starts, axis=1), out=there)
    return best


def _highest(scores: Float32, kept: int) -> Int64:
    """Where the `kept` highest of [P] are, highest first; of equal ones those with the lowest number, in that order."""
    if not kept:
        return np.zeros(0, dtype=np.int64)
    least = np.partition(scores, len(scores) - kept)[len(scores) - kept]
    candidates = np.flatnonzero(scores >= least)
    order = np.lexsort((candidates, -scores[candidates]))
    return candidates[order[:kept]].astype(np.int64)
