"""`flwr run` in one process: the ServerApp and the ClientApp of the bundle, a fresh site for each message, as stock
Flower has it, give the bits of clients that stay; stopped and gone on with; as a simulation; and failing as failed."""

import dataclasses
import json
import logging
import sys
from collections.abc import Iterable

import pytest
from flwr.app import Context, Message, RecordDict
from tiny_federation import UNWATCHED, InProcessMailbox, enter_run, enter_tiny_federation, settings_with, tiny_pack

import clients.app
import clients.local_update
import clients.message_handler
from clients.app import respond
from clients.egress import LEDGER
from common import config
from common.errors import FaceFedError, UserError
from common.protocol import wire
from common.system.events import STOP_FILE
from server.app import Surroundings, federate
from server.flower.public_grid import PublicMailbox
from server.run_config import declared
from server.stock import OneLineOfOurs, Settled, mailbox_over, run

ROUNDS = 3
OWN_MACHINES = ("max_epsilon", "max_delta")  # more than a file may allow


@pytest.fixture(autouse=True)
def tiny_packs(monkeypatch):
    """A site's pictures by the last part of its folder's name."""
    enter_run(monkeypatch)
    monkeypatch.delitem(sys.modules, "ray", raising=False)  # of another file's tests: only an actor has it
    monkeypatch.setattr(clients.message_handler, "_workplaces", {})
    monkeypatch.setattr(clients.packs, "open_pack", lambda _dataset, data_dir, *_, **__: tiny_pack(data_dir.name))
    monkeypatch.setattr(clients.app, "check_room", lambda *_: None)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy") / "own.toml"
    values = {name: value for name, value in dataclasses.asdict(UNWATCHED).items() if name not in OWN_MACHINES}
    lines = (f"{name} = {json.dumps(value)}\n" for name, value in values.items())
    path.write_text("".join(lines))
    return path


class StockMailbox:
    """A Mailbox whose nodes are stock SuperNodes' ClientApp, each message in what may as well be another process."""

    def __init__(self, nodes, run_config, watch=lambda _task: None):
        self.nodes, self._run_config, self._watch = nodes, run_config, watch
        self._sent: list[Message] = []

    def node_ids(self):
        return sorted(self.nodes)

    def expect(self, num_bytes):
        pass

    def send(self, messages: Iterable[Message]):
        first = len(self._sent)
        self._sent += messages
        return [str(number) for number in range(first, len(self._sent))]

    def receive(self, message_id, _deadline=None):
        message = self._sent[int(message_id)]
        self._watch(wire.read_task(message.content)[0])
        clients.message_handler._workplaces.clear()
        node = message.metadata.dst_node_id
        config_of = {"run_id": 1, "node_id": node, "state": RecordDict(), "run_config": self._run_config}
        return respond(message, Context(node_config=self.nodes[node], **config_of))

    def is_short(self, _message_id):
        return False


@pytest.fixture
def given(tmp_path):
    """A run's configuration: a file, and settings over it."""
    settings = settings_with(federation__rounds=1, federation__join_timeout_s=20.0)
    (tmp_path / "tiny.toml").write_text(config.to_toml(settings))
    own = {"config": str(tmp_path / "tiny.toml"), "federation.rounds": ROUNDS, "run.out": str(tmp_path / "runs")}
    return declared() | own


@pytest.fixture
def nodes(tmp_path, policy):
    return {
        100 + number: {
            "dataset": "folder", "data-dir": f"/pictures/{name}", "name": name, "device": "cpu", "site-seed": 1,
            "state-dir": str(tmp_path / "sites" / name), "policy": str(policy),
        }
        for number, name in enumerate(("alpha", "beta"))
    }  # fmt: skip


@pytest.fixture(scope="module")
def resident(tmp_path_factory):
    """The model of clients that stay, by SHA-256."""
    folder = tmp_path_factory.mktemp("resident")
    with pytest.MonkeyPatch.context() as patch:
        enter_tiny_federation(patch)
        settings = settings_with(federation__rounds=ROUNDS, federation__join_timeout_s=20.0)
        (folder / "run-1").mkdir()
        surroundings = Surroundings(
            run_folder=folder / "run-1", stopped=lambda: False, all_nodes_are_here=lambda: True, git_commit="none"
        )
        federate(settings, InProcessMailbox(("alpha", "beta"), folder / "sites"), surroundings)
    return json.loads((folder / "run-1" / "metrics.json").read_text())["model_sha256"]


def summary_of(folder):
    [found] = list(folder.glob("*/metrics.json"))
    return json.loads(found.read_text())


def test_a_process_for_each_message_gives_the_bits_of_clients_that_stay(tmp_path, given, nodes, resident, capsys):
    run(given, StockMailbox(nodes, given))
    said = capsys.readouterr().out
    assert summary_of(tmp_path / "runs")["model_sha256"] == resident
    assert f"model SHA-256 {resident}" in said
    assert f"round {ROUNDS} of {ROUNDS}" in said
    [folder] = (tmp_path / "runs").iterdir()
    for name in ("alpha", "beta"):
        lines = (tmp_path / "sites" / name / LEDGER / f"{folder.name}.jsonl").read_text().splitlines()
        sent = [line["answer_to"] for line in map(json.loads, lines) if line["kind"] == "sent"]
        assert sent.count("train") == ROUNDS
        assert sent[0] == "join"
        assert list((tmp_path / "sites" / name / "private" / folder.name).iterdir())


def test_it_is_stopped_fails_with_the_line_that_goes_on_and_gives_the_same_bits(tmp_path, given, nodes, resident):
    def stop(task):
        if task.server_round == 2:
            (tmp_path / "runs" / task.run_id / STOP_FILE).touch()

    with pytest.raises(FaceFedError, match=r"stopped by the user.* --run-config 'resume=") as raised:
        run(given, StockMailbox(nodes, given, stop))
    [folder] = (tmp_path / "runs").iterdir()
    assert f'resume="{folder}"' in str(raised.value)
    again = declared() | {"resume": folder.name, "run.out": str(tmp_path / "runs")}
    run(again, StockMailbox(nodes, again))
    assert summary_of(tmp_path / "runs")["model_sha256"] == resident
    with pytest.raises(UserError, match="that run is finished"):
        run(again, StockMailbox(nodes, again))


def test_flowers_simulation_gives_the_same_bits_and_a_partition_too_many_is_told(
    tmp_path, given, resident, monkeypatch, capsys
):
    monkeypatch.setattr(clients.app, "is_simulated", lambda: True)
    asked = given | {"clients": "beta:folder=/pictures/beta,alpha:folder=/pictures/alpha"}
    partitions = {7 + number: {"partition-id": number, "num-partitions": 3} for number in range(3)}
    run(asked, StockMailbox(partitions, asked))
    assert summary_of(tmp_path / "runs")["model_sha256"] == resident
    assert "partition 2 has no client: clients names 2 (alpha, beta)" in capsys.readouterr().out
    assert (tmp_path / "runs" / "clients" / "alpha" / LEDGER).is_dir()


def test_nodes_that_are_no_sites_are_told_by_what_they_lack_and_the_run_fails(given, nodes):
    asked = given | {"federation.join_timeout_s": 0.3}
    bare = {100: nodes[100], 101: {"dataset": "folder"}}
    with pytest.raises(FaceFedError, match=r"1 of 2 clients joined .* Refused: .* its configuration has no data-dir;"):
        run(asked, StockMailbox(bare, asked))


def test_a_site_that_its_policy_keeps_out_says_the_settings_name_and_nothing_else(tmp_path, given, nodes):
    (tmp_path / "strict.toml").write_text("max_lr = 0.001\nmax_rounds = 1000\n")
    nodes[101]["policy"] = str(tmp_path / "strict.toml")
    asked = given | {"federation.join_timeout_s": 0.3}
    with pytest.raises(FaceFedError, match=r"beta: .*training\.lr"):
        run(asked, StockMailbox(nodes, asked))


class Grid:
    """Flower's Grid, by what it shows."""

    def __init__(self, mailbox):
        self._mailbox = mailbox

    def get_node_ids(self):
        return iter(self._mailbox.node_ids())

    def push_messages(self, messages):
        return self._mailbox.send(messages)

    def pull_messages(self, message_ids):
        replies = [self._mailbox.receive(name) for name in message_ids]
        for name, reply in zip(message_ids, replies, strict=True):
            reply.metadata.__dict__["_reply_to_message_id"] = name
        return replies


def test_where_flowers_inside_has_changed_its_public_interface_gives_the_same_bits(
    tmp_path, given, nodes, resident, monkeypatch, caplog
):
    monkeypatch.setitem(sys.modules, "server.flower.grid", None)  # so that importing it fails
    monkeypatch.setattr(logging.getLogger("facefed"), "propagate", True)
    mailbox = mailbox_over(Grid(StockMailbox(nodes, given)))
    assert type(mailbox) is PublicMailbox
    assert "Flower's inside has changed" in caplog.text
    run(given, mailbox)
    assert summary_of(tmp_path / "runs")["model_sha256"] == resident


def test_an_error_of_ours_is_one_line_in_flowers_log(caplog):
    flowers = logging.getLogger("flwr-of-this-test")
    flowers.addFilter(OneLineOfOurs())
    for error in (FaceFedError("1 of 2 clients joined"), ZeroDivisionError("division")):
        flowers.error("%s raised an exception", "ServerApp", exc_info=error)
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 2 clients joined",
        "ServerApp raised an exception",
    ]
    assert [record.exc_info is None for record in caplog.records] == [True, False]


def test_who_can_come_to_a_simulation_is_known_once_its_nodes_have_settled():
    mailbox, now = StockMailbox({}, {}), [0.0]
    deployment, simulation = (Settled(mailbox, number, clock=lambda: now[0]) for number in (0, 3))
    assert not simulation()
    mailbox.nodes = {1: {}, 2: {}}
    assert not simulation()
    now[0] = 4.9
    assert not simulation()
    now[0] = 5.0
    assert simulation()
    mailbox.nodes = {1: {}, 2: {}, 3: {}}
    assert simulation()
    assert not deployment()
