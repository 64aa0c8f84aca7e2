"""The loop: gather, send one message to each client, add the replies in order, keep the best, evaluate at the end."""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from common import config, wire
from common.errors import NotEnoughClients, ReplyRefused
from common.parameters import Manifest
from common.precision import threads_for
from common.settings import Settings
from common.tracking.settings import without_secrets
from common.wire import Reply, Task
from server.aggregate import WeightedChange
from server.checkpointing import RunCheckpoints
from server.guard import check_evaluation_reply, check_train_reply
from server.history import History
from server.mailbox import Mailbox, Patience
from server.optimiser import ServerOptimiser
from server.public_set import PublicScorer
from server.record import Record
from server.roster import Member, Roster
from server.round_clock import RoundClock
from server.scores import evaluation_sums

Buffer = NDArray[np.float32]
TTL_SLACK_S = 10.0  # our deadline passes first, and says so in our words


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a federation ended."""

    history: History
    last_round: int  # smaller than federation.rounds when training stopped early
    sha256: str  # of the last global model


@dataclass(kw_only=True)
class Federation:
    """One run's federation: what it needs, and its state as it goes."""

    settings: Settings
    run_id: str
    manifest: Manifest
    model: Buffer  # the global model, changed in place
    optimiser: ServerOptimiser
    mailbox: Mailbox
    roster: Roster
    patience: Patience
    checkpoints: RunCheckpoints
    record: Record
    public: PublicScorer | None = None
    history: History = field(default_factory=History)
    clock: RoundClock = field(default_factory=RoundClock)  # of the round in progress

    def run(self) -> Outcome:
        """All rounds and the final evaluation.

        Raises NotEnoughClients, InterruptedRun; the checkpoint of the last whole round is on disk then.
        """
        last_round, rounds = 0, self.settings.federation.rounds
        sha256 = self._save(0)
        while last_round < rounds and not self._is_out_of_patience():
            last_round += 1
            sha256 = self._round(last_round)
        if last_round < rounds:
            self.record.stopped_early(last_round, self.history)
        self._evaluate_at_end(last_round)
        self.checkpoints.write_state(last_round, sha256, self.history)  # with the scores that came last
        return Outcome(history=self.history, last_round=last_round, sha256=sha256)

    def _save(self, step: int) -> str:
        return self.checkpoints.save(step, self.model, self.optimiser.moments, self.history)

    def _is_out_of_patience(self) -> bool:
        """A model's score arrives a round later, so the model of the last round is not among those counted."""
        patience = self.settings.training.patience
        return isinstance(patience, int) and self.history.validations_since_best() >= patience

    def _round(self, server_round: int) -> str:
        """One round; returns the SHA-256 of the new global model."""
        self.clock = clock = RoundClock()
        members = self.roster.gather()
        clock.lap("wait")
        self.record.members(members)
        clock.lap("log")
        splits = self._splits_to_score(server_round - 1)
        tasks = self._tasks("train", server_round, members, splits)
        change = WeightedChange(self.manifest.size)
        replies = self._exchange(tasks, members, change)
        self._require_enough(replies, members, server_round, kept=server_round - 1)
        self._score(server_round - 1, replies, splits)
        clock.lap("evaluate")
        self.optimiser.apply(self.model, change.mean())
        clock.lap("aggregate")
        sha256 = self._save(server_round)
        clock.lap("checkpoint")
        clients = {name: self._costs(name, reply) for name, reply in replies.items()}
        sizes = {
            "bytes_down": float(len(tasks) * self.manifest.num_bytes),
            "bytes_up": sum(costs["bytes_up"] for costs in clients.values()),
        }
        self.record.trained(self.history, server_round, replies, sizes=sizes, clients=clients)
        clock.lap("log")
        self.record.timed(self.history, server_round, clock.metrics())
        return sha256

    def _splits_to_score(self, step: int) -> str:
        return "val test" if step % self.settings.federation.test_every_rounds == 0 else "val"

    def _tasks(self, kind: str, step: int, members: Mapping[str, Member], splits: str) -> dict[str, Task]:
        """The task of each member by name; clients of one machine get equal precision and divided cores."""
        settings_json = config.to_json(without_secrets(self.settings))
        first_on: dict[tuple[str, str], Member] = {}
        for member in members.values():
            first_on.setdefault((member.site.machine, member.site.device), member)
        num_on = {
            m.site.machine: sum(o.site.machine == m.site.machine for o in members.values()) for m in members.values()
        }
        tasks = {}
        for name, member in members.items():
            model_of_kind = first_on[(member.site.machine, member.site.device)].site
            tasks[name] = Task(
                kind=kind,
                run_id=self.run_id,
                server_round=step,
                settings=settings_json,
                manifest=self.manifest.digest,
                splits=splits,
                best_round=self.history.best_round,
                precision=model_of_kind.precision,
                memory_format=model_of_kind.memory_format,
                compiled=model_of_kind.compiled,
                threads=threads_for(self.settings, num_on[member.site.machine], member.site.cores),
            )
        return tasks

    def _exchange(
        self, tasks: Mapping[str, Task], members: Mapping[str, Member], change: WeightedChange | None
    ) -> dict[str, Reply]:
        """Send every task and take the replies in the fixed order of names; a bad or missing one is left out.

        With `change`, replies are checked as those of training and added to it at once, and their buffers dropped.
        """
        timeout_s = self.settings.federation.round_timeout_s
        deadline = time.monotonic() + timeout_s
        names = list(tasks)
        shared = wire.pack_shared(self.model)
        messages = [
            wire.task_message(tasks[name], shared, node_id=members[name].node_id, ttl_s=timeout_s + TTL_SLACK_S)
            for name in names
        ]
        sent = dict(zip(names, self.mailbox.send(messages), strict=True))
        del messages, shared  # the SuperLink has them now
        self.clock.sent()
        self._score_public(next(iter(tasks.values()), None))
        self.clock.lap("evaluate")
        replies = {}
        for name in names:
            try:
                replies[name] = self._receive(sent[name], tasks[name], members[name], change, deadline)
            except ReplyRefused as refusal:
                self.record.refused(tasks[name].server_round, name, str(refusal))
        return replies

    def _score_public(self, task: Task | None) -> None:
        """Score the model that was just sent on the public pairs, while the clients work on it."""
        if self.public is None or task is None or "test" not in task.splits.split():
            return
        step = task.server_round - 1 if task.kind == "train" else task.server_round
        self.record.public_scored(self.history, step, self.public.scores(self.model, self.patience.check))

    def _receive(
        self, message_id: str, task: Task, member: Member, change: WeightedChange | None, deadline: float
    ) -> Reply:
        if not message_id:
            raise ReplyRefused("the task could not be sent; the client is not connected")
        message = self.patience.until(lambda: self._look(message_id), deadline)
        self.clock.lap("wait")
        if message is None:
            raise ReplyRefused(f"no answer within {self.settings.federation.round_timeout_s:g} s")
        self.clock.answered(member.site.name)
        reply = wire.read_reply(message, task.splits)
        if change is None:
            check_evaluation_reply(reply, server_round=task.server_round, manifest=self.manifest, site=member.site)
            return reply
        check_train_reply(reply, server_round=task.server_round, manifest=self.manifest, site=member.site)
        self.clock.lap("receive")
        if reply.change is not None:
            change.add(reply.change, reply.num_examples)
        self.clock.lap("aggregate")
        return dataclasses.replace(reply, change=None)

    def _look(self, message_id: str) -> Message | None:
        """The reply if it is there; pulling it is no waiting."""
        self.clock.lap("wait")
        message = self.mailbox.receive(message_id)
        if message is not None:
            self.clock.lap("receive")
        return message

    def _require_enough(
        self, replies: Mapping[str, Reply], members: Mapping[str, Member], step: int, *, kept: int
    ) -> None:
        """kept: the newest round whose model is on disk; `step` itself when that model was only evaluated."""
        wanted = self.settings.federation.min_clients
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
        return {
            "bytes_down": float(self.manifest.num_bytes),
            "bytes_up": float(self.manifest.num_bytes + wire.counts_nbytes(reply)),
            "answer_seconds": self.clock.answer_seconds(client),
        }

    def _score(self, step: int, replies: Mapping[str, Reply], splits: str) -> None:
        for split in splits.split():
            by_client = {name: evaluation_sums(reply.evaluations[split]) for name, reply in replies.items()}
            self.record.scored(self.history, step, split, by_client)

    def _evaluate(self, step: int, splits: str, members: Mapping[str, Member], *, last: bool) -> None:
        self.record.members(members)  # one may have come during the last round
        tasks = {
            name: dataclasses.replace(task, last=last)
            for name, task in self._tasks("evaluate", step, members, splits).items()
        }
        replies = self._exchange(tasks, members, None)
        if splits:
            self._require_enough(replies, members, step, kept=step)
        self._score(step, replies, splits)

    def _evaluate_at_end(self, last_round: int) -> None:
        """Score the last model; then hand out the best one for good, scored on test unless the curve has that point."""
        self._evaluate(last_round, "val test", self.roster.gather(), last=False)
        best, last_model = self.history.best_round, self.model
        self.model = self.checkpoints.load(best)
        if self.history.tested(best):  # a farewell: the run is whole without it, so nobody is waited for
            self._evaluate(best, "", self.roster.members(), last=True)
        else:
            self._evaluate(best, "val test", self.roster.gather(), last=True)
        self.model = last_model
