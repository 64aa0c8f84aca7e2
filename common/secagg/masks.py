"""Masks on a vector of integers modulo 2**32, which cancel in the sum of all members.

The first words of a vector may be two *lanes* of 16 bits each (`common/secagg/lanes.py`), which are added modulo 2**16.

Member i sends x_i + s_i + sum over j > i of p_ij - sum over j < i of p_ij (Bonawitz et al. 2017, section 4): s_i is its
self mask, p_ij the mask that it shares with j.  Each is the key stream of AES-256 in counter mode from a seed that is
used once.  Of a member who sent nothing, its pairwise masks are taken out of the others' sum; of those who sent, their
self masks.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from common.errors import SecureSumRefused
from common.secagg.keys import Advert, Context, Secrets, agreed, derived, public_of

PIECE: Final = 2**16  # elements at a time, 256 KiB: all of a piece's masks are added while it is in the core's cache
_PER_BLOCK: Final = 4  # elements in a block of AES
_COUNTER_BYTES: Final = 16

Words = NDArray[np.uint32]
Mask = tuple[bytes, int]  # seed [32] bytes, sign 1 or -1


def pair_mask(mask_key: bytes, own: str, peer: Advert, context: Context) -> Mask:
    """The mask that `own` adds for a peer, whose own is the same with the other sign.

    mask_key: [32] bytes, of `own`.  context: with the received model.
    Raises SecureSumRefused where the peer's key is none; ValueError for a member with itself.
    """
    if own == peer.name:
        raise ValueError(f"{own!r} has no mask with itself")
    return pair_seed(mask_key, own, peer, context), 1 if own < peer.name else -1


def pair_seed(mask_key: bytes, own: str, peer: Advert, context: Context) -> bytes:
    """The seed, [32] bytes, that two members have in common and nobody else; the same from either side."""
    ends = sorted([(own.encode(), public_of(mask_key)), (peer.name.encode(), peer.mask_public)])
    fields = [part for end in ends for part in end]
    return derived(agreed(mask_key, peer.mask_public, peer.name), "pairwise mask", context, *fields)


def self_seed(self_secret: bytes, name: str, context: Context) -> bytes:
    """The seed, [32] bytes, of a member's self mask.  self_secret: [32] bytes.  context: with the received model."""
    return derived(self_secret, "self mask", context, name.encode())


def add_mask(vector: Words, seed: bytes, sign: int, start: int = 0) -> None:
    """Add a mask to a vector, [size] uint32, in place, modulo 2**32.

    seed: [32] bytes, used for this vector alone.  sign: 1 or -1.
    start: the vector's first element in the whole one, where it is a part.
    """
    add_masks(vector, [(seed, sign)], start)


def add_words(total: Words, words: Words, lanes: int = 0) -> None:
    """Add a vector to a sum, [size] uint32 both, in place.  lanes: how many of the first words are two lanes each."""
    _combine(np.add, total, words, lanes)


def _combine(operation: Callable[..., Any], vector: Words, other: Words, lanes: int) -> None:
    pairs = vector[:lanes].view(np.uint16)
    operation(pairs, other[:lanes].astype(np.uint32, copy=False).view(np.uint16), out=pairs)
    operation(vector[lanes:], other[lanes:], out=vector[lanes:])


def add_masks(vector: Words, masks: Iterable[Mask], start: int = 0, *, lanes: int = 0) -> None:
    """`add_mask` of several, piece by piece; it takes 256 KiB beside the vector.

    lanes: how many of the vector's first words are two lanes each.  Raises ValueError.
    """
    if vector.dtype != np.uint32 or vector.ndim != 1:
        raise ValueError(f"a masked vector is one row of uint32, not {vector.dtype} {vector.shape}")
    skipped = start % _PER_BLOCK
    counter = (start // _PER_BLOCK).to_bytes(_COUNTER_BYTES, "big")
    streams = []
    for seed, sign in masks:
        stream = Cipher(algorithms.AES256(seed), modes.CTR(counter)).encryptor()
        stream.update(bytes(4 * skipped))
        streams.append((stream, {1: np.add, -1: np.subtract}[sign]))
    zeros, drawn = bytes(4 * PIECE), bytearray(4 * PIECE + _COUNTER_BYTES)
    for begin in range(0, len(vector), PIECE):
        piece = vector[begin : begin + PIECE]
        for stream, operation in streams:
            stream.update_into(memoryview(zeros)[: 4 * len(piece)], drawn)
            drawn_words = np.frombuffer(drawn, dtype="<u4", count=len(piece))
            _combine(operation, piece, drawn_words, min(max(lanes - begin, 0), len(piece)))


def masked(
    vector: Words, kept: Secrets, own: str, adverts: Mapping[str, Advert], context: Context, *, lanes: int = 0
) -> Words:
    """What a member sends in the vector's place: a new vector, [size] uint32, uniform for whoever lacks the seeds.

    kept: the member's.  adverts: of all members by name, checked; its own may be missing.
    context: with members and the received model.  lanes: how many of the first words are two lanes each.
    Raises SecureSumRefused where a member's advert is missing.
    """
    peers = [_advert(adverts, name) for name in context.members if name != own]
    masks = [(self_seed(kept.self_secret, own, context), 1)]
    masks += [pair_mask(kept.mask_key, own, peer, context) for peer in peers]
    result = vector.copy()
    add_masks(result, masks, lanes=lanes)
    return result


def unmask(
    total: Words,
    self_secrets: Mapping[str, bytes],
    mask_keys: Mapping[str, bytes],
    adverts: Mapping[str, Advert],
    context: Context,
    *,
    lanes: int = 0,
) -> None:
    """Take the masks out of a sum of masked vectors, [size] uint32, in place.

    self_secrets: of each member whose vector is in the sum.  mask_keys: of each other member.  Both [32] bytes by name.
    adverts: of all members.  context: as the members had it, with the model that they were sent.  lanes: likewise.
    Raises SecureSumRefused unless the two are all members, and none is in both.
    """
    given = [*self_secrets, *mask_keys]
    if sorted(given) != list(context.members):
        raise SecureSumRefused("the secrets that were put together are not one for each member.")
    masks = [(self_seed(secret, name, context), -1) for name, secret in self_secrets.items()]
    for lost, mask_key in mask_keys.items():
        # What a survivor added for the lost one has the other sign than what the lost one would have added for it.
        masks += [pair_mask(mask_key, lost, _advert(adverts, name), context) for name in self_secrets]
    add_masks(total, masks, lanes=lanes)


def _advert(adverts: Mapping[str, Advert], name: str) -> Advert:
    try:
        return adverts[name]
    except KeyError:
        raise SecureSumRefused(f"the keys of {name!r}, a member of this attempt, are missing.") from None
