"""Who takes part: the join deadline, who is missing, names claimed twice, clients that go and come."""

import time

import pytest
from flwr.app import Message
from tiny_federation import ScriptedMailbox, client, roster_over, settings_with

from common.errors import InterruptedRun, NotEnoughClients, UserError
from common.protocol import wire
from common.system.events import EventReader
from server.exchange.mailbox import Waiter

pytestmark = pytest.mark.usefixtures("in_a_run")


def failing_to_join(_task, message):
    return wire.error_message("gamma: data/gamma holds no pictures.", message)


def silent(_task, _message):
    return None


def kinds_of(folder):
    return [event["kind"] for event in EventReader(folder).new_events()]


def refusals(folder):
    return [event["reason"] for event in EventReader(folder).new_events() if event["kind"] == "refused"]


def test_members_come_in_the_order_of_their_names_whatever_their_node_ids(tmp_path):
    mailbox = ScriptedMailbox({1: client("zeta"), 2: client("alpha"), 3: client("mu")})
    roster = roster_over(mailbox, settings_with(federation__min_clients=3), tmp_path)
    assert list(roster.gather()) == ["alpha", "mu", "zeta"]
    assert [member.node_id for member in roster.members().values()] == [2, 3, 1]
    assert kinds_of(tmp_path) == ["joined"] * 3


def test_the_join_deadline_holds_and_the_line_says_who_is_here_and_who_failed(tmp_path):
    mailbox = ScriptedMailbox({1: client("alpha"), 2: silent, 3: failing_to_join})
    roster = roster_over(mailbox, settings_with(federation__min_clients=3), tmp_path)
    started = time.monotonic()
    with pytest.raises(NotEnoughClients) as seen:
        roster.gather()
    assert 0.3 <= time.monotonic() - started < 30.0
    line = str(seen.value)
    assert "1 of 3 clients joined within 0.3 s (here: alpha; missing: 2 more)" in line
    assert "gamma: data/gamma holds no pictures." in line
    assert seen.value.exit_code == 1
    assert refusals(tmp_path) == ["a client that is no member says: gamma: data/gamma holds no pictures."]


def test_two_clients_of_one_name_end_the_run_as_the_users_mistake(tmp_path):
    mailbox = ScriptedMailbox({1: client("twins"), 2: client("twins", dataset="celeba")})
    with pytest.raises(UserError, match=r"two clients claim the name 'twins' .*--name") as seen:
        roster_over(mailbox, settings_with(), tmp_path).gather()
    assert seen.value.exit_code == 2


def test_a_node_is_asked_once_while_it_is_connected(tmp_path):
    mailbox = ScriptedMailbox({1: client("alpha"), 2: client("beta"), 3: silent, 4: failing_to_join})
    roster = roster_over(mailbox, settings_with(), tmp_path)
    for _ in range(4):
        roster.gather()
    assert sorted(node for node, _ in mailbox.tasks) == [1, 2, 3, 4]


def test_a_late_joiner_takes_part_from_the_next_gathering(tmp_path):
    mailbox = ScriptedMailbox({1: client("alpha"), 2: client("beta")})
    roster = roster_over(mailbox, settings_with(), tmp_path)
    assert list(roster.gather()) == ["alpha", "beta"]
    mailbox.nodes[3] = client("aardvark")
    assert list(roster.gather()) == ["aardvark", "alpha", "beta"]


def test_a_client_that_vanishes_is_waited_for_and_then_named_as_missing(tmp_path):
    mailbox = ScriptedMailbox({1: client("alpha"), 2: client("beta")})
    roster = roster_over(mailbox, settings_with(), tmp_path)
    roster.gather()
    del mailbox.nodes[2]
    with pytest.raises(
        NotEnoughClients, match=r"1 of 2 clients joined .* \(here: alpha; missing: beta, which was here before\)"
    ):
        roster.gather()
    mailbox.nodes[2] = client("beta")
    assert list(roster.gather()) == ["alpha", "beta"]


def test_a_client_that_was_restarted_takes_its_own_place_and_the_two_do_not_alternate(tmp_path):
    """Flower holds a dead node for online for a while; were a live one asked again, the name would change hands."""
    mailbox = ScriptedMailbox({1: client("alpha"), 2: client("beta")})
    roster = roster_over(mailbox, settings_with(), tmp_path)
    roster.gather()
    mailbox.nodes[9] = client("beta")
    assert [roster.gather()["beta"].node_id for _ in range(4)] == [9, 9, 9, 9]
    assert kinds_of(tmp_path).count("warning") == 1


def test_a_client_with_a_key_that_was_set_aside_comes_back_as_the_same_node(tmp_path):
    mailbox = ScriptedMailbox({1: client("alpha"), 2: client("beta"), 3: client("gamma")})
    roster = roster_over(mailbox, settings_with(federation__refusals_in_a_row=1), tmp_path)
    members = roster.gather()
    roster.judge(asked=members, answered=["alpha", "beta"])
    assert list(roster.gather()) == ["alpha", "beta"]
    del mailbox.nodes[3]
    roster.gather()
    mailbox.nodes[3] = client("gamma")
    assert list(roster.gather()) == ["alpha", "beta", "gamma"]
    assert [node for node, _ in mailbox.tasks].count(3) == 2


def test_a_name_is_the_keys(tmp_path):
    """Neither that of another key nor a free one: whoever sees a name knows whose key answered."""
    mailbox = ScriptedMailbox({1: client("beta"), 2: client("free"), 3: client("beta"), 4: client("alpha")})
    roster = roster_over(mailbox, settings_with(federation__min_clients=2), tmp_path)
    roster._keys = lambda: {1: "alpha", 2: "gamma", 3: "beta", 4: "alpha"}
    assert {name: member.node_id for name, member in roster.gather().items()} == {"alpha": 4, "beta": 3}
    assert refusals(tmp_path) == [
        "a client claims the name 'beta', which is that of another client's key: its key is registered as 'alpha';"
        " start it without --name, or with --name 'alpha'",
        "a client claims the name 'free', which is not its key's: its key is registered as 'gamma'; start it without"
        " --name, or with --name 'gamma'",
    ]


def test_nobody_without_a_key_takes_the_name_of_one(tmp_path):
    mailbox = ScriptedMailbox({1: client("alpha"), 2: client("beta"), 3: client("gamma")})
    roster = roster_over(mailbox, settings_with(federation__min_clients=2), tmp_path)
    roster._keys = lambda: {1: "alpha", 2: "beta", 9: "gamma"}
    assert "gamma" not in roster.gather()


@pytest.mark.parametrize("twin", ["сeleba", "Celeba", "ce1eba", "celebа", "ｃeleba", "celebà"])  # noqa: RUF001
def test_a_name_that_looks_like_anothers_is_refused_in_one_line(tmp_path, twin):
    mailbox = ScriptedMailbox({1: client("celeba"), 2: client("vggface2"), 3: client(twin)})
    assert list(roster_over(mailbox, settings_with(), tmp_path).gather()) == ["celeba", "vggface2"]
    assert refusals(tmp_path) == [
        f"a client claims the name {twin!r}, which looks like 'celeba'; start it with another --name"
    ]


def test_a_name_that_ends_in_a_blank_is_refused_in_one_line(tmp_path):
    mailbox = ScriptedMailbox({1: client("celeba"), 2: client("vggface2"), 3: client("celeba ")})
    assert list(roster_over(mailbox, settings_with(), tmp_path).gather()) == ["celeba", "vggface2"]
    (refused,) = refusals(tmp_path)
    assert "the name 'celeba ' cannot be used" in refused


def test_with_keys_a_node_that_nobody_admitted_is_not_even_asked(tmp_path):
    """What it would be asked with are the run's settings, and in the next round the model."""
    mailbox = ScriptedMailbox({1: client("alpha"), 2: client("beta"), 3: client("sneaky")})
    roster = roster_over(mailbox, settings_with(), tmp_path)
    roster._keys = lambda: {1: "alpha", 2: "beta"}
    assert list(roster.gather()) == ["alpha", "beta"]
    assert 3 not in [node for node, _ in mailbox.tasks]
    roster._keys = lambda: {2: "beta", 3: "sneaky"}  # alpha was turned out, and sneaky's key was added
    assert list(roster.gather()) == ["beta", "sneaky"]


def test_in_a_simulation_every_node_joins_before_the_first_round(tmp_path):
    """Otherwise the members of round 1, and with them the bits of the model, would depend on who was quick."""
    slow = []

    def slow_client(task, message):
        slow.append(1)
        return client("slow")(task, message) if len(slow) > 2 else None

    mailbox = ScriptedMailbox({1: client("alpha"), 2: client("beta"), 3: slow_client})
    assert len(roster_over(mailbox, settings_with(), tmp_path, all_here=True).gather()) == 3


def test_in_a_simulation_there_is_no_waiting_for_a_node_that_cannot_come(tmp_path):
    mailbox = ScriptedMailbox({1: client("alpha"), 3: failing_to_join})
    settings = settings_with(federation__join_timeout_s=60.0)
    with pytest.raises(NotEnoughClients, match=r"nobody else can come .*gamma: data/gamma holds no pictures"):
        roster_over(mailbox, settings, tmp_path, all_here=True).gather()


def test_an_answer_that_is_none_of_ours_is_left_out(tmp_path):
    def foreign(_task, message):
        return Message(wire.RecordDict({"site": wire.ConfigRecord({"name": "x"})}), reply_to=message)

    mailbox = ScriptedMailbox({1: client("alpha"), 2: client("beta"), 3: foreign, 4: client("bad/name")})
    assert list(roster_over(mailbox, settings_with(), tmp_path).gather()) == ["alpha", "beta"]
    assert kinds_of(tmp_path).count("refused") == 2


def test_waiting_ends_when_the_run_is_stopped():
    with pytest.raises(InterruptedRun) as seen:
        Waiter(lambda: True).until(lambda: None, time.monotonic() + 60)
    assert seen.value.exit_code == 130


def test_what_is_there_at_the_deadline_is_taken():
    assert Waiter(lambda: False).until(lambda: "reply", time.monotonic() - 1) == "reply"
    assert Waiter(lambda: False).until(lambda: None, time.monotonic() - 1) is None
