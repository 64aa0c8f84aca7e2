"""The Gaussian mechanism on flat buffers: clipping, noise from a secret seed, and what is released of a sum.

The noise comes from AES-256 in counter mode, not from a generator of simulations, whose later numbers follow from
earlier ones.  It is added in float64 and the sum is rounded to a grid of a thousandth of the noise: what is released
is one of the same numbers whatever the data, so the last bits of a floating-point sum tell nothing of it
(doi:10.1145/2382196.2382264).  Beyond 9.4 standard deviations there is no noise: a mass of 1e-20 an element, which
delta leaves out of account.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

SEED_BYTES: Final = 32
PIECE: Final = 2**18  # elements at a time; even, as noise is drawn in pairs
GRID: Final = 1024  # steps of the grid in a standard deviation, or up to twice as many
MARGIN: Final = 1e-6  # relative, by which a clipped norm stays below its bound whatever is rounded

Buffer = NDArray[np.float32]


def norm(buffer: Buffer) -> float:
    """The Euclidean norm of a flat buffer, [size] float32, added up in float64."""
    total = 0.0
    for start in range(0, len(buffer), PIECE):
        part = buffer[start : start + PIECE].astype(np.float64)
        total += float(np.dot(part, part))
    return math.sqrt(total)


def add_clipped(total: NDArray[np.float64], change: Buffer, clip: float) -> float:
    """Add a change to a sum in place, shortened to the norm `clip` where it is longer; returns its norm before.

    total: [size] float64.  change: [size] float32.  clip: C > 0.  A change that is not finite adds nothing.
    """
    length = norm(change)
    if math.isfinite(length):
        factor = min(1.0, clip / length) * (1.0 - MARGIN) if length > 0.0 else 0.0
        for start in range(0, len(change), PIECE):
            total[start : start + PIECE] += factor * change[start : start + PIECE].astype(np.float64)
    return length


def _uniform(seed: bytes, number: int) -> Iterator[NDArray[np.float64]]:
    """Pieces of `number` independent uniform numbers in (0, 1]; the last piece may be shorter than PIECE."""
    stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    for start in range(0, number, PIECE):
        drawn = np.frombuffer(stream.update(bytes(8 * min(PIECE, number - start))), dtype="<u8")
        yield (drawn.astype(np.float64) + 0.5) * 2.0**-64


def standard_normal(seed: bytes, number: int) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Independent N(0, 1) numbers in order, as (where, values); the same for the same seed (Box and Muller, 1958).

    seed: SEED_BYTES random bytes, for one use.
    """
    start = 0
    for uniform in _uniform(seed, number + number % 2):
        half = len(uniform) // 2
        radius, angle = np.sqrt(-2.0 * np.log(uniform[:half])), 2.0 * math.pi * uniform[half:]
        values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[: number - start]
        yield slice(start, start + len(values)), values
        start += len(values)


def grid_of(deviation: float) -> float:
    """The step of the grid for noise of that deviation: a power of two, so that its multiples are exact."""
    return 2.0 ** math.floor(math.log2(deviation / GRID))


def released(
    total: NDArray[np.float64], spans: Iterable[slice], *, deviation: float, divisor: float, seed: bytes
) -> Buffer:
    """(total + noise) / divisor, [size] float32: what may be seen of a sum.

    total: [size] float64.  spans: the elements that are released; the others are 0, whatever they were.
    deviation: of the noise on each element, > 0.  seed: SEED_BYTES random bytes that are used for this alone.
    """
    result = np.zeros(len(total), dtype=np.float32)
    chosen = np.concatenate([np.arange(span.start, span.stop) for span in spans]) if len(total) else np.arange(0)
    step = grid_of(deviation)
    for where, noise in standard_normal(seed, len(chosen)):
        places = chosen[where]
        noisy = np.rint((total[places] + deviation * noise) / step) * step
        result[places] = noisy / divisor
    return result
