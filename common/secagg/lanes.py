"""Words of 16 bits, two in each word of 32: a weighted change in half the bytes, with a step for each block of it.

    a block           BLOCK elements of one tensor, or what is left of it
    its limit         2**-shift times the tensor's, which follows from the received model; the largest magnitude in it
    an element        q = round(x / limit * largest), |q| <= largest = (2**15 - 1) / members, so that no sum overflows

All members have the same shifts.  They are as large as the last global change lets them be: whose largest element,
times HEADROOM, is within the limit.  A lane of a sum is the sum of the members' lanes modulo 2**16, in any order.
"""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.errors import SecureSumRefused, TrainingFailed
from common.secagg.keys import MOST_MEMBERS

BLOCK: Final = 512  # elements that share a shift
HEADROOM: Final = 8.0  # one site's change may be so many times the mean one, and the next round's so much larger
MOST_SHIFT: Final = 12  # with it a step is about float32's own of the tensor's largest element; no change needs less
_DIGITS: Final = b"0123456789abc"  # of shifts, as text

Lanes = NDArray[np.uint16]
Words = NDArray[np.uint32]
Shifts = NDArray[np.uint8]
Numbers = NDArray[np.float64]


def num_blocks(size: int) -> int:
    """How many blocks a tensor of so many elements has."""
    return -(-size // BLOCK)


def num_words(size: int) -> int:
    """How many words of 32 bits so many lanes take."""
    return -(-size // 2)


def largest_code(num_members: int) -> int:
    """The largest |q| of one member that no sum of so many overflows: (2**15 - 1) / members, rounded down.

    Raises ValueError for none or more than MOST_MEMBERS.
    """
    if not 1 <= num_members <= MOST_MEMBERS:
        raise ValueError(f"{num_members} members; 1 to {MOST_MEMBERS} are possible")
    return (2**15 - 1) // num_members


def shifts_for(peaks: NDArray[np.float32], limit: float) -> Shifts:
    """A tensor's shifts, [blocks] uint8 in [0, MOST_SHIFT].

    peaks: [blocks] of the last global change, the largest magnitude in each block, >= 0; 0 where nothing moved.
    limit: > 0, the tensor's own.
    """
    wanted = HEADROOM * peaks.astype(np.float64)
    least = limit * 2.0**-MOST_SHIFT
    steps = np.floor(np.log2(limit / np.maximum(wanted, least)))
    return np.clip(steps, 0, MOST_SHIFT).astype(np.uint8)


def limits_of(shifts: Shifts, limit: float) -> Numbers:
    """The blocks' limits, [blocks] float64; exact, as the tensor's limit is a power of two."""
    if not (math.isfinite(limit) and limit > 0.0):
        raise ValueError(f"the limit of a change is {limit}; it must be finite and above 0")
    return limit * 2.0 ** -shifts.astype(np.float64)


def by_element(limits: Numbers, size: int) -> Numbers:
    """The limit of each of a tensor's elements, [size] float64."""
    return np.repeat(limits, BLOCK)[:size]


def quantise(weighted_change: Numbers, num_members: int, limits: Numbers) -> tuple[Lanes, int]:
    """A part of one tensor's weighted change as lanes, and how many elements were beyond their limit and became it.

    weighted_change: [size] float64, from a block's first element on.  limits: [num_blocks(size)].
    Returns [size] uint16 (two's complement), and the count.
    Raises TrainingFailed when a value is not finite.
    """
    if not np.isfinite(weighted_change).all():
        raise TrainingFailed("a change or sum is not finite, and integers cannot carry that; lower training.lr.")
    largest = largest_code(num_members)
    scaled = np.rint(weighted_change / by_element(limits / largest, len(weighted_change)))
    saturated = int(np.count_nonzero(np.abs(scaled) > largest))
    return np.clip(scaled, -largest, largest).astype(np.int16).view(np.uint16), saturated


def dequantise(total: Lanes, num_members: int, limits: Numbers) -> Numbers:
    """The sum of weighted changes, [size] float64, of a sum of what `quantise` gave; of fewer members too.

    num_members, limits: as they were for `quantise`.
    """
    codes: NDArray[np.int16] = total.view(np.int16)
    return codes * by_element(limits / largest_code(num_members), len(total))


def packed(lanes: Lanes) -> Words:
    """Two lanes in each word, [num_words(size)] uint32; a last one of an odd number has a zero beside it."""
    whole = np.zeros(2 * num_words(len(lanes)), dtype="<u2")
    whole[: len(lanes)] = lanes
    return whole.view("<u4").astype(np.uint32, copy=False)


def unpacked(words: Words, size: int) -> Lanes:
    """The inverse of `packed`: [size] uint16."""
    return words.astype("<u4", copy=False).view("<u2").astype(np.uint16, copy=False)[:size]


def in_text(shifts: Shifts) -> str:
    """Shifts as a digit each."""
    return np.frombuffer(_DIGITS, dtype=np.uint8)[shifts].tobytes().decode("ascii")


def of_text(text: str) -> Shifts:
    """The inverse.  Raises SecureSumRefused for a digit that is none."""
    if text.strip(_DIGITS.decode("ascii")):
        raise SecureSumRefused("the steps that came are none of ours; use equal versions of FaceFed.")
    values = np.zeros(256, dtype=np.uint8)
    values[np.frombuffer(_DIGITS, dtype=np.uint8)] = np.arange(len(_DIGITS))
    return values[np.frombuffer(text.encode("ascii"), dtype=np.uint8)]
