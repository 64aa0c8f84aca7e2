"""One site's part in sums of which the server sees no summand (docs/adr/0031-secure-aggregation.md).

    keys      -> an attempt's number and its members     <- this site's fresh keys, signed
    shares    -> everybody's keys                        <- shares of this site's two secrets, sealed for each peer
    train or  -> whose shares are here, and they         <- this site's words, masked
    evaluate
    unmask    -> whose words arrived                     <- of each of those a share of its self mask's secret, of each
                                                            other one a share of its mask key; never both of one site

What may be answered once is written down before it is answered, in one file of the run's private state: the attempt,
how far it is, its secrets, and over whom this site's round, or a model's score, was summed before.  Attempts only grow.
An attempt's secrets go when its sum is opened, in the same write: what is left is what was answered.  Where it is not
opened, they go with the next one's keys, at the run's end, or when this site joins another run.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from numpy.typing import NDArray

from clients.policy import Against, Policy, PolicyRefusal
from clients.site import MadeKeys, SiteSettings
from common.errors import CheckpointError, SecureSumRefused, UserError
from common.privacy.shared_noise import fewest_noises
from common.protocol.secure_words import (
    KEYS,
    SHARES,
    KeysAsked,
    SharesAsked,
    UnmaskAsked,
    WorkAsked,
    in_text,
    of_text,
)
from common.secagg.keys import (
    FEWEST_MEMBERS,
    MOST_MEMBERS,
    Advert,
    Context,
    Identity,
    Secrets,
    advertise,
    check_advert,
    lasting_key_of,
    load_identity,
    load_public,
)
from common.secagg.masks import masked
from common.secagg.shares import SharePair, seal, split_secrets, unseal
from common.secagg.sites import threshold_of
from common.system.certs import PEERS, fingerprint
from common.system.events import SHOWN
from common.system.files import read_sealed_json, write_bytes, write_sealed_json

FILE: Final = "secure-sum.json"
MASKED, OPENED = "masked", "opened"  # the steps of an attempt beside KEYS and SHARES

Words = NDArray[np.uint32]
T = TypeVar("T")

log = logging.getLogger("facefed.client")


class UnknownPeer(SecureSumRefused):
    """A member of whom this site has no key."""


class Keys:
    """A site's lasting key, and those of its peers."""

    def __init__(
        self, own: Identity, peer: Callable[[str], ec.EllipticCurvePublicKey], pins: Path | None = None
    ) -> None:
        """peer: a member's lasting public key, by its name; raises UnknownPeer for a stranger.

        pins: a folder where a stranger's key is kept, as it first came; None: strangers are refused.
        """
        self.own, self._peer, self._pins = own, peer, pins

    def require(self, name: str) -> None:
        """Raises UnknownPeer for a site of which there is no key, and none may be taken as it comes."""
        if self._pins is None:
            self._peer(name)

    def check(self, adverts: Mapping[str, Advert], context: Context) -> None:
        """Raises SecureSumRefused unless each is its site's, by the key that is known or pinned; then pins new ones."""
        new: dict[Path, ec.EllipticCurvePublicKey] = {}
        for name, advert in adverts.items():
            try:
                key = self._peer(name)
            except UnknownPeer:
                if self._pins is None:
                    raise
                pin = self._pins / f"{name}.pub"
                key = _usable(partial(load_public, pin)) if pin.exists() else lasting_key_of(advert)
                if not pin.exists():
                    new[pin] = key
            check_advert(advert, key, context)
        for pin, key in new.items():
            write_bytes(pin, key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH))
            log.warning(
                "%sthe key of %s came through the server and is kept from now on, %s: %s; ask whether it is theirs",
                SHOWN, pin.stem, pin, fingerprint(key),
            )  # fmt: skip


@dataclass(kw_only=True)
class _Attempt:
    """What this site keeps of the newest attempt."""

    number: int = -1  # of the run's attempts; -1: none yet
    step: str = ""  # the last that was answered: KEYS, SHARES, MASKED, OPENED
    server_round: int = 0
    members: list[str] = field(default_factory=list)  # who was asked for keys
    secrets: str = ""  # of this site, as text
    threshold: int = 0
    adverts: dict[str, str] = field(default_factory=dict)  # of all whose keys were handed out
    own_shares: dict[str, str] = field(default_factory=dict)  # this site's shares of its own two secrets
    summed: list[str] = field(default_factory=list)  # who adds words
    pairs: dict[str, dict[str, str]] = field(default_factory=dict)  # of whom this site holds which shares
    about: list[str] = field(default_factory=list)  # what is summed: a round, scores of a model
    shown: list[str] = field(default_factory=list)  # whose words arrived, as this site was told and answered
    before: dict[str, str] = field(default_factory=dict)  # what was summed -> over whom, a digest


class SecureSum:
    """One run's attempts at one site.

    Each method answers one message, or raises SecureSumRefused or PolicyRefusal and shows nothing.
    """

    def __init__(
        self, folder: Path, run_id: str, keys: Keys, *, threshold: float, policy: Policy, colluding: int = 1
    ) -> None:
        """folder: of the run's private state.

        threshold: `secagg.threshold` of the run.  colluding: `privacy.colluding_sites`.
        """
        self._path, self._run_id, self._keys = folder / FILE, run_id, keys
        self._fraction, self._policy, self._colluding = threshold, policy, colluding
        self._kept = self._load()

    @property
    def name(self) -> str:
        """The site's own."""
        return self._keys.own.name

    def keys(self, asked: KeysAsked, server_round: int) -> str:
        """Fresh keys for a new attempt: their advert as text."""
        if asked.attempt <= self._kept.number:
            raise SecureSumRefused(
                f"attempt {asked.attempt} of round {server_round} comes after attempt {self._kept.number}: each attempt"
                " has keys of its own, and is not begun twice."
            )
        self._check_members(asked.members)
        for name in asked.members:
            self._keys.require(name)
        context = Context(run_id=self._run_id, server_round=server_round, attempt=asked.attempt)
        advert, secrets = advertise(self._keys.own, context)
        self._kept = _Attempt(
            number=asked.attempt,
            step=KEYS,
            server_round=server_round,
            members=list(asked.members),
            secrets=in_text(secrets.to_bytes()),
            before=self._kept.before,
        )
        self._save()
        return in_text(advert.to_bytes())

    def shares(self, asked: SharesAsked, server_round: int) -> dict[str, str]:
        """The site's two secrets, shared out and sealed: a text for each peer."""
        kept = self._at(asked.attempt, server_round, KEYS)
        names = sorted(asked.adverts)
        self._check_members(names)
        if not set(names) <= set(kept.members):
            raise SecureSumRefused("keys were handed out of a site that was no member when the attempt began.")
        threshold = threshold_of(self._fraction, len(names))
        context = replace(self._context(), members=tuple(names), threshold=threshold)
        adverts = {name: Advert.from_bytes(of_text(text)) for name, text in asked.adverts.items()}
        for name, advert in adverts.items():
            if advert.name != name:
                raise SecureSumRefused(f"the keys of {advert.name!r} were handed out as those of {name!r}.")
        self._keys.check(adverts, context)
        secrets = Secrets.from_bytes(of_text(kept.secrets))
        pairs = split_secrets(secrets, context)
        sealed = {
            name: in_text(seal(pairs[name], secrets, self.name, adverts[name], context))
            for name in names
            if name != self.name
        }
        kept.threshold, kept.adverts, kept.step = threshold, dict(asked.adverts), SHARES
        kept.own_shares = _pair_in_text(pairs[self.name])
        self._save()
        return sealed

    def require_turn(self, asked: WorkAsked, server_round: int) -> None:
        """Raises SecureSumRefused, before any work is done, where `mask` would."""
        kept = self._at(asked.attempt, server_round, SHARES)
        self._check_members(asked.members)
        if not set(asked.members) <= kept.adverts.keys():
            raise SecureSumRefused("the sum is to be over a site whose keys were not handed out.")
        if len(asked.members) < kept.threshold:
            raise SecureSumRefused(
                f"the sum is to be over {len(asked.members)} sites, and {kept.threshold} must stay of the"
                f" {len(kept.adverts)} of this attempt."
            )
        if sorted(asked.shares) != [name for name in asked.members if name != self.name]:
            raise SecureSumRefused("the shares that came are not one of each other site that the sum is over.")
        sure = fewest_noises(
            len(asked.members), num_keys=len(kept.adverts), threshold=kept.threshold, colluding=self._colluding
        )
        if asked.noises > max(0, sure):
            raise SecureSumRefused(
                f"the noise of {asked.noises} sites is to hide this one's people, and of the {len(asked.members)} sites"
                f" of this sum {max(0, sure)} are sure to be in it (privacy.colluding_sites)."
            )

    def mask(
        self,
        asked: WorkAsked,
        server_round: int,
        words: Words,
        about: Sequence[str],
        digest: bytes,
        *,
        lanes: int = 0,
    ) -> Words:
        """The site's words, masked: a new vector, [size] uint32.

        about: what is summed, such as "round 3" and "val" with a model's SHA-256; each over one list of sites only.
        digest: of all that this site was asked, the received model too; a site that was asked anything else has other
        masks, and the sum is noise.  lanes: how many of the first words are two lanes of 16 bits each.
        """
        self.require_turn(asked, server_round)
        kept, secrets = self._kept, Secrets.from_bytes(of_text(self._kept.secrets))
        adverts = {name: Advert.from_bytes(of_text(text)) for name, text in kept.adverts.items()}
        context = replace(self._context(), members=tuple(sorted(adverts)), threshold=kept.threshold)
        pairs = {
            name: unseal(of_text(sealed), secrets, adverts[name], self.name, context)
            for name, sealed in asked.shares.items()
        }
        kept.pairs = {name: _pair_in_text(pair) for name, pair in pairs.items()} | {self.name: kept.own_shares}
        kept.summed, kept.about, kept.step = list(asked.members), list(about), MASKED
        self._save()
        of_masks = replace(context, members=tuple(asked.members)).with_model(digest)
        return masked(words, secrets, self.name, adverts, of_masks, lanes=lanes)

    def unmask(self, asked: UnmaskAsked, server_round: int) -> dict[str, dict[str, str]]:
        """Of each site whose words arrived a share of its self secret, of each other one a share of its mask key."""
        kept = self._at(asked.attempt, server_round, MASKED, OPENED)
        here = list(asked.survivors)
        if here != sorted(set(here)) or not set(here) <= set(kept.summed) or self.name not in here:
            raise SecureSumRefused(
                "the list of whose words arrived is not in order, names a site that the sum is not over, or not this"
                " one."
            )
        self._check_members(here)
        if len(here) < kept.threshold:
            raise SecureSumRefused(
                f"the words of {len(here)} sites arrived, and {kept.threshold} must stay; nothing is shown of fewer."
            )
        if kept.step == OPENED and here != kept.shown:
            raise SecureSumRefused(
                "this attempt was opened for another list of sites; both lists would tell the difference, a site's own."
            )
        self._require_same_sites(kept.about, here)
        self._drop_secrets(here)
        kept.shown, kept.step = here, OPENED
        for about in kept.about:
            kept.before[about] = _digest_of(here)
        self._save()
        return {
            "self": {name: kept.pairs[name]["self"] for name in here},
            "mask": {name: kept.pairs[name]["mask"] for name in kept.summed if name not in here},
        }

    def forget(self) -> None:
        """The run is over: no secret of it stays."""
        self._kept = _Attempt(number=self._kept.number, before=self._kept.before)
        if self._path.exists():
            self._save()

    def _drop_secrets(self, here: Sequence[str]) -> None:
        """Keep, of each site, the one share that is shown where the words of these arrived; of this site nothing."""
        kept = self._kept
        shown = {name: "self" if name in here else "mask" for name in kept.summed}
        kept.pairs = {name: {kind: kept.pairs[name][kind]} for name, kind in shown.items()}
        kept.secrets, kept.own_shares = "", {}

    def _context(self) -> Context:
        return Context(run_id=self._run_id, server_round=self._kept.server_round, attempt=self._kept.number)

    def _check_members(self, names: Sequence[str]) -> None:
        """Raises SecureSumRefused or PolicyRefusal for a list that no sum may be over."""
        fewest = self._policy.min_secagg_sites
        if len(names) < fewest and fewest > FEWEST_MEMBERS:
            raise PolicyRefusal(Against("members", "min_secagg_sites", str(len(names)), str(fewest)))
        if not FEWEST_MEMBERS <= len(names) <= MOST_MEMBERS:
            raise SecureSumRefused(
                f"a sum over {len(names)} sites was asked for; it is over {FEWEST_MEMBERS} to {MOST_MEMBERS}, as each"
                " of two could take itself away."
            )
        if list(names) != sorted(set(names)) or self.name not in names:
            raise SecureSumRefused("the list of members is not in order of names, names one twice, or not this site.")

    def _at(self, attempt: int, server_round: int, *steps: str) -> _Attempt:
        """The newest attempt, where it is that one and at one of the steps.  Raises SecureSumRefused."""
        kept = self._kept
        if (attempt, server_round) != (kept.number, kept.server_round):
            raise SecureSumRefused(
                f"attempt {attempt} of round {server_round} is none that this site is in; its newest is {kept.number},"
                f" of round {kept.server_round}."
            )
        if kept.step not in steps:
            raise SecureSumRefused(
                f"attempt {attempt} of round {server_round} is at {kept.step!r} here, so it was answered already or"
                " something was left out; each step is answered once."
            )
        return kept

    def _require_same_sites(self, about: Sequence[str], here: Sequence[str]) -> None:
        """The same sum over two lists of sites would tell, by its difference, what the others added."""
        for one in about:
            if self._kept.before.get(one, _digest_of(here)) != _digest_of(here):
                raise SecureSumRefused(
                    f"{one.partition(' ')[0]} {one.split(' ')[1][:12]} was summed over other sites before; both sums"
                    " would tell the difference. It can be summed again over the same sites only."
                )

    def _load(self) -> _Attempt:
        if not self._path.exists():
            return _Attempt()
        try:
            values: dict[str, Any] = read_sealed_json(self._path)
            return _Attempt(**values)
        except (CheckpointError, TypeError) as error:
            # To begin anew would let a server have both lists, or an old attempt once more.
            raise SecureSumRefused(
                f"what this site may answer once is not known: its {FILE} of the run is damaged"
                f" ({type(error).__name__})."
            ) from None

    def _save(self) -> None:
        write_sealed_json(self._path, vars(self._kept))
        self._path.chmod(0o600)


def forget_others(state_dir: Path, run_id: str) -> None:
    """Delete the secrets of a site's other runs, which an attempt left that was never opened.

    Such a run can be gone on with: its next attempt has new ones.  What must not be answered twice stays known.
    """
    for path in (state_dir / "private").glob(f"*/{FILE}"):
        if path.parent.name == run_id:
            continue
        try:
            values: dict[str, Any] = read_sealed_json(path)
            left = _Attempt(**values)
        except (CheckpointError, TypeError):
            continue  # damaged, so it answers nothing more; it goes with its run's folder
        if left.secrets:
            write_sealed_json(path, vars(_Attempt(number=left.number, before=left.before)))
            path.chmod(0o600)


def keys_of(site: SiteSettings) -> Keys:
    """A site's lasting keys.  Raises SecureSumRefused where it has none, or files that are not keys."""
    if isinstance(site.keys, MadeKeys):
        made = site.keys
        return Keys(Identity(site.name, _private(made.own)), lambda name: _of_peers(made, name))
    folder = site.keys
    if folder is None:
        raise SecureSumRefused(
            "secure aggregation needs a key of each site, and this one has none; start it with --tls DIR, a SuperNode"
            ' of Flower with keys="DIR" in its --node-config.'
        )

    def peer(name: str) -> ec.EllipticCurvePublicKey:
        path = folder / PEERS / f"{name}.pub"
        if not path.exists():
            raise UnknownPeer(f"this site has no key of {name!r}; put its {name}.pub into {PEERS} of the keys.")
        return _usable(lambda: load_public(path))

    pins = site.state_dir / PEERS if site.policy.pin_secagg_peers else None
    return Keys(_usable(lambda: load_identity(folder, site.name)), peer, pins)


def _usable(load: Callable[[], T]) -> T:
    """What is loaded; of a file that is no key only this site's own output says which it is."""
    try:
        return load()
    except UserError as error:
        log.warning("%s%s", SHOWN, error)
        raise SecureSumRefused("a key of this site cannot be used; the client's own output says why.") from None


def _private(der: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_der_private_key(der, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("a key of a simulation is of another kind")
    return key


def _of_peers(made: MadeKeys, name: str) -> ec.EllipticCurvePublicKey:
    if name not in made.peers:
        raise UnknownPeer(f"no key was made for {name!r}, so it is no client of this simulation.")
    key = serialization.load_der_public_key(made.peers[name])
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise TypeError("a key of a simulation is of another kind")
    return key


def _digest_of(names: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()[:32]


def _pair_in_text(pair: SharePair) -> dict[str, str]:
    return {"self": in_text(pair.of_self_secret.to_bytes()), "mask": in_text(pair.of_mask_key.to_bytes())}
