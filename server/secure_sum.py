"""The server's side of secure aggregation: it hands keys and shares round, adds masked words, and opens the sum.

It needs no secret for that, and learns none but those of an attempt's masks that the sites show: of each site either
its self mask's secret or its mask key.  See `clients/secure_sum.py` and docs/adr/0031-secure-aggregation.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from common.errors import CheckpointError, NotEnoughClients, SecureSumRefused
from common.privacy.shared_noise import fewest_noises, grid_of_sum, sensitivity_of
from common.protocol.codec import Coded, is_lossy
from common.protocol.parameters import Part, buffer_sha256
from common.protocol.secure_vector import Layout, Sums, layout_of, num_shifts, peaks_of, shifts_after
from common.protocol.secure_words import (
    KEYS,
    SHARES,
    UNMASK,
    KeysAsked,
    SharesAsked,
    UnmaskAsked,
    WorkAsked,
    digest_of_work,
    in_text,
    of_text,
    read_answer,
    texts_by_name,
    write,
)
from common.protocol.wire import Task, words_of
from common.secagg.keys import (
    FEWEST_MEMBERS,
    MOST_MEMBERS,
    Advert,
    Context,
    is_mask_key_of,
    is_self_secret_of,
)
from common.secagg.masks import add_words, unmask
from common.secagg.shamir import Share, join
from common.secagg.sites import require_sites, threshold_of
from common.settings import Settings
from common.system.files import read_sealed_json, write_sealed_json
from server.exchange.roster import Member
from server.exchange.roster import Share as Counted

ROUNDING: Final = 1e-3  # more than the steps of a sum of real numbers add up to
PEAKS: Final = "secure-peaks"  # in a checkpoint, beside the strategy's moments
NO_CHANGE: Final = -1.0  # there, in the place of each peak, before the first change
ATTEMPTS_FILE: Final = "secure-sum.json"  # in the run's folder: no number is used twice, whoever is killed

Buffer = NDArray[np.float32]
Words = NDArray[np.uint32]
T = TypeVar("T")


class Ask(Protocol):
    """How sites are asked for something small."""

    def ask(self, kind: str, texts: Mapping[str, str]) -> Mapping[str, str]:
        """Send a text to each of some sites; returns the text that each answered, of those that did."""
        ...

    def refuse(self, name: str, reason: str) -> None:
        """A site's answer cannot be used."""
        ...


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a sum is of."""

    kind: str  # train or evaluate
    step: int  # the round
    splits: Sequence[str]
    change: Part | None  # of the flat model what moves, where it is trained
    received: Buffer  # the whole model as it is received


class SecureSums:
    """Of one run: begins an attempt, with the keys and the shares of its sites."""

    def __init__(self, settings: Settings, run_id: str, folder: Path) -> None:
        """folder: the run's, where the number of the last attempt is kept."""
        self._settings, self._run_id, self._path = settings, run_id, folder / ATTEMPTS_FILE
        self._peaks: Buffer | None = None  # of the last global change, [num_shifts]; None: there is none
        self._is_in_lanes = is_lossy(settings.federation.upload_codec)

    def learn(self, part: Part, mean: Buffer) -> None:
        """A round's mean change is known, [part.size]: the next one's goes in steps that follow from it."""
        if self._is_in_lanes:
            self._peaks = peaks_of(part, mean)

    def remembered(self, part: Part) -> dict[str, Buffer]:
        """What a checkpoint needs: of each block of a change how large the last one was; nothing with 32-bit words."""
        if not self._is_in_lanes:
            return {}
        return {PEAKS: np.full(num_shifts(part), NO_CHANGE, dtype=np.float32) if self._peaks is None else self._peaks}

    def restore(self, part: Part, moments: dict[str, Buffer]) -> None:
        """Go on from what a checkpoint kept; what is this one's own is taken out.  Raises CheckpointError."""
        peaks = moments.pop(PEAKS, None)
        wanted = self.remembered(part).get(PEAKS)
        if (None if peaks is None else peaks.shape) != (None if wanted is None else wanted.shape):
            raise CheckpointError("the checkpoint is of other words of secure aggregation; resume with its settings.")
        self._peaks = None if peaks is None or bool((peaks == NO_CHANGE).any()) else peaks

    def _shifts(self, asked: Asked) -> str:
        """Of the change's blocks; empty where it goes in words of 32 bits: always, or before there was a change."""
        if self._peaks is None or asked.change is None:
            return ""
        return shifts_after(asked.change, asked.change.taken(asked.received), self._peaks)

    def begin(self, asked: Asked, members: Mapping[str, Member], share: Counted | None, sites: Ask) -> "SecureAttempt":
        """Keys of all members, shares of all who sent keys; whoever did both is in the attempt.

        share: how much of one site is counted.  Raises NotEnoughClients; UserError for too many members.
        """
        names = sorted(members)
        if len(names) > MOST_MEMBERS:
            require_sites(len(names))
        number = self._next()
        context = Context(run_id=self._run_id, server_round=asked.step, attempt=number)
        answers = sites.ask(KEYS, dict.fromkeys(names, write(KeysAsked(attempt=number, members=tuple(names)))))
        adverts = _read_each(answers, lambda name, text: _advert(name, text, context), sites.refuse)
        if len(adverts) < FEWEST_MEMBERS:
            raise _too_few(asked, len(adverts), len(names), FEWEST_MEMBERS, "sent keys")
        threshold = threshold_of(self._settings.secagg.threshold, len(adverts))
        handed = {name: in_text(advert.to_bytes()) for name, advert in adverts.items()}
        shared = sites.ask(SHARES, dict.fromkeys(adverts, write(SharesAsked(attempt=number, adverts=handed))))
        others = {name: set(adverts) - {name} for name in adverts}
        shares = _read_each(shared, lambda name, text: _shares(text, others[name]), sites.refuse)
        if len(shares) < threshold:
            raise _too_few(asked, len(shares), len(adverts), threshold, "shared their secrets")
        return SecureAttempt(
            settings=self._settings,
            asked=asked,
            context=context,
            threshold=threshold,
            adverts=adverts,
            shares=shares,
            most=_most(members, share),
            noise=self._noise(asked, members, sorted(shares), threshold, num_keys=len(adverts), share=share),
            shifts=self._shifts(asked),
        )

    def _noise(
        self,
        asked: Asked,
        members: Mapping[str, Member],
        names: Sequence[str],
        threshold: int,
        *,
        num_keys: int,
        share: Counted | None,
    ) -> tuple[float, int]:
        """Of noise that is shared out: how far one person moves the sum, and how many noises are in it; else zeros."""
        privacy, (largest, _) = self._settings.privacy, _most(members, share)
        if asked.change is None or not privacy.is_shared:
            return 0.0, 0
        noises = fewest_noises(len(names), num_keys=num_keys, threshold=threshold, colluding=privacy.colluding_sites)
        if noises < 1:
            raise NotEnoughClients(
                f"round {asked.step}: of {len(names)} clients no noise is sure to be in the sum where"
                f" {privacy.colluding_sites} tell theirs (privacy.colluding_sites); more clients are needed."
            )
        sites = [members[name].site for name in names]
        each = [
            sensitivity_of(
                privacy,
                num_people=site.num_training_people,
                share=min(1.0, site.num_training_pictures / largest),
            )
            for site in sites
        ]
        return max(each), noises

    def _next(self) -> int:
        """A number that no attempt of this run has had."""
        last = 0
        if self._path.exists():
            try:
                last = int(read_sealed_json(self._path)["attempt"])
            except (KeyError, TypeError, ValueError):
                raise CheckpointError(f"{self._path} is damaged: the sites refuse an attempt twice.") from None
        write_sealed_json(self._path, {"attempt": last + 1})
        return last + 1


@dataclass(kw_only=True)
class SecureAttempt:
    """One attempt at a sum, as `server.aggregate.Aggregate`: texts go out, masked words are added, then it is opened.

    adverts: of all whose keys were handed out.  shares: of all in the sum, by sender and receiver.
    most, shifts: see `WorkAsked`.  noise: likewise, (sensitivity, noises).
    """

    settings: Settings
    asked: Asked
    context: Context  # of run, round and attempt alone
    threshold: int
    adverts: Mapping[str, Advert]
    shares: Mapping[str, Mapping[str, str]]
    most: tuple[int, int]
    noise: tuple[float, int] = (0.0, 0)
    shifts: str = ""
    sums: Sums = field(default_factory=lambda: Sums(evaluations={}, content={}))
    layout: Layout = field(init=False)
    _total: Words = field(init=False)
    _weights: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layout = layout_of(
            self.asked.change,
            self.asked.splits,
            num_members=len(self.shares),
            by=self.settings.verification.by,
            step=self._step(),
            shifts=self.shifts,
        )
        self._total = np.zeros(self.layout.size, dtype=np.uint32)

    def _step(self) -> float:
        """The grid of the sites' noise, where it is shared out."""
        sensitivity, noises = self.noise
        if not noises:
            return 0.0
        rounds = self.settings.federation.rounds
        return grid_of_sum(self.settings.privacy, rounds, sensitivity=sensitivity, noises=noises)

    @property
    def members(self) -> tuple[str, ...]:
        """Over whom the sum is, in order of names."""
        return tuple(sorted(self.shares))

    def work(self, name: str) -> WorkAsked:
        """What a site's task says."""
        own = {sender: self.shares[sender][name] for sender in self.members if sender != name}
        examples, pictures = self.most
        return WorkAsked(
            attempt=self.context.attempt,
            members=self.members,
            shares=own,
            most_examples=examples,
            most_pictures=pictures,
            sensitivity=self.noise[0],
            noises=self.noise[1],
            shifts=self.shifts,
        )

    def add(self, change: Coded, num_examples: int, name: str = "") -> None:
        """Add one site's words; the order makes no difference."""
        add_words(self._total, np.frombuffer(change.data, dtype="<u4"), self.layout.lanes)
        self._weights[name] = min(num_examples, self.most[0])

    def outliers(self) -> Mapping[str, str]:
        """None: nobody sees a site's change."""
        return {}

    def open(self, task: Task, sites: Ask) -> None:
        """Have the sites whose words arrived show what opens their sum.  task: that of the words, of any of them.

        Raises NotEnoughClients.
        """
        here = tuple(sorted(self._weights))
        if len(here) < self.threshold:
            raise _too_few(self.asked, len(here), len(self.members), self.threshold, "sent their masked words")
        text = write(UnmaskAsked(attempt=self.context.attempt, survivors=here))
        answers = sites.ask(UNMASK, dict.fromkeys(here, text))
        shown = _read_each(answers, lambda name, answer: self._shown(name, answer, here), sites.refuse)
        if len(shown) < self.threshold:
            raise _too_few(self.asked, len(shown), len(here), self.threshold, "showed what opens the sum")
        gone = [name for name in self.members if name not in here]
        try:
            secrets = {name: self._joined("self", name, shown) for name in here}
            keys = {name: self._joined("mask", name, shown) for name in gone}
            digest = digest_of_work(
                self.work(here[0]), words=words_of(task), model_sha256=buffer_sha256(self.asked.received)
            )
            context = self._shared_context(self.members).with_model(digest)
            unmask(self._total, secrets, keys, self.adverts, context, lanes=self.layout.lanes)
            self.sums = _possible(self.layout.sums(self._total))
        except (SecureSumRefused, ValueError) as error:
            raise NotEnoughClients(
                f"round {self.asked.step}: the sum over {', '.join(here)} cannot be opened ({error}); a site's words or"
                " shares are not what was asked for."
            ) from None

    def mean(self) -> Buffer:
        """The weighted mean change of the sites whose words arrived, [part.size] float32."""
        part = self.asked.change
        if part is None:
            raise ValueError("no change was asked for")
        shares = sum(self._weights.values()) / self.most[0]
        return self.layout.mean(self._total, part.taken(self.asked.received), shares)

    def close(self) -> None:
        """Nothing is kept."""

    def _shared_context(self, members: Sequence[str]) -> Context:
        context = self.context
        return Context(
            run_id=context.run_id,
            server_round=context.server_round,
            attempt=context.attempt,
            members=tuple(members),
            threshold=self.threshold,
        )

    def _shown(self, name: str, answer: str, here: Sequence[str]) -> dict[str, dict[str, Share]]:
        """A site's answer to unmask: by which secret, of whom, its share."""
        gone = [other for other in self.members if other not in here]
        values, place = read_answer(answer), self._shared_context(sorted(self.adverts)).place_of(name)
        found: dict[str, dict[str, Share]] = {}
        for kind, names in (("self", list(here)), ("mask", gone)):
            texts = texts_by_name(values.get(kind))
            if sorted(texts) != sorted(names):
                raise SecureSumRefused("it shows shares of other sites than it was asked for.")
            found[kind] = {one: Share.from_bytes(of_text(text)) for one, text in texts.items()}
            if any(share.x != place for share in found[kind].values()):
                raise SecureSumRefused("it shows shares of another site's place.")
        return found

    def _joined(self, kind: str, name: str, shown: Mapping[str, Mapping[str, Mapping[str, Share]]]) -> bytes:
        """A secret of the site `name`, put together; where one site's share is wrong, without that site's."""
        fits = {"self": is_self_secret_of, "mask": is_mask_key_of}[kind]
        for without in ("", *shown):
            shares = [own[kind][name] for who, own in shown.items() if who != without]
            try:
                secret = join(shares, self.threshold)
            except SecureSumRefused:
                continue
            if fits(self.adverts[name], secret):
                return secret
        raise SecureSumRefused(f"the shares of a secret of {name} do not belong together.")


def _possible(sums: Sums) -> Sums:
    """The sums, without what rounding adds to them.  Raises SecureSumRefused for what no pictures give.

    Nobody can say whose they are: a site that sends words of its own making spoils the sum, and is not found.
    """
    bounded = {}
    for split, found in sums.evaluations.items():
        closed = found.closed
        bounds = {"correct": closed.num_examples, "loss_sum": np.inf, "num_examples": np.inf, "num_classes": np.inf}
        bounds |= dict.fromkeys(("precision_sum", "recall_sum", "f1_sum"), closed.num_classes)
        for name, bound in bounds.items():
            if not -ROUNDING <= getattr(closed, name) <= bound + ROUNDING:
                raise SecureSumRefused(f"{split}-{name} of all is {getattr(closed, name)}, which no pictures give")
        if (closed.num_examples and not closed.num_classes) or bool((found.twins > found.pairs).any()):
            raise SecureSumRefused(f"the {split} sums of all are none that pictures give")
        names = ("loss_sum", "precision_sum", "recall_sum", "f1_sum")
        within: dict[str, Any] = {name: float(np.clip(getattr(closed, name), 0.0, bounds[name])) for name in names}
        bounded[split] = replace(found, closed=replace(closed, **within))
    if not all(-ROUNDING <= value < np.inf for value in sums.content.values()):
        raise SecureSumRefused("the training sums of all are none that pictures give")
    content = {name: max(0.0, value) for name, value in sums.content.items()}
    return replace(sums, evaluations=bounded, content=content)


def _most(members: Mapping[str, Member], share: Counted | None) -> tuple[int, int]:
    """Training pictures that a site counts for at most, and pictures whose scores it does (0: all)."""
    largest = max(member.site.num_training_pictures for member in members.values())
    return (largest, 0) if share is None else (min(largest, share.num_examples), share.num_pictures)


def _too_few(asked: Asked, number: int, of: int, needed: int, what: str) -> NotEnoughClients:
    return NotEnoughClients(
        f"round {asked.step}: {number} of {of} clients {what}, {needed} are needed (secagg.threshold)."
    )


def _read_each(
    answers: Mapping[str, str], read: Callable[[str, str], T], refuse: Callable[[str, str], object]
) -> dict[str, T]:
    """What each answer says, of those that are well-formed, in order of names; `refuse` is told of the others."""
    found = {}
    for name, text in sorted(answers.items()):
        try:
            found[name] = read(name, text)
        except SecureSumRefused as error:
            refuse(name, str(error))
    return found


def _advert(name: str, text: str, context: Context) -> Advert:
    advert = Advert.from_bytes(of_text(str(read_answer(text).get("advert"))))
    if advert.name != name or advert.attempt_digest != context.attempt_digest():
        raise SecureSumRefused("the keys are another site's, or of another attempt.")
    return advert


def _shares(text: str, receivers: set[str]) -> dict[str, str]:
    texts = texts_by_name(read_answer(text))
    if texts.keys() != receivers:
        raise SecureSumRefused("the shares are not one for each other site.")
    return texts
