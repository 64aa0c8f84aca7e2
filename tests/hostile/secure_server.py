"""A server that plays secure aggregation with sites' own protocol objects, and adds up whatever it was shown.

It follows the protocol where a test does not have it do otherwise, and works out of all shares and words that it ever
got what a site's words were: `opened`.  The sites are `clients.secure_sum.SecureSum`; their words are made up.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from clients.policy import OWN_MACHINE, Policy
from clients.secure_sum import Keys, SecureSum, UnknownPeer
from common.errors import SecureSumRefused
from common.protocol.secure_words import KeysAsked, SharesAsked, UnmaskAsked, WorkAsked, in_text, of_text
from common.secagg.keys import Advert, Context, Identity, is_mask_key_of, is_self_secret_of
from common.secagg.masks import add_masks, pair_mask, self_seed
from common.secagg.shamir import Share, join
from common.secagg.shares import seal, split_secrets
from common.secagg.sites import threshold_of

RUN = "run"
NAMES = ("ada", "ben", "cyd", "dan", "eve")
SIZE = 20_000
MODEL = hashlib.sha256(b"the round's model").digest()


def words_of_site(name):
    """A change of a few steps: [SIZE] uint32, another for each site."""
    random = np.random.default_rng(list(name.encode()))
    return random.integers(-9, 10, SIZE).astype(np.int32).view(np.uint32)


def chi_square(vector):
    """Of the vector's bytes against uniform ones: mean 255, deviation 22.6."""
    counts = np.bincount(vector.view(np.uint8), minlength=256)
    expected = 4 * len(vector) / 256
    return float(((counts - expected) ** 2 / expected).sum())


class Sites:
    """Sites that know each other's lasting keys."""

    def __init__(
        self,
        folder: Path,
        names: Iterable[str] = NAMES,
        *,
        threshold: float = 0.667,
        policy: Policy = OWN_MACHINE,
        trusted: Mapping[str, Identity] | None = None,
        strangers: Iterable[str] = (),
        pins: Path | None = None,
    ) -> None:
        """trusted: keys that the sites have of others, too.  strangers: sites that the others have no key of.

        pins: where a stranger's key is kept as it first comes.
        """
        self.identities = {name: Identity.in_memory(name) for name in names}
        self.threshold = threshold
        known = {**self.identities, **(trusted or {})}
        self.known = {name: one for name, one in known.items() if name not in strangers}
        self.made = lambda name: SecureSum(
            folder / name,
            RUN,
            Keys(self.identities[name], self._peer, pins),
            threshold=threshold,
            policy=policy,
        )
        for name in names:
            (folder / name).mkdir()
        self.by_name = {name: self.made(name) for name in names}

    def _peer(self, name):
        if name not in self.known:
            raise UnknownPeer(f"this site has no key of {name!r}")
        return self.known[name].public_key

    def secrets(self, name):
        """What a site keeps of its newest attempt: for tests in which it does not forget."""
        return of_text(self.by_name[name]._kept.secrets)

    def restart(self):
        """kill -9 of each site's program, and a new one."""
        self.by_name = {name: self.made(name) for name in self.by_name}


class Server:
    """What a server does and learns.  Each method is refused where a site refuses, with the site's line."""

    def __init__(self, sites: Sites) -> None:
        self.sites = sites
        self.adverts: dict[int, dict[str, Advert]] = {}  # by attempt
        self.sealed: dict[int, dict[str, dict[str, str]]] = {}  # by attempt, sender, receiver
        self.words: dict[int, dict[str, np.ndarray]] = {}
        self.contexts: dict[int, Context] = {}
        self.shown: dict[tuple[int, str, str], dict[int, Share]] = {}  # by attempt, kind, owner; then place

    def exchange(self, attempt, server_round=1, names=None):
        """Keys and shares of all."""
        self.ask_keys(attempt, names or sorted(self.sites.by_name), server_round)
        for name in self.contexts[attempt].members:
            self.ask_shares(name, attempt, self.adverts[attempt])

    def ask_keys(self, attempt, members, server_round=1):
        """Of the members that are sites; whoever is none answers nothing."""
        asked = KeysAsked(attempt=attempt, members=tuple(members))
        asked_of = [name for name in members if name in self.sites.by_name]
        texts = {name: self.sites.by_name[name].keys(asked, server_round) for name in asked_of}
        self.adverts[attempt] = {name: Advert.from_bytes(of_text(text)) for name, text in texts.items()}
        self.contexts[attempt] = Context(run_id=RUN, server_round=server_round, attempt=attempt, members=tuple(members))

    def ask_shares(self, name, attempt, adverts):
        asked = SharesAsked(attempt=attempt, adverts={one: in_text(ad.to_bytes()) for one, ad in adverts.items()})
        sealed = self.sites.by_name[name].shares(asked, self.contexts[attempt].server_round)
        self.sealed.setdefault(attempt, {})[name] = sealed

    def work(self, name, attempt, words=None, shares=None, digest=MODEL, about=None):
        """Have a site mask its words."""
        members = self.contexts[attempt].members
        shares = shares or {one: self.sealed[attempt][one][name] for one in members if one != name}
        asked = WorkAsked(attempt=attempt, members=members, shares=shares, most_examples=1, most_pictures=0)
        number = self.contexts[attempt].server_round
        words = words_of_site(name) if words is None else words
        masked = self.sites.by_name[name].mask(asked, number, words, about or [f"round {number}"], digest)
        self.words.setdefault(attempt, {})[name] = masked

    def work_all(self, attempt, **others):
        for name in self.contexts[attempt].members:
            self.work(name, attempt, **others)

    def unmask(self, name, attempt, survivors):
        """Have a site show what opens the sum of these."""
        asked = UnmaskAsked(attempt=attempt, survivors=tuple(survivors))
        shown = self.sites.by_name[name].unmask(asked, self.contexts[attempt].server_round)
        for kind, by_owner in shown.items():
            for owner, text in by_owner.items():
                share = Share.from_bytes(of_text(text))
                self.shown.setdefault((attempt, kind, owner), {})[share.x] = share

    def secret(self, attempt, kind, owner):
        """A secret of a site, of all the shares that were shown; None: they are too few, or of something else."""
        fits = {"self": is_self_secret_of, "mask": is_mask_key_of}[kind]
        shares = list(self.shown.get((attempt, kind, owner), {}).values())
        try:
            secret = join(shares, self.threshold(attempt))
        except SecureSumRefused:
            return None
        return secret if fits(self.adverts[attempt][owner], secret) else None

    def shares_context(self, attempt):
        """What shares are sealed for."""
        return replace(self.contexts[attempt], threshold=self.threshold(attempt))

    def sealed_bytes(self, attempt, sender, receiver):
        return of_text(self.sealed[attempt][sender][receiver])

    def sealed_by(self, attempt, kept, receiver):
        """Shares that the server makes itself, of members whose secrets it has."""
        context = self.shares_context(attempt)
        return {
            name: in_text(
                seal(split_secrets(own, context)[receiver], own, name, self.adverts[attempt][receiver], context)
            )
            for name, own in kept.items()
        }

    def threshold(self, attempt):
        return threshold_of(self.sites.threshold, len(self.contexts[attempt].members))

    def opened(self, attempt, owner, vector=None):
        """A site's masked words with each mask taken out whose seed the server can work out: [SIZE] uint32."""
        context = self.shares_context(attempt).with_model(MODEL)
        masks = []
        if secret := self.secret(attempt, "self", owner):
            masks.append((self_seed(secret, owner, context), -1))
        own_key = self.secret(attempt, "mask", owner)
        for peer in context.members:
            if peer == owner:
                continue
            if own_key:
                seed, sign = pair_mask(own_key, owner, self.adverts[attempt][peer], context)
                masks.append((seed, -sign))
            elif peer_key := self.secret(attempt, "mask", peer):
                masks.append(pair_mask(peer_key, peer, self.adverts[attempt][owner], context))
        result = (self.words[attempt][owner] if vector is None else vector).copy()
        add_masks(result, masks)
        return result
