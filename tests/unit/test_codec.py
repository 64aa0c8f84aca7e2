"""The codecs: what they lose, that it is not lost for good, how many bytes they take, and what they refuse."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from common.errors import TrainingFailed
from common.protocol.codec import (
    BLOCK,
    PIECE,
    Coded,
    add_to,
    decode,
    encode,
    is_lossy,
    largest_magnitude,
    num_blocks,
    num_bytes,
    residue_of,
    take,
)
from common.settings import CODECS

LOSSY = [codec for codec in CODECS if is_lossy(codec)]
# One element, a part of a block, a block, one more, several pieces with a part of a block at the end.
SIZES = [1, BLOCK - 1, BLOCK, BLOCK + 1, PIECE, 2 * PIECE + 3 * BLOCK + 7]
FINITE = arrays(np.float32, st.integers(1, 3 * BLOCK), elements=st.floats(-(2.0**100), 2.0**100, width=32))


def change_of(size, seed=0):
    """Numbers whose magnitude differs from tensor to tensor, as those of a network do."""
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.uniform(-6, 0, size=num_blocks(size)).repeat(BLOCK)[:size]
    return (rng.normal(size=size) * scales).astype(np.float32)


def bound_of(codec, buffer):
    """The largest error of each element, [size]."""
    if codec == "float16":
        return np.maximum(np.abs(buffer) * 2.0**-11, 2.0**-25)
    blocks = np.zeros(num_blocks(len(buffer)) * BLOCK, dtype=np.float32)
    blocks[: len(buffer)] = np.abs(buffer)
    return (blocks.reshape(-1, BLOCK).max(1) * (0.5 / 127)).repeat(BLOCK)[: len(buffer)]


@pytest.mark.parametrize("size", SIZES)
def test_float32_gives_back_every_bit(size):
    buffer = change_of(size)
    assert decode(encode(buffer, "float32")).tobytes() == buffer.tobytes()


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("size", SIZES)
def test_no_element_is_off_by_more_than_the_rounding_of_its_codec(codec, size):
    buffer = change_of(size)
    off = np.abs(decode(encode(buffer, codec)) - buffer)
    assert (off <= bound_of(codec, buffer) * (1 + 1e-5)).all()
    assert off.any() or size == 1


def test_a_tensor_of_small_numbers_keeps_them_beside_one_of_large_numbers():
    """With one scale for all, whatever is below 1/254 of the largest number would be zero."""
    buffer = np.concatenate([np.full(BLOCK, 1000.0), np.linspace(1e-5, 2e-5, BLOCK)]).astype(np.float32)
    back = decode(encode(buffer, "int8"))
    np.testing.assert_allclose(back[BLOCK:], buffer[BLOCK:], rtol=0.01)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [0, *SIZES])
def test_the_number_of_bytes_is_known_before(codec, size):
    coded = encode(np.zeros(size, dtype=np.float32), codec)
    assert len(coded.data) == coded.nbytes == num_bytes(codec, size)
    assert decode(coded).tobytes() == bytes(4 * size)


def test_int8_takes_a_quarter_and_a_scale_for_each_block():
    assert num_bytes("int8", 11_200_000) / num_bytes("float32", 11_200_000) == pytest.approx(0.25 + 1 / BLOCK, abs=1e-6)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", SIZES)
def test_adding_piece_by_piece_is_adding_what_decoding_gives(codec, size):
    coded, total = encode(change_of(size), codec), torch.from_numpy(change_of(size, seed=1))
    whole = total.add(torch.from_numpy(decode(coded)), alpha=3.0)
    add_to(total, coded, 3.0)
    assert total.numpy().tobytes() == whole.numpy().tobytes()


@pytest.mark.parametrize("codec", LOSSY)
def test_what_was_lost_and_what_was_sent_are_what_there_was(codec):
    buffer = change_of(3 * BLOCK)
    coded = encode(buffer, codec)
    np.testing.assert_allclose(decode(coded) + residue_of(buffer, coded), buffer, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("codec", LOSSY)
def test_with_error_feedback_all_that_was_sent_is_all_that_there_was_but_for_one_rounding(codec):
    """Fifty changes; without the residue the errors of a constant change add up fifty times."""
    changes = [change_of(2 * BLOCK, seed=number % 2) * 0.1 for number in range(50)]
    sent, residue = np.zeros(2 * BLOCK), np.zeros(2 * BLOCK, dtype=np.float32)
    plain = np.zeros(2 * BLOCK)
    for change in changes:
        fed = change + residue
        coded = encode(fed, codec)
        residue = residue_of(fed, coded)
        sent += decode(coded)
        plain += decode(encode(change, codec))
    there_was = np.sum(changes, axis=0, dtype=np.float64)
    last = bound_of(codec, np.abs(changes[-1]) * 2.5)
    assert (np.abs(sent - there_was) <= last + 1e-6).all()
    assert np.abs(plain - there_was).max() > 10 * np.abs(sent - there_was).max()


def test_float16_keeps_for_later_what_is_beyond_its_range():
    buffer = np.float32([1e6, -1e6])
    coded = encode(buffer, "float16")
    assert decode(coded).tolist() == [65504.0, -65504.0]
    assert residue_of(buffer, coded).tolist() == [1e6 - 65504.0, 65504.0 - 1e6]


def test_int8_of_numbers_too_small_for_a_scale_is_zero():
    buffer = np.full(BLOCK, 1e-44, dtype=np.float32)
    assert not decode(encode(buffer, "int8")).any()


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_lossy_codec_refuses_what_is_not_finite(codec, value):
    buffer = np.zeros(BLOCK + 3, dtype=np.float32)
    buffer[-1] = value
    with pytest.raises(TrainingFailed, match=f"not all finite, and {codec} cannot carry that"):
        encode(buffer, codec)


@pytest.mark.parametrize("codec", CODECS)
def test_the_largest_magnitude_is_never_understated(codec):
    buffer = change_of(PIECE + 5)
    coded = encode(buffer, codec)
    assert largest_magnitude(coded) >= np.abs(decode(coded)).max() * (1 - 1e-6)
    assert largest_magnitude(coded) <= np.abs(decode(coded)).max() * (1 + 1e-6)
    assert largest_magnitude(encode(np.zeros(0, dtype=np.float32), codec)) == 0.0


@pytest.mark.parametrize("position", [0, 6])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_none_shows_in_the_largest_magnitude(value, position):
    buffer = np.zeros(7, dtype=np.float32)
    buffer[position] = value
    for coded in (
        Coded(codec="float32", size=7, data=buffer.tobytes()),
        Coded(codec="float16", size=7, data=buffer.astype(np.float16).tobytes()),
    ):
        assert not np.isfinite(largest_magnitude(coded))


@pytest.mark.parametrize("codec", CODECS)
@given(buffer=FINITE)
@settings(max_examples=60, deadline=None)
def test_whatever_is_finite_comes_back_finite(codec, buffer):
    coded = encode(buffer, codec)
    assert np.isfinite(decode(coded)).all()
    assert len(coded.data) == num_bytes(codec, len(buffer))
    largest = np.abs(buffer).max()
    assert np.abs(decode(coded)).max() <= max(
        largest * (1 + 2.0**-10), largest + 2.0**-24
    )  # the second of the smallest


def test_received_bytes_are_neither_copied_nor_changed():
    coded = encode(change_of(BLOCK), "float32")
    before = bytes(bytearray(coded.data))
    total = torch.zeros(BLOCK)
    add_to(total, coded, 2.0)
    decode(coded)[:] = 7.0
    assert coded.data == before


def test_float32_travels_and_is_taken_without_a_copy():
    """What may not be written to is copied: whoever takes a buffer changes it."""
    buffer = change_of(5)
    coded = encode(buffer, "float32")
    assert np.shares_memory(np.frombuffer(coded.data, np.float32), buffer)
    assert np.shares_memory(take(coded), buffer)
    sealed = Coded(codec="float32", size=5, data=bytes(coded.data))
    assert not np.shares_memory(take(sealed), np.frombuffer(sealed.data, np.float32))
    assert take(sealed).flags.writeable
    for codec in CODECS:
        assert take(encode(buffer, codec)).tobytes() == decode(encode(buffer, codec)).tobytes()
