"""A round of secure aggregation on the pure parts: the sum is the plain one, bit for bit, whoever is lost."""

import numpy as np
import pytest
from secagg_round import NAMES, exchanged

SIZE = 70_001  # more than a piece, and no whole number of AES blocks


@pytest.mark.parametrize("lost", [(), ("ada",), ("cyd",), ("eve",)])
def test_the_unmasked_sum_is_the_survivors_sum_bit_for_bit(lost):
    random = np.random.default_rng(0)
    vectors = {name: random.integers(0, 2**32, SIZE, dtype=np.uint32) for name in NAMES}
    round_ = exchanged()
    sent = {name: round_.masked(name, vectors[name]) for name in NAMES if name not in lost}
    expected = np.zeros(SIZE, np.uint32)
    for name in sent:
        expected += vectors[name]
    np.testing.assert_array_equal(round_.unmasked(sent), expected)
