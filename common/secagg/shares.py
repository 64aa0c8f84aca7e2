"""What one member tells another through the server: its shares of both its secrets, sealed so that only he reads them.

X25519 between the two share keys, HKDF-SHA256 bound to the context and the direction, AES-256-GCM.  Bonawitz et al.
2017, figure 4, round 1.
"""

import secrets as random
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from common.errors import SecureSumRefused
from common.secagg.keys import Advert, Context, Secrets, agreed, derived, packed
from common.secagg.shamir import SHARE_BYTES, Share, split

_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
SEALED_BYTES: Final = _NONCE_BYTES + 2 * SHARE_BYTES + _TAG_BYTES


@dataclass(frozen=True, kw_only=True)
class SharePair:
    """What one peer holds of a member.  It may ever show one of the two: both take the member's masks away."""

    of_self_secret: Share = field(repr=False)  # for a member whose masked vector arrived
    of_mask_key: Share = field(repr=False)  # for a member whose did not


def split_secrets(kept: Secrets, context: Context) -> dict[str, SharePair]:
    """A member's shares for every member, itself included, by name; any `context.threshold` give a secret back."""
    xs = range(1, len(context.members) + 1)
    of_self, of_key = (split(one, context.threshold, xs) for one in (kept.self_secret, kept.mask_key))
    return {
        name: SharePair(of_self_secret=one, of_mask_key=other)
        for name, one, other in zip(context.members, of_self, of_key, strict=True)
    }


def seal(pair: SharePair, kept: Secrets, sender: str, receiver: Advert, context: Context) -> bytes:
    """A sender's shares for a receiver, SEALED_BYTES bytes.  kept: the sender's.  context: without the model.

    Raises SecureSumRefused where the receiver's key is none.
    """
    key = _key(kept, receiver, sender, receiver.name, context)
    nonce = random.token_bytes(_NONCE_BYTES)
    plain = pair.of_self_secret.to_bytes() + pair.of_mask_key.to_bytes()
    return nonce + AESGCM(key).encrypt(nonce, plain, _route(sender, receiver.name, context))


def unseal(sealed: bytes, kept: Secrets, sender: Advert, receiver: str, context: Context) -> SharePair:
    """The shares that a sender sealed for this receiver.  kept: the receiver's.  context: without the model.

    Raises SecureSumRefused: tampered with, from or for somebody else, of another context, or not of this place.
    """
    refused = SecureSumRefused(
        f"the shares of {sender.name!r} for {receiver!r} cannot be opened: they were tampered with, or are of another"
        " round, attempt, threshold or list of members."
    )
    if len(sealed) != SEALED_BYTES:
        raise refused
    key = _key(kept, sender, sender.name, receiver, context)
    try:
        plain = AESGCM(key).decrypt(
            sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], _route(sender.name, receiver, context)
        )
    except InvalidTag:
        raise refused from None
    pair = SharePair(
        of_self_secret=Share.from_bytes(plain[:SHARE_BYTES]), of_mask_key=Share.from_bytes(plain[SHARE_BYTES:])
    )
    if {pair.of_self_secret.x, pair.of_mask_key.x} != {context.place_of(receiver)}:
        raise SecureSumRefused(f"the shares of {sender.name!r} for {receiver!r} are of another member's place.")
    return pair


def _key(kept: Secrets, peer: Advert, sender: str, receiver: str, context: Context) -> bytes:
    secret = agreed(kept.share_key, peer.share_public, peer.name)
    return derived(secret, "shares", context, sender.encode(), receiver.encode())


def _route(sender: str, receiver: str, context: Context) -> bytes:
    return packed(b"shares", context.digest(), sender.encode(), receiver.encode())
