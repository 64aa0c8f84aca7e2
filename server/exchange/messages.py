"""One message to each client and one reply from each, taken in a fixed order; what is bad or missing is left out."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, Message

from common.errors import ReplyRefused
from common.metrics.group_names import GROUPS
from common.protocol import wire
from common.protocol.beats import Beat
from common.protocol.change_bound import ChangeBound, ChangeNorms
from common.protocol.codec import MASKED, num_bytes
from common.protocol.parameters import Manifest
from common.protocol.wire import Reply, Task
from common.settings import FederationSettings
from server.aggregate import Aggregate
from server.exchange.clock import RoundClock
from server.exchange.guard import (
    check_evaluation_reply,
    check_masked_reply,
    check_sender,
    check_train_reply,
)
from server.exchange.mailbox import Mailbox, Waiter
from server.exchange.patience import SLOWEST_BYTES_PER_S, Patience
from server.exchange.roster import Member, Share
from server.global_model import Sent

Download = Callable[[], Sent]
TTL_SLACK_S = 10.0  # our deadline passes first, and says so in our words
LOOK_WHO_IS_HERE_EVERY_S = 1.0
SOONEST = 0.5  # times `Task.beat_s`: a client that answers sooner is not asked again at once


@dataclass
class _Awaited:
    """A client whose answer is not taken yet."""

    patience: Patience
    first: str  # the id of the message with its task; empty where it could not be sent
    asked: float  # when it was asked last, as time.monotonic()
    message: str  # the id of the message that it has not answered; empty: it is asked again soon
    early: Message | ReplyRefused | None = None  # a short answer that came before its turn, or what is wrong with it


@dataclass(kw_only=True)
class Exchange:
    """The messages of one attempt at a round, or of one evaluation."""

    federation: FederationSettings
    manifest: Manifest
    mailbox: Mailbox
    waiter: Waiter
    clock: RoundClock
    refused: Callable[[int, str, str], None]  # is told the round, the client, the reason
    bound: ChangeBound  # of the model that is sent
    changes: Manifest  # of what a change holds
    share: Share | None = None  # None: all that a client holds is counted
    max_pairs: int | str = "all"  # verification.max_pairs, by which every client scores
    num_groups: int = 0  # of people, whose errors the run asks for
    is_private: bool = False  # the run has differential privacy
    masked_size: int | None = None  # with secure aggregation: how many masked words a reply has
    limited: Callable[[str, str], None] = lambda _client, _line: None  # is told who counts for less than it says
    answered: Callable[[str], None] = lambda _client: None  # is told whose reply was taken, or given up
    usual: Callable[[str, Task], float | None] = lambda _client, _task: None  # seconds of that client's like answers
    heard: Callable[[str, Beat], None] = lambda _client, _beat: None  # is told how far a client is
    moves: Callable[[], bool] = lambda: False  # whether clients of this machine have moved since the last call
    keeps: dict[str, str] = field(default_factory=dict)  # client -> which frozen part it keeps, by its last answer
    reasons: dict[str, str] = field(default_factory=dict)  # client -> why it was left out
    bytes_down: dict[str, int] = field(default_factory=dict)  # client -> of the model that was sent to it
    norms: dict[str, ChangeNorms] = field(default_factory=dict)  # client -> of its change
    _tasks: Mapping[str, Task] = field(default_factory=dict)
    _members: Mapping[str, Member] = field(default_factory=dict)
    _awaited: dict[str, _Awaited] = field(default_factory=dict)
    _lost: set[int] = field(default_factory=set)  # nodes that have been away since their task was sent
    _looked: float = 0.0

    def send(self, tasks: Mapping[str, Task], members: Mapping[str, Member], model: Download | None) -> None:
        """Send every task.  model: makes what is sent; it is not kept while the clients work.  None: none is sent."""
        self._tasks, self._members = tasks, members
        now = time.monotonic()
        patience = {name: self._patience(name, task, now) for name, task in tasks.items()}
        made = self._records(tasks, None if model is None else model())
        messages = [
            wire.task_message(task, shared, node_id=members[name].node_id, ttl_s=self._ttl_s(patience[name], now))
            for name, (task, shared) in made.items()
        ]
        sent = dict(zip(tasks, self.mailbox.send(messages), strict=True))
        del messages, made  # the SuperLink has them now
        self._awaited = {name: _Awaited(patience[name], sent[name], now, sent[name]) for name in tasks}
        self.clock.sent()

    def _records(self, tasks: Mapping[str, Task], model: Sent | None) -> dict[str, tuple[Task, ArrayRecord | None]]:
        """What goes to each client: who keeps what training does not move gets the rest only."""
        if model is None:
            return {name: (task, None) for name, task in tasks.items()}
        lacking = {name for name in tasks if model.frozen is not None and self.keeps.get(name) != model.digest}
        frozen = model.frozen() if model.frozen is not None and lacking else None
        rest, whole = wire.pack_shared(model.moving), wire.pack_shared(model.moving, frozen)
        found: dict[str, tuple[Task, ArrayRecord | None]] = {}
        for name, task in tasks.items():
            self.bytes_down[name] = model.moving.nbytes + (frozen.nbytes if frozen and name in lacking else 0)
            found[name] = dataclasses.replace(task, frozen=model.digest), whole if name in lacking else rest
        return found

    def _patience(self, name: str, task: Task, now: float) -> Patience:
        fixed, codec, size = self.federation.round_timeout_s, self.federation.upload_codec, self.changes.size
        if self.masked_size is not None:
            codec, size = MASKED, self.masked_size
        change = num_bytes(codec, size) if task.kind == "train" else 0
        return Patience(
            began=now,
            silence_s=self.federation.silence_s,
            fixed_s=None if isinstance(fixed, str) else fixed,
            usual_s=self.usual(name, task),
            transfer_s=change / SLOWEST_BYTES_PER_S,
        )

    def _ttl_s(self, patience: Patience, now: float) -> float:
        return patience.limit - now + TTL_SLACK_S

    def words(self) -> dict[str, str]:
        """Take the answers to small tasks of secure aggregation, by client; a bad or missing one is left out, and told.

        Raises InterruptedRun.
        """
        found = {}
        for name, task in self._tasks.items():
            try:
                message = self._message(name)
                check_sender(message, self._members[name].node_id)
                found[name] = wire.read_secure(message)
            except ReplyRefused as refusal:
                self.reasons[name] = str(refusal)
                self.refused(task.server_round, name, str(refusal))
            del self._awaited[name]
        return found

    def _message(self, name: str) -> Message:
        """A client's answer.  Raises ReplyRefused where none comes."""
        awaited = self._awaited[name]
        if not awaited.first:
            raise ReplyRefused("the task could not be sent; the client is not connected")
        message = self.waiter.until(lambda: self._look(name), lambda: awaited.patience.ends)
        self.clock.lap("wait")
        if message is None:
            raise ReplyRefused(awaited.patience.words(time.monotonic()))
        return message

    def replies(self, change: Aggregate | None) -> dict[str, Reply]:
        """Take the replies in the order of the tasks; a bad or missing one is left out, and told.

        With `change`, replies are checked as those of training and added to it at once, and their buffers dropped.
        Raises InterruptedRun.
        """
        replies = {}
        for name, task in self._tasks.items():
            self.keeps.pop(name, None)  # until it says so again: who failed may have lost what it had
            try:
                replies[name] = self._receive(name, task, change)
                self.keeps[name] = replies[name].frozen
            except ReplyRefused as refusal:
                self.reasons[name] = str(refusal)
                self.refused(task.server_round, name, str(refusal))
            del self._awaited[name]
            self.answered(name)
        return replies

    def _receive(self, name: str, task: Task, change: Aggregate | None) -> Reply:
        member = self._members[name]
        message = self._message(name)
        self.clock.answered(name)
        reply = wire.read_reply(message, task.splits if self.masked_size is None else "")
        check_sender(message, member.node_id)
        if self.masked_size is not None:
            return self._masked(name, reply, change)
        if change is None:
            check_evaluation_reply(
                reply,
                server_round=task.server_round,
                manifest=self.manifest,
                site=member.site,
                max_pairs=self.max_pairs,
                num_groups=self.num_groups if GROUPS in task.splits.split() else 0,
            )
            return self._in_share(name, reply)
        check_train_reply(
            reply,
            server_round=task.server_round,
            manifest=self.manifest,
            site=member.site,
            codec=self.federation.upload_codec,
            changes=self.changes,
            max_pairs=self.max_pairs,
            is_private=self.is_private,
        )
        if reply.change is not None:
            self.norms[name] = self.bound.check(reply.change)
        reply = self._in_share(name, reply)
        self.clock.lap("receive")
        if reply.change is not None:
            change.add(reply.change, reply.num_examples, name)
        self.clock.lap("aggregate")
        return dataclasses.replace(reply, change=None)

    def _masked(self, name: str, reply: Reply, words: Aggregate | None) -> Reply:
        task, size = self._tasks[name], self.masked_size or 0
        site = self._members[name].site
        check_masked_reply(
            reply, server_round=task.server_round, manifest=self.manifest, site=site, size=size, kind=task.kind
        )
        reply = self._in_share(name, reply)
        self.clock.lap("receive")
        if words is not None and reply.change is not None:
            words.add(reply.change, reply.num_examples, name)
        self.clock.lap("aggregate")
        return dataclasses.replace(reply, change=None)

    def _in_share(self, name: str, reply: Reply) -> Reply:
        """The reply, counting for no more pictures and pairs than one client may; whoever counts for less is told of.

        It is told of what it joined with, and not of what each reply counts.
        """
        if self.share is None:
            return reply
        site, share = self._members[name].site, self.share
        if site.num_training_pictures > share.num_examples or site.num_pictures > share.num_pictures:
            self.limited(
                name,
                f"{name} holds {site.num_training_pictures} training pictures of {site.num_pictures}, and counts for"
                f" {share.num_examples} of {share.num_pictures} at most: {self.federation.max_weight_factor:g} times"
                " the median client's (federation.max_weight_factor)",
            )
        return dataclasses.replace(
            reply,
            num_examples=min(reply.num_examples, share.num_examples),
            evaluations={split: sums.at_most(share.num_pictures) for split, sums in reply.evaluations.items()},
        )

    def _look(self, name: str) -> Message | None:
        """The reply if it is there; pulling it is no waiting.  Raises ReplyRefused where none can come any more.

        A client with a key of its own comes back as the node that it was, but without the task that it had; so who
        has been away is noted for all of them, whoever is being waited for.
        """
        self.clock.lap("wait")
        if time.monotonic() - self._looked >= LOOK_WHO_IS_HERE_EVERY_S:
            self._look_at_all(name)
            self._looked = time.monotonic()
        message = self._heard_or_answer(name)
        if message is not None:
            self.clock.lap("receive")
        elif self._members[name].node_id in self._lost:
            raise ReplyRefused("the connection to the client was lost")
        return message

    def _look_at_all(self, name: str) -> None:
        """Who is away, who moves, and how far the others are, whose turn comes after that of `name`.

        Their answers stay where they are until then, but for those without a model.
        """
        here = set(self.mailbox.node_ids())
        self._lost |= {member.node_id for member in self._members.values()} - here
        now, moves = time.monotonic(), self.moves()
        for other, awaited in self._awaited.items():
            if moves:
                awaited.patience.move(now)
            beat_s, waits = self._tasks[other].beat_s, bool(awaited.message)
            if other == name or awaited.early is not None or not awaited.first or beat_s <= 0.0:
                continue
            if not waits or (now - awaited.asked >= SOONEST * beat_s and self.mailbox.is_short(awaited.message)):
                try:
                    awaited.early = self._heard_or_answer(other)
                except ReplyRefused as refusal:
                    awaited.early = refusal

    def _heard_or_answer(self, name: str) -> Message | None:
        """A client's answer; None where there is none yet, also when it said how far it is and was asked again.

        Raises ReplyRefused.
        """
        awaited, task = self._awaited[name], self._tasks[name]
        now = time.monotonic()
        if isinstance(awaited.early, ReplyRefused):
            raise awaited.early
        if awaited.early is not None:
            return awaited.early
        if not awaited.message:
            if now >= awaited.asked + SOONEST * task.beat_s:
                self._ask_again(name, now)
            return None
        message = self.mailbox.receive(awaited.message, awaited.patience.ends)
        beat = None if message is None else wire.read_beat(message)
        if message is None or beat is None:
            return message
        check_sender(message, self._members[name].node_id)
        awaited.message = ""
        awaited.patience.hear(beat, now)
        self.heard(name, beat)
        return None

    def _ask_again(self, name: str, now: float) -> None:
        awaited, node_id = self._awaited[name], self._members[name].node_id
        task = dataclasses.replace(self._tasks[name], again=awaited.first)
        message = wire.task_message(task, None, node_id=node_id, ttl_s=self._ttl_s(awaited.patience, now))
        awaited.message, awaited.asked = next(iter(self.mailbox.send([message])), ""), now
        if not awaited.message:
            raise ReplyRefused("it could not be asked again; the client is not connected")
