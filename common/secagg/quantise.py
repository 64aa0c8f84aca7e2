"""Numbers as integers modulo 2**32 whose sum over all members cannot overflow, and back.

    a change, weighted     one word an element, |q| <= (2**31 - 1) / members: what is lost is limit * members / 2**32
    counts                 two words each, exact below 2**48
    sums of real numbers   three words each, in steps of 2**-20

A word of a sum is the sum of the members' words modulo 2**32, in any order.
"""

import math
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.errors import SecureSumRefused, TrainingFailed
from common.secagg.keys import MOST_MEMBERS

PIECE: Final = 2**18  # elements at a time
LIMB_BITS: Final = 24  # of an integer in each word but the highest: 2**8 members at most
COUNT_WORDS, REAL_WORDS = 2, 3
FRACTION_BITS: Final = 20  # of a real number's fixed point

Words = NDArray[np.uint32]
Floats = NDArray[np.float32] | NDArray[np.float64]


# -- one word an element -----------------------------------------------------------------------------------------------


def largest_code(num_members: int) -> int:
    """The largest |q| of one member that no sum of so many overflows: (2**31 - 1) / members, rounded down.

    Raises ValueError for none or more than MOST_MEMBERS.
    """
    if not 1 <= num_members <= MOST_MEMBERS:
        raise ValueError(f"{num_members} members; 1 to {MOST_MEMBERS} are possible")
    return (2**31 - 1) // num_members


def quantise(weighted_change: Floats, num_members: int, limit: float) -> tuple[Words, int]:
    """A weighted change as integers, and how many elements were beyond the limit and became it.

    weighted_change: [size] float32 or float64.  limit: > 0, the same for all members: the largest magnitude.
    Returns [size] uint32 (two's complement), q = round(x / limit * largest_code), and the count.
    Raises TrainingFailed when a value is not finite.
    """
    largest = largest_code(num_members)
    step = _checked_limit(limit) / largest
    words = np.empty(len(weighted_change), dtype=np.uint32)
    saturated = 0
    for where in _pieces(len(weighted_change)):
        scaled = np.rint(_finite(weighted_change[where]) / step)
        saturated += int(np.count_nonzero(np.abs(scaled) > largest))
        words[where] = np.clip(scaled, -largest, largest).astype(np.int32).view(np.uint32)
    return words, saturated


def dequantise(total: Words, num_members: int, limit: float) -> NDArray[np.float64]:
    """The sum of weighted changes, [size] float64, of a sum of what `quantise` gave; of fewer members too.

    num_members, limit: as they were for `quantise`.
    """
    step = _checked_limit(limit) / largest_code(num_members)
    codes: NDArray[np.int32] = total.view(np.int32)
    return codes.astype(np.float64) * step


def _checked_limit(limit: float) -> float:
    if not (math.isfinite(limit) and limit > 0.0):
        raise ValueError(f"the limit of a change is {limit}; it must be finite and above 0")
    return limit


def _finite(values: Floats) -> NDArray[np.float64]:
    if not np.isfinite(values).all():
        raise TrainingFailed("a change or sum is not finite, and integers cannot carry that; lower training.lr.")
    return values.astype(np.float64)


def _pieces(size: int) -> Iterator[slice]:
    for start in range(0, size, PIECE):
        yield slice(start, min(start + PIECE, size))


# -- counts and sums ---------------------------------------------------------------------------------------------------


def counts_to_words(counts: NDArray[np.int64]) -> Words:
    """Counts, any shape, int64 in [0, 2**48), as [2 * size] uint32: all lower words, then all upper ones."""
    return _to_words(counts.ravel(), COUNT_WORDS)


def words_to_counts(total: Words, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """The members' counts added, int64 of that shape, of a sum of what `counts_to_words` gave."""
    return _from_words(total, COUNT_WORDS).reshape(shape)


def reals_to_words(values: NDArray[np.float64]) -> Words:
    """Real numbers, [size] float64, |x| < 2**42, as [3 * size] uint32 in steps of 2**-FRACTION_BITS.

    Raises TrainingFailed when one is not finite.
    """
    scaled = np.rint(_finite(values) * 2.0**FRACTION_BITS)
    if (np.abs(scaled) >= 2.0**62).any():
        raise SecureSumRefused(f"a sum of this site is {float(np.abs(values).max()):.3g}; 2**42 is the most that adds.")
    return _to_words(scaled.astype(np.int64), REAL_WORDS)


def words_to_reals(total: Words) -> NDArray[np.float64]:
    """The members' numbers added, [size] float64, of a sum of what `reals_to_words` gave."""
    parts = total.reshape(REAL_WORDS, -1)
    steps = 2.0 ** (LIMB_BITS * np.arange(REAL_WORDS) - FRACTION_BITS)
    highest: NDArray[np.int32] = parts[-1].view(np.int32)
    numbers: NDArray[np.float64] = np.concatenate([parts[:-1].astype(np.float64), highest[None].astype(np.float64)])
    total_of_each: NDArray[np.float64] = (numbers * steps[:, None]).sum(axis=0)
    return total_of_each


def _to_words(values: NDArray[np.int64], num_words: int) -> Words:
    """Each integer as digits of LIMB_BITS, the lowest first; the highest has the sign.  [num_words * size] uint32."""
    mask = np.int64(2**LIMB_BITS - 1)
    digits = [(values >> np.int64(LIMB_BITS * place)) & mask for place in range(num_words - 1)]
    highest = values >> np.int64(LIMB_BITS * (num_words - 1))
    if len(highest) and int(np.abs(highest).max()) >= 2**LIMB_BITS:
        raise SecureSumRefused(f"a count of this site has more than {num_words * LIMB_BITS} bits; it cannot be added.")
    return np.concatenate([*digits, highest]).astype(np.uint32)


def _from_words(total: Words, num_words: int) -> NDArray[np.int64]:
    parts = total.reshape(num_words, -1)
    highest: NDArray[np.int32] = parts[-1].view(np.int32)
    value: NDArray[np.int64] = highest.astype(np.int64)
    for part in reversed(parts[:-1]):
        value = value * np.int64(2**LIMB_BITS) + part.astype(np.int64)
    return value
