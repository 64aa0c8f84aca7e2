"""A whole round of secure aggregation on the pure parts, in memory: five members, any of whom may be lost."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from common.secagg.keys import Advert, Context, Identity, Secrets, advertise, check_advert
from common.secagg.masks import Words, add_words, masked, unmask
from common.secagg.shamir import join
from common.secagg.shares import SharePair, seal, split_secrets, unseal

NAMES = ("ada", "ben", "cyd", "dan", "eve")
IDENTITIES = {name: Identity.in_memory(name) for name in NAMES}
MODEL = bytes(range(32))


@dataclass
class Round:
    """Keys and shares of an attempt were exchanged; `context` has no model yet."""

    context: Context
    adverts: dict[str, Advert] = field(default_factory=dict)
    kept: dict[str, Secrets] = field(default_factory=dict)
    held: dict[str, dict[str, SharePair]] = field(default_factory=dict)  # by holder, then owner

    def masked(self, name: str, vector: Words, model: bytes = MODEL, *, lanes: int = 0) -> Words:
        return masked(vector, self.kept[name], name, self.adverts, self.context.with_model(model), lanes=lanes)

    def self_secret(self, owner: str, holders: Iterable[str]) -> bytes:
        return join([self.held[one][owner].of_self_secret for one in holders], self.context.threshold)

    def mask_key(self, owner: str, holders: Iterable[str]) -> bytes:
        return join([self.held[one][owner].of_mask_key for one in holders], self.context.threshold)

    def unmasked(self, sent: Mapping[str, Words], *, lanes: int = 0) -> Words:
        total = np.zeros_like(next(iter(sent.values())))
        for vector in sent.values():
            add_words(total, vector, lanes)
        lost = [name for name in self.context.members if name not in sent]
        self_secrets = {name: self.self_secret(name, sent) for name in sent}
        mask_keys = {name: self.mask_key(name, sent) for name in lost}
        unmask(total, self_secrets, mask_keys, self.adverts, self.context.with_model(MODEL), lanes=lanes)
        return total


def exchanged(names: tuple[str, ...] = NAMES, threshold: int = 4, **context: object) -> Round:
    """Keys and shares of all, through bytes as they travel."""
    for name in names:
        IDENTITIES.setdefault(name, Identity.in_memory(name))
    given = {"run_id": "run", "server_round": 3, "attempt": 0, **context}
    round_ = Round(Context(**given, members=names, threshold=threshold))
    for name in names:
        advert, round_.kept[name] = advertise(IDENTITIES[name], Context(**given))
        round_.adverts[name] = Advert.from_bytes(advert.to_bytes())
        check_advert(round_.adverts[name], IDENTITIES[name].public_key, round_.context)
    for owner in names:
        for holder, pair in split_secrets(round_.kept[owner], round_.context).items():
            if holder != owner:
                sealed = seal(pair, round_.kept[owner], owner, round_.adverts[holder], round_.context)
                pair = unseal(sealed, round_.kept[holder], round_.adverts[owner], holder, round_.context)
            round_.held.setdefault(holder, {})[owner] = pair
    return round_
