"""The codecs of a flat float32 buffer: what travels in its place, and how it is added without being unpacked whole.

float32 is exact; float16 halves the bytes; int8 makes them a quarter (arXiv:1610.05492, section 3): each block of 512
elements has one float32 scale, its largest magnitude / 127, and each element is the nearest multiple of it. Whoever
encodes keeps what was lost, the *residue*, and adds it to the next buffer (error feedback, arXiv:1901.09847), so that
nothing is lost for good.

Every codec has a fixed size for a given number of elements: a header can be checked before a byte is decoded, and
nothing can unpack to more than it says.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import TrainingFailed

Buffer = NDArray[np.float32]

BLOCK = 512  # elements that share a scale: 0.8 % more bytes than the codes alone
PIECE = 512 * BLOCK  # elements decoded at a time: 1 MiB, which stays in a core's cache
LARGEST_CODE = 127
MASKED = "masked32"  # no codec: words of secure aggregation, which are numbers only when they have been added
FLOAT16_MAX = 65504.0
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, kw_only=True)
class Coded:
    """A buffer as it travels.  Made by `encode`, or by `common.protocol.wire` from a header that was checked."""

    codec: str
    size: int  # elements of the buffer
    data: bytes | memoryview  # num_bytes(codec, size) of them, little-endian; int8: the scales, then the codes

    @property
    def nbytes(self) -> int:
        """What it takes on the wire."""
        return len(self.data)


def is_lossy(codec: str) -> bool:
    """Whether decoding gives back less than what was encoded."""
    return codec != "float32"


def num_blocks(size: int) -> int:
    """How many scales int8 has for so many elements."""
    return -(-size // BLOCK)


def num_bytes(codec: str, size: int) -> int:
    """The bytes of `size` elements in a codec of `common.settings.CODECS`, or MASKED.  Raises KeyError for another."""
    sizes = {"float32": 4 * size, "float16": 2 * size, "int8": 4 * num_blocks(size) + size, MASKED: 4 * size}
    return sizes[codec]


def encode(buffer: Buffer, codec: str) -> Coded:
    """Encode a flat buffer, [size] float32; as float32 it is the buffer itself, which must not change meanwhile.

    Values beyond float16's range become its largest; the residue holds the rest.
    Raises TrainingFailed when a value is not finite and the codec has no way to say so.
    """
    if codec == "float32":
        data: bytes | memoryview = np.ascontiguousarray(buffer, dtype="<f4").view(np.uint8).data
    else:
        values = torch.from_numpy(np.ascontiguousarray(buffer))
        if len(buffer) and not bool(torch.isfinite(torch.stack(torch.aminmax(values))).all()):
            raise TrainingFailed(
                f"the model's numbers are not all finite, and {codec} cannot carry that; lower training.lr."
            )
        data = _float16(values) if codec == "float16" else _int8(values)
    return Coded(codec=codec, size=len(buffer), data=data)


def _float16(values: Tensor) -> bytes:
    halves: NDArray[np.float16] = values.clamp(-FLOAT16_MAX, FLOAT16_MAX).half().numpy()
    return halves.astype("<f2", copy=False).tobytes()


def _int8(values: Tensor) -> bytes:
    scales, codes = torch.empty(num_blocks(len(values))), torch.empty(len(values), dtype=torch.int8)
    for start in range(0, len(values), PIECE):
        piece = values[start : start + PIECE]
        whole = torch.zeros(num_blocks(len(piece)) * BLOCK)
        whole[: len(piece)] = piece
        blocks = whole.view(-1, BLOCK)
        scale = blocks.abs().amax(1) / LARGEST_CODE
        scale[scale < _SMALLEST_SCALE] = 0.0  # their quotients would not be numbers
        nearest = (blocks / torch.where(scale > 0.0, scale, 1.0)[:, None]).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
        scales[start // BLOCK : start // BLOCK + len(scale)] = scale
        codes[start : start + len(piece)] = nearest.to(torch.int8).view(-1)[: len(piece)]
    return scales.numpy().astype("<f4", copy=False).tobytes() + codes.numpy().tobytes()


def _tensor(data: bytes | memoryview, dtype: str, *, count: int, offset: int = 0) -> Tensor:
    """A view of received bytes, which must not be written to."""
    array = np.frombuffer(data, dtype=dtype, count=count, offset=offset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it cannot be written to: nobody here does
        return torch.from_numpy(array)


def _scales(coded: Coded) -> Tensor:
    return _tensor(coded.data, "<f4", count=num_blocks(coded.size))


def pieces(coded: Coded) -> Iterator[tuple[slice, Tensor]]:
    """The decoded elements in order, as (where, float32 values); float32 comes in one piece and is not copied."""
    if coded.codec == "float32":
        yield slice(0, coded.size), _tensor(coded.data, "<f4", count=coded.size)
        return
    if coded.codec == MASKED:
        raise ValueError("masked words are no numbers by themselves")
    if coded.codec == "float16":
        halves = _tensor(coded.data, "<f2", count=coded.size)
        for start in range(0, coded.size, PIECE):
            piece = halves[start : start + PIECE].float()
            yield slice(start, start + len(piece)), piece
        return
    scales = _scales(coded)
    codes = _tensor(coded.data, "|i1", count=coded.size, offset=4 * len(scales))
    for start in range(0, coded.size, PIECE):
        piece = codes[start : start + PIECE].float()
        scale = scales[start // BLOCK : start // BLOCK + num_blocks(len(piece))]
        whole = len(piece) // BLOCK  # the last block may be a part of one
        piece[: whole * BLOCK].view(whole, BLOCK).mul_(scale[:whole, None])
        piece[whole * BLOCK :].mul_(scale[whole:])
        yield slice(start, start + len(piece)), piece


def decode(coded: Coded) -> Buffer:
    """The buffer, [size] float32, in memory of its own."""
    buffer = np.empty(coded.size, dtype=np.float32)
    for where, values in pieces(coded):
        torch.from_numpy(buffer[where]).copy_(values)
    return buffer


def take(coded: Coded) -> Buffer:
    """The buffer, [size] float32: the memory of `coded` itself where that may be written to, else as `decode`."""
    if coded.codec == "float32":
        own: Buffer = np.frombuffer(coded.data, dtype="<f4")
        if own.flags.writeable and own.dtype == np.float32:
            return own
    return decode(coded)


def add_to(total: Tensor, coded: Coded, weight: float) -> None:
    """Add weight * the decoded buffer to `total`, [size] float32, in place."""
    for where, values in pieces(coded):
        total[where].add_(values, alpha=weight)


def largest_magnitude(coded: Coded) -> float:
    """The largest absolute value, NaN where one is none; an upper bound for int8, whose scales alone are read."""
    if coded.size == 0:
        return 0.0
    if coded.codec == "int8":
        return float(_scales(coded).abs().max()) * LARGEST_CODE
    peaks = [torch.stack(torch.aminmax(values)).abs().max() for _, values in pieces(coded)]
    return float(torch.stack(peaks).max())


def has_negative_scale(coded: Coded) -> bool:
    """Whether an int8 buffer claims a scale that no encoder writes: scales are magnitudes."""
    return coded.codec == "int8" and coded.size > 0 and bool((_scales(coded) < 0).any())


def residue_of(buffer: Buffer, coded: Coded) -> Buffer:
    """What encoding lost: buffer - decoded, [size] float32."""
    lost = buffer.copy()
    add_to(torch.from_numpy(lost), coded, -1.0)
    return lost
