"""Errors by group in a federation: counted at the sites, added, told once, and left out where too few people are.

Each site has six test people, three of each group: two of six pictures and one of three, or one and two.
"""

import dataclasses
import json

import numpy as np
import pytest
import tiny_federation
from secure_federation import secure_mailbox
from tiny_federation import InProcessMailbox, enter_tiny_federation, settings_with, tiny_pack

import clients.group_scores
import clients.message_handler
from common.errors import ConfigError, UserError
from common.faces.splits import Split
from common.metrics.groups import GROUP_ROW, GroupPairs
from common.protocol import wire
from server.app import Surroundings, federate

THREE = ("alpha", "beta", "gamma")
MALE, OTHERS = (0, 1, 9), (2, 10, 11)
GENUINE = {"Male": 15 + 15 + 3, "not Male": 15 + 3 + 3}  # pairs of a site
IMPOSTOR = {"Male": 6 * 6 + 2 * 6 * 3, "not Male": 2 * 6 * 3 + 3 * 3}


def wider_pack(name):
    """Of the tiny pack's training people three are tested on, and one validates: enough pairs for FAR 0.1."""
    pack = tiny_pack(name)
    split = np.where(pack.person < 3, Split.TEST_PEOPLE, pack.split)
    return dataclasses.replace(pack, split=np.where(pack.person == 3, Split.VAL_PEOPLE, split).astype(np.int8))


def people_of_groups(_dataset, _root, attributes, name):
    assert attributes == ("Male",)
    if name == "folder":
        raise UserError("folder says nothing of its people")
    return {"Male": [f"{name}-{one}" for one in MALE], "not Male": [f"{name}-{one}" for one in OTHERS]}


@pytest.fixture(autouse=True)
def tiny_packs(monkeypatch):
    enter_tiny_federation(monkeypatch)
    monkeypatch.setattr(tiny_federation, "tiny_pack", wider_pack)
    monkeypatch.setattr(clients.group_scores, "people_of_groups", people_of_groups)


def federation(folder, names=THREE, *, secure=False, policies=None, tamper=lambda _name, _task, reply: reply, **values):
    """Run it; returns (outcome, summary)."""
    clients.message_handler._workplaces.clear()
    make = secure_mailbox if secure else InProcessMailbox
    mailbox = make(names, folder / "sites", tamper)
    for node, site in mailbox.sites.items():
        policy = dataclasses.replace(site.policy, **(policies or {}).get(site.name, {}))
        mailbox.sites[node] = dataclasses.replace(site, policy=policy)
    usual = {
        "federation__rounds": 1, "federation__min_clients": 3, "federation__join_timeout_s": 20.0,
        "verification__by": "Male", "verification__group_people": 3, "secagg__enabled": secure,
    }  # fmt: skip
    run = folder / "run-1"
    run.mkdir(parents=True)
    federate(
        settings_with(**(usual | values)),
        mailbox,
        Surroundings(run_folder=run, stopped=lambda: False, all_nodes_are_here=lambda: True, git_commit="none"),
    )
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome == {"exit_code": 0, "line": ""}
    return json.loads((run / "metrics.json").read_text())


def groups_of(summary):
    (one,) = summary["groups"]["models"]
    return {row["group"]: row for row in one["errors"]}, one


def test_the_sites_pairs_are_added_and_secure_aggregation_opens_the_same_sums(tmp_path):
    plain, masked = (federation(tmp_path / kind, secure=kind == "masked") for kind in ("plain", "masked"))
    found, one = groups_of(plain)
    for group, row in found.items():
        assert (row["num_people"], row["num_sites"]) == (9, 3)
        assert (row["num_genuine_pairs"], row["num_impostor_pairs"]) == (3 * GENUINE[group], 3 * IMPOSTOR[group])
        assert 0.0 <= row["fmr_low"] <= row["fmr"] <= row["fmr_high"] <= 1.0
    assert found.keys() == {"Male", "not Male"}
    assert one["threshold"]["far"] == 0.1
    assert groups_of(masked)[1] == one | {"threshold": groups_of(masked)[1]["threshold"]}
    kept = json.loads((tmp_path / "plain" / "run-1" / "groups.json").read_text())
    assert kept == plain["groups"]
    spool = (tmp_path / "plain" / "run-1" / "spool.jsonl").read_text()
    assert '"groups/not Male/fnmr"' in spool


@pytest.mark.parametrize(
    "policy",
    [
        {"groups": False},
        {"scores": "noisy"},
        {"min_group_people": 4},
        {"min_pairs": 30},  # who is not in the group has 21 genuine pairs, so nothing leaves of those who are either
    ],
)
def test_a_sites_policy_keeps_its_groups_and_it_takes_part(tmp_path, policy, caplog):
    with caplog.at_level("INFO", logger="facefed.client"):
        summary = federation(tmp_path, policies={"beta": policy})
    found, _ = groups_of(summary)
    assert {row["num_sites"] for row in found.values()} == {2}
    assert {row["num_people"] for row in found.values()} == {6}
    assert "beta" in summary["clients"]
    assert "beta: errors by group: nothing leaves (" in caplog.text


def test_a_site_whose_data_say_nothing_of_people_takes_part_without(tmp_path):
    found, _ = groups_of(federation(tmp_path, names=("alpha", "beta", "folder")))
    assert {row["num_sites"] for row in found.values()} == {2}


def test_fewer_people_than_asked_for_at_each_site_are_told_and_nothing_of_them_leaves(tmp_path):
    seen = []

    def watch(_name, task, reply):
        if task.splits == "groups":
            seen.append(wire.read_reply(reply, "groups").groups)
        return reply

    found, one = groups_of(federation(tmp_path, tamper=watch, verification__group_people=4))
    assert (found, one["too_small"]) == ({}, {"Male": 0, "not Male": 0})
    assert len(seen) == 3
    assert not any(rows.any() for rows in seen)


def test_they_are_asked_for_once_and_only_where_the_run_wants_them(tmp_path):
    asked = []

    def watch(name, task, reply):
        asked.append((name, task.kind, task.splits))
        return reply

    federation(tmp_path / "a", tamper=watch)
    assert sorted(one for one in asked if one[2] == "groups") == [(name, "evaluate", "groups") for name in THREE]
    asked.clear()
    summary = federation(tmp_path / "b", tamper=watch, verification__by="none")
    assert not any("groups" in splits for _, _, splits in asked)
    assert "groups" not in summary


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rows: rows[:1],  # one group less
        lambda rows: rows * 2,  # two sites in one
        lambda rows: rows + np.eye(1, GROUP_ROW, 5, dtype=np.int64) * 10**9,  # more pairs than pictures have
        lambda rows: rows + np.eye(1, GROUP_ROW, GROUP_ROW - 2, dtype=np.int64),  # pairs of people who are not there
    ],
)
def test_what_no_people_give_is_refused_and_the_run_is_whole_without(tmp_path, spoil):
    def tamper(name, task, reply):
        if name == "beta" and task.splits == "groups":
            read = wire.read_reply(reply, "groups")
            content = wire.reply_content(dataclasses.replace(read, groups=spoil(read.groups)))
            reply.content["arrays"] = content["arrays"]
        return reply

    summary = federation(tmp_path, tamper=tamper, federation__min_clients=2)
    found, _ = groups_of(summary)
    assert {row["num_sites"] for row in found.values()} == {2}
    assert summary["refused_replies"] == 1


def test_a_row_comes_back_and_adds():
    pairs = GroupPairs(histogram=np.arange(2 * 8192).reshape(2, 8192), num_people=5, num_people_pairs=10)
    both = GroupPairs.of_row(pairs.row + pairs.row)
    assert np.array_equal(both.histogram, 2 * pairs.histogram)
    assert (both.num_people, both.num_people_pairs, both.num_sites) == (10, 20, 2)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"privacy__unit": "person"}, "with privacy.unit"),
        ({"verification__by": "Male,Male"}, "each once"),
        ({"verification__by": "Male; rm"}, "of letters, digits"),
        ({"verification__by": "Male,"}, "give 1 to 16 attributes"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_in_one_line(values, told):
    with pytest.raises(ConfigError, match=told) as caught:
        settings_with(**({"verification__by": "Male"} | values))
    assert "verification.by = " in str(caught.value)
