"""What members tell each other through the server opens for the receiver alone, in its own context alone."""

from dataclasses import replace

import pytest
from secagg_round import IDENTITIES, NAMES, exchanged

from common.errors import SecureSumRefused
from common.secagg.keys import advertise, is_mask_key_of, is_self_secret_of
from common.secagg.shares import SEALED_BYTES, SharePair, seal, split_secrets, unseal

ROUND = exchanged()
PAIR = split_secrets(ROUND.kept["ada"], ROUND.context)["ben"]
SEALED = seal(PAIR, ROUND.kept["ada"], "ada", ROUND.adverts["ben"], ROUND.context)


def opened(sealed=SEALED, kept="ben", sender="ada", receiver="ben", context=ROUND.context):
    return unseal(sealed, ROUND.kept[kept], ROUND.adverts[sender], receiver, context)


def test_the_receiver_reads_both_shares():
    assert opened() == PAIR
    assert len(SEALED) == SEALED_BYTES


def test_the_same_shares_sealed_again_look_different():
    """A site that starts again may seal once more with the same keys: a nonce that repeats would give them away."""
    again = seal(PAIR, ROUND.kept["ada"], "ada", ROUND.adverts["ben"], ROUND.context)
    assert again[:12] != SEALED[:12]
    assert opened(again) == PAIR


@pytest.mark.parametrize("place", range(0, SEALED_BYTES, 7))
def test_a_bit_that_was_changed_is_refused(place):
    changed = bytearray(SEALED)
    changed[place] ^= 1
    with pytest.raises(SecureSumRefused, match="'ada' for 'ben' cannot be opened"):
        opened(bytes(changed))


@pytest.mark.parametrize("sealed", [b"", SEALED[:-1], SEALED + b"\0"], ids=["none", "short", "long"])
def test_another_length_is_refused(sealed):
    with pytest.raises(SecureSumRefused, match="cannot be opened"):
        opened(sealed)


@pytest.mark.parametrize(
    "wrong",
    [
        {"run_id": "other"},
        {"server_round": 4},
        {"attempt": 1},
        {"threshold": 3},
        {"members": ("ada", "ben", "cyd", "dan")},
        {"model_sha256": bytes(32)},
    ],
)
def test_shares_of_another_context_are_refused(wrong):
    with pytest.raises(SecureSumRefused, match="cannot be opened"):
        opened(context=replace(ROUND.context, **wrong))


@pytest.mark.parametrize("wrong", [{"kept": "cyd"}, {"receiver": "cyd"}, {"sender": "cyd"}])
def test_shares_for_or_from_somebody_else_are_refused(wrong):
    with pytest.raises(SecureSumRefused, match="cannot be opened"):
        opened(**wrong)


def test_shares_sent_back_to_their_sender_are_refused():
    with pytest.raises(SecureSumRefused, match="cannot be opened"):
        opened(kept="ada", sender="ben", receiver="ada")


def test_shares_of_another_members_place_are_refused():
    of_cyd = split_secrets(ROUND.kept["ada"], ROUND.context)["cyd"]
    for pair in (of_cyd, SharePair(of_self_secret=PAIR.of_self_secret, of_mask_key=of_cyd.of_mask_key)):
        with pytest.raises(SecureSumRefused, match="another member's place"):
            opened(seal(pair, ROUND.kept["ada"], "ada", ROUND.adverts["ben"], ROUND.context))


@pytest.mark.parametrize("holders", [NAMES[:4], NAMES[1:], NAMES])
def test_the_threshold_of_members_gives_each_secret_back(holders):
    for owner in NAMES:
        advert = ROUND.adverts[owner]
        assert is_self_secret_of(advert, ROUND.self_secret(owner, holders))
        assert is_mask_key_of(advert, ROUND.mask_key(owner, holders))
        other, _ = advertise(IDENTITIES[owner], ROUND.context)
        assert not is_self_secret_of(other, ROUND.self_secret(owner, holders))
        assert not is_mask_key_of(other, ROUND.mask_key(owner, holders))


def test_fewer_members_than_the_threshold_give_none():
    with pytest.raises(SecureSumRefused, match="3 shares of a secret are here, and 4 are needed"):
        ROUND.self_secret("ada", NAMES[:3])
