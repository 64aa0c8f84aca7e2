"""The weighted mean of the clients' changes: its numbers, its order, its memory."""

import tracemalloc

import numpy as np
import pytest

from common.protocol.codec import encode
from server.aggregate import WeightedChange


def mean_of(replies, codec="float32"):
    total = WeightedChange(len(replies[0][0]))
    for change, num_examples in replies:
        total.add(encode(change, codec), num_examples)
    return total.mean()


def random_replies(num_clients, size, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=size).astype(np.float32), int(rng.integers(1, 20_000))) for _ in range(num_clients)]


def test_clients_count_by_their_examples():
    """One picture pulls by 4 and three pull by 0: (1 * 4 + 3 * 0) / 4 = 1; and (1 * -2 + 3 * 6) / 4 = 4."""
    mean = mean_of([(np.float32([4.0, -2.0]), 1), (np.float32([0.0, 6.0]), 3)])
    assert mean.dtype == np.float32
    assert mean.tolist() == [1.0, 4.0]


def test_the_mean_is_that_of_float64():
    """Sixteen terms lose at most 16 roundings of 2**-24, relative to the mean of the magnitudes."""
    replies = random_replies(16, 10_000)
    changes = np.stack([change for change, _ in replies]).astype(np.float64)
    weights = np.array([num for _, num in replies], dtype=np.float64)[:, None]
    exact = (weights * changes).sum(0) / weights.sum()
    bound = 20 * 2.0**-24 * (weights * np.abs(changes)).sum(0) / weights.sum()
    assert (np.abs(mean_of(replies) - exact) <= bound).all()


def test_the_same_order_gives_the_same_bits_and_another_order_need_not():
    """Which is why the loop adds in the order of names: float32 addition is not associative."""
    replies = random_replies(5, 2_000)
    assert mean_of(replies).tobytes() == mean_of(replies).tobytes()
    assert mean_of(replies).tobytes() != mean_of(replies[::-1]).tobytes()


def test_memory_does_not_grow_with_the_number_of_replies():
    """The running sum is one buffer of torch's; what numpy holds meanwhile is the reply at hand, 400 kB of it."""
    size = 100_000

    def peak(num_clients):
        total = WeightedChange(size)
        tracemalloc.start()
        for number in range(num_clients):
            total.add(encode(np.full(size, number, dtype=np.float32), "float32"), 3)
        seen = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return seen

    few, many = peak(2), peak(32)
    assert few >= 4 * size  # it does see the buffers
    assert many < few + 4 * size / 2


def test_a_reply_is_not_changed_and_not_kept():
    total = WeightedChange(2)
    change = encode(np.float32([1.0, 2.0]), "float32")
    sent = bytes(bytearray(change.data))
    total.add(change, 2)
    assert change.data == sent
    assert total.mean().tolist() == [1.0, 2.0]


@pytest.mark.parametrize(("codec", "bound"), [("float16", 2.0**-11), ("int8", 0.5 / 127)])
def test_lossy_replies_add_up_to_what_their_codec_says(codec, bound):
    """Each element is off by at most its codec's rounding: float16 of its value, int8 of its block's largest."""
    replies = random_replies(8, 5_000)
    largest = max(float(np.abs(change).max()) for change, _ in replies)
    off = np.abs(mean_of(replies, codec) - mean_of(replies))
    assert 0 < off.max() <= bound * largest * 1.001


def test_no_reply_has_no_mean():
    with pytest.raises(ValueError, match="no reply was added"):
        WeightedChange(3).mean()
