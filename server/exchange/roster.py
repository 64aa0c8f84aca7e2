"""Who takes part: asks each node that appears for its name, waits for enough, and draws who works in a round."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from statistics import median_low
from typing import Final, TypeVar

from flwr.app import Message

from common.errors import NotEnoughClients, ReplyRefused, UserError
from common.names import CLIENT_NAME, looks_of
from common.protocol import wire
from common.protocol.beats import UNKNOWN, Beat
from common.protocol.wire import Site, Task
from common.settings import FederationSettings
from common.system.events import EventLog
from common.system.runtime import stream_seed
from server.exchange.guard import check_sender, read_site
from server.exchange.mailbox import Mailbox, Waiter
from server.exchange.patience import LONGEST_S

T = TypeVar("T")
SAY_WAITING_EVERY_S = 10.0
SAY_OFTEN_S = 120.0  # so long; then as seldom as the next line
SAY_PREPARING_EVERY_S = 30.0  # of a simulation, where nobody has to do anything
MOST_TOLD_APART: Final = 32  # more clients have no runs, curves and sums of their own, but quantiles over them


@dataclass(frozen=True, kw_only=True)
class Member:
    """A client that takes part."""

    node_id: int
    site: Site


@dataclass(kw_only=True)
class _Joining:
    """A node that was asked to join and has not answered.  Times are time.monotonic()."""

    message: str  # the id of the message that it has not answered; empty: it is asked again soon
    first: float  # when it was asked first
    asked: float  # when it was asked last
    beat: Beat | None = None  # what it said last of how far it is
    moved: float = float("-inf")  # when that has moved last

    def hear(self, beat: Beat, now: float) -> None:
        if self.beat is None:
            self.moved = now
        if beat.still_s != UNKNOWN:
            self.moved = max(self.moved, now - beat.still_s)
        self.beat, self.message = beat, ""


class Roster:
    """The members by name, kept up to date as nodes come and go."""

    def __init__(
        self,
        mailbox: Mailbox,
        federation: FederationSettings,
        *,
        task: Task,
        events: EventLog,
        waiter: Waiter,
        all_nodes_are_here: Callable[[], bool],
        keys: Callable[[], Mapping[int, str] | None] = lambda: None,
        simulated: bool = False,
    ) -> None:
        """task: what joining clients are sent.  all_nodes_are_here: nobody else can come (a simulation).

        keys: the names of the admitted keys by node, or None where nodes have no keys.
        simulated: nobody has to start anything, also while nodes are still to appear.
        """
        self._simulated = simulated
        self._mailbox, self._federation, self._task = mailbox, federation, task
        self._events, self._waiter = events, waiter
        self._all_nodes_are_here, self._keys = all_nodes_are_here, keys
        self._asked: dict[int, _Joining] = {}  # by node
        self._refused: dict[int, str] = {}  # node -> reason; these are not asked again while they are connected
        self._left: set[int] = set()  # of those refused, who has been away since
        self._members: dict[str, Member] = {}
        self._known: set[str] = set()  # whoever was a member once
        self._looks: dict[str, str] = {}  # what the names of these look like -> the name
        self._in_a_row: dict[int, int] = {}  # node -> rounds without a usable reply since the last one
        self._complete = False  # afterwards a name that comes again is a client that was restarted

    def gather(self) -> dict[str, Member]:
        """The members, in order of their names, as soon as there are `min_clients`; at once if there are.

        Whoever packs its pictures is waited for beyond the join deadline while that moves, for LONGEST_S at most.
        Raises NotEnoughClients, saying who is here and how many are missing; UserError when two clients claim one
        name.
        """
        started = time.monotonic()
        said, told = started, set[str]()

        def look() -> bool | None:
            nonlocal said
            self._refresh()
            if len(self._members) >= self._federation.min_clients and not self._still_answering():
                return True
            self._check_hope()
            now, at_work = time.monotonic(), self._at_work()
            seldom = self._simulated or now - started > SAY_OFTEN_S
            is_due = now - said >= (SAY_PREPARING_EVERY_S if seldom else SAY_WAITING_EVERY_S)
            if is_due or at_work.keys() - told:  # at once, where somebody begins
                said = now
                told.update(at_work)
                self._say_waiting(at_work, round(now - started))
            return None

        found = self._waiter.until(look, lambda: self._join_ends(started + self._federation.join_timeout_s))
        if found is None and len(self._members) < self._federation.min_clients:
            raise NotEnoughClients(self._missing_line(f"within {self._federation.join_timeout_s:g} s"))
        if not self._complete and len(self._members) > MOST_TOLD_APART:
            self._say_how_many()
        self._complete = True
        return self.members()

    def members(self) -> dict[str, Member]:
        """The members as last seen, in order of their names."""
        return dict(sorted(self._members.items()))

    def judge(self, *, asked: Mapping[str, Member], answered: Collection[str]) -> None:
        """A round is over: a client that gave no usable reply so many times running is set aside, and told of.

        It comes back when it is started again, as another node.
        """
        limit = self._federation.refusals_in_a_row
        for name, member in asked.items():
            node = member.node_id
            self._in_a_row[node] = 0 if name in answered else self._in_a_row.get(node, 0) + 1
            if isinstance(limit, int) and self._in_a_row[node] >= limit and name in self._members:
                self.set_aside(
                    name,
                    f"{name} gave no usable reply {limit} times running and is set aside; start it again to let it in",
                )

    def set_aside(self, name: str, reason: str) -> None:
        """A client is asked no more; it comes back when it is started again, as another node.  reason: one line."""
        member = self._members.pop(name, None)
        if member is not None:
            self._refused[member.node_id] = reason
            self._events.emit("warning", line=reason)

    def others_may_come(self) -> bool:
        """Whether a client that is missing can come back: not in a simulation."""
        return not self._all_nodes_are_here()

    def _join_ends(self, deadline: float) -> float:
        """The deadline, or later while someone packs and moves."""
        silence_s = self._federation.silence_s
        later = [min(one.moved + silence_s, one.first + LONGEST_S) for one in self._asked.values() if one.beat]
        return max(deadline, *later) if later else deadline

    def _at_work(self) -> dict[str, str]:
        """How far those are who have not joined yet, in words by name; the first ones."""
        keys, found = self._keys() or {}, {}
        for node, one in list(self._asked.items())[:MOST_TOLD_APART]:
            if one.beat is not None:
                said = one.beat.client if CLIENT_NAME.fullmatch(one.beat.client) else f"node {node}"
                found[keys.get(node, said)] = one.beat.words()
        return found

    def _still_answering(self) -> bool:
        # In a simulation every node is known from the start, so a run begins with all of them.
        return self._all_nodes_are_here() and bool(self._asked)

    def _who(self) -> Mapping[str, object]:
        return {"here": sorted(self._members), "wanted": self._federation.min_clients}

    def _say_waiting(self, at_work: Mapping[str, str], seconds: int) -> None:
        if len(self._members) > MOST_TOLD_APART:
            self._say_how_many()
            return
        self._events.emit("waiting", **self._who(), seconds=seconds, simulated=self._simulated, at_work=at_work)

    def _say_how_many(self) -> None:
        self._events.emit("gathered", clients=len(self._members), wanted=self._federation.min_clients)

    def _missing_line(self, when: str) -> str:
        names = sorted(self._members)
        here = ", ".join(names[:MOST_TOLD_APART]) or "none"
        here += ", ..." if len(names) > MOST_TOLD_APART else ""
        # One line of each, once: a thousand virtual clients fail for one reason, and an engine's own are tracebacks.
        lines = dict.fromkeys(reason.strip().splitlines()[-1] for reason in self._refused.values() if reason.strip())
        reasons = "".join(f" Refused: {line.rstrip('.')}." for line in list(lines)[:MOST_TOLD_APART])
        gone = sorted(self._known - self._members.keys())[:MOST_TOLD_APART]
        reasons += "".join(f" At work: {name}: {words.rstrip('.')}." for name, words in self._at_work().items())
        more = self._federation.min_clients - len(self._members) - len(gone)
        missing = [f"{name}, which was here before" for name in gone] + [f"{more} more"] * (more > 0)
        return (
            f"{len(self._members)} of {self._federation.min_clients} clients joined {when} (here: {here}; missing:"
            f" {'; '.join(missing)}). Start each with: flower-client --dataset ... --data-dir ... --server ...{reasons}"
        )

    def _check_hope(self) -> None:
        if self._all_nodes_are_here() and not self._asked and self._refused:
            raise NotEnoughClients(self._missing_line("and nobody else can come"))

    def _refresh(self) -> None:
        online = set(self._mailbox.node_ids())
        keys = self._keys()
        if keys is not None:
            online &= keys.keys()  # a node whose key nobody admitted is not asked, so it is sent nothing
        self._members = {name: m for name, m in self._members.items() if m.node_id in online}
        self._asked = {node: joining for node, joining in self._asked.items() if node in online}
        # With a key of its own a client that is started again is the node that it was.
        self._left |= self._refused.keys() - online
        known = {m.node_id for m in self._members.values()} | self._asked.keys() | (self._refused.keys() - self._left)
        new = sorted(online - known)
        self._left -= online
        if new:
            messages, now = [self._ask(node) for node in new], time.monotonic()
            sent = zip(new, self._mailbox.send(messages), strict=True)
            self._asked |= {node: _Joining(message=name, first=now, asked=now) for node, name in sent if name}
        for node in list(self._asked):
            self._hear(node)

    def _hear(self, node: int) -> None:
        """Take a node's answer, or what it says of how far it is, after which it is asked again."""
        joining, now = self._asked[node], time.monotonic()
        if not joining.message:
            if now >= joining.asked + self._task.beat_s / 2:
                joining.message, joining.asked = next(iter(self._mailbox.send([self._ask(node)])), ""), now
            return
        reply = self._mailbox.receive(joining.message)
        if reply is None:
            # One that was started again while nobody looked has lost the question; one that packs goes on with it.
            if self._task.beat_s > 0.0 and now - joining.asked > self._federation.silence_s:
                joining.message = ""
            return
        try:
            beat = wire.read_beat(reply)
            if beat is not None:
                check_sender(reply, node)
                joining.hear(beat, now)
                return
        except ReplyRefused as error:
            del self._asked[node]
            self._refuse(node, str(error))
            return
        del self._asked[node]
        self._admit(node, reply)

    def _ask(self, node_id: int) -> Message:
        return wire.task_message(self._task, None, node_id=node_id, ttl_s=self._federation.join_timeout_s + LONGEST_S)

    def _admit(self, node_id: int, reply: Message) -> None:
        try:
            site = read_site(reply)
            check_sender(reply, node_id)
            self._check_name(site.name, node_id)
        except ReplyRefused as error:
            said = "a client that is no member says: " if reply.has_error() else ""
            self._refuse(node_id, f"{said}{error}")
            return
        if site.name in self._members and not self._complete:
            raise UserError(
                f"two clients claim the name {site.name!r} (a {self._members[site.name].site.dataset} and a"
                f" {site.dataset} data set); start one of them with another --name."
            )
        earlier = self._members.get(site.name)
        if earlier is not None:
            # Were it asked again while it lives, two clients of one name would replace each other round after round.
            reason = f"{site.name} joined anew from another process, so its earlier connection is left out"
            self._refused[earlier.node_id] = reason
            self._events.emit("warning", line=reason)
        self._members[site.name] = Member(node_id=node_id, site=site)
        self._known.add(site.name)
        self._looks |= dict.fromkeys(looks_of(site.name), site.name)
        if len(self._members) > MOST_TOLD_APART:
            return
        self._events.emit(
            "joined",
            client=site.name,
            people=site.num_training_people,
            pictures=site.num_training_pictures,
            device=site.device,
            **self._who(),
        )

    def _refuse(self, node_id: int, reason: str) -> None:
        self._refused[node_id] = reason
        self._events.emit("refused", client=(self._keys() or {}).get(node_id, ""), reason=reason)

    def _check_name(self, name: str, node_id: int) -> None:
        """Raises ReplyRefused unless the name is the node's own: with a key the key's, and like nobody else's."""
        keys = self._keys() or {}
        own = keys.get(node_id)
        if own is not None and name != own:
            whose = "that of another client's key" if name in keys.values() else "not its key's"
            raise ReplyRefused(
                f"a client claims the name {name!r}, which is {whose}: its key is registered as {own!r}; start it"
                f" without --name, or with --name {own!r}"
            )
        looks, of_keys = looks_of(name), {look: key for key in keys.values() for look in looks_of(key)}
        alike = {known[look] for known in (self._looks, of_keys) for look in looks if look in known} - {name}
        if alike:
            raise ReplyRefused(
                f"a client claims the name {name!r}, which looks like {min(alike)!r}; start it with another --name"
            )
        if own is None and name in keys.values():
            raise ReplyRefused(f"a client claims the name {name!r}, which is that of another client's key")


def sample(members: Mapping[str, T], federation: FederationSettings, *, seed: int, server_round: int) -> dict[str, T]:
    """The members of a round, in order of their names: all, or `federation.clients_per_round` of them.

    Each has a number of its own in the stream (seed, "sample", round, name) and the lowest are taken, so every set of
    that size is equally likely, and one member that comes or goes changes the sample by one at most.
    """
    wanted = federation.clients_per_round
    names = sorted(members)
    if isinstance(wanted, int) and wanted < len(names):
        names = sorted(sorted(names, key=lambda name: stream_seed(seed, "sample", server_round, name))[:wanted])
    return {name: members[name] for name in names}


def is_sampled(members: Mapping[str, T], federation: FederationSettings) -> bool:
    """Whether a round has fewer than all members."""
    wanted = federation.clients_per_round
    return isinstance(wanted, int) and wanted < len(members)


def waves(members: Mapping[str, T], federation: FederationSettings) -> Iterator[dict[str, T]]:
    """All members in order of their names, at most `federation.clients_per_round` at a time; nothing where none are."""
    names = sorted(members)
    wanted = federation.clients_per_round
    size = wanted if isinstance(wanted, int) else max(1, len(names))
    for start in range(0, len(names), size):
        yield {name: members[name] for name in names[start : start + size]}


@dataclass(frozen=True, kw_only=True)
class Share:
    """How much of one client is counted: so many pictures."""

    num_examples: int  # in the mean of the changes
    num_pictures: int  # in pooled scores, with the pairs that so many have


def share_of_each(members: Mapping[str, Member], federation: FederationSettings) -> Share | None:
    """`federation.max_weight_factor` times the median of what the members hold; None: there is no bound.

    The lower of the middle two where they are even, or of two members the larger would raise its own bound.
    """
    factor = federation.max_weight_factor
    if isinstance(factor, str) or not members:
        return None
    sites = [member.site for member in members.values()]
    return Share(
        num_examples=max(1, int(factor * median_low(site.num_training_pictures for site in sites))),
        num_pictures=max(2, int(factor * median_low(site.num_pictures for site in sites))),
    )


def replies_needed(federation: FederationSettings) -> int:
    """How many usable replies a round needs: `federation.min_clients`, or all where fewer are asked by choice."""
    wanted = federation.clients_per_round
    return min(federation.min_clients, wanted) if isinstance(wanted, int) else federation.min_clients
