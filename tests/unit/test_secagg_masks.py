"""Masks: they are AES's key stream, cancel in the sum only, and leave one member's vector uniform."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_round import MODEL, NAMES, exchanged

from common.errors import SecureSumRefused
from common.secagg.masks import PIECE, add_mask, add_masks, pair_mask, self_seed, unmask

SIZE = 2**16 + 5
SEED = bytes(range(32))
ROUND = exchanged()
WITH_MODEL = ROUND.context.with_model(MODEL)


def stream(size, seed=SEED):
    vector = np.zeros(size, np.uint32)
    add_mask(vector, seed, 1)
    return vector


def chi_square(vector):
    """Of the vector's bytes against uniform ones: mean 255, deviation 22.6."""
    counts = np.bincount(vector.view(np.uint8), minlength=256)
    expected = 4 * len(vector) / 256
    return float(((counts - expected) ** 2 / expected).sum())


def looks_uniform(vector):
    """450 is passed by chance in fewer than one of 10^12 uniform vectors."""
    return chi_square(vector) < 450


def test_a_mask_is_the_key_stream_of_aes_in_counter_mode():
    """The counters, encrypted block by block: NIST SP 800-38A, section 6.5."""
    blocks = b"".join(number.to_bytes(16, "big") for number in range(3))
    expected = np.frombuffer(Cipher(algorithms.AES(SEED), modes.ECB()).encryptor().update(blocks), "<u4")  # noqa: S305
    np.testing.assert_array_equal(stream(12), expected)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, PIECE + 9), st.integers(1, 50))
def test_a_part_is_masked_as_in_the_whole(start, size):
    part = np.zeros(size, np.uint32)
    add_mask(part, SEED, 1, start)
    np.testing.assert_array_equal(part, stream(start + size)[start:])


def test_both_signs_cancel_and_seeds_differ():
    vector = np.arange(SIZE, dtype=np.uint32)
    add_masks(vector, [(SEED, 1), (MODEL[::-1], 1), (SEED, -1), (MODEL[::-1], -1)])
    np.testing.assert_array_equal(vector, np.arange(SIZE))
    assert (stream(SIZE) != stream(SIZE, bytes(32))).mean() > 0.999


def test_masking_takes_little_memory_beside_the_vector():
    vector = np.zeros(2**22, np.uint32)  # 16 MiB
    tracemalloc.start()
    add_masks(vector, [(SEED, 1), (bytes(32), -1)])
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2**21


@pytest.mark.parametrize("vector", [np.zeros(4, np.int32), np.zeros(4, np.uint16), np.zeros((2, 2), np.uint32)])
def test_only_a_row_of_words_is_masked(vector):
    with pytest.raises(ValueError, match="one row of uint32"):
        add_mask(vector, SEED, 1)


def test_two_members_share_a_seed_and_differ_in_sign():
    (one, plus), (other, minus) = (
        pair_mask(ROUND.kept[own].mask_key, own, ROUND.adverts[peer], WITH_MODEL)
        for own, peer in (("ada", "ben"), ("ben", "ada"))
    )
    assert (one, plus, minus) == (other, 1, -1)
    third, _ = pair_mask(ROUND.kept["ada"].mask_key, "ada", ROUND.adverts["cyd"], WITH_MODEL)
    assert third != one
    with pytest.raises(ValueError, match="no mask with itself"):
        pair_mask(ROUND.kept["ada"].mask_key, "ada", ROUND.adverts["ada"], WITH_MODEL)


OTHERS = [
    {"run_id": "other"},
    {"server_round": 4},
    {"attempt": 1},
    {"threshold": 5},
    {"members": NAMES[:-1]},
    {"model_sha256": bytes(32)},
]


@pytest.mark.parametrize("other", OTHERS)
def test_another_context_gives_other_masks(other):
    changed = replace(WITH_MODEL, **other)
    key = ROUND.kept["ada"].mask_key
    assert pair_mask(key, "ada", ROUND.adverts["ben"], changed) != pair_mask(
        key, "ada", ROUND.adverts["ben"], WITH_MODEL
    )
    assert self_seed(SEED, "ada", changed) != self_seed(SEED, "ada", WITH_MODEL)


def without(vector, *, pairwise=False, own=False):
    """ada's masked vector with masks of hers taken out, as whoever had learned these seeds would."""
    result = vector.copy()
    if own:
        add_mask(result, self_seed(ROUND.kept["ada"].self_secret, "ada", WITH_MODEL), -1)
    if pairwise:
        for peer in NAMES[1:]:
            seed, sign = pair_mask(ROUND.kept["ada"].mask_key, "ada", ROUND.adverts[peer], WITH_MODEL)
            add_mask(result, seed, -sign)
    return result


def test_one_members_vector_is_uniform_while_one_kind_of_mask_is_unknown():
    """A change of a few steps, whose bytes are 0 and 255 mostly: with both kinds known, it lies open."""
    change = np.random.default_rng(0).integers(-4, 5, SIZE).astype(np.int32).view(np.uint32)
    vector = ROUND.masked("ada", change)
    assert looks_uniform(vector)
    assert looks_uniform(vector - change)
    assert looks_uniform(without(vector, pairwise=True))  # the self mask holds: each peer's mask key was learned
    assert looks_uniform(without(vector, own=True))  # the pairwise masks hold: the self secret was learned
    bare = without(vector, own=True, pairwise=True)
    assert not looks_uniform(bare)
    np.testing.assert_array_equal(bare, change)


def test_sites_that_got_different_models_give_noise():
    """The server keeps one model for ada: what it can take out, with each secret of the survivors, is not enough."""
    zeros = np.zeros(SIZE, np.uint32)
    sent = {name: ROUND.masked(name, zeros, bytes(32) if name == "ada" else MODEL) for name in NAMES}
    assert looks_uniform(ROUND.unmasked(sent))
    sent = {name: ROUND.masked(name, zeros) for name in NAMES}
    assert not ROUND.unmasked(sent).any()


def test_secrets_that_are_not_one_for_each_member_are_refused():
    total = np.zeros(4, np.uint32)
    self_secrets = {name: ROUND.kept[name].self_secret for name in NAMES}
    for selves, keys in [
        (dict.fromkeys(NAMES[1:], SEED), {}),
        (self_secrets, {"ada": SEED}),
        ({**self_secrets, "zoe": SEED}, {}),
    ]:
        with pytest.raises(SecureSumRefused, match="not one for each member"):
            unmask(total, selves, keys, ROUND.adverts, WITH_MODEL)


def test_a_member_without_keys_is_named():
    round_ = exchanged()
    del round_.adverts["dan"]
    with pytest.raises(SecureSumRefused, match="the keys of 'dan', a member of this attempt, are missing"):
        round_.masked("ada", np.zeros(4, np.uint32))
