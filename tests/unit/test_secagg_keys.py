"""Lasting and fresh keys: who signed for what, and that everything derived is bound to all of the context."""

import hashlib
import hmac
from dataclasses import fields, replace

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from secagg_round import IDENTITIES, NAMES

from common.errors import SecureSumRefused, UserError
from common.secagg.keys import (
    Advert,
    Context,
    Identity,
    Secrets,
    advertise,
    agreed,
    check_advert,
    default_threshold,
    derived,
    fewest_threshold,
    load_identity,
    load_public,
    packed,
    public_of,
    unpacked,
)
from simulation.admin.certs import make_folder

CONTEXT = Context(run_id="run", server_round=3, attempt=1, members=NAMES, threshold=4, model_sha256=bytes(32))
OTHERS = {  # the same with one field changed
    "run_id": "runn",
    "server_round": 4,
    "attempt": 2,
    "members": NAMES[:-1],
    "threshold": 3,
    "model_sha256": bytes([1] * 32),
}
ADA, BEN = IDENTITIES["ada"], IDENTITIES["ben"]


def test_every_field_of_a_context_is_tried():
    assert {one.name for one in fields(Context)} == set(OTHERS)


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_differs_in_a_context_gives_other_keys(name):
    other = replace(CONTEXT, **{name: OTHERS[name]})
    assert other.digest() != CONTEXT.digest()
    assert derived(bytes(32), "shares", other) != derived(bytes(32), "shares", CONTEXT)
    of_attempt = name in {"run_id", "server_round", "attempt"}
    assert (other.attempt_digest() != CONTEXT.attempt_digest()) is of_attempt


def test_no_model_and_no_members_are_contexts_of_their_own():
    digests = {CONTEXT.digest(), CONTEXT.without_model().digest(), replace(CONTEXT, members=()).digest()}
    assert len(digests) == 3
    assert CONTEXT.without_model().with_model(bytes(32)) == CONTEXT


def test_members_that_join_to_the_same_text_are_told_apart():
    assert replace(CONTEXT, members=("a", "bc")).digest() != replace(CONTEXT, members=("ab", "c")).digest()


@pytest.mark.parametrize("members", [("ben", "ada"), ("ada", "ada")])
def test_members_out_of_order_or_named_twice_are_refused(members):
    with pytest.raises(SecureSumRefused, match="names one twice"):
        replace(CONTEXT, members=members)


def test_a_derived_key_is_that_of_rfc_5869():
    """Extract and expand written out with HMAC: salt the digest, one block of output."""
    secret, purpose = bytes(range(32)), "pairwise mask"
    info = b"".join(len(one).to_bytes(4, "big") + one for one in (b"facefed secure sum 1", purpose.encode(), b"x", b""))
    extracted = hmac.new(CONTEXT.digest(), secret, hashlib.sha256).digest()
    expected = hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()
    assert derived(secret, purpose, CONTEXT, b"x", b"") == expected


@given(st.lists(st.binary(max_size=9), max_size=4))
def test_packed_fields_come_back(parts):
    assert unpacked(packed(*parts), [None] * len(parts), "it") == parts


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"\xff" + data[1:]])
def test_a_cut_or_longer_message_is_refused(damage):
    with pytest.raises(SecureSumRefused, match="it is malformed"):
        unpacked(damage(packed(b"abc", b"de")), [None, 2], "it")


def test_an_advert_travels_and_is_believed_for_its_attempt():
    advert, kept = advertise(ADA, Context(run_id="run", server_round=3, attempt=1))
    check_advert(Advert.from_bytes(advert.to_bytes()), ADA.public_key, CONTEXT)
    assert public_of(kept.mask_key) == advert.mask_public
    assert public_of(kept.share_key) == advert.share_public
    assert Secrets.from_bytes(kept.to_bytes()) == kept


def test_no_two_adverts_share_a_secret():
    kept = [advertise(ADA, CONTEXT)[1] for _ in range(3)]
    assert len({secret for one in kept for secret in (one.mask_key, one.share_key, one.self_secret)}) == 9


def test_secrets_are_not_shown_where_they_are_printed():
    _, kept = advertise(ADA, CONTEXT)
    assert repr(kept) == "Secrets()"
    assert "key" not in repr(ADA)


@pytest.mark.parametrize("name", ["run_id", "server_round", "attempt"])
def test_an_advert_of_another_attempt_is_a_replay(name):
    advert, _ = advertise(ADA, replace(CONTEXT, **{name: OTHERS[name]}))
    with pytest.raises(SecureSumRefused, match=r"made for another and sent again"):
        check_advert(advert, ADA.public_key, CONTEXT)


def test_a_replay_that_claims_the_present_attempt_is_not_signed():
    advert, _ = advertise(ADA, replace(CONTEXT, attempt=0))
    with pytest.raises(SecureSumRefused, match="are not signed"):
        check_advert(replace(advert, attempt_digest=CONTEXT.attempt_digest()), ADA.public_key, CONTEXT)


@pytest.mark.parametrize(
    "name", ["mask_public", "share_public", "self_commitment", "lasting_public", "signature", "name"]
)
def test_an_advert_with_a_swapped_part_is_refused(name):
    """The server takes one part from an advert of its own, which it signed with a key of its own."""
    advert, _ = advertise(ADA, CONTEXT)
    own, _ = advertise(Identity.in_memory("ben"), CONTEXT)
    with pytest.raises(SecureSumRefused, match="are not signed"):
        check_advert(replace(advert, **{name: getattr(own, name)}), ADA.public_key, CONTEXT)


def test_a_member_that_nobody_knows_is_refused():
    mallory = Identity.in_memory("mallory")
    advert, _ = advertise(mallory, CONTEXT)
    with pytest.raises(SecureSumRefused, match="'mallory' is no member"):
        check_advert(advert, mallory.public_key, CONTEXT)
    with pytest.raises(SecureSumRefused, match="'mallory' is no member"):
        CONTEXT.place_of("mallory")


def test_a_key_that_agrees_with_everybody_is_refused():
    """The point of order two gives the secret 0 with whatever key (RFC 7748, section 6.1)."""
    with pytest.raises(SecureSumRefused, match="the same secret with everybody"):
        agreed(bytes(range(32)), bytes(32), "ada")


@pytest.mark.parametrize(("num_members", "expected"), [(3, 3), (4, 3), (5, 4), (6, 5), (10, 7), (30, 21)])
def test_the_default_threshold_is_more_than_two_thirds(num_members, expected):
    assert default_threshold(num_members) == expected
    assert 3 * expected > 2 * num_members
    assert fewest_threshold(num_members) <= expected
    assert 2 * fewest_threshold(num_members) > num_members


def test_the_keys_of_a_sites_folder_are_read(tmp_path):
    make_folder(tmp_path / "fed", ["localhost"], ["ada", "ben"])
    identity = load_identity(tmp_path / "fed" / "ada")
    assert (identity.name, load_identity(tmp_path / "fed" / "ada" / "client.key", "ben").name) == ("ada", "ben")
    public = load_public(tmp_path / "fed" / "clients" / "ada.pub")
    assert public == identity.public_key
    public.verify(identity.sign(b"x"), b"x", ec.ECDSA(hashes.SHA384()))


def test_a_key_that_is_missing_or_of_another_kind_is_one_line(tmp_path):
    other = ec.generate_private_key(ec.SECP256R1())
    form = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    (tmp_path / "client.key").write_bytes(other.private_bytes(*form))
    public = other.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (tmp_path / "ada.pub").write_bytes(public)
    with pytest.raises(UserError, match=r"client.key is no P-384 private key"):
        load_identity(tmp_path)
    with pytest.raises(UserError, match=r"ada.pub is not a P-384 public key"):
        load_public(tmp_path / "ada.pub")
    with pytest.raises(UserError, match=r"ben.pub cannot be read: No such file"):
        load_public(tmp_path / "ben.pub")
