"""Who a site is, what an attempt of a round is, and the fresh keys that each site announces for it, signed.

    Context    run, round, attempt, members, threshold, received model: bound into whatever is derived
    Identity   a site's lasting P-384 key, with which it signs
    Advert     what everybody gets: two X25519 keys and a commitment, signed for one attempt of a round
    Secrets    what stays at the site: the halves of those keys, and the secret of its self mask

After Bonawitz et al. 2017 (doi:10.1145/3133956.3133982), figure 4, rounds 0 and 1.  The server hands the adverts round;
it can swap none, for it has no site's lasting key.  All secrets come from the operating system.
See docs/adr/0031-secure-aggregation.md.
"""

import codecs
import hashlib
import hmac
import secrets as random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.errors import SecureSumRefused, UserError

SECRET_BYTES: Final = 32
DIGEST_BYTES: Final = 32
POINT_BYTES: Final = 49  # of P-384, compressed (SEC 1, section 2.3.3)
FEWEST_MEMBERS: Final = 3  # of two, each can take itself from the sum
MOST_MEMBERS: Final = 64  # so that sums of a member's lanes stay in them (`quantise`)
_NUMBER_BYTES: Final = 8
_LENGTH_BYTES: Final = 4
_PROTOCOL: Final = b"facefed secure sum 1"
_NAME_FILE: Final = "name"


# -- fields of bytes ---------------------------------------------------------------------------------------------------


def packed(*fields: bytes) -> bytes:
    """The fields, each behind its length (4 bytes, big-endian): no two sequences of fields give the same bytes."""
    return b"".join(len(one).to_bytes(_LENGTH_BYTES, "big") + one for one in fields)


def unpacked(data: bytes, sizes: Sequence[int | None], what: str) -> list[bytes]:
    """The fields that `packed` joined.  sizes: the bytes of each, None for any.  Raises SecureSumRefused."""
    found: list[bytes] = []
    place = 0
    for size in sizes:
        length = int.from_bytes(data[place : place + _LENGTH_BYTES], "big")
        place += _LENGTH_BYTES
        if length != (length if size is None else size) or place + length > len(data):
            raise SecureSumRefused(f"{what} is malformed: it is cut or holds a field of another size.")
        found.append(bytes(data[place : place + length]))
        place += length
    if place != len(data):
        raise SecureSumRefused(f"{what} is malformed: {len(data) - place} bytes are left over.")
    return found


# -- what everything is bound to ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Context:
    """One attempt of one round, as a site sees it.  Sites that see different ones share no mask and no share."""

    run_id: str
    server_round: int  # >= 0
    attempt: int  # of that round, >= 0; each has fresh keys
    members: tuple[str, ...] = ()  # all whose adverts were handed out, in order of names; () before that is known
    threshold: int = 0  # shares that give a secret back; 0 before that is known
    model_sha256: bytes | None = None  # of the received model; None before it came

    def __post_init__(self) -> None:
        if list(self.members) != sorted(set(self.members)):
            raise SecureSumRefused("the list of members is not in order of names, or names one twice.")
        if self.model_sha256 is not None and len(self.model_sha256) != DIGEST_BYTES:
            raise ValueError(f"model_sha256 has {len(self.model_sha256)} bytes, not {DIGEST_BYTES}")
        if min(self.server_round, self.attempt, self.threshold) < 0:
            raise ValueError("round, attempt and threshold are 0 or more")

    def attempt_digest(self) -> bytes:
        """SHA-256 of run, round and attempt alone: what an advert is signed for, before the members are known."""
        return hashlib.sha256(packed(_PROTOCOL, b"attempt", *self._attempt())).digest()

    def digest(self) -> bytes:
        """SHA-256 of all of it."""
        return hashlib.sha256(
            packed(
                _PROTOCOL,
                b"context",
                *self._attempt(),
                self.threshold.to_bytes(_NUMBER_BYTES, "big"),
                self.model_sha256 or b"",
                *(name.encode() for name in self.members),
            )
        ).digest()

    def with_model(self, model_sha256: bytes) -> "Context":
        """The same when the model has come.  model_sha256: [32] bytes."""
        return replace(self, model_sha256=model_sha256)

    def without_model(self) -> "Context":
        """The same before the model has come."""
        return replace(self, model_sha256=None)

    def place_of(self, name: str) -> int:
        """A member's x in the sharing of secrets: 1 for the first name.  Raises SecureSumRefused for a stranger."""
        if name not in self.members:
            raise SecureSumRefused(f"{name!r} is no member of round {self.server_round}, attempt {self.attempt}.")
        return self.members.index(name) + 1

    def _attempt(self) -> tuple[bytes, bytes, bytes]:
        numbers = (self.server_round, self.attempt)
        return self.run_id.encode(), *(number.to_bytes(_NUMBER_BYTES, "big") for number in numbers)  # type: ignore[return-value]


def derived(secret: bytes, purpose: str, context: Context, *fields: bytes) -> bytes:
    """32 bytes for one purpose: HKDF-SHA256 (RFC 5869) with the context's digest as salt.  secret: [32] bytes."""
    info = packed(_PROTOCOL, purpose.encode(), *fields)
    return HKDF(hashes.SHA256(), SECRET_BYTES, salt=context.digest(), info=info).derive(secret)


def default_threshold(num_members: int) -> int:
    """The fewest shares that are more than two thirds of the members: 3 of 3, 4 of 5, 7 of 10, 21 of 30."""
    return 2 * num_members // 3 + 1


def fewest_threshold(num_members: int) -> int:
    """The smallest threshold that a site may accept: more than half, or two lists give both secrets of one member."""
    return max(FEWEST_MEMBERS, num_members // 2 + 1)


# -- lasting keys ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """A site's name and its lasting P-384 key, which signs."""

    name: str
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def in_memory(cls, name: str) -> "Identity":
        """A new key that is written nowhere: of a simulation, which shows the protocol and protects nobody."""
        return cls(name, ec.generate_private_key(ec.SECP384R1()))

    @property
    def public_key(self) -> ec.EllipticCurvePublicKey:
        """What others check its signatures with."""
        return self.key.public_key()

    def sign(self, message: bytes) -> bytes:
        """ECDSA with SHA-384, as DER."""
        return self.key.sign(message, ec.ECDSA(hashes.SHA384()))


def load_identity(path: Path, name: str = "") -> Identity:
    """A site's identity.  path: its folder of `facefed certs`, or the `client.key` in it.  Raises UserError.

    name: the site's; "": as the file `name` beside the key has it.
    """
    file = path / "client.key" if path.is_dir() else path
    key = None
    with suppress(ValueError, TypeError, UnsupportedAlgorithm):
        key = serialization.load_ssh_private_key(_content(file), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise UserError(f"{file} is no P-384 private key of OpenSSH's format; put the one of `facefed certs` there.")
    found = name or _content(file.parent / _NAME_FILE).decode(errors="replace").strip()
    if not found:
        raise UserError(f"{file.parent / _NAME_FILE} is empty; write the site's name there, as its operator has it.")
    return Identity(found, key)


def load_public(path: Path) -> ec.EllipticCurvePublicKey:
    """A site's P-384 key, NAME.pub of OpenSSH's format.  Raises UserError."""
    key = None
    with suppress(ValueError, UnsupportedAlgorithm):
        key = serialization.load_ssh_public_key(_content(path))
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise UserError(f"{path} is not a P-384 public key of OpenSSH's format; remove it or put the key there.")
    return key


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


# -- fresh keys --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Secrets:
    """What a site keeps of its advert.  Each is shown to nobody, but for shares of the first or the last of them."""

    mask_key: bytes = field(repr=False)  # [32], X25519: of the pairwise masks
    share_key: bytes = field(repr=False)  # [32], X25519: of what peers are told
    self_secret: bytes = field(repr=False)  # [32]: of the self mask

    def to_bytes(self) -> bytes:
        """For the site's private state, 0600."""
        return packed(self.mask_key, self.share_key, self.self_secret)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Secrets":
        """What `to_bytes` gave.  Raises SecureSumRefused."""
        mask_key, share_key, self_secret = unpacked(data, (SECRET_BYTES,) * 3, "the file of a round's secrets")
        return cls(mask_key=mask_key, share_key=share_key, self_secret=self_secret)


@dataclass(frozen=True, kw_only=True)
class Advert:
    """A site's fresh public keys for one attempt of a round, signed with its lasting key."""

    name: str
    lasting_public: bytes  # [49], compressed point: of the key that signed, for whoever has it not yet
    attempt_digest: bytes  # [32], `Context.attempt_digest`
    mask_public: bytes  # [32], X25519
    share_public: bytes  # [32], X25519
    self_commitment: bytes  # [32], SHA-256: shows whether a self secret was put together rightly
    signature: bytes  # DER

    def to_bytes(self) -> bytes:
        """As it travels: about 310 bytes."""
        return packed(*self._signed(), self.signature)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Advert":
        """What travelled; `check_advert` says whether it is to be believed.  Raises SecureSumRefused."""
        sizes = (None, POINT_BYTES, DIGEST_BYTES, SECRET_BYTES, SECRET_BYTES, DIGEST_BYTES, None)
        name, lasting, digest, mask_public, share_public, commitment, signature = unpacked(
            data, sizes, "an advert of keys"
        )
        try:
            text = name.decode()
        except UnicodeDecodeError:
            raise SecureSumRefused("an advert of keys is malformed: its name is not UTF-8.") from None
        return cls(
            name=text,
            lasting_public=lasting,
            attempt_digest=digest,
            mask_public=mask_public,
            share_public=share_public,
            self_commitment=commitment,
            signature=signature,
        )

    def message(self) -> bytes:
        """What is signed."""
        return packed(_PROTOCOL, b"advert", *self._signed())

    def _signed(self) -> tuple[bytes, ...]:
        return (
            self.name.encode(),
            self.lasting_public,
            self.attempt_digest,
            self.mask_public,
            self.share_public,
            self.self_commitment,
        )


def advertise(identity: Identity, context: Context) -> tuple[Advert, Secrets]:
    """Fresh keys for an attempt of a round, each from the operating system's randomness.

    context: of it run, round and attempt count; the others may be unknown yet.
    """
    kept = Secrets(
        mask_key=random.token_bytes(SECRET_BYTES),
        share_key=random.token_bytes(SECRET_BYTES),
        self_secret=random.token_bytes(SECRET_BYTES),
    )
    advert = Advert(
        name=identity.name,
        lasting_public=point_of(identity.public_key),
        attempt_digest=context.attempt_digest(),
        mask_public=public_of(kept.mask_key),
        share_public=public_of(kept.share_key),
        self_commitment=_commitment(kept.self_secret),
        signature=b"",
    )
    return replace(advert, signature=identity.sign(advert.message())), kept


def check_advert(advert: Advert, public_key: ec.EllipticCurvePublicKey, context: Context) -> None:
    """Raise SecureSumRefused unless the owner of that key made this advert for this attempt, and is a member of it.

    public_key: the lasting one of whoever `advert.name` is, from the site's own folder.
    context: its members count where they are known.
    """
    if context.members and advert.name not in context.members:
        raise SecureSumRefused(f"{advert.name!r} is no member of this attempt, but keys of it were handed out.")
    if not hmac.compare_digest(advert.attempt_digest, context.attempt_digest()):
        raise SecureSumRefused(
            f"the keys of {advert.name!r} are not for run {context.run_id!r}, round {context.server_round}, attempt"
            f" {context.attempt}: they were made for another and sent again."
        )
    try:
        public_key.verify(advert.signature, advert.message(), ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise SecureSumRefused(
            f"the keys of {advert.name!r} are not signed with the key that this site has of it: they were swapped on"
            " the way, or its key was replaced and its new NAME.pub is not here."
        ) from None


def lasting_key_of(advert: Advert) -> ec.EllipticCurvePublicKey:
    """The lasting key that an advert says is its own: to be believed by who has none, and was told to believe it.

    Raises SecureSumRefused where it is none.
    """
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), advert.lasting_public)
    except ValueError:
        raise SecureSumRefused(f"the lasting key of {advert.name!r} is no point of P-384.") from None


def point_of(key: ec.EllipticCurvePublicKey) -> bytes:
    """A P-384 public key as POINT_BYTES bytes."""
    return key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)


def is_self_secret_of(advert: Advert, secret: bytes) -> bool:
    """Whether a secret put together of shares is the one of the member's self mask."""
    return hmac.compare_digest(_commitment(secret), advert.self_commitment)


def is_mask_key_of(advert: Advert, secret: bytes) -> bool:
    """Whether a secret put together of shares is the member's mask key."""
    return hmac.compare_digest(public_of(secret), advert.mask_public)


def public_of(private: bytes) -> bytes:
    """The X25519 public key, [32] bytes, of a private one, [32] bytes (RFC 7748)."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agreed(private: bytes, peer_public: bytes, peer: str) -> bytes:
    """The X25519 secret, [32] bytes, of one's private and a peer's public key.

    Raises SecureSumRefused where the peer's is one of those that give the same with every key.
    """
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(peer_public))
    except ValueError:
        raise SecureSumRefused(f"the key of {peer!r} gives the same secret with everybody; it is none.") from None


def _commitment(secret: bytes) -> bytes:
    """Binding, and hiding as the secret is 256 random bits; masks are derived by HKDF, so it is none of theirs."""
    return hashlib.sha256(packed(_PROTOCOL, b"commitment", secret)).digest()
