"""What one site's part of a sum is as whole numbers: its weighted change, and every sum that its reply would have told.

    the change      one word an element, in steps that follow from the received model: the same at every site;
                    or half a word, a lane, in steps that follow from the last global change too, as the server tells
    counts          two words each: score histograms, of groups of people too; pictures, classes, elements out of range
    sums            three words each: losses, precisions, recalls, F1, norms of gradients

A word is a uint32; the words of all sites are added modulo 2**32, lanes modulo 2**16, in any order.  Confusion matrices
stay at the sites: their people differ, so the sum says nothing.  The encodings are those of `common/secagg/quantise.py`
and `common/secagg/lanes.py`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.errors import SecureSumRefused
from common.metrics.group_names import GROUPS, attributes_of, group_names
from common.metrics.groups import GROUP_ROW
from common.metrics.sums import COUNTS, WHOLE_NUMBERS, ClosedSetSums, EvaluationSums
from common.protocol.parameters import Part
from common.secagg import lanes
from common.secagg.quantise import (
    COUNT_WORDS,
    PIECE,
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
Numbers = NDArray[np.float64]

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
class InWords:
    """One site's change on its way."""

    words: Words  # [Layout.num_change_words] uint32
    saturated: int  # elements that were beyond their range, and became it


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What lies where in the words of one exchange.

    change: of the flat model what moves; None: no change is sent, of an evaluation.  splits: that are scored.
    num_members: how many sites may add.  num_groups: of test people, whose pairs are counted.  step: of all numbers of
    the change, where noise puts them on a grid (`common/privacy/shared_noise.py`); 0: one of each tensor, by its range.
    shifts: of the change's blocks as `shifts_after` gave them, where it is in lanes of 16 bits; empty: words of 32.
    Raises SecureSumRefused for shifts of another model.
    """

    change: Part | None
    splits: tuple[str, ...]
    num_members: int
    num_groups: int = 0
    step: float = 0.0
    shifts: str = ""

    def __post_init__(self) -> None:
        wanted = 0 if self.change is None else num_shifts(self.change)
        if self.shifts and len(self.shifts) != wanted:
            raise SecureSumRefused(
                f"{len(self.shifts)} steps came, and the change has {wanted} blocks; use equal versions of FaceFed."
            )

    @property
    def size(self) -> int:
        """How many words there are."""
        return self.num_change_words + COUNT_WORDS * self._num_counts + REAL_WORDS * self._num_reals

    @property
    def lanes(self) -> int:
        """How many of them, the first, are two lanes each."""
        return self.num_change_words if self.shifts else 0

    @property
    def num_change_words(self) -> int:
        """How many of them, the first, are the change."""
        return lanes.num_words(self._change_size) if self.shifts else self._change_size

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

    def in_words(self, change: Buffer, received: Buffer, share: float) -> InWords:
        """One site's change in words.

        change: [part.size], as `received`, of the model that came.  share: of the change, its weight in (0, 1].
        Raises TrainingFailed for a change that is not finite.
        """
        saturated, halves = 0, np.empty(self._change_size if self.shifts else 0, dtype=np.uint16)
        words = np.empty(0 if self.shifts else self._change_size, dtype=np.uint32)
        for where, limits in self._limits(received):
            weighted = change[where].astype(np.float64) * share
            if isinstance(limits, float):
                words[where], beyond = quantise(weighted, self.num_members, limits)
            else:
                halves[where], beyond = lanes.quantise(weighted, self.num_members, limits)
            saturated += beyond
        return InWords(words=lanes.packed(halves) if self.shifts else words, saturated=saturated)

    def lost(self, change: Buffer, coded: InWords, received: Buffer, share: float) -> tuple[Buffer, int]:
        """What a site's words lack of its change, [part.size] float32, and of how many elements that was cut.

        It goes into the site's next change (error feedback, arXiv:1901.09847), so what is more than one range of it
        is cut to that: a change that stays beyond its range would be carried along for ever, and grow.
        The arguments are as for `in_words`, and what that gave.
        """
        rest, cut = np.empty(self._change_size, dtype=np.float32), 0
        for where, sent, limits in self._numbers(coded.words, received):
            left = change[where].astype(np.float64) - sent / share
            most = np.asarray(limits if isinstance(limits, float) else lanes.by_element(limits, len(left))) / share
            cut += int(np.count_nonzero(np.abs(left) > most))
            rest[where] = np.clip(left, -most, most)
        return rest, cut

    def words(self, change: InWords | None, sums: Sums) -> Words:
        """One site's words, [size] uint32.

        change: of `in_words`; None: no change is sent.
        sums: its own; a split that it keeps to itself is missing, and adds nothing.
        Raises SecureSumRefused for counts that are too large.
        """
        words = np.empty(self.size, dtype=np.uint32)
        saturated = 0 if change is None else change.saturated
        words[: self.num_change_words] = 0 if change is None else change.words
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
        end = self.num_change_words + COUNT_WORDS * self._num_counts
        words[self.num_change_words : end] = counts_to_words(np.concatenate(counts))
        words[end:] = reals_to_words(np.array(reals, dtype=np.float64))
        return words

    def mean(self, total: Words, received: Buffer, shares: float) -> Buffer:
        """The weighted mean change, [part.size] float32, of the sites' words added.

        received: as for `in_words`.  shares: of these sites, added, > 0.
        """
        if self.change is None:
            raise ValueError("no change was sent")
        mean = np.empty(self._change_size, dtype=np.float32)
        for where, numbers, _ in self._numbers(total[: self.num_change_words], received):
            mean[where] = numbers / shares
        return mean

    def _numbers(self, words: Words, received: Buffer) -> Iterator[tuple[slice, Numbers, float | Numbers]]:
        """What words of a change, or of a sum of them, say: (where, the numbers, float64, and as `_limits`)."""
        halves = lanes.unpacked(words, self._change_size) if self.shifts else None
        for where, limits in self._limits(received):
            if isinstance(limits, float) or halves is None:
                yield where, dequantise(words[where], self.num_members, float(limits)), limits
            else:
                yield where, lanes.dequantise(halves[where], self.num_members, limits), limits

    def _limits(self, received: Buffer) -> Iterator[tuple[slice, float | Numbers]]:
        """The change in parts, in order: (where, the largest magnitude, of lanes of each of its blocks)."""
        if self.change is None:
            return
        shifts, block = lanes.of_text(self.shifts), 0
        for where, limit in self._ranges(self.change, received):
            if not self.shifts:
                yield where, limit
                continue
            for start in range(where.start, where.stop, PIECE):
                piece = slice(start, min(start + PIECE, where.stop))
                number = lanes.num_blocks(piece.stop - piece.start)
                yield piece, lanes.limits_of(shifts[block : block + number], limit)
                block += number

    def _ranges(self, part: Part, received: Buffer) -> list[tuple[slice, float]]:
        if self.step:
            return [(slice(0, part.part.size), self.step * largest_code(self.num_members))]
        return ranges(part, received)

    def sums(self, total: Words) -> Sums:
        """What else the sites' words, added, say."""
        end = self.num_change_words + COUNT_WORDS * self._num_counts
        counts = words_to_counts(total[self.num_change_words : end], (self._num_counts,))
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


def layout_of(
    change: Part | None,
    splits: Sequence[str],
    *,
    num_members: int,
    by: str,
    step: float = 0.0,
    shifts: str = "",
) -> Layout:
    """The layout of a task's answer.  splits: as the task names them.  by: verification.by.  Else as `Layout`."""
    num_groups = len(group_names(attributes_of(by))) if GROUPS in splits else 0
    return Layout(
        change=change,
        splits=tuple(split for split in splits if split != GROUPS),
        num_members=num_members,
        num_groups=num_groups,
        step=step,
        shifts=shifts,
    )


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


def num_shifts(part: Part) -> int:
    """How many blocks its change has in lanes; none reaches over two tensors."""
    return sum(lanes.num_blocks(entry.size) for entry in part.part.entries)


def peaks_of(part: Part, change: Buffer) -> Buffer:
    """The largest magnitude in each block of a change, [num_shifts] float32.  change: [part.size], finite."""
    starts = [
        start for entry in part.part.entries for start in range(entry.offset, entry.offset + entry.size, lanes.BLOCK)
    ]
    peaks: Buffer = np.maximum.reduceat(np.abs(change), starts) if starts else np.empty(0, dtype=np.float32)
    return peaks


def shifts_after(part: Part, received: Buffer, peaks: Buffer) -> str:
    """The shifts of the change that is sent next, as text.

    received: [part.size], the model that it is of.  peaks: of the last global change, as `peaks_of` gave them.
    """
    shifts, block = [], 0
    for where, limit in ranges(part, received):
        number = lanes.num_blocks(where.stop - where.start)
        shifts.append(lanes.shifts_for(peaks[block : block + number], limit))
        block += number
    return lanes.in_text(np.concatenate([np.empty(0, dtype=np.uint8), *shifts]))


def _is_trainable(part: Part, position: int) -> bool:
    return any(trainable for span, trainable in part.spans if span.start <= position < span.stop)
