"""The loop: gather, send one message to each client, add the replies in order, keep the best, evaluate at the end."""

import dataclasses
from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

from common import config
from common.errors import NotEnoughClients
from common.protocol import wire
from common.protocol.codec import Coded, decode, encode, num_bytes
from common.protocol.parameters import Manifest
from common.protocol.wire import Reply, Task
from common.settings import Settings
from common.strategies import check_number, fewest_clients
from common.training.autotune import threads_for
from server.aggregate import Aggregate, aggregate_for
from server.exchange.clock import RoundClock
from server.exchange.mailbox import Mailbox, Waiter
from server.exchange.messages import Download, Exchange
from server.exchange.roster import Member, Roster, is_sampled, replies_needed, sample, waves
from server.global_model import GlobalModel, ServerOptimiser
from server.public_set import PublicScorer
from server.record.checkpoint import RunCheckpoints
from server.record.history import History, Tally
from server.record.tell import Record


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
    history: History = field(default_factory=History)
    clock: RoundClock = field(default_factory=RoundClock)  # of the round in progress
    sha256: str = ""  # of the model that was saved last
    first_round: int = 1  # larger for a run that goes on
    farewell: bool = True  # whether the best model is handed out when nothing of it is to be scored

    def run(self) -> Outcome:
        """All rounds and the final evaluation.

        Raises NotEnoughClients, InterruptedRun; the checkpoint of the last whole round is on disk then.
        """
        last_round, rounds = self.first_round - 1, self.settings.federation.rounds
        if last_round == 0:
            self._save(0)
        try:
            while last_round < rounds and not self._is_out_of_patience():
                last_round += 1
                self._round(last_round)
            if last_round < rounds:
                self.record.stopped_early(last_round, self.history)
            self._evaluate_at_end(last_round)
        finally:
            self.waiter.do_work()
        # With the scores that came last.
        self.checkpoints.write_state(last_round, self.sha256, self.history, self.record.counts())
        return Outcome(history=self.history, last_round=last_round, sha256=self.sha256)

    def _save(self, step: int) -> None:
        moments = {**self.optimiser.moments, **self.model.remembered()}
        counts = self.record.counts()
        self.sha256 = self.checkpoints.save(step, self.model.received, moments, self.history, counts)

    def _is_out_of_patience(self) -> bool:
        """A model's score arrives a round later, so the model of the last round is not among those counted."""
        return self.settings.training.is_out_of_patience(self.history.validations_since_best())

    def _round(self, server_round: int) -> None:
        """One round.  Its model is saved and its figures are told while the next messages are answered.

        It is tried again while too few replies can be used, as whoever is missing may come back.
        """
        self.clock = clock = RoundClock()
        attempts = self._attempts()
        replies: dict[str, Reply] = {}
        num_tasks = 0
        while not replies:
            attempts -= 1
            replies, num_asked = self._attempt(server_round, is_last=attempts == 0)
            num_tasks += num_asked
        clients = {name: self._costs(name, reply) for name, reply in replies.items()}
        self.waiter.leave_work(partial(self._round_is_whole, server_round, replies, clients, num_tasks, clock))

    def _attempts(self) -> int:
        return self.settings.federation.round_attempts if self.roster.others_may_come() else 1

    def _attempt(self, server_round: int, *, is_last: bool) -> tuple[dict[str, Reply], int]:
        """Have a round's model trained, and make the step.  Returns the replies and how many clients were asked.

        No replies: too few can be used, and nothing has changed; raises NotEnoughClients when it is the last attempt.
        """
        members = self.roster.gather()
        self.clock.lap("wait")
        self.record.members(members)
        members = sample(members, self.settings.federation, seed=self.settings.run.seed, server_round=server_round)
        self.clock.lap("log")
        splits = self._splits_to_score(server_round - 1)
        if server_round == self.first_round:
            check_number(self.settings.federation, len(members))
        tasks = self._tasks("train", server_round, members, splits)
        with closing(self._aggregate()) as change:
            replies = self._exchange(tasks, members, self.model.coded, change)
            for name, reason in change.outliers().items():
                del replies[name]
                self.record.refused(server_round, name, reason)
            self.roster.judge(asked=members, answered=replies)
            try:
                self._require_enough(replies, members, server_round, kept=server_round - 1)
            except NotEnoughClients as few:
                if is_last:
                    raise
                self.record.repeated(str(few))
                return {}, len(tasks)
            self._score(server_round - 1, replies, splits)
            self.clock.lap("evaluate")
            self.model.step(self.optimiser, change.mean())
            self.clock.lap("aggregate")
        return replies, len(tasks)

    def _aggregate(self) -> Aggregate:
        return aggregate_for(self.settings.federation, self.manifest.size, self.checkpoints.replies_folder)

    def _round_is_whole(
        self,
        server_round: int,
        replies: Mapping[str, Reply],
        clients: Mapping[str, Mapping[str, float]],
        num_tasks: int,
        clock: RoundClock,
    ) -> None:
        """Tell and save; the seconds of it are the next round's.  clock: the round's own, which has stopped."""
        seconds = clock.metrics()
        self.clock.lap("wait")
        sizes = {
            "bytes_down": num_tasks * next(iter(clients.values()))["bytes_down"],
            "bytes_up": sum(costs["bytes_up"] for costs in clients.values()),
        }
        self.record.trained(self.history, server_round, replies, sizes=sizes, clients=clients)
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
        )
        return _tasks_for(members, task, self.settings)

    def _exchange(
        self, tasks: Mapping[str, Task], members: Mapping[str, Member], model: Download, change: Aggregate | None
    ) -> dict[str, Reply]:
        """Send every task and take the replies; with `change`, as those of training, which are added to it."""
        exchange = Exchange(
            federation=self.settings.federation,
            manifest=self.manifest,
            mailbox=self.mailbox,
            waiter=self.waiter,
            clock=self.clock,
            refused=self.record.refused,
        )
        exchange.send(tasks, members, model)
        self.waiter.do_work()
        self._score_public(next(iter(tasks.values()), None), model)
        self.clock.lap("evaluate")
        return exchange.replies(change)

    def _score_public(self, task: Task | None, model: Download) -> None:
        """Score the model that was just sent on the public pairs, while the clients work on it."""
        if self.public is None or task is None or "test" not in task.splits.split():
            return
        step = task.server_round - 1 if task.kind == "train" else task.server_round
        if "round_public_auc" in self.history.at(step).metrics:  # the round is tried again
            return
        self.record.public_scored(self.history, step, self.public.scores(decode(model()), self.waiter.check))

    def _require_enough(self, replies: Collection[str], members: Collection[str], step: int, *, kept: int) -> None:
        """kept: the newest round whose model is on disk; `step` itself when that model was only evaluated."""
        federation = self.settings.federation
        wanted = max(replies_needed(federation), fewest_clients(federation) if kept < step else 0)
        if len(replies) < wanted:
            reasons = self.record.reasons(step)
            raise NotEnoughClients(
                f"{'round' if kept < step else 'evaluation of round'} {step}: {len(replies)} of {len(members)} clients"
                f" gave a usable reply, {wanted}"
                f" are needed ({'; '.join(f'{name}: {reason}' for name, reason in reasons.items())})."
                f" The model of round {kept} is kept in {self.checkpoints.path(kept)}."
            )

    def _costs(self, client: str, reply: Reply) -> dict[str, float]:
        """Bytes each way and seconds of one client's answer to a training task."""
        federation, size = self.settings.federation, self.manifest.size
        return {
            "bytes_down": float(num_bytes(federation.download_codec, size)),
            "bytes_up": float(num_bytes(federation.upload_codec, size) + wire.counts_nbytes(reply)),
            "answer_seconds": self.clock.answer_seconds(client),
        }

    def _score(self, step: int, replies: Mapping[str, Reply], splits: str) -> None:
        for split in splits.split():
            tally = Tally(split)
            tally.add(replies)
            self.record.scored(self.history, step, tally)

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
        for tally in tallies:
            self.record.scored(self.history, step, tally)

    def _ask_all(
        self, step: int, splits: str, members: Mapping[str, Member], model: Download, *, last: bool
    ) -> list[Tally]:
        """As many clients are asked at once as in a round, and their sums merged at once.  Raises NotEnoughClients."""
        tallies, replied = [Tally(split) for split in splits.split()], set[str]()
        for wave in waves(members, self.settings.federation):
            tasks = {
                name: dataclasses.replace(task, last=last)
                for name, task in self._tasks("evaluate", step, wave, splits).items()
            }
            replies = self._exchange(tasks, wave, model, None)
            replied |= replies.keys()
            for tally in tallies:
                tally.add(replies)
        if splits:
            self._require_enough(replied, members, step, kept=step)
        return tallies

    def _coded_best(self, best: int) -> Coded:
        return encode(self.checkpoints.load(best), "float32")

    def _evaluate_at_end(self, last_round: int) -> None:
        """Score the last model; then hand out the best one for good, scored on test unless the curve has that point."""
        self.clock = RoundClock()
        members = self.roster.gather()
        self._evaluate(last_round, "val test", members, self.model.coded, last=False)
        best = self.history.best_round
        # As it was received in its round, whatever the codec: this is the model that goes into use.
        model = partial(self._coded_best, best)
        # A round's sample has scored it, but the figures that remain are everybody's.
        by_sample = is_sampled(members, self.settings.federation) and best < last_round
        if by_sample or not self.history.tested(best):
            self._evaluate(best, "val test", self.roster.gather(), model, last=True)
        elif self.farewell:  # the run is whole without it, so nobody is waited for
            self._evaluate(best, "", self.roster.members(), model, last=True)


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
