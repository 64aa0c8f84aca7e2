"""How long a client is waited for: it moves, it stands still, it lies, it says nothing; rounds and joins."""

import dataclasses
import itertools
import time

import pytest
from flwr.app import Message
from tiny_federation import (
    ScriptedMailbox,
    client,
    federation_over,
    reply_to,
    roster_over,
    settings_with,
    site_named,
)

from common.errors import NotEnoughClients
from common.protocol import wire
from common.protocol.beats import NOT_COUNTED, UNKNOWN, Beat
from common.system.events import EventReader
from server.exchange import patience, roster
from server.exchange.patience import GENEROUS_S, LIMIT_FACTOR, LONGEST_S, Patience, beat_s
from server.exchange.roster import _Joining
from tests.tiny_settings import changed

pytestmark = pytest.mark.usefixtures("in_a_run")

SILENCE_S = 300.0


def waiting(**values):
    return Patience(**({"began": 1000.0, "silence_s": SILENCE_S} | values))


def beat(still_s=0.0, **values):
    return Beat(**({"client": "celeba", "work": "training", "percent": 31, "still_s": still_s} | values))


# ---- the rules, by a clock of ours


def test_a_number_is_the_whole_rule():
    fixed = waiting(fixed_s=60.0)
    fixed.hear(beat(), 1050.0)
    fixed.move(1059.0)
    assert (fixed.ends, fixed.limit, fixed.words(1060.0)) == (1060.0, 1060.0, "no answer within 60 s")


def test_who_moves_is_waited_for_beyond_what_was_thought_and_then_for_the_silence():
    """The hour of a first round is over, and each beat that moved gives `silence_s` from when it moved."""
    slow = waiting()
    assert slow.ends == 1000.0 + GENEROUS_S
    for now in range(1015, 1000 + 3 * int(GENEROUS_S), 15):
        assert now < slow.ends
        slow.hear(beat(still_s=5.0), float(now))
    assert slow.ends == now - 5.0 + SILENCE_S


def test_who_says_that_nothing_moves_is_given_up_at_once_and_by_its_own_words():
    stuck = waiting()
    stuck.hear(beat(still_s=0.0), 1100.0)
    stuck.hear(beat(still_s=SILENCE_S - 1.0), 1100.0 + SILENCE_S - 1.0)
    assert stuck.ends > 1100.0 + SILENCE_S
    stuck.hear(beat(still_s=SILENCE_S), 1100.0 + SILENCE_S)
    assert stuck.ends == 1100.0 + SILENCE_S
    assert stuck.words(1100.0 + SILENCE_S) == "its training stands still at 31 % for 300 s (federation.silence_s)"


def test_work_that_is_not_told_of_neither_moves_nor_stands_still():
    quiet = waiting()
    quiet.hear(beat(still_s=SILENCE_S), 1400.0)
    quiet.hear(Beat(client="celeba"), 1500.0)
    assert quiet.ends == 1000.0 + GENEROUS_S
    assert quiet.words(4600.0) == "no answer within 3600 s; the last that it said: is at work"


def test_who_moves_for_ever_is_given_up_at_the_limit():
    liar, now = waiting(), 1000.0
    while now < liar.ends:
        now += 15.0
        liar.hear(beat(), now)
    assert now == 1000.0 + LONGEST_S
    assert liar.words(now) == "no answer within 86400 s, the longest that a site is waited for"


def test_the_limit_follows_what_a_client_took_before():
    """Ten times that, an hour at the least and a day at the most; what it says of itself raises neither."""
    for usual_s, limit_s in ((10.0, GENEROUS_S), (1000.0, LIMIT_FACTOR * 1000.0), (50_000.0, LONGEST_S)):
        liar = waiting(usual_s=usual_s)
        liar.hear(beat(still_s=-0.0), 1e9)
        assert liar.ends == liar.limit == 1000.0 + limit_s


@pytest.mark.parametrize(("usual_s", "waited_s"), [(None, 3600.0), (10.0, 600.0), (1000.0, 3000.0)])
def test_who_says_nothing_is_waited_for_by_what_it_took_before(usual_s, waited_s):
    assert waiting(usual_s=usual_s).ends == 1000.0 + waited_s


def test_an_answer_on_its_way_is_not_heard_of_and_is_waited_for():
    """344 MB at 1 Mbit/s: after the last beat the site sends, and says no more."""
    sending = waiting(transfer_s=344e6 / patience.SLOWEST_BYTES_PER_S)
    sending.hear(beat(), 9000.0)
    assert sending.ends == 9000.0 + SILENCE_S + 2752.0


def test_a_simulation_is_seen_to_move():
    seen = waiting()
    seen.hear(beat(still_s=SILENCE_S), 1300.0)
    seen.move(8000.0)
    assert seen.ends == 8000.0 + SILENCE_S


# ---- a round


class Slow:
    """A client that says `beats` before it gives its answer; it notes what it was asked."""

    def __init__(self, name, beats, answer=reply_to):
        self.beats, self.asked, self.answers = list(beats), [], 0
        self._name, self._answer = name, answer

    def __call__(self, task, message):
        if task.kind == "join":
            return Message(wire.site_content(site_named(self._name)), reply_to=message)
        if message.metadata.message_id not in [known for known, _ in self.asked]:
            self.asked.append((message.metadata.message_id, task))
            if self.beats:
                self.said = Message(wire.beat_content(self.beats.pop(0)), reply_to=message)
            else:
                self.answers += 1
                self.said = Message(wire.reply_content(self._answer(task)), reply_to=message)
        return self.said


def short_beats(**values):
    """Settings in which clients say how far they are at each look."""
    return settings_with(federation__rounds=1, federation__round_timeout_s="auto", **values)


@pytest.fixture
def quick(monkeypatch):
    """No second between looks, and beats as often."""
    monkeypatch.setattr("server.exchange.messages.LOOK_WHO_IS_HERE_EVERY_S", 0.0)
    monkeypatch.setattr("server.rounds.beat_s", lambda _: 0.001)


@pytest.mark.usefixtures("quick")
def test_a_client_that_says_how_far_it_is_is_asked_again_until_it_answers(tmp_path):
    told = [beat(percent=percent) for percent in (10, 40, 40, 80)]
    slow = Slow("alpha", told)
    federation = federation_over(ScriptedMailbox({1: slow, 2: client("beta")}), short_beats(), tmp_path)
    federation.farewell = False
    federation.run()
    assert federation.record.num_refused == 0
    training = [(name, task) for name, task in slow.asked if task.kind == "train"]
    first = training[0][0]
    assert [task.again for _, task in training] == ["", *[first] * 4]
    sent = zip(federation.mailbox.tasks, federation.mailbox.models, strict=True)
    models = [model is not None for (node, task), model in sent if (node, task.kind) == (1, "train")]
    assert models == [True, False, False, False, False]
    events = [event for event in EventReader(tmp_path).new_events() if event["kind"] == "progress"]
    assert [(one["client"], one["words"], one["pictures"]) for one in events] == [
        ("alpha", "training 10 %", 5), ("alpha", "training 40 %", 20), ("alpha", "training 80 %", 40)
    ]  # fmt: skip


@pytest.mark.usefixtures("quick")
def test_those_whose_turn_is_later_are_heard_and_asked_again_meanwhile(tmp_path):
    """alpha answers when beta has been asked a third time; were beta heard after alpha only, nobody would answer."""
    beta = Slow("beta", [beat(), beat()])

    def alpha_waits_for_beta(task):
        return reply_to(task) if task.kind != "train" or beta.answers else None

    nodes = {1: client("alpha", alpha_waits_for_beta), 2: beta}
    federation = federation_over(ScriptedMailbox(nodes), short_beats(federation__run_timeout_s=20.0), tmp_path)
    federation.farewell = False
    federation.run()
    assert federation.record.num_refused == 0


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("timeout_s", "reasons"), [(0.3, {"beta": "no answer within 0.3 s"}), ("auto", {})])
def test_a_round_of_three_times_the_fixed_timeout_is_whole_under_auto(tmp_path, monkeypatch, timeout_s, reasons):
    """Whatever was thought at first is over at once here, so that only what beta says keeps it in the round."""
    monkeypatch.setattr(patience, "GENEROUS_S", 0.05)
    monkeypatch.setattr("server.exchange.messages.Patience", lambda **of: Patience(**of | {"silence_s": 0.5}))
    began: list[float] = []

    def slow(task, message):
        if task.kind != "train":
            return client("beta")(task, message)
        began.append(time.monotonic())
        if time.monotonic() - began[0] < 0.9:
            return Message(wire.beat_content(beat()), reply_to=message)
        return Message(wire.reply_content(reply_to(task)), reply_to=message)

    settings = short_beats(federation__min_clients=1)
    settings = changed(settings, federation__round_timeout_s=timeout_s)
    federation = federation_over(ScriptedMailbox({1: client("alpha"), 2: slow}), settings, tmp_path)
    federation.farewell = False
    federation.run()
    assert federation.record.reasons(1) == reasons


@pytest.mark.usefixtures("quick")
def test_a_client_that_stands_still_is_left_out_and_the_others_go_on(tmp_path):
    stuck = Slow("beta", itertools.repeat(beat(still_s=SILENCE_S), 1000))
    federation = federation_over(
        ScriptedMailbox({1: client("alpha"), 2: stuck}), short_beats(federation__min_clients=1), tmp_path
    )
    federation.farewell = False
    federation.run()
    assert federation.record.reasons(1)["beta"].startswith("its training stands still at 31 % for 300 s")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "values", [{"percent": 101}, {"left_s": float("nan")}, {"work": "idling"}, {"still_s": -2.0}, {"client": 7}]
)
def test_a_beat_that_cannot_be_is_refused(tmp_path, values):
    def lies(task, message):
        if task.kind != "train":
            return client("beta")(task, message)
        record = wire.ConfigRecord(beat().values() | values)
        return Message(wire.RecordDict({"progress": record}), reply_to=message)

    nodes = {1: client("alpha"), 2: lies}
    federation = federation_over(ScriptedMailbox(nodes), short_beats(federation__min_clients=1), tmp_path)
    federation.farewell = False
    federation.run()
    assert "a beat is malformed" in federation.record.reasons(1)["beta"]


@pytest.mark.usefixtures("quick")
def test_a_beat_with_a_model_in_it_is_refused(tmp_path):
    def smuggles(task, message):
        if task.kind != "train":
            return client("beta")(task, message)
        content = wire.reply_content(reply_to(task))
        content["progress"] = wire.beat_content(beat())["progress"]
        return Message(content, reply_to=message)

    nodes = {1: client("alpha"), 2: smuggles}
    federation = federation_over(ScriptedMailbox(nodes), short_beats(federation__min_clients=1), tmp_path)
    federation.farewell = False
    federation.run()
    assert "a beat holds the record" in federation.record.reasons(1)["beta"]


def test_what_a_client_took_is_its_pace_for_the_like_of_it(tmp_path):
    federation = federation_over(ScriptedMailbox({1: client("alpha"), 2: client("beta")}), settings_with(), tmp_path)
    federation.run()
    member = federation.roster.members()["alpha"]
    kinds = [("train", False), ("evaluate", False), ("evaluate", True)]
    assert set(federation._pace) == {(name, *kind) for name in ("alpha", "beta") for kind in kinds}
    task = federation._tasks("train", 2, {"alpha": member}, "val")["alpha"]
    federation._pace["alpha", "train", False] = 0.5  # seconds a picture
    assert federation._usual_seconds("alpha", task, member) == 50.0
    twice = dataclasses.replace(member, site=site_named("alpha", num_pictures=200))
    assert federation._usual_seconds("alpha", task, twice) == 100.0
    assert federation._usual_seconds("gamma", task, member) is None


# ---- joining


def joining(*beats):
    """A node that says this, and then joins as alpha."""
    said = list(beats)

    def script(_task, message):
        content = wire.beat_content(said.pop(0)) if said else wire.site_content(site_named("alpha"))
        return Message(content, reply_to=message)

    return script


def packs(percent, still_s=0.0):
    return beat(work="packing", percent=percent, still_s=still_s, left_s=2400.0)


def test_a_join_waits_for_a_site_that_packs_beyond_its_deadline(tmp_path):
    """The deadline of 50 ms is over long before the pack is."""
    node = joining(packs(NOT_COUNTED), *[packs(percent) for percent in range(30)], packs(31))
    settings = settings_with(federation__min_clients=1, federation__join_timeout_s=0.05)
    members = roster_over(ScriptedMailbox({1: node}), settings, tmp_path).gather()
    assert list(members) == ["alpha"]
    events = list(EventReader(tmp_path).new_events())
    assert [event["at_work"] for event in events if event["kind"] == "waiting"] == [
        {"celeba": "packing: counting the pictures"}
    ]


def test_the_waiting_line_says_how_far_it_is_and_so_does_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(roster, "SAY_WAITING_EVERY_S", 0.0)
    node = joining(*[packs(31, still_s=400.0)] * 10_000)
    settings = settings_with(federation__min_clients=1, federation__silence_s=20.0)
    found = roster_over(ScriptedMailbox({1: node}), settings, tmp_path)
    monkeypatch.setattr(_Joining, "hear", _as_if_long_silent(_Joining.hear))
    with pytest.raises(NotEnoughClients, match=r"At work: celeba: packing 31 %, 40 min left\."):
        found.gather()
    events = [event for event in EventReader(tmp_path).new_events() if event["kind"] == "waiting"]
    assert events[-1]["at_work"] == {"celeba": "packing 31 %, 40 min left"}


def _as_if_long_silent(hear):
    def heard(self, said, now):
        hear(self, said, now)
        self.moved = now - 400.0

    return heard


def test_the_join_rule_by_a_clock(tmp_path):
    settings = settings_with(federation__silence_s=300.0)
    found = roster_over(ScriptedMailbox({}), settings, tmp_path)
    one = _Joining(message="m", first=1000.0, asked=1000.0)
    found._asked[7] = one
    assert found._join_ends(1100.0) == 1100.0, "nothing was heard of it"
    one.hear(packs(NOT_COUNTED, still_s=UNKNOWN), 1050.0)
    assert found._join_ends(1100.0) == 1350.0, "it answers"
    one.hear(packs(5, still_s=10.0), 1400.0)
    assert found._join_ends(1100.0) == 1690.0, "it moves"
    one.hear(packs(5, still_s=280.0), 1670.0)
    assert found._join_ends(1100.0) == 1690.0, "it stands still"
    one.hear(packs(6), 9e9)
    assert found._join_ends(1100.0) == 1000.0 + LONGEST_S, "nobody is waited for longer"


def test_a_name_in_a_beat_is_shown_only_where_it_could_be_one_and_a_key_says_it_better(tmp_path):
    found = roster_over(ScriptedMailbox({}), settings_with(), tmp_path)
    for node, name in ((1, "celeba"), (2, "\x1b[31m; 9 of 9 joined"), (3, "celeba")):
        found._asked[node] = _Joining(message="m", first=0.0, asked=0.0)
        found._asked[node].hear(dataclasses.replace(packs(1), client=name), 0.0)
    found._keys = lambda: {3: "vggface2"}
    assert list(found._at_work()) == ["celeba", "node 2", "vggface2"]


def test_a_site_that_joins_late_still_packs_and_the_others_begin(tmp_path):
    mailbox = ScriptedMailbox({1: client("beta"), 2: joining(*[packs(1)] * 100)})
    assert list(roster_over(mailbox, settings_with(federation__min_clients=1), tmp_path).gather()) == ["beta"]


def test_beats_come_often_enough_within_the_silence():
    assert beat_s(settings_with(federation__silence_s=300.0).federation) == 15.0


def test_a_node_of_which_nothing_is_heard_is_asked_again_after_the_silence(tmp_path):
    """With a key, a client that is started again is the node that it was, and does not know what that was asked."""
    mailbox = ScriptedMailbox({1: lambda _task, _message: None})
    found = roster_over(mailbox, settings_with(federation__silence_s=300.0), tmp_path)
    found._task = dataclasses.replace(found._task, beat_s=15.0)
    for waited_s, asked in ((0.0, 1), (299.0, 1), (301.0, 2)):
        found._refresh()
        found._asked[1].asked -= waited_s
        found._refresh()
        found._refresh()
        assert len(mailbox.tasks) == asked


def test_a_client_that_answers_at_once_with_beats_is_not_asked_in_a_loop(tmp_path):
    """Half of `beat_s` passes between two questions, whatever it says."""
    node = joining(*[packs(1)] * 1000)
    mailbox = ScriptedMailbox({1: node})
    found = roster_over(mailbox, settings_with(federation__min_clients=1), tmp_path)
    found._task = dataclasses.replace(found._task, beat_s=60.0)
    began = time.monotonic()
    while time.monotonic() - began < 0.1:
        found._refresh()
    assert len(mailbox.tasks) == 1
