"""Samples and crowds in the round loop: who is asked, what is needed, and a record that does not grow with them."""

import itertools
import json

import pytest
from tiny_federation import ScriptedMailbox, client, federation_over, reply_to, roster_over, settings_with

from common import config
from common.errors import NotEnoughClients
from common.system.events import EventReader
from server.exchange.roster import MOST_TOLD_APART, sample
from server.record.history import Tally, quantiles

pytestmark = pytest.mark.usefixtures("in_a_run")
NUM = MOST_TOLD_APART + 8


def crowd(count=NUM):
    """Client number n's pictures pull by n, so a model tells whose they were."""
    return {
        number: client(f"c-{number:03d}", lambda task, n=number: reply_to(task, change=float(n), auc=0.5 + n / 100))
        for number in range(1, count + 1)
    }


def federated(folder, nodes, **settings):
    federation = federation_over(ScriptedMailbox(nodes), settings_with(**settings), folder)
    return federation, federation.run()


def asked(federation, kind, step):
    """Who was asked for something; the farewell asks for nothing."""
    tasks = federation.mailbox.tasks
    return [node for node, task in tasks if (task.kind, task.server_round) == (kind, step) and task.splits]


def test_a_round_asks_its_sample_and_its_model_is_theirs(tmp_path):
    federation, outcome = federated(tmp_path, crowd(6), federation__clients_per_round=2)
    members = {f"c-{number:03d}": number for number in range(1, 7)}
    total = 0.0
    for step in (1, 2):
        drawn = sample(members, federation.settings.federation, seed=1, server_round=step)
        assert asked(federation, "train", step) == list(drawn.values())
        total += sum(drawn.values()) / 2  # the mean of their changes, all of ten pictures
    assert federation.model.received.tolist() == [pytest.approx(total)] * federation.manifest.size
    assert outcome.last_round == 2


def test_the_last_model_and_the_best_are_scored_by_everybody_in_waves(tmp_path):
    federation, outcome = federated(tmp_path, crowd(5), federation__clients_per_round=2)
    assert asked(federation, "evaluate", 2) == [1, 2, 3, 4, 5]
    best = outcome.history.best_round
    if best != 2:
        assert asked(federation, "evaluate", best) == [1, 2, 3, 4, 5]
    assert set(outcome.history.at(best).sums["test"]) == {f"c-{number:03d}" for number in range(1, 6)}


def test_a_sample_below_min_clients_needs_all_of_its_replies(tmp_path):
    nodes = crowd(4)
    nodes[9] = client("c-009", lambda _task: None)
    settings = settings_with(federation__min_clients=4, federation__clients_per_round=3, federation__rounds=1)
    names = [*(f"c-{number:03d}" for number in range(1, 5)), "c-009"]
    seed = next(
        seed
        for seed in itertools.count()
        if "c-009" in sample(dict.fromkeys(names), settings.federation, seed=seed, server_round=1)
    )
    federation = federation_over(ScriptedMailbox(nodes), config.with_value(settings, "run", "seed", seed), tmp_path)
    with pytest.raises(NotEnoughClients, match=r"2 of 3 clients gave a usable reply, 3 are needed"):
        federation.run()


def test_of_many_clients_the_record_has_quantiles_and_no_runs(tmp_path):
    federation, outcome = federated(tmp_path, crowd(), federation__rounds=1)
    summary = federation.record.finished(outcome.history, outcome.last_round, outcome.sha256)
    rows = [json.loads(line) for line in (tmp_path / "spool.jsonl").read_text().splitlines()]
    assert {row.get("run", "") for row in rows if "key" in row} == {""}
    logged = {(row["key"], row["step"]): row["value"] for row in rows if "key" in row}
    # the AUC of client n is (50 + n) hundredths, here of 1 to 40
    assert logged["deciles/val_roc_auc_p50", 0] == pytest.approx(0.705, abs=0.01)
    assert logged["deciles/val_roc_auc_p10", 0] == pytest.approx(0.549, abs=0.01)
    assert not outcome.history.at(1).sums["test"]  # half a megabyte of each would stay
    assert outcome.history.tested(1)
    events = list(EventReader(tmp_path).new_events())
    assert sum(event["kind"] == "warning" for event in events) == 1
    assert max(len(json.dumps(event)) for event in events) < 10_000
    assert summary["clients"] == {}
    assert "deciles/round_test_roc_auc_p50" in summary["clients_quantiles"]


def test_many_join_without_a_line_for_each(tmp_path):
    roster = roster_over(ScriptedMailbox(crowd()), settings_with(federation__min_clients=NUM), tmp_path, all_here=True)
    assert len(roster.gather()) == NUM
    events = list(EventReader(tmp_path).new_events())
    assert [event["kind"] for event in events].count("joined") == MOST_TOLD_APART
    assert events[-1]["kind"] == "gathered"
    assert (events[-1]["clients"], events[-1]["wanted"]) == (NUM, NUM)


def test_a_tally_pools_all_and_tells_few_apart(tmp_path):
    tally = Tally("val")
    federation, _ = federated(tmp_path, crowd(2), federation__rounds=1)
    task = next(task for _, task in federation.mailbox.tasks if task.kind == "train")
    for number in range(NUM):
        tally.add({f"c{number}": reply_to(task, auc=0.6)})
        assert len(tally.by_client) == (number + 1 if number < MOST_TOLD_APART else 0)
    assert tally.total.pairs.sum() == NUM * 200
    assert len(tally.metrics) == NUM


def test_quantiles_are_of_those_who_have_the_figure():
    metrics = {f"c{number}": {"loss": float(number)} for number in range(11)} | {"none": {}}
    assert quantiles(metrics) == {"deciles/loss_p10": 1.0, "deciles/loss_p50": 5.0, "deciles/loss_p90": 9.0}
