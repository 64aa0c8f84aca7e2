"""A stock SuperNode's configuration: it is flower-client's flags, and whatever is wrong with it is one line."""

import dataclasses
import importlib.metadata
import json
import sys
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from tiny_federation import enter_run

import clients.app
from clients.app import NOT_USABLE, respond
from clients.egress import LEDGER
from clients.node import NodeRefused, check_room, site_of_node, site_of_partition
from clients.policy import DEFAULT, OWN_MACHINE
from clients.secure_sum import keys_of
from clients.site import OF_RUN, OF_SITE
from clients.state_folder import state_folder_held
from common.errors import UserError
from common.protocol import wire
from common.protocol.wire import Task
from common.system import runtime
from simulation.admin.certs import make_folder

WHOLE = {"dataset": "celeba", "data-dir": "/data/celeba", "device": "cpu"}


@pytest.fixture(autouse=True)
def _run(monkeypatch):
    enter_run(monkeypatch)
    monkeypatch.delitem(sys.modules, "ray", raising=False)  # of another file's tests: only an actor has it


# ---- a site


def test_it_is_flower_clients_flags_with_its_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    site = site_of_node(WHOLE)
    assert (site.name, site.dataset, str(site.data_dir), site.device) == ("celeba", "celeba", "/data/celeba", "cpu")
    assert site.state_dir == tmp_path / ".facefed" / "clients" / "celeba"
    assert site.cache_dir == tmp_path / ".facefed" / "packs"
    assert (site.policy, site.seed, site.tracking_uri, site.share) == (DEFAULT, OF_SITE, "", None)
    (tmp_path / "own.toml").write_text("max_rounds = 33\n")
    more = {"name": "north", "state-dir": "s", "cache-dir": "c", "policy": "own.toml", "site-seed": 7}
    site = site_of_node(
        WHOLE | more | {"partition-id": 0, "num-partitions": 2, "tracking-uri": "http://127.0.0.1:5000"}
    )
    assert (site.name, site.state_dir, site.cache_dir) == ("north", tmp_path / "s", tmp_path / "c")
    assert (site.policy.max_rounds, site.seed, site.tracking_uri) == (33, 7, "http://127.0.0.1:5000")


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({}, "its configuration has no dataset and no data-dir; start its SuperNode with --node-config 'dataset="),
        ({"dataset": "celeba"}, "its configuration has no data-dir;"),
        ({"data-dir": "/x", "dataset": ""}, "its configuration has no dataset;"),
        (WHOLE | {"polcy": "x"}, "--node-config: the key = 'polcy' is unknown; did you mean 'policy'?"),
        (WHOLE | {"dataset": "celebs"}, "--node-config: the dataset = 'celebs' is unknown; did you mean 'celeba'?"),
        (WHOLE | {"site-seed": "7"}, "--node-config: site-seed must be a whole number."),
        (WHOLE | {"name": 7}, '--node-config: name must be a text in quotes, such as "celeba".'),
        (WHOLE | {"name": "../x"}, "--node-config: name must be "),
    ],
)
def test_what_is_wrong_is_told_to_the_server_without_anything_of_this_machine(config, line):
    with pytest.raises(NodeRefused) as raised:
        site_of_node(config)
    assert line in str(raised.value)
    assert "/x" not in str(raised.value)


def test_its_keys_of_secure_aggregation_are_those_of_the_folder_of_certs(tmp_path, monkeypatch):
    make_folder(tmp_path / "tls", ["localhost"], ["north", "south"])
    monkeypatch.chdir(tmp_path)
    assert site_of_node(WHOLE).keys is None
    for name in ({}, {"name": "north"}):
        site = site_of_node(WHOLE | name | {"keys": "tls/north"})
        assert (site.name, site.keys, site.state_dir.name) == ("north", tmp_path / "tls" / "north", "north")
    keys = keys_of(site)
    assert keys.own.name == "north"
    keys.require("south")
    with pytest.raises(NodeRefused, match="keys holds the key of 'south' and name is 'north'") as refused:
        site_of_node(WHOLE | {"name": "north", "keys": "tls/south"})
    assert str(tmp_path) not in str(refused.value)
    with pytest.raises(UserError, match="nobody cannot be read") as broken:  # whose line holds a path, so it stays here
        site_of_node(WHOLE | {"keys": "tls/nobody"})
    assert not isinstance(broken.value, NodeRefused)


def test_a_policy_that_cannot_be_read_is_no_policy_and_stays_here(tmp_path):
    with pytest.raises(UserError) as raised:
        site_of_node(WHOLE | {"policy": str(tmp_path / "none.toml")})
    assert not isinstance(raised.value, NodeRefused)


def test_a_policy_that_the_sites_data_can_never_meet_is_told(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "1.jpg").write_bytes(b"")
    site = site_of_node({"dataset": "folder", "data-dir": str(tmp_path), "device": "cpu"})
    with pytest.raises(UserError, match="min_training_people = 4 is more than the 1 that this site has"):
        check_room(site, "")


# ---- a client of Flower's simulation

TWO = "north:folder=/data/n, celeba=/data/celeba"


def test_partitions_are_the_clients_in_order_of_their_names(tmp_path):
    first, second = (
        site_of_partition({"partition-id": number, "num-partitions": 2}, TWO, out=str(tmp_path)) for number in (0, 1)
    )
    assert [(site.name, site.dataset, str(site.data_dir)) for site in (first, second)] == [
        ("celeba", "celeba", "/data/celeba"),
        ("north", "folder", "/data/n"),
    ]
    assert (first.policy, first.seed, first.state_dir) == (OWN_MACHINE, OF_RUN, tmp_path / "clients" / "celeba")


@pytest.mark.parametrize(
    ("number", "of", "clients", "line"),
    [
        (2, 3, TWO, "partition 2 has no client: clients names 2 (celeba, north); give --federation-config"),
        (0, 1, TWO, "the simulation has 1 SuperNodes and clients names 2 (celeba, north); give --federation-config"),
        (1, 2, "", "partition 1 has no client: give --run-config 'clients=\"celeba=/data/celeba\"'."),
        (0, 1, "celeba", "clients celeba: write NAME=DIR"),
        (0, 1, "celeba=data/celeba", "clients celeba=data/celeba: write an absolute path"),
        (0, 2, "celeba=/a,celeba=/b", "two clients claim the name 'celeba'"),
    ],
)
def test_a_partition_without_a_client_says_which_it_is(number, of, clients, line):
    with pytest.raises(NodeRefused) as raised:
        site_of_partition({"partition-id": number, "num-partitions": of}, clients, out="runs")
    assert line in str(raised.value)


# ---- versions


def test_a_bundle_of_another_version_is_told_with_both(monkeypatch):
    monkeypatch.setattr(runtime, "facefed_version", lambda: "0.2.0")
    monkeypatch.setattr(runtime, "installed_version", lambda: "0.1.0")
    with pytest.raises(UserError, match=r"bundle is facefed 0\.2\.0, and this node has facefed 0\.1\.0 installed"):
        site_of_node(WHOLE)
    monkeypatch.setattr(runtime, "installed_version", lambda: "unknown")  # what it needs is there, it itself is not
    assert site_of_node(WHOLE).name == "celeba"


def test_the_version_of_this_code_is_that_of_the_project_file_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "common" / "system" / "runtime.py"))
    monkeypatch.setattr(runtime, "installed_version", lambda: "9.9")
    for text, version in (
        ('[project]\nname = "facefed"\nversion = "1.2.3"\n', "1.2.3"),
        ('[project]\nname = "other"\nversion = "1.2.3"\n', "9.9"),
        ("no TOML", "9.9"),
    ):
        (tmp_path / "pyproject.toml").write_text(text)
        runtime.facefed_version.cache_clear()
        assert runtime.facefed_version() == version
    runtime.facefed_version.cache_clear()


def test_flower_outside_of_the_tested_versions_is_one_line_and_goes_on_where_that_is_accepted(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"flwr": "1.43.0"}[name])
    with pytest.raises(UserError, match=r"Flower 1\.43\.0 is none .* \(1\.41 and 1\.42\); .* give --any-flower to go"):
        runtime.require_tested_flower(any_flower=False)
    assert runtime.require_tested_flower(any_flower=True).endswith("it goes on, as --any-flower asks")
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "1.42.7")
    assert runtime.require_tested_flower(any_flower=False) == ""


# ---- the ClientApp


def message_of(**task):
    plain = {"kind": "join", "run_id": "run-1", "server_round": 0, "settings": json.dumps({"run": {"out": "runs"}})}
    return Message(RecordDict({wire.TASK: ConfigRecord(plain | task)}), 1, "query")


def context_of(node=None, run=None):
    return Context(run_id=1, node_id=1, node_config=node or {}, state=RecordDict(), run_config=run or {})


@pytest.fixture
def answered(monkeypatch):
    """Whom the messages came to that were answered."""
    found = []

    def handle(site, message):
        found.append(site)
        return Message(RecordDict(), reply_to=message)

    monkeypatch.setitem(sys.modules, "clients.message_handler", SimpleNamespace(handle=handle))
    monkeypatch.setattr(clients.app, "check_room", lambda *_: None)
    return found


def test_a_message_is_answered_for_the_site_that_the_node_is(tmp_path, answered):
    reply = respond(message_of(), context_of(WHOLE | {"state-dir": str(tmp_path / "s")}))
    assert not reply.has_error()
    assert [site.name for site in answered] == ["celeba"]
    assert (tmp_path / "s" / "site").read_text() == "celeba"
    assert (tmp_path / "s").stat().st_mode & 0o077 == 0


def test_what_a_run_says_of_clients_is_nothing_to_a_site(tmp_path, answered):
    """Its pictures are in the folder that its own operator named, whatever partition its SuperNode is told to be."""
    run = {"clients": "celeba=/etc"}
    reply = respond(message_of(), context_of({"partition-id": 0, "num-partitions": 1}, run))
    assert "no dataset and no data-dir" in reply.error.reason
    respond(message_of(), context_of(WHOLE | {"state-dir": str(tmp_path / "s"), "partition-id": 0}, run))
    assert [str(site.data_dir) for site in answered] == ["/data/celeba"]


def test_an_actor_of_flowers_simulation_is_the_client_of_its_partition(tmp_path, monkeypatch, answered):
    monkeypatch.setattr(clients.app, "is_simulated", lambda: True)
    message = message_of(settings=json.dumps({"run": {"out": str(tmp_path)}}))
    node, run = {"partition-id": 1, "num-partitions": 2}, {"clients": TWO}
    assert not respond(message, context_of(node, run)).has_error()
    assert [(site.name, site.state_dir) for site in answered] == [("north", tmp_path / "clients" / "north")]
    reply = respond(message, context_of(node | {"partition-id": 2, "num-partitions": 3}, run))
    assert "partition 2 has no client" in reply.error.reason


def test_a_line_with_something_of_this_machine_stays_in_its_own_output(tmp_path, answered, capfd):
    config = WHOLE | {"policy": str(tmp_path / "none.toml")}
    reply = respond(message_of(), context_of(config))
    assert (reply.error.code, reply.error.reason) == (wire.CLIENT_FAILED, NOT_USABLE)
    assert "none.toml" in capfd.readouterr().err
    assert answered == []


def test_one_client_at_a_time_and_one_site_works_in_a_state_folder(tmp_path, answered, monkeypatch, capfd):
    """A refusal of a site that is known is in its ledger, as all that leaves."""
    monkeypatch.setattr(clients.app, "FREE_WITHIN_S", 0.0)
    folder = tmp_path / "s"
    config = context_of(WHOLE | {"state-dir": str(folder)})
    with state_folder_held(folder, "celeba", say=print):
        reply = respond(message_of(), config)
    assert reply.error.reason == f"celeba: {NOT_USABLE}"
    assert f"state-dir {folder} is in use by another client" in capfd.readouterr().err
    assert "celeba" in (folder / LEDGER / "run-1.jsonl").read_text()
    (folder / "site").write_text("north")
    assert respond(message_of(), config).has_error()
    assert f"state-dir {folder} is of the site 'north'" in capfd.readouterr().err
    assert answered == []


def test_whatever_else_goes_wrong_costs_this_reply_only_and_tells_its_kind(tmp_path, monkeypatch, capfd):
    def fail(_site, _message):
        raise ZeroDivisionError("/data/celeba/000001.jpg")

    monkeypatch.setattr(clients.app, "check_room", lambda *_: None)
    monkeypatch.setitem(sys.modules, "clients.message_handler", SimpleNamespace(handle=fail))
    reply = respond(message_of(), context_of(WHOLE | {"state-dir": str(tmp_path / "s")}))
    assert reply.error.reason == "celeba: its task failed (ZeroDivisionError); the node's own output says why."
    assert "000001.jpg" in capfd.readouterr().err


def test_a_task_that_takes_longer_than_the_policy_allows_ends_its_process(monkeypatch):
    ended = []
    monkeypatch.setattr(clients.app.os, "_exit", ended.append)
    done = clients.app.threading.Event()
    clients.app._end_when_late(0.01, done)
    done.set()
    clients.app._end_when_late(60.0, done)
    assert ended == [3]


def test_the_servers_version_is_compared_with_this_sites():
    """A flower-client never sees the bundle: the server says what it is."""
    from clients.message_handler import _check

    plain = Task(kind="join", run_id="r", server_round=0, settings="{}")
    for version in ("", "unknown", runtime.facefed_version()):
        _check(dataclasses.replace(plain, version=version))
    with pytest.raises(Exception, match=r"the server runs facefed 9\.9 and this site facefed .*; install equal"):
        _check(dataclasses.replace(plain, version="9.9"))
