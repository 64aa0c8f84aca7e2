"""The loop: gather, send one message to each client, add the replies in order, keep the best, evaluate at the end."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common import config
from common.errors import CheckpointError, NotEnoughClients
from common.metrics.figures import AUC
from common.metrics.group_names import GROUPS, attributes_of, group_names
from common.metrics.groups import GROUP_ROW, GroupPairs
from common.metrics.names import BYTES_DOWN, BYTES_UP, of_split
from common.protocol import wire
from common.protocol.change_bound import ChangeBound
from common.protocol.codec import MASKED, num_bytes
from common.protocol.parameters import Manifest, Part, buffer_sha256
from common.protocol.refusals import is_spent
from common.protocol.secure_words import write
from common.protocol.wire import Reply, Task
from common.settings import Settings
from common.strategies import check_number, fewest_clients
from common.training.autotune import threads_for
from server.aggregate import Aggregate, aggregate_for
from server.exchange.clock import RoundClock
from server.exchange.guard import blames_the_model
from server.exchange.mailbox import Mailbox, Waiter
from server.exchange.messages import Download, Exchange
from server.exchange.patience import beat_s
from server.exchange.roster import (
    Member,
    Roster,
    Share,
    is_sampled,
    replies_needed,
    sample,
    share_of_each,
    waves,
)
from server.global_model import Buffer, GlobalModel, Sent, ServerOptimiser
from server.public_set import PublicScorer
from server.record.checkpoint import RunCheckpoints
from server.record.history import History, Tally, longest_first, named_norms, progress_of, standing_out
from server.record.tell import Record
from server.secure_sum import Asked, SecureAttempt, SecureSums
from server.site_privacy import BudgetSpent, SitePrivacy

SMALL_S: Final = 1.0  # what a site takes for keys, shares or to unmask; see server/exchange/patience.py


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a federation ended."""

    history: History
    last_round: int  # smaller than federation.rounds when training stopped early
    sha256: str  # of the last global model


@dataclass(kw_only=True)
class Federation:
    """One run's federation: hides how a round is asked for, tried again, made one model, scored and saved meanwhile.

    The fields are what it needs and its state as it goes; `run` is all that is asked of it.
    """

    settings: Settings
    run_id: str
    manifest: Manifest
    model: GlobalModel
    optimiser: ServerOptimiser
    mailbox: Mailbox
    roster: Roster
    waiter: Waiter
    checkpoints: RunCheckpoints
    record: Record
    public: PublicScorer | None = None
    part: Part | None = None  # of the model, that training moves; None: all
    site_privacy: SitePrivacy | None = None  # of privacy.unit = "site"
    secure: SecureSums | None = None  # of secagg.enabled
    history: History = field(default_factory=History)
    clock: RoundClock = field(default_factory=RoundClock)  # of the round in progress
    sha256: str = ""  # of the model that was saved last
    first_round: int = 1  # larger for a run that goes on
    farewell: bool = True  # whether the best model is handed out when nothing of it is to be scored
    bound: ChangeBound = field(init=False)
    _part: Part = field(init=False)
    _left_out: dict[int, dict[str, str]] = field(default_factory=dict)  # round -> client -> why it is not asked again
    _gone_back: Counter[int] = field(default_factory=Counter)  # round -> how often its model was of no use
    _blamed: Counter[str] = field(default_factory=Counter)  # client -> how often that was its doing
    moves: Callable[[], bool] = lambda: False  # see `Exchange`
    _keeps: dict[str, str] = field(default_factory=dict)  # see `Exchange`
    _pace: dict[tuple[str, str, bool], float] = field(default_factory=dict)  # (client, kind, last) -> s a picture

    def __post_init__(self) -> None:
        self._part = self.part or Part(whole=self.manifest, part=self.manifest, spans=self.optimiser.spans)
        first = self._part.taken(self.model.received)
        self.bound = ChangeBound(self._part.spans, first, self.settings.federation.max_change_factor)

    def run(self) -> Outcome:
        """All rounds and the final evaluation; that alone of the first model with `federation.evaluate_only`.

        Raises NotEnoughClients, InterruptedRun; the checkpoint of the last whole round is on disk then.
        """
        last_round, is_over = self.first_round - 1, False
        if last_round == 0:
            self._save(0)
        if self.settings.federation.evaluate_only:
            self._count_groups(0, self.model.coded)
            self._evaluate(0, "val test", self.roster.gather(), self.model.coded, last=True)
            self.checkpoints.write_state(0, self.sha256, self.history, self.record.counts())
            return Outcome(history=self.history, last_round=0, sha256=self.sha256)
        try:
            while not is_over:
                try:
                    last_round = self._train(last_round)
                    self._evaluate_at_end(last_round)
                    is_over = True
                except _WentBack as back:
                    last_round = back.step
        finally:
            self.waiter.do_work()
        # With the scores that came last.
        self.checkpoints.write_state(last_round, self.sha256, self.history, self.record.counts())
        return Outcome(history=self.history, last_round=last_round, sha256=self.sha256)

    def _train(self, last_round: int) -> int:
        """The rounds after that one; returns the number of the last, which is earlier where privacy is spent.

        Raises _WentBack.
        """
        rounds = self.settings.federation.rounds
        while last_round < rounds and not self._is_out_of_patience():
            try:
                self._round(last_round + 1)
            except BudgetSpent:
                self.record.out_of_privacy(last_round)
                return last_round
            last_round += 1
        if last_round < rounds:
            self.record.stopped_early(last_round, self.history)
        return last_round

    def _save(self, step: int) -> None:
        moments = {**self.optimiser.moments, **self.model.remembered(), **self._secure_memory()}
        counts = self.record.counts()
        self.sha256 = self.checkpoints.save(step, self.model.received, moments, self.history, counts)

    def _secure_memory(self) -> dict[str, Buffer]:
        return {} if self.secure is None else self.secure.remembered(self._part)

    def _is_out_of_patience(self) -> bool:
        """A model's score arrives a round later, so the model of the last round is not among those counted."""
        return self.settings.training.is_out_of_patience(self.history.validations_since_best())

    def _round(self, server_round: int) -> None:
        """One round.  Its model is saved and its figures are told while the next messages are answered.

        It is tried again while too few replies can be used, as whoever is missing may come back.
        Raises BudgetSpent where one was trained before: more of it would break what the clients' people were promised.
        """
        self.clock = clock = RoundClock()
        attempts = self._attempts()
        made: _Made | None = None
        bytes_down = 0
        while made is None:
            attempts -= 1
            made, sent = self._attempt(server_round, is_last=attempts == 0)
            bytes_down += sum(sent.values())
        self.waiter.leave_work(partial(self._round_is_whole, server_round, made, bytes_down, clock))

    def _attempts(self) -> int:
        return self.settings.federation.round_attempts if self.roster.others_may_come() else 1

    def _attempt(self, server_round: int, *, is_last: bool) -> tuple["_Made | None", dict[str, int]]:
        """Have a round's model trained, and make the step.

        Returns what the clients did, and the bytes that went to each.  None: too few replies can be used, and nothing
        has changed; raises NotEnoughClients when it is the last attempt.
        """
        members = self.roster.gather()
        self.clock.lap("wait")
        self.record.members(members)
        left_out = self._left_out.get(server_round, {})
        members = {name: member for name, member in members.items() if name not in left_out}
        members = sample(members, self.settings.federation, seed=self.settings.run.seed, server_round=server_round)
        self.clock.lap("log")
        splits = self._splits_to_score(server_round - 1)
        if server_round == self.first_round:
            check_number(self.settings.federation, len(members))
        if self.site_privacy is not None:
            self.site_privacy.require_room(len(self.roster.members()))
        sites = _Sites(self, server_round, members)
        asked = Asked(
            kind="train", step=server_round, splits=splits.split(), change=self._part, received=self.model.received
        )
        try:
            secure = self._secure_sum(asked, members, sites)
        except NotEnoughClients as few:
            self._repeat(few, is_last=is_last)
            return None, {}
        tasks = _with_work(self._tasks("train", server_round, members, splits), secure)
        with closing(secure or self._aggregate()) as change:
            self.bound.receive(self._part.taken(self.model.received))
            replies, exchange = self._exchange(tasks, members, self.model.coded, change)
            self._go_back_from(server_round - 1, exchange.reasons, num_asked=len(tasks))
            for name, reason in change.outliers().items():
                del replies[name]
                self.record.refused(server_round, name, reason)
            self.roster.judge(asked=members, answered=replies)
            try:
                self._require_enough(replies, members, server_round, kept=server_round - 1)
                self._open(secure, tasks, sites, kept=server_round - 1)
            except NotEnoughClients as few:
                if server_round > 1 and any(map(is_spent, exchange.reasons.values())):
                    raise BudgetSpent from None  # nobody's comes back
                self._repeat(few, is_last=is_last)
                return None, exchange.bytes_down
            self.record.scored(self.history, server_round - 1, _tallies(splits, replies, secure))
            self.clock.lap("evaluate")
            if self.site_privacy is not None:
                self.site_privacy.spend(server_round)
            self._step(change)
            self.clock.lap("aggregate")
        sent = exchange.bytes_down
        clients = {
            name: {BYTES_DOWN: float(sent[name])} | self._costs(name, reply, secure) for name, reply in replies.items()
        }
        for name, norms in exchange.norms.items():
            if name in clients:
                clients[name] |= named_norms(*norms)
        content = secure.sums.content if secure and not self.settings.privacy.is_on else {}
        return _Made(replies=replies, clients=clients, content=content), sent

    def _step(self, change: Aggregate) -> None:
        """Make the next global model of the clients' changes."""
        mean = change.mean()
        if self.secure is not None:
            self.secure.learn(self._part, mean)
        self.model.step(self.optimiser, self._part.spread(mean))

    def _repeat(self, few: NotEnoughClients, *, is_last: bool) -> None:
        """Tell that the round is tried again, for want of replies; raises `few` when it was the last attempt."""
        if is_last:
            raise few
        self.record.repeated(str(few))

    def _secure_sum(self, asked: Asked, members: Mapping[str, Member], sites: "_Sites") -> SecureAttempt | None:
        """A sum of which nobody sees a summand; None where the replies are seen.  Raises NotEnoughClients."""
        if self.secure is None:
            return None
        try:
            return self.secure.begin(asked, members, self._share(members), sites)
        except NotEnoughClients as few:
            raise self._told(few, asked.step, kept=asked.step - (asked.kind == "train")) from None

    def _open(self, secure: SecureAttempt | None, tasks: Mapping[str, Task], sites: "_Sites", *, kept: int) -> None:
        """Open a sum, where it is masked, which has a replies' worth of words by now.  Raises NotEnoughClients."""
        if secure is None:
            return
        try:
            secure.open(next(iter(tasks.values())), sites)
        except NotEnoughClients as few:
            raise self._told(few, secure.asked.step, kept=kept) from None
        if secure.sums.saturated:
            self.record.saturated(secure.asked.step, secure.sums.saturated)

    def _told(self, few: NotEnoughClients, step: int, *, kept: int) -> NotEnoughClients:
        """The same line with the clients' reasons, and what is kept."""
        words = "; ".join(f"{name}: {reason.rstrip('.')}" for name, reason in self.record.reasons(step).items())
        return NotEnoughClients(
            f"{str(few).rstrip('.')}{f' ({words})' if words else ''}. The model of round {kept} is kept in"
            f" {self.checkpoints.path(kept)}."
        )

    def _share(self, members: Mapping[str, Member]) -> Share | None:
        return share_of_each({**self.roster.members(), **members}, self.settings.federation)

    def _aggregate(self) -> Aggregate:
        if self.site_privacy is not None:
            return self.site_privacy.empty_sum(self._part.part.size, self._part.spans)
        return aggregate_for(self.settings.federation, self._part.part.size, self.checkpoints.replies_folder)

    def _round_is_whole(
        self,
        server_round: int,
        made: "_Made",
        bytes_down: int,
        clock: RoundClock,
    ) -> None:
        """Tell and save; the seconds of it are the next round's.  clock: the round's own, which has stopped."""
        seconds = clock.metrics()
        self.clock.lap("wait")
        sizes = {
            BYTES_DOWN: float(bytes_down),
            BYTES_UP: sum(costs[BYTES_UP] for costs in made.clients.values()),
        }
        self.record.trained(
            self.history, server_round, made.replies, sizes=sizes, clients=made.clients, content=made.content
        )
        self.record.timed(self.history, server_round, seconds)
        self.clock.lap("log")
        self._save(server_round)  # with all that was told: whoever goes on from it tells what got lost
        self.clock.lap("checkpoint")

    def _splits_to_score(self, step: int) -> str:
        return "val test" if step % self.settings.federation.test_every_rounds == 0 else "val"

    def _tasks(self, kind: str, step: int, members: Mapping[str, Member], splits: str) -> dict[str, Task]:
        task = Task(
            kind=kind,
            run_id=self.run_id,
            server_round=step,
            settings=config.to_json(self.settings),
            manifest=self.manifest.digest,
            splits=splits,
            best_round=self.history.best_round,
            beat_s=beat_s(self.settings.federation),
            **progress_of(self.history, step, self.settings.federation.rounds),
        )
        return _tasks_for(members, task, self.settings)

    def _exchange(
        self, tasks: Mapping[str, Task], members: Mapping[str, Member], model: Download, change: Aggregate | None
    ) -> tuple[dict[str, Reply], Exchange]:
        """Send every task and take the replies; with `change`, as those of training, which are added to it."""
        exchange = self._new_exchange(members, change)
        exchange.send(tasks, members, model)
        self.record.asked(tasks, members)
        self.waiter.do_work()
        self._score_public(next(iter(tasks.values()), None), model)
        self.clock.lap("evaluate")
        replies = exchange.replies(change)
        for name in replies:
            task, pictures = tasks[name], max(1, members[name].site.num_pictures)
            self._pace[name, task.kind, task.last] = self.clock.answer_seconds(name) / pictures
        return replies, exchange

    def _new_exchange(self, members: Mapping[str, Member], change: Aggregate | None) -> Exchange:
        return Exchange(
            federation=self.settings.federation,
            manifest=self.manifest,
            mailbox=self.mailbox,
            waiter=self.waiter,
            clock=self.clock,
            refused=self.record.refused,
            bound=self.bound,
            changes=self._part.part,
            share=self._share(members),
            limited=self.record.limited,
            max_pairs=self.settings.verification.max_pairs,
            num_groups=len(self._groups),
            is_private=self.settings.privacy.is_on,
            masked_size=change.layout.size if isinstance(change, SecureAttempt) else None,
            answered=self.record.answered,
            usual=lambda name, task: self._usual_seconds(name, task, members[name]),
            heard=self.record.heard,
            moves=self.moves,
            keeps=self._keeps,
        )

    def ask_small(self, tasks: Mapping[str, Task], members: Mapping[str, Member]) -> dict[str, str]:
        """Send small tasks of secure aggregation, and take what each client answers."""
        exchange = dataclasses.replace(self._new_exchange(members, None), usual=lambda _name, _task: SMALL_S)
        exchange.send(tasks, members, None)
        return exchange.words()

    def small_tasks(self, kind: str, step: int, members: Mapping[str, Member]) -> dict[str, Task]:
        """One for each member; what each of them says is still to be written into it."""
        return self._tasks(kind, step, members, "")

    def _usual_seconds(self, name: str, task: Task, member: Member) -> float | None:
        """What a client takes for the like of a task, by its last answer and the pictures it announced."""
        pace = self._pace.get((name, task.kind, task.last))
        return None if pace is None else pace * member.site.num_pictures

    def _score_public(self, task: Task | None, model: Download) -> None:
        """Score the model that was just sent on the public pairs, while the clients work on it."""
        if self.public is None or task is None or "test" not in task.splits.split():
            return
        step = task.server_round - 1 if task.kind == "train" else task.server_round
        if of_split("public", AUC) in self.history.at(step).metrics:  # the round is tried again
            return
        self.record.public_scored(self.history, step, self.public.scores(model().received(), self.waiter.check))

    def _require_enough(self, replies: Collection[str], members: Collection[str], step: int, *, kept: int) -> None:
        """kept: the newest round whose model is on disk; `step` itself when that model was only evaluated."""
        federation = self.settings.federation
        wanted = max(replies_needed(federation), fewest_clients(federation) if kept < step else 0)
        if len(replies) < wanted:
            reasons = {**self._left_out.get(step, {}), **self.record.reasons(step)}
            words = "; ".join(f"{name}: {reason.rstrip('.')}" for name, reason in reasons.items())
            raise NotEnoughClients(
                f"{'round' if kept < step else 'evaluation of round'} {step}: {len(replies)} of {len(members)} clients"
                f" gave a usable reply, {wanted} are needed ({words})."
                f" The model of round {kept} is kept in {self.checkpoints.path(kept)}."
            )

    def _go_back_from(self, step: int, reasons: Mapping[str, str], *, num_asked: int) -> None:
        """Raise _WentBack where most clients can make nothing of the model of round `step`, for it is to blame then.

        The run is where the round before left it, and whose change stood out in round `step` is not asked for it again.
        Nothing happens where nobody's stood out, where there is no round before, or after `round_attempts`.
        reasons: of those that gave no usable reply, of the `num_asked`.
        """
        failed = [name for name, reason in reasons.items() if blames_the_model(reason)]
        if 2 * len(failed) <= num_asked or step < max(self.history.rounds, default=0) or step < 1:
            return
        clients = self.history.at(step).clients
        odd = standing_out(clients)
        if odd is None or self._gone_back[step] + 1 >= self.settings.federation.round_attempts:
            return
        try:
            counts = self.checkpoints.counts(step - 1)
            self.take_model(step - 1)
        except CheckpointError:
            return
        self._gone_back[step] += 1
        norms = "; ".join(f"{name} {' and '.join(told)}" for name, told in longest_first(clients).items())
        line = (
            f"round {step}'s model gave no numbers at {len(failed)} of {num_asked} clients ({failed[0]}:"
            f" {reasons[failed[0]]}). Norms of the changes that made it: {norms}. Back to round {step - 1};"
            f" round {step} is repeated without {odd}."
        )
        self._left_out.setdefault(step, {})[odd] = f"left out of the repeated round {step}, as its change stood out"
        self.history.forget_after(step - 1)
        self.record.went_back(step, line, counts)
        self.checkpoints.write_state(step - 1, self.sha256, self.history, self.record.counts())
        self._blame(odd)
        raise _WentBack(step - 1)

    def _blame(self, name: str) -> None:
        """Count against a client that a model was of no use because of it."""
        limit = self.settings.federation.refusals_in_a_row
        self._blamed[name] += 1
        if isinstance(limit, int) and self._blamed[name] >= limit:
            self.roster.set_aside(
                name, f"{name} made the model useless {limit} times and is set aside; start it again to let it in"
            )

    def take_model(self, step: int) -> None:
        """The model and the moments after that round, which must belong together.  Raises CheckpointError."""
        received = self.checkpoints.load(step)
        sha256 = buffer_sha256(received)
        sizes = {name: len(buffer) for name, buffer in self._secure_memory().items()}
        keeps = bool(self.optimiser.moments) or bool(self.model.remembered()) or bool(sizes)
        kept = self.checkpoints.load_moments(step, sha256, sizes) if keeps else {}
        if self.secure is not None:
            self.secure.restore(self._part, kept)
        model = GlobalModel.restored(received, kept, self.settings.federation.download_codec, self.part)
        self.optimiser.restore(kept)
        self.model, self.sha256 = model, sha256

    def _costs(self, client: str, reply: Reply, secure: SecureAttempt | None) -> dict[str, float]:
        """Bytes and seconds of one client's answer to a training task."""
        if secure is None:
            codec = self.settings.federation.upload_codec
            up = num_bytes(codec, self._part.part.size) + wire.counts_nbytes(reply)
        else:
            up = num_bytes(MASKED, secure.layout.size)
        return {
            BYTES_UP: float(up),
            "answer_seconds": self.clock.answer_seconds(client),
        }

    def _evaluate(self, step: int, splits: str, members: Mapping[str, Member], model: Download, *, last: bool) -> None:
        """Everybody's scores of one model, asked for again while too few can be used, as in a round."""
        attempts, tallies = self._attempts(), None
        while tallies is None:
            attempts -= 1
            self.record.members(members)  # one may have come during the last round
            try:
                tallies = self._ask_all(step, splits, members, model, last=last)
            except NotEnoughClients as few:
                if attempts == 0:
                    raise
                self.record.repeated(str(few))
                members = self.roster.gather()
        self.record.scored(self.history, step, tallies)

    def _ask_all(
        self, step: int, splits: str, members: Mapping[str, Member], model: Download, *, last: bool
    ) -> list[Tally]:
        """As many clients are asked at once as in a round, and their sums merged at once.  Raises NotEnoughClients."""
        if self.secure is not None and splits:
            return self._ask_masked(step, splits, members, model, last=last)
        tallies, replied, reasons = [Tally(split) for split in splits.split()], set[str](), dict[str, str]()
        for wave in waves(members, self.settings.federation):
            tasks = {
                name: dataclasses.replace(task, last=last)
                for name, task in self._tasks("evaluate", step, wave, splits).items()
            }
            replies, exchange = self._exchange(tasks, wave, model, None)
            replied |= replies.keys()
            reasons |= exchange.reasons
            for tally in tallies:
                tally.add(replies)
        if splits:
            self._go_back_from(step, reasons, num_asked=len(members))
            self._require_enough(replied, members, step, kept=step)
        return tallies

    def _ask_masked(
        self, step: int, splits: str, members: Mapping[str, Member], model: Download, *, last: bool
    ) -> list[Tally]:
        """The same with secure aggregation."""
        replies, secure = self._masked(step, splits, members, model, last=last)
        return _tallies(splits, replies, secure)

    def _masked(
        self, step: int, splits: str, members: Mapping[str, Member], model: Download, *, last: bool
    ) -> tuple[Mapping[str, Reply], SecureAttempt | None]:
        """The sums of an evaluation that was opened.  Raises NotEnoughClients."""
        sites = _Sites(self, step, members)
        asked = Asked(kind="evaluate", step=step, splits=splits.split(), change=None, received=model().received())
        secure = self._secure_sum(asked, members, sites)
        tasks = _with_work(self._tasks("evaluate", step, members, splits), secure)
        tasks = {name: dataclasses.replace(task, last=last) for name, task in tasks.items()}
        replies, _ = self._exchange(tasks, members, model, secure)
        self._require_enough(replies, members, step, kept=step)
        self._open(secure, tasks, sites, kept=step)
        return replies, secure

    def _count_groups(self, step: int, model: Download) -> None:
        """The pairs of that round's model within groups of people, where the run asks for them, once.

        The run is whole without them: too few answers are told, and nothing is asked again.
        """
        if not self._groups:
            return
        members = self.roster.gather()
        self.record.members(members)
        try:
            rows: NDArray[np.int64] | None
            if self.secure is None:
                rows = self._group_rows(step, members, model)
            else:
                _, secure = self._masked(step, GROUPS, members, model, last=False)
                rows = None if secure is None else secure.sums.groups
        except NotEnoughClients as few:
            self.record.without_groups(str(few))
            return
        if rows is not None:
            pairs = map(GroupPairs.of_row, rows)
            self.history.at(step).groups = dict(zip(self._groups, pairs, strict=True))

    def _group_rows(self, step: int, members: Mapping[str, Member], model: Download) -> NDArray[np.int64]:
        """All sites' rows, added: [G, GROUP_ROW].  Raises NotEnoughClients."""
        total = np.zeros((len(self._groups), GROUP_ROW), dtype=np.int64)
        replied = set[str]()
        for wave in waves(members, self.settings.federation):
            replies, _ = self._exchange(self._tasks("evaluate", step, wave, GROUPS), wave, model, None)
            replied |= replies.keys()
            for reply in replies.values():
                total += 0 if reply.groups is None else reply.groups
        self._require_enough(replied, members, step, kept=step)
        return total

    @property
    def _groups(self) -> tuple[str, ...]:
        return group_names(attributes_of(self.settings.verification.by))

    def _coded_best(self, best: int) -> Sent:
        return Sent.of(self.checkpoints.load(best), "float32", self.part)

    def _evaluate_at_end(self, last_round: int) -> None:
        """Score the last model; then hand out the best one for good, scored on test unless the curve has that point."""
        self.clock = RoundClock()
        members = self.roster.gather()
        self._evaluate(last_round, "val test", members, self.model.coded, last=False)
        best = self.history.best_round
        # As it was received in its round, whatever the codec: this is the model that goes into use.
        model = partial(self._coded_best, best)
        self._count_groups(best, model)
        # A round's sample has scored it, but the figures that remain are everybody's.
        by_sample = is_sampled(members, self.settings.federation) and best < last_round
        if by_sample or not self.history.tested(best):
            # A model's scores are summed once with secure aggregation, so only what is missing is asked for.
            splits = "val test" if self.secure is None else "test"
            self._evaluate(best, splits, self.roster.gather(), model, last=True)
        elif self.farewell:  # the run is whole without it, so nobody is waited for
            self._evaluate(best, "", self.roster.members(), model, last=True)


@dataclass(frozen=True, kw_only=True)
class _Made:
    """What a round's clients did: their replies, what is told of each, and with secure aggregation what of all."""

    replies: Mapping[str, Reply]
    clients: Mapping[str, Mapping[str, float]]
    content: Mapping[str, float]


@dataclass(frozen=True)
class _Sites:
    """The members of a round, as secure aggregation asks them."""

    federation: Federation
    step: int
    members: Mapping[str, Member]

    def ask(self, kind: str, texts: Mapping[str, str]) -> dict[str, str]:
        """Send a text to each of some of them; returns the text that each answered, of those that did."""
        members = {name: self.members[name] for name in texts}
        tasks = self.federation.small_tasks(kind, self.step, members)
        tasks = {name: dataclasses.replace(task, secure=texts[name]) for name, task in tasks.items()}
        return self.federation.ask_small(tasks, members)

    def refuse(self, name: str, reason: str) -> None:
        """Its answer cannot be used."""
        self.federation.record.refused(self.step, name, reason)


def _with_work(tasks: Mapping[str, Task], secure: SecureAttempt | None) -> dict[str, Task]:
    """The tasks of the members of a masked sum, each with what it needs for its part; all tasks where none is."""
    if secure is None:
        return dict(tasks)
    return {name: dataclasses.replace(tasks[name], secure=write(secure.work(name))) for name in secure.members}


def _tallies(splits: str, replies: Mapping[str, Reply], secure: SecureAttempt | None) -> list[Tally]:
    """The scores that replies brought; with secure aggregation those of all together."""
    tallies = [Tally(split) for split in splits.split()]
    for tally in tallies:
        if secure is None:
            tally.add(replies)
        else:
            tally.total = secure.sums.evaluations[tally.split]
    return tallies


class _WentBack(Exception):
    """The model of the round after `step` was of no use, and all is as it was after `step`."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


def _tasks_for(members: Mapping[str, Member], task: Task, settings: Settings) -> dict[str, Task]:
    """The task of each member by name; clients of one machine get equal precision and divided cores.

    task: what is the same for all of them.
    """
    first_on: dict[tuple[str, str], Member] = {}
    num_on: dict[str, int] = {}
    for member in members.values():
        first_on.setdefault((member.site.machine, member.site.device), member)
        num_on[member.site.machine] = num_on.get(member.site.machine, 0) + 1
    tasks = {}
    for name, member in members.items():
        of_kind = first_on[(member.site.machine, member.site.device)].site
        tasks[name] = dataclasses.replace(
            task,
            precision=of_kind.precision,
            memory_format=of_kind.memory_format,
            compiled=of_kind.compiled,
            threads=threads_for(settings, num_on[member.site.machine], member.site.cores),
        )
    return tasks
