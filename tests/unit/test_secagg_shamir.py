"""Sharing of secrets: any threshold of shares, no fewer, and no wrong one."""

import secrets

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import SecureSumRefused
from common.secagg.shamir import PRIME, SHARE_BYTES, Share, join, split

SECRET = bytes(range(224, 256))


def test_the_modulus_is_a_prime_above_every_secret():
    """Miller and Rabin's test to 64 random bases."""
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(64):
        power = pow(2 + secrets.randbelow(PRIME - 3), odd, PRIME)
        chain = [power := power * power % PRIME if place else power for place in range(twos)]
        assert chain[0] == 1 or PRIME - 1 in chain
    assert PRIME > 2**256


def test_a_share_is_the_polynomials_value(monkeypatch):
    """5 + 7 x + 3 x^2 at 1, 2 and 3: 15, 31 and 53."""
    drawn = iter([7, 3])
    monkeypatch.setattr("common.secagg.shamir.secrets.randbelow", lambda _: next(drawn))
    shares = split((5).to_bytes(32, "big"), 3, [1, 2, 3])
    assert [(share.x, share.y) for share in shares] == [(1, 15), (2, 31), (3, 53)]


@settings(deadline=None, max_examples=60)
@given(data=st.data(), secret=st.binary(min_size=32, max_size=32), num=st.integers(1, 12))
def test_any_threshold_of_shares_gives_the_secret_back(data, secret, num):
    threshold = data.draw(st.integers(1, num))
    shares = [Share.from_bytes(one.to_bytes()) for one in split(secret, threshold, range(1, num + 1))]
    chosen = data.draw(st.permutations(shares))[: data.draw(st.integers(threshold, num))]
    assert join(chosen, threshold) == secret


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32])
def test_the_least_and_the_largest_secret_are_shared_too(secret):
    assert join(split(secret, 2, [1, 2, 3])[1:], 2) == secret


def test_shares_have_one_length_whatever_they_are():
    assert {len(Share(x, y).to_bytes()) for x, y in [(1, 0), (65535, PRIME - 1), (30, 2**200)]} == {SHARE_BYTES}


def test_one_share_fewer_says_nothing_of_the_secret():
    """Below the threshold a share is uniform: the top byte of one of threshold two, over 4,096 splits of one secret.

    Chi-square over 16 bins has mean 15 and deviation 5.5; 70 is passed by chance once in 10^8.  With a coefficient
    that is not random each split gives the same bin: 61,440.
    """
    bins = [0] * 16
    for _ in range(4096):
        bins[split(SECRET, 2, [1, 2])[0].y >> 252 & 15] += 1
    assert sum((count - 256) ** 2 / 256 for count in bins) < 70


def test_fewer_shares_than_the_threshold_are_refused():
    with pytest.raises(SecureSumRefused, match="2 shares of a secret are here, and 3 are needed"):
        join(split(SECRET, 3, [1, 2, 3])[:2], 3)
    with pytest.raises(SecureSumRefused):
        join([], 0)


def test_two_shares_of_one_place_are_refused():
    first = split(SECRET, 2, [1, 2])[0]
    with pytest.raises(SecureSumRefused, match="of one place"):
        join([first, Share(first.x, 5)], 2)


def test_a_share_that_was_tampered_with_is_seen_where_there_is_one_more():
    shares = split(SECRET, 3, [1, 2, 3, 4])
    shares[1] = Share(2, (shares[1].y + 1) % PRIME)
    with pytest.raises(SecureSumRefused, match="do not belong together"):
        join(shares, 3)


@pytest.mark.parametrize(
    "data", [bytes(SHARE_BYTES), b"\0\1" + b"\xff" * 33, bytes([0, 1] * 17), b"\0\1" + PRIME.to_bytes(33, "big")]
)
def test_a_malformed_share_is_refused(data):
    with pytest.raises(SecureSumRefused, match="malformed"):
        Share.from_bytes(data)


@pytest.mark.parametrize(
    ("secret", "threshold", "xs"),
    [
        (SECRET[1:], 1, [1]),
        (SECRET, 0, [1]),
        (SECRET, 3, [1, 2]),
        (SECRET, 2, [1, 1, 2]),
        (SECRET, 1, [0]),
        (SECRET, 1, [65536]),
    ],
)
def test_what_cannot_be_shared_is_an_error(secret, threshold, xs):
    with pytest.raises(ValueError, match=r"secret|shares|bytes"):
        split(secret, threshold, xs)
