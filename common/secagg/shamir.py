"""Sharing of a 32-byte secret: any `threshold` shares give it back, fewer say nothing of it.

Shamir 1979 (doi:10.1145/359168.359176): a polynomial of degree threshold - 1 over the integers modulo a prime whose
value at 0 is the secret and whose other coefficients are random.  The prime is above 2**256, so every secret fits.
Python's integers take time by their values; who runs this holds the secret himself, and an attempt's secrets are used
once, so there is nothing to learn by asking again.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from common.errors import SecureSumRefused
from common.secagg.keys import SECRET_BYTES

PRIME: Final = 2**256 + 297  # the least prime above 2**256
_X_BYTES: Final = 2
_Y_BYTES: Final = 33
SHARE_BYTES: Final = _X_BYTES + _Y_BYTES
LARGEST_X: Final = 2 ** (8 * _X_BYTES) - 1


@dataclass(frozen=True)
class Share:
    """One point of the polynomial."""

    x: int  # 1 to LARGEST_X
    y: int = field(repr=False)  # in [0, PRIME)

    def to_bytes(self) -> bytes:
        """SHARE_BYTES bytes, whatever it is."""
        return self.x.to_bytes(_X_BYTES, "big") + self.y.to_bytes(_Y_BYTES, "big")

    @classmethod
    def from_bytes(cls, data: bytes) -> "Share":
        """What `to_bytes` gave.  Raises SecureSumRefused."""
        x, y = int.from_bytes(data[:_X_BYTES], "big"), int.from_bytes(data[_X_BYTES:], "big")
        if len(data) != SHARE_BYTES or x == 0 or y >= PRIME:
            raise SecureSumRefused("a share of a secret is malformed.")
        return cls(x, y)


def split(secret: bytes, threshold: int, xs: Sequence[int]) -> list[Share]:
    """Shares of a secret at `xs`, any `threshold` of which give it back.

    secret: [32] bytes.  threshold: 1 to len(xs).  xs: different numbers, 1 to LARGEST_X.  Raises ValueError otherwise.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES} bytes, not {len(secret)}")
    if len(set(xs)) != len(xs) or not all(1 <= x <= LARGEST_X for x in xs):
        raise ValueError(f"the places of shares are different numbers from 1 to {LARGEST_X}, not {list(xs)}")
    if not 1 <= threshold <= len(xs):
        raise ValueError(f"{threshold} of {len(xs)} shares cannot give a secret back")
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [Share(x, _value(coefficients, x)) for x in xs]


def _value(coefficients: Sequence[int], x: int) -> int:
    """The polynomial at x, by Horner's rule."""
    total = 0
    for coefficient in reversed(coefficients):
        total = (total * x + coefficient) % PRIME
    return total


def join(shares: Sequence[Share], threshold: int) -> bytes:
    """The secret, [32] bytes, of `threshold` shares or more; those beyond must agree with the first ones.

    Raises SecureSumRefused: too few, two of one place, one that does not belong to the others.  Shares of exactly
    `threshold` that do not belong together give another secret: `keys.is_self_secret_of` and `is_mask_key_of` tell.
    """
    if len({share.x for share in shares}) != len(shares):
        raise SecureSumRefused("two shares of a secret are of one place.")
    if threshold < 1 or len(shares) < threshold:
        raise SecureSumRefused(f"{len(shares)} shares of a secret are here, and {threshold} are needed.")
    first, others = shares[:threshold], shares[threshold:]
    secret = _at(first, 0)
    if secret >= 2 ** (8 * SECRET_BYTES) or any(_at(first, share.x) != share.y for share in others):
        raise SecureSumRefused("the shares of a secret do not belong together: one was tampered with.")
    return secret.to_bytes(SECRET_BYTES, "big")


def _at(shares: Sequence[Share], x: int) -> int:
    """The polynomial through the shares at x, by Lagrange's formula."""
    total = 0
    for share in shares:
        above = below = 1
        for other in shares:
            if other.x != share.x:
                above = above * (x - other.x) % PRIME
                below = below * (share.x - other.x) % PRIME
        total = (total + share.y * above * pow(below, -1, PRIME)) % PRIME
    return total
