"""What one site's part of a sum is as whole numbers: its weighted change, and every sum that its reply would have told.

    the change      one word an element, in steps that follow from the received model: the same at every site
    counts          two words each: score histograms, of groups of people too; pictures, classes, elements out of range
    sums            three words each: losses, precisions, recalls, F1, norms of gradients

A word is a uint32; the words of all sites are added modulo 2**32, in any order.  Confusion matrices stay at the sites:
their people differ, so the sum says nothing.  The encodings are those of `common/secagg/quantise.py`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.metrics.group_names import GROUPS, attributes_of, group_names
from common.metrics.groups import GROUP_ROW
from common.metrics.sums import COUNTS, WHOLE_NUMBERS, ClosedSetSums, EvaluationSums
from common.protocol.parameters import Part
from common.secagg.quantise import (
    COUNT_WORDS,
    REAL_WORDS,
    counts_to_words,
    dequantise,
    largest_code,
    quantise,
    reals_to_words,
    words_to_counts,
    words_to_reals,
)

Buffer = NDArray[np.float32]
Words = NDArray[np.uint32]

# A tensor's largest possible change: so many times its largest element, or this one where that is less.  A power of
# two, so that every machine works out the same step.
PARAMETERS: Final = (4.0, 0.25)
STATISTICS: Final = (64.0, 1.0)  # running means and variances follow the activations
SATURATED: Final = "saturated"  # elements of the change that were beyond that, and became it
CONTENT: Final = ("correct", "loss_sum", "gradient_norm_sum")  # of training, which follow from the pictures
_WHOLE: Final = WHOLE_NUMBERS
_REAL: Final = tuple(field.name for field in fields(ClosedSetSums) if field.type is float)
_ARRAYS: Final = {name: shape for name, shape in COUNTS.items() if shape is not None}


@dataclass(frozen=True, kw_only=True)
class Sums:
    """The sums over some sites; of one site what it adds."""

    evaluations: Mapping[str, EvaluationSums]  # by split
    content: Mapping[str, float]  # CONTENT, of training; empty else
    saturated: int = 0  # elements of changes that were cut to their range
    groups: NDArray[np.int64] | None = None  # [G, GROUP_ROW], where they were asked for


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What lies where in the words of one exchange.

    change: of the flat model what moves; None: no change is sent, of an evaluation.  splits: that are scored.
    num_members: how many sites may add.  num_groups: of test people, whose pairs are counted.  step: of all numbers of
    the change, where noise puts them on a grid (`common/privacy/shared_noise.py`); 0: one of each tensor, by its range.
    """

    change: Part | None
    splits: tuple[str, ...]
    num_members: int
    num_groups: int = 0
    step: float = 0.0

    @property
    def size(self) -> int:
        """How many words there are."""
        return self._change_size + COUNT_WORDS * self._num_counts + REAL_WORDS * self._num_reals

    @property
    def _change_size(self) -> int:
        return 0 if self.change is None else self.change.part.size

    @property
    def _num_counts(self) -> int:
        each = sum(math.prod(shape) for shape in _ARRAYS.values()) + len(_WHOLE)
        return each * len(self.splits) + 1 + self.num_groups * GROUP_ROW

    @property
    def _num_reals(self) -> int:
        return len(_REAL) * len(self.splits) + (0 if self.change is None else len(CONTENT))

    def words(self, change: Buffer | None, received: Buffer | None, share: float, sums: Sums) -> tuple[Words, int]:
        """One site's words, [size] uint32, and how many elements of its change were cut to their range.

        change: [part.size], as `received`, of the model that came.  share: of the change, its weight in (0, 1].
        sums: its own; a split that it keeps to itself is missing, and adds nothing.
        Raises TrainingFailed for a change that is not finite, SecureSumRefused for counts that are too large.
        """
        words, saturated = np.empty(self.size, dtype=np.uint32), 0
        if self.change is not None and change is not None and received is not None:
            for where, limit in self._ranges(self.change, received):
                weighted = change[where].astype(np.float64) * share
                words[where], beyond = quantise(weighted, self.num_members, limit)
                saturated += beyond
        counts, reals = [np.array([saturated], dtype=np.int64)], [0.0] * 0
        for split in self.splits:
            found = sums.evaluations.get(split)
            counts += [_counts_of(found, name, shape) for name, shape in _ARRAYS.items()]
            closed: Mapping[str, Any] = {} if found is None else vars(found.closed)
            counts.append(np.array([closed.get(name, 0) for name in _WHOLE], dtype=np.int64))
            reals += [float(closed.get(name, 0.0)) for name in _REAL]
        own = np.zeros((self.num_groups, GROUP_ROW), dtype=np.int64) if sums.groups is None else sums.groups
        counts.append(own.reshape(-1))
        if self.change is not None:
            reals += [float(sums.content.get(name, 0.0)) for name in CONTENT]
        end = self._change_size + COUNT_WORDS * self._num_counts
        words[self._change_size : end] = counts_to_words(np.concatenate(counts))
        words[end:] = reals_to_words(np.array(reals, dtype=np.float64))
        return words, saturated

    def mean(self, total: Words, received: Buffer, shares: float) -> Buffer:
        """The weighted mean change, [part.size] float32, of the sites' words added.

        received: as for `words`.  shares: of these sites, added, > 0.
        """
        if self.change is None:
            raise ValueError("no change was sent")
        mean = np.empty(self._change_size, dtype=np.float32)
        for where, limit in self._ranges(self.change, received):
            mean[where] = dequantise(total[where], self.num_members, limit) / shares
        return mean

    def _ranges(self, part: Part, received: Buffer) -> list[tuple[slice, float]]:
        if self.step:
            return [(slice(0, part.part.size), self.step * largest_code(self.num_members))]
        return ranges(part, received)

    def sums(self, total: Words) -> Sums:
        """What else the sites' words, added, say."""
        end = self._change_size + COUNT_WORDS * self._num_counts
        counts = words_to_counts(total[self._change_size : end], (self._num_counts,))
        reals = words_to_reals(total[end:]).tolist()
        saturated, rest = int(counts[0]), counts[1:]
        evaluations = {}
        for number, split in enumerate(self.splits):
            arrays = {}
            for name, shape in _ARRAYS.items():
                arrays[name], rest = rest[: math.prod(shape)].reshape(shape), rest[math.prod(shape) :]
            whole, rest = rest[: len(_WHOLE)].tolist(), rest[len(_WHOLE) :]
            own = reals[number * len(_REAL) : (number + 1) * len(_REAL)]
            numbers = dict(zip((*_WHOLE, *_REAL), (*whole, *own), strict=True))
            evaluations[split] = EvaluationSums.from_parts(numbers, arrays)
        content = dict(zip(CONTENT, reals[len(_REAL) * len(self.splits) :], strict=False))
        groups = rest.reshape(self.num_groups, GROUP_ROW) if self.num_groups else None
        return Sums(evaluations=evaluations, content=content, saturated=saturated, groups=groups)


def layout_of(change: Part | None, splits: Sequence[str], *, num_members: int, by: str, step: float = 0.0) -> Layout:
    """The layout of a task's answer.  splits: as the task names them.  by: verification.by.  step: see `Layout`."""
    num_groups = len(group_names(attributes_of(by))) if GROUPS in splits else 0
    scored = tuple(split for split in splits if split != GROUPS)
    return Layout(change=change, splits=scored, num_members=num_members, num_groups=num_groups, step=step)


def _counts_of(found: EvaluationSums | None, name: str, shape: Sequence[int]) -> NDArray[np.int64]:
    counts: NDArray[np.int64] = np.zeros(shape, dtype=np.int64) if found is None else getattr(found, name)
    return counts.reshape(-1)


def ranges(part: Part, received: Buffer) -> list[tuple[slice, float]]:
    """Of each tensor of the part where it lies, and the largest magnitude of its change.

    received: [part.size], the model that came.
    """
    found = []
    for entry in part.part.entries:
        where = slice(entry.offset, entry.offset + entry.size)
        factor, least = PARAMETERS if _is_trainable(part, entry.offset) else STATISTICS
        peak = float(np.abs(received[where]).max(initial=0.0))
        found.append((where, 2.0 ** math.ceil(math.log2(factor * max(peak, least)))))
    return found


def _is_trainable(part: Part, position: int) -> bool:
    return any(trainable for span, trainable in part.spans if span.start <= position < span.stop)
