"""The round loop over scripted clients: what counts, what is left out, what is kept, which round is the best."""

import dataclasses
import json
import re
import threading
from functools import partial

import numpy as np
import pytest
from tiny_federation import (
    MANIFEST,
    ScriptedMailbox,
    client,
    federation_over,
    reply_to,
    settings_with,
    sums_with,
)

from common.errors import CheckpointError, DeadlinePassed, NotEnoughClients, UserError
from common.protocol import wire
from common.protocol.parameters import buffer_sha256
from common.system.events import EventReader
from server.exchange.mailbox import Waiter
from server.global_model import GlobalModel
from server.record.checkpoint import RunCheckpoints

pytestmark = pytest.mark.usefixtures("in_a_run")


def answering(**by_round):
    """An answer whose keyword arguments of `reply_to` depend on the task: r1={...} for round 1; else the defaults."""
    return lambda task: reply_to(task, **by_round.get(f"r{task.server_round}", {}))


def run(folder, nodes, **settings):
    federation = federation_over(ScriptedMailbox(nodes), settings_with(**settings), folder)
    return federation, federation.run()


def spooled(folder):
    """(run, metric, step) -> value of everything that was logged."""
    seen = {}
    for line in (folder / "spool.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "key" in row:
            seen[row.get("run", ""), row["key"], row["step"]] = row["value"]
    return seen


def test_two_rounds_add_the_weighted_mean_twice(tmp_path):
    """alpha's 10 pictures pull by 1 and beta's 30 by 3: (10 * 1 + 30 * 3) / 40 = 2.5 each round, so 5.0 after two."""
    nodes = {
        1: client("alpha", lambda task: reply_to(task, change=1.0, num_examples=10)),
        2: client("beta", lambda task: reply_to(task, change=3.0, num_examples=30)),
    }
    federation, outcome = run(tmp_path, nodes)
    assert federation.model.received.tolist() == [5.0] * MANIFEST.size
    assert outcome.sha256 == buffer_sha256(federation.model.received)
    assert outcome.last_round == 2
    sent = [model for model in federation.mailbox.models if model is not None]
    assert [model[0] for model in sent] == [0.0, 0.0, 2.5, 2.5, 5.0, 5.0, 2.5, 2.5]  # the best, round 1's, for good


def test_each_client_gets_one_message_a_round_and_the_last_says_that_it_is_over(tmp_path):
    federation, _ = run(tmp_path, {1: client("alpha"), 2: client("beta")}, federation__rounds=3)
    sent = [(task.kind, task.server_round, task.last) for node, task in federation.mailbox.tasks if node == 1]
    assert sent == [
        ("join", 0, False),
        *(("train", r, False) for r in (1, 2, 3)),
        ("evaluate", 3, False),
        ("evaluate", 1, True),
    ]


def test_scores_of_a_model_belong_to_its_round_though_they_arrive_with_the_next(tmp_path):
    """The reply of round r + 1 scores the model of round r; round 0 is the initial model."""
    answer = answering(r1={"auc": 0.50}, r2={"auc": 0.70})

    def beta(task):
        return reply_to(task, auc=0.90) if task.kind == "evaluate" else answer(task)

    _, outcome = run(tmp_path, {1: client("alpha", beta), 2: client("beta", beta)})
    aucs = {row["step"]: row["val_roc_auc"] for row in outcome.history.rows()}
    assert aucs == pytest.approx({0: 0.50, 1: 0.70, 2: 0.90})


def test_every_score_is_logged_at_the_step_of_its_model(tmp_path):
    answer = answering(r1={"auc": 0.50}, r2={"auc": 0.70})
    run(tmp_path, {1: client("alpha", answer), 2: client("beta", answer)})
    logged = {(key, step): value for (_, key, step), value in spooled(tmp_path).items()}
    assert logged["val_roc_auc", 0] == pytest.approx(0.50)
    assert logged["val_roc_auc", 1] == pytest.approx(0.70)
    assert logged["val_roc_auc", 0] == pytest.approx(0.50)
    assert ("train_loss", 0) not in logged
    assert ("train_loss", 2) in logged


def test_the_best_round_is_chosen_on_validation_and_never_on_test(tmp_path):
    """Round 1's model is the best on validation and the worst on test; the untrained one is never the best."""
    answer = answering(
        r1={"auc": 0.99, "test_auc": 0.9},
        r2={"auc": 0.80, "test_auc": 0.1},
        r3={"auc": 0.70, "test_auc": 0.9},
        r4={"auc": 0.60, "test_auc": 1.0},
    )
    nodes = {1: client("alpha", answer), 2: client("beta", answer)}
    federation, outcome = run(tmp_path, nodes, federation__rounds=4)
    assert outcome.history.best_round == 1
    assert outcome.history.best_val_auc == pytest.approx(0.80)
    assert federation.checkpoints.load(1).tolist() == [0.5] * MANIFEST.size


def test_a_round_that_is_scored_by_a_design_says_so_and_how_far_off_it_may_be(tmp_path):
    """sqrt(1.5e9) pictures: 1.96 sqrt(2 x 0.6 x 0.4 / 38,729) = 0.0069 for the AUC of 0.6 that is answered."""
    drawn = {"num_pairs": 7 * 10**10, "num_scored_pairs": 10**9}
    run(tmp_path / "drawn", {1: client("alpha", **drawn), 2: client("beta")}, federation__rounds=1)
    run(tmp_path / "whole", {1: client("alpha"), 2: client("beta")}, federation__rounds=1)
    found, whole = (spooled(tmp_path / name) for name in ("drawn", "whole"))
    assert found["", "val_roc_auc_half_width", 0] == pytest.approx(0.0069, abs=5e-5)
    assert not any(key == "val_roc_auc_half_width" for _, key, _ in whole)
    events = (tmp_path / "drawn" / "events.jsonl").read_text()
    assert "alpha scores 1e+09 of 7e+10 pairs of unseen people" in events
    assert "about 25 CPU-seconds" in events


def test_an_equal_validation_score_leaves_the_earlier_round_the_best(tmp_path):
    _, outcome = run(tmp_path, {1: client("alpha"), 2: client("beta")}, federation__rounds=3)
    assert outcome.history.best_round == 1


def test_the_clients_are_told_the_best_round_whose_private_state_they_must_keep(tmp_path):
    answer = answering(r2={"auc": 0.9}, r3={"auc": 0.5}, r4={"auc": 0.5})
    nodes = {1: client("alpha", answer), 2: client("beta", answer)}
    federation, _ = run(tmp_path, nodes, federation__rounds=4)
    told = [task.best_round for node, task in federation.mailbox.tasks if node == 1 and task.kind != "join"]
    assert told == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(("every", "tested"), [(1, [0, 1, 2, 3, 4]), (2, [0, 1, 2, 4]), (9, [0, 1, 4])])
def test_the_test_curve_is_thinned_and_keeps_untrained_best_and_last(tmp_path, every, tested):
    answer = answering(r2={"auc": 0.9})  # the model of round 1 is the best
    nodes = {1: client("alpha", answer), 2: client("beta", answer)}
    federation, outcome = run(tmp_path, nodes, federation__rounds=4, federation__test_every_rounds=every)
    assert [step for step in range(5) if outcome.history.tested(step)] == tested
    last = [task.last for node, task in federation.mailbox.tasks if node == 1]
    assert last == [False] * (len(last) - 1) + [True]
    assert (
        federation.model.received.tolist() == [2.0] * MANIFEST.size
    )  # the last model again, after the best was evaluated


# ---- clients that fail


def poisoned(task):
    change = np.zeros(MANIFEST.size, dtype=np.float32)
    change[4] = np.nan
    return reply_to(task, change=change) if task.server_round == 2 and task.kind == "train" else reply_to(task)


def test_a_bad_reply_is_left_out_named_and_counted_and_the_rest_is_averaged(tmp_path):
    nodes = {1: client("alpha"), 2: client("beta", poisoned), 3: client("gamma", lambda t: reply_to(t, change=2.0))}
    federation, outcome = run(tmp_path, nodes)
    first, second = (0.5 + 0.5 + 2.0) / 3, (0.5 + 2.0) / 2
    assert federation.model.received == pytest.approx(first + second)
    assert federation.record.num_refused == 1
    assert federation.record.reasons(2) == {"beta": "the change holds nan in backbone.b"}
    refused = [event for event in EventReader(tmp_path).new_events() if event["kind"] == "refused"]
    assert [(event["client"], event["round"]) for event in refused] == [("beta", 2)]
    assert set(outcome.history.at(1).sums["val"]) == {"alpha", "gamma"}  # nor do its scores count
    summary = federation.record.finished(outcome.history, outcome.last_round, outcome.sha256)
    assert summary["refused_replies"] == 1


def test_a_client_that_is_left_out_twice_in_the_last_round_counts_twice(tmp_path):
    def failing(task):
        bad = task.server_round == 2
        return reply_to(task, auc=0.5) if not bad else dataclasses.replace(reply_to(task), manifest="other")

    nodes = {1: client("alpha"), 2: client("beta"), 3: client("gamma", failing)}
    federation, _ = run(tmp_path, nodes)
    assert federation.record.num_refused == 2  # once when it trained, once when the last model was evaluated
    federation.record.finished(federation.history, 2, federation.sha256)
    lines = [json.loads(line) for line in (tmp_path / "spool.jsonl").read_text().splitlines()]
    told = [(line["step"], line["value"]) for line in lines if line.get("key") == "refused_replies"]
    assert told == [(2, 2.0)]  # a metric has each step once


def with_error_in_round_2(name):
    def script(task, message):
        if task.server_round == 2 and task.kind == "train":
            return wire.error_message(f"{name}: the loss is nan at epoch 2, step 1 of 3", message)
        return client(name)(task, message)

    return script


def test_a_client_that_answers_with_an_error_is_left_out_in_its_own_words(tmp_path):
    nodes = {1: client("alpha"), 2: client("beta"), 3: with_error_in_round_2("gamma")}
    federation, outcome = run(tmp_path, nodes)
    assert federation.record.reasons(2) == {"gamma": "gamma: the loss is nan at epoch 2, step 1 of 3"}
    assert outcome.last_round == 2


def test_a_reply_later_than_the_deadline_is_left_out_and_named(tmp_path):
    def late(task):
        return None if task.server_round == 1 and task.kind == "train" else reply_to(task)

    nodes = {1: client("alpha"), 2: client("beta"), 3: client("gamma", late)}
    federation, _ = run(tmp_path, nodes)
    assert federation.record.reasons(1) == {"gamma": "no answer within 0.3 s"}
    assert federation.model.received.tolist() == [1.0] * MANIFEST.size


def test_the_deadline_is_the_rounds_and_not_each_clients(tmp_path):
    """Three silent clients cost one deadline; what has arrived by then is taken though others were waited for first."""
    nodes = {n: client(f"a{n}", lambda _task: None) for n in (1, 2, 3)}
    nodes |= {8: client("x"), 9: client("y")}
    federation, _ = run(tmp_path, nodes, federation__rounds=1, federation__round_timeout_s=0.5)
    metrics = federation.history.at(1).metrics
    assert metrics["time/round_seconds"] >= 0.5
    assert metrics["time/wait_seconds"] < 1.0
    assert sorted(federation.record.reasons(1)) == ["a1", "a2", "a3"]


def test_a_stragglers_reply_of_round_1_is_not_mixed_into_round_2(tmp_path):
    """Whether it comes as the answer to round 1, which nobody reads any more, or as an answer to round 2."""
    kept = []

    def straggler(task):
        if task.kind == "evaluate":
            return reply_to(task)
        if task.server_round == 1:
            kept.append(task)
            return None
        return reply_to(kept[0], change=100.0)

    nodes = {1: client("alpha"), 2: client("beta"), 3: client("gamma", straggler)}
    federation, _ = run(tmp_path, nodes)
    assert federation.record.reasons(2) == {"gamma": "the reply is of round 1, not of round 2"}
    assert federation.model.received.tolist() == [1.0] * MANIFEST.size


def test_a_client_that_vanishes_in_a_round_is_left_out_and_the_run_goes_on(tmp_path):
    mailbox = ScriptedMailbox({1: client("alpha"), 2: client("beta")})

    def vanishing(_task):
        mailbox.nodes.pop(3, None)

    mailbox.nodes[3] = client("gamma", vanishing)
    federation = federation_over(mailbox, settings_with(), tmp_path)
    federation.run()
    assert federation.record.reasons(1) == {"gamma": "no answer within 0.3 s"}
    assert {task.server_round for node, task in mailbox.tasks if node == 3} == {0, 1}


class Blinking(ScriptedMailbox):
    """Node 3 is away when somebody looks while round 1 is trained; afterwards it is there again, without its task."""

    def node_ids(self):
        training = bool(self.tasks) and (self.tasks[-1][1].kind, self.tasks[-1][1].server_round) == ("train", 1)
        return [node for node in super().node_ids() if not (training and node == 3)]


def test_a_client_that_came_back_as_the_same_node_is_not_waited_for_in_the_round_that_it_lost(tmp_path):
    forgetful = client(
        "gamma", lambda task: None if task.server_round == 1 and task.kind == "train" else reply_to(task)
    )
    mailbox = Blinking({1: client("alpha"), 2: client("beta"), 3: forgetful})
    federation = federation_over(mailbox, settings_with(federation__round_timeout_s=60.0), tmp_path)
    federation.run()
    assert federation.record.reasons(1) == {"gamma": "the connection to the client was lost"}
    assert set(federation.history.at(2).clients) == {"alpha", "beta", "gamma"}


def test_a_reply_that_arrived_before_its_client_went_counts(tmp_path):
    mailbox = Blinking({1: client("alpha"), 2: client("beta"), 3: client("gamma")})
    federation = federation_over(mailbox, settings_with(federation__rounds=1), tmp_path)
    federation.run()
    assert federation.record.num_refused == 0


def test_of_a_reason_that_ends_with_a_stop_no_second_one_is_printed(tmp_path):
    def script(task, message):
        if task.kind == "join":
            return client("beta")(task, message)
        return wire.error_message("beta: this site's policy does not allow it: model (max_move).", message)

    nodes = {1: client("alpha"), 2: script}
    with pytest.raises(NotEnoughClients, match=re.escape("model (max_move)). The model")):
        federation_over(ScriptedMailbox(nodes), settings_with(), tmp_path).run()


def test_too_few_replies_end_the_run_with_names_and_the_last_whole_model(tmp_path):
    nodes = {1: client("alpha"), 2: client("beta", poisoned)}
    federation = federation_over(ScriptedMailbox(nodes), settings_with(), tmp_path)
    with pytest.raises(NotEnoughClients) as seen:
        federation.run()
    line = str(seen.value)
    assert "round 2: 1 of 2 clients gave a usable reply, 2 are needed" in line
    assert "beta: the change holds nan in backbone.b" in line
    assert "alpha:" not in line
    assert f"The model of round 1 is kept in {federation.checkpoints.path(1)}." in line
    assert federation.checkpoints.load(1).tolist() == [0.5] * MANIFEST.size
    state = json.loads((tmp_path / "checkpoints" / "state.json").read_text())
    assert (state["round"], state["sha256"]) == (1, buffer_sha256(np.full(MANIFEST.size, 0.5, dtype=np.float32)))


def test_a_round_with_too_few_replies_is_tried_again_from_the_same_model(tmp_path):
    """beta fails twice in round 2; what alpha answered then is not mixed into the third attempt."""
    seen = []

    def failing_twice(task):
        seen.append((task.kind, task.server_round))
        return poisoned(task) if seen.count(("train", 2)) <= 2 else reply_to(task)

    mailbox = ScriptedMailbox({1: client("alpha"), 2: client("beta", failing_twice)})
    federation = federation_over(mailbox, settings_with(), tmp_path)
    outcome = federation.run()
    assert outcome.sha256 == buffer_sha256(np.full(MANIFEST.size, 1.0, dtype=np.float32))
    assert federation.record.num_refused == 2
    assert federation.record.reasons(2) == {"beta": "the change holds nan in backbone.b"}
    asked = [model[0] for (_, task), model in zip(mailbox.tasks, mailbox.models, strict=True) if task.server_round == 2]
    assert asked == [0.5] * 6 + [1.0] * 2
    warnings = [event["line"] for event in EventReader(tmp_path).new_events() if event["kind"] == "warning"]
    assert len(warnings) == 2
    assert warnings[0].startswith("round 2: 1 of 2 clients gave a usable reply")
    assert outcome.history.at(2).metrics["bytes/down"] == 6 * 4 * MANIFEST.size  # the repeated ones are traffic too


@pytest.mark.parametrize(("attempts", "ends"), [(1, True), (2, True), (3, False)])
def test_a_round_is_tried_so_often_and_no_more(tmp_path, attempts, ends):
    seen = []

    def failing_twice(task):
        seen.append(1)
        return poisoned(dataclasses.replace(task, server_round=2)) if len(seen) <= 2 else reply_to(task)

    mailbox = ScriptedMailbox({1: client("alpha"), 2: client("beta", failing_twice)})
    federation = federation_over(mailbox, settings_with(federation__round_attempts=attempts), tmp_path)
    if ends:
        with pytest.raises(NotEnoughClients, match="round 1: 1 of 2 clients gave a usable reply"):
            federation.run()
    else:
        assert federation.run().last_round == 2


def test_a_client_that_goes_in_a_round_is_waited_for_and_the_round_repeated(tmp_path):
    mailbox = ScriptedMailbox({1: client("alpha")})
    gone = []

    def dying(task):
        if task.server_round == 2 and task.kind == "train" and not gone:
            gone.append(mailbox.nodes.pop(2))
            threading.Timer(0.5, lambda: mailbox.nodes.update({9: client("beta")})).start()
            return None
        return reply_to(task)

    mailbox.nodes[2] = client("beta", dying)
    settings = settings_with(federation__join_timeout_s=30.0, federation__round_timeout_s=30.0)
    outcome = federation_over(mailbox, settings, tmp_path).run()
    assert outcome.sha256 == buffer_sha256(np.full(MANIFEST.size, 1.0, dtype=np.float32))


def test_a_client_that_does_not_come_back_is_named_and_the_last_whole_model_is_on_disk(tmp_path):
    mailbox = ScriptedMailbox({1: client("alpha")})

    def leaving(task):
        if task.server_round == 2:
            del mailbox.nodes[2]
            return None
        return reply_to(task)

    mailbox.nodes[2] = client("beta", leaving)
    federation = federation_over(mailbox, settings_with(), tmp_path)
    with pytest.raises(NotEnoughClients, match=r"1 of 2 clients joined .*missing: beta, which was here before"):
        federation.run()
    assert json.loads((tmp_path / "checkpoints" / "state.json").read_text())["round"] == 1


def test_a_run_that_takes_too_long_ends_with_the_last_whole_model(tmp_path):
    mailbox = ScriptedMailbox(
        {1: client("alpha"), 2: client("beta", lambda t: reply_to(t) if t.server_round < 2 else None)}
    )
    federation = federation_over(mailbox, settings_with(federation__round_timeout_s=60.0), tmp_path)
    federation.waiter = federation.roster._waiter = Waiter(lambda: False, run_timeout_s=1.0)
    with pytest.raises(DeadlinePassed, match=r"within 1 s \(federation.run_timeout_s\)"):
        federation.run()
    assert json.loads((tmp_path / "checkpoints" / "state.json").read_text())["round"] == 1


def test_too_few_at_the_last_evaluation_names_the_model_that_is_there(tmp_path):
    def mute_at_the_end(task):
        return None if task.kind == "evaluate" else reply_to(task)

    federation = federation_over(
        ScriptedMailbox({1: client("alpha"), 2: client("beta", mute_at_the_end)}), settings_with(), tmp_path
    )
    with pytest.raises(NotEnoughClients, match=r"^evaluation of round 2: 1 of 2 .*The model of round 2 is kept"):
        federation.run()
    assert federation.checkpoints.path(2).is_file()


def test_a_client_that_comes_during_the_last_round_is_evaluated_too(tmp_path):
    mailbox = ScriptedMailbox({2: client("beta")})

    def letting_in(task):
        if task.server_round == 2:
            mailbox.nodes.setdefault(3, client("late"))
        return reply_to(task)

    mailbox.nodes[1] = client("alpha", letting_in)
    federation = federation_over(mailbox, settings_with(), tmp_path)
    outcome = federation.run()
    assert set(outcome.history.at(2).sums["test"]) == {"alpha", "beta", "late"}


def test_clients_of_one_machine_share_its_cores_and_compute_alike(tmp_path):
    """Six cores over two clients are three threads each; a client elsewhere has its own, and its own precision."""
    nodes = {
        1: client("alpha", cores=6, precision="bfloat16"),
        2: client("beta", cores=6, precision="float32"),
        3: client("gamma", cores=4, machine="there", precision="float32"),
    }
    federation, _ = run(tmp_path, nodes, training__threads="auto", federation__min_clients=3)
    seen = {node: (task.threads, task.precision) for node, task in federation.mailbox.tasks if task.kind == "train"}
    assert seen == {1: (3, "bfloat16"), 2: (3, "bfloat16"), 3: (4, "float32")}


# ---- patience


def val_aucs(*aucs, **others):
    """An answer in which the model of round r scores aucs[r - 1] on validation; later models score the last."""
    return lambda task: reply_to(task, auc=aucs[max(0, min(task.server_round - 2, len(aucs) - 1))], **others)


def patient(folder, patience, *aucs, rounds=9):
    answer = val_aucs(*aucs)
    nodes = {1: client("alpha", answer), 2: client("beta", answer)}
    return run(folder, nodes, federation__rounds=rounds, training__patience=patience)


def test_training_stops_when_validation_has_not_become_better_for_long_enough(tmp_path):
    """The models of rounds 1, 2, 3 score 0.8, 0.7, 0.7, known after round 4: two are no better, so no round 5.

    The last model, that of round 4, is scored and kept as always.
    """
    federation, outcome = patient(tmp_path, 2, 0.8, 0.7, 0.7)
    assert (outcome.last_round, outcome.history.best_round) == (4, 1)
    assert federation.model.received.tolist() == [4 * 0.5] * MANIFEST.size
    assert outcome.sha256 == buffer_sha256(federation.model.received)
    assert [task.server_round for _, task in federation.mailbox.tasks if task.kind == "train"][-1] == 4
    assert ("evaluate", 4) in {(task.kind, task.server_round) for _, task in federation.mailbox.tasks}
    assert outcome.history.tested(4)
    assert federation.mailbox.tasks[-1][1].last
    state = json.loads((tmp_path / "checkpoints" / "state.json").read_text())
    assert (state["round"], state["sha256"]) == (4, outcome.sha256)


def test_an_early_stop_is_told_in_the_event_the_summary_and_a_tag(tmp_path):
    federation, outcome = patient(tmp_path, 2, 0.8, 0.7, 0.7)
    summary = federation.record.finished(outcome.history, outcome.last_round, outcome.sha256)
    assert (summary["rounds"], summary["stopped_early"], summary["best_round"]) == (4, True, 1)
    assert summary["last"] != {}
    [event] = [event for event in EventReader(tmp_path).new_events() if event["kind"] == "stopped_early"]
    assert event["round"] == 4
    line = "stopped early after round 4 of 9: 2 validations without a better AUC than round 1's"
    assert event["line"] == line
    assert "after round 4" in (tmp_path / "spool.jsonl").read_text()


def test_a_better_model_gives_new_patience(tmp_path):
    """Round 3's 0.9 is better, so the two that count are those of rounds 4 and 5, known after round 6."""
    _, outcome = patient(tmp_path, 2, 0.8, 0.7, 0.9, 0.7, 0.7)
    assert (outcome.last_round, outcome.history.best_round) == (6, 3)


def test_an_equal_score_is_no_better_one(tmp_path):
    _, outcome = patient(tmp_path, 1, 0.8)
    assert outcome.last_round == 3


@pytest.mark.parametrize("patience", ["off", 3])
def test_without_patience_or_with_enough_all_rounds_are_trained(tmp_path, patience):
    """With 4 rounds the scores of at most 3 models are known before the last; one of them is the best."""
    federation, outcome = patient(tmp_path, patience, 0.8, 0.7, rounds=4)
    assert outcome.last_round == 4
    summary = federation.record.finished(outcome.history, outcome.last_round, outcome.sha256)
    assert (summary["rounds"], summary["stopped_early"]) == (4, False)


def test_the_untrained_models_score_is_not_one_of_them(tmp_path):
    """It arrives in round 1, 0.99 here; training goes on though nothing reaches it."""
    answer = answering(r1={"auc": 0.99}, r2={"auc": 0.5}, r3={"auc": 0.6}, r4={"auc": 0.7})
    nodes = {1: client("alpha", answer), 2: client("beta", answer)}
    _, outcome = run(tmp_path, nodes, federation__rounds=4, training__patience=1)
    assert outcome.last_round == 4


# ---- the server's optimiser in the loop


def test_the_strategys_moments_are_kept_with_each_rounds_model(tmp_path):
    """Changes of 0.5 with momentum 0.5 and lr 2: v = 0.5, w = 1; v = 0.75, w = 2.5; on disk beside that model."""
    rates = {"federation__server_lr": 2.0, "federation__server_momentum": 0.5}
    nodes = {1: client("alpha"), 2: client("beta")}
    federation, outcome = run(tmp_path, nodes, federation__strategy="fedavgm", **rates)
    assert federation.model.received.tolist() == [2.5] * MANIFEST.size
    assert federation.checkpoints.load(1).tolist() == [1.0] * MANIFEST.size
    moments = federation.checkpoints.load_moments(2, outcome.sha256)
    assert moments["momentum"].tolist() == [0.75] * MANIFEST.size
    first = federation.checkpoints.load_moments(1, buffer_sha256(federation.checkpoints.load(1)))
    assert first["momentum"].tolist() == [0.5] * MANIFEST.size


def test_server_settings_of_another_strategy_change_nothing(tmp_path):
    nodes = {1: client("alpha"), 2: client("beta")}
    federation, outcome = run(tmp_path, nodes, federation__server_momentum=0.1, federation__server_beta2=0.3)
    assert federation.model.received.tolist() == [1.0] * MANIFEST.size
    assert not list((tmp_path / "checkpoints").glob("moments-*"))
    assert outcome.last_round == 2


# ---- what is counted


def test_the_warm_up_of_new_heads_is_counted_apart_in_the_summary_and_at_the_client(tmp_path):
    """Each made-up reply tells of one picture trained on, and alpha in round 1 of five in a warm-up of two seconds."""

    def alpha(task):
        reply = reply_to(task)
        warmup = {"num_warmup_pictures": 5.0, "warmup_seconds": 2.0} if task.server_round == 1 else {}
        return dataclasses.replace(reply, train=reply.train and {**reply.train, "num_warmup_pictures": 0.0, **warmup})

    def beta(task):
        reply = reply_to(task)
        return dataclasses.replace(reply, train=reply.train and {**reply.train, "num_warmup_pictures": 0.0})

    federation, outcome = run(tmp_path, {1: client("alpha", alpha), 2: client("beta", beta)})
    summary = federation.record.finished(outcome.history, outcome.last_round, outcome.sha256)
    assert (summary["num_warmup_pictures"], summary["num_pictures_processed"]) == (5.0, 4.0)
    told = {(key, step): value for (_, key, step), value in spooled(tmp_path).items() if "warmup" in key}
    assert told == {("num_warmup_pictures", 1): 5.0, ("time/warmup_seconds", 1): 2.0}


def test_the_bytes_received_are_those_of_all_arrays(tmp_path):
    """Two clients, two splits: the change of 7 numbers, and every count, which is below 256 here, in a byte."""
    federation, outcome = run(tmp_path, {1: client("alpha"), 2: client("beta")}, federation__rounds=1)
    sums = sums_with(0.5)
    counts = sum(array.size for array in (sums.pairs, sums.twins, sums.folds, sums.confusion))
    assert outcome.history.at(1).metrics["bytes/up"] == 2 * (MANIFEST.num_bytes + 2 * counts)
    assert federation.model.received.tolist() == [0.5] * MANIFEST.size


# ---- codecs


@pytest.mark.parametrize(("codec", "nbytes"), [("float32", 28), ("float16", 14), ("int8", 11)])
def test_each_direction_travels_in_its_codec_and_its_bytes_are_counted(tmp_path, codec, nbytes):
    """Seven numbers, of which each is as large as the largest, so that no codec loses any of them."""
    nodes = {number: client(name, partial(reply_to, codec=codec)) for number, name in ((1, "alpha"), (2, "beta"))}
    federation, outcome = run(
        tmp_path, nodes, federation__rounds=1, federation__upload_codec=codec, federation__download_codec=codec
    )
    metrics = outcome.history.at(1).metrics
    counts = sum(array.size for array in vars(sums_with(0.5)).values() if isinstance(array, np.ndarray))
    assert metrics["bytes/down"] == 2 * nbytes
    assert metrics["bytes/up"] == 2 * (nbytes + 2 * counts)
    assert federation.model.received.tolist() == pytest.approx([0.5] * MANIFEST.size, rel=1e-6)


def test_with_a_coded_download_the_model_of_a_round_is_the_one_that_was_received(tmp_path):
    """What coding lost is in the next download; what is saved and named by its hash is what the clients scored."""
    change = np.float32([1.0, 0.3, -0.003, 0.07, -1.0, 0.5, 0.004])
    nodes = {1: client("alpha", lambda task: reply_to(task, change=change))}
    federation, outcome = run(
        tmp_path, nodes, federation__rounds=40, federation__min_clients=1, federation__download_codec="int8"
    )
    received = federation.model.received
    assert outcome.sha256 == buffer_sha256(received)
    assert federation.checkpoints.load(40).tobytes() == received.tobytes()
    exact = federation.model.remembered()["exact-model"]
    np.testing.assert_allclose(exact, 40 * change, rtol=1e-5)
    assert np.abs(received - exact).max() <= 0.5 * 40 / 127 * 1.001
    assert received.tolist() != exact.tolist()
    kept = federation.checkpoints.load_moments(40, outcome.sha256)
    assert kept["exact-model"].tobytes() == exact.tobytes()
    again = GlobalModel.restored(received, dict(kept), "int8")
    assert again.received.tobytes() == received.tobytes()
    best = federation.checkpoints.load(outcome.history.best_round)
    assert federation.mailbox.models[-1].tobytes() == best.tobytes(), "the best goes into use as it was scored"


def test_a_checkpoint_of_another_download_codec_is_not_taken_for_ones_own():
    model = np.zeros(7, dtype=np.float32)
    with pytest.raises(CheckpointError, match="download_codec 'float32'; resume with the settings"):
        GlobalModel.restored(model, {"exact-model": model}, "float32")
    with pytest.raises(CheckpointError, match="holds no exact model"):
        GlobalModel.restored(model, {}, "int8")


# ---- what is done while the clients work


def test_a_rounds_model_is_saved_and_told_after_the_next_tasks_were_sent_and_before_their_replies_are_taken(tmp_path):
    seen = []

    def answer(task):
        saved = tmp_path / "checkpoints" / f"round-{task.server_round - 1:06d}.safetensors"
        state = json.loads((tmp_path / "checkpoints" / "state.json").read_text())
        seen.append((task.kind, task.server_round, saved.exists(), state["round"]))
        return reply_to(task)

    run(tmp_path, {1: client("alpha", answer), 2: client("beta")}, federation__rounds=3)
    assert seen[:3] == [("train", number, True, number - 1) for number in (1, 2, 3)]
    assert seen[3] == ("evaluate", 3, True, 3)


def test_the_tasks_of_a_round_are_not_kept_waiting_by_the_last_ones_checkpoint(tmp_path, monkeypatch):
    order = []
    save = RunCheckpoints.save
    monkeypatch.setattr(
        RunCheckpoints, "save", lambda self, step, *rest: (order.append(f"save {step}"), save(self, step, *rest))[1]
    )
    send = ScriptedMailbox.send

    def noted(self, messages):
        messages = list(messages)
        task, _ = wire.read_task(messages[0].content)
        order.append(f"{task.kind} {task.server_round}")
        return send(self, messages)

    monkeypatch.setattr(ScriptedMailbox, "send", noted)
    run(tmp_path, {1: client("alpha"), 2: client("beta")}, federation__rounds=2)
    assert order[1:6] == ["join 0", "train 1", "train 2", "save 1", "evaluate 2"]
    assert order[6] == "save 2"


def test_while_clients_are_missing_the_last_model_is_on_disk(tmp_path):
    """The join deadline passes in round 2; whoever kills the server meanwhile finds round 1."""
    nodes = {}

    def leaves(task):
        if task.server_round == 1:
            nodes.pop(2)
        return reply_to(task)

    seen = []
    mailbox = ScriptedMailbox({})
    mailbox.nodes = nodes
    nodes |= {1: client("alpha"), 2: client("beta", leaves)}
    settings = settings_with(federation__rounds=3, federation__join_timeout_s=0.2)
    federation = federation_over(mailbox, settings, tmp_path)
    ask = mailbox.node_ids
    mailbox.node_ids = lambda: (seen.append(federation.checkpoints.path(1).exists()), ask())[1]
    with pytest.raises(NotEnoughClients, match="1 of 2 clients joined"):
        federation.run()
    assert seen[-1]
    assert json.loads((tmp_path / "checkpoints" / "state.json").read_text())["round"] == 1


# ---- robust rules, outliers, and clients that go on failing


def liar(task):
    return reply_to(task, change=1e6)


@pytest.mark.parametrize("strategy", ["fedmedian", "fedtrimmedavg", "krum", "multikrum"])
def test_a_robust_strategy_is_not_moved_by_one_liar_and_leaves_no_replies_behind(tmp_path, strategy):
    nodes = {n: client(f"c{n}", lambda task, n=n: reply_to(task, change=1.0 + n / 100)) for n in range(1, 6)}
    nodes[6] = client("liar", liar)
    values = {"strategy": strategy, "rounds": 2, "min_clients": 6, "max_change_factor": "off"}
    federation, _ = run(tmp_path, nodes, **{f"federation__{name}": value for name, value in values.items()})
    assert federation.model.received == pytest.approx(2 * 1.03, abs=0.05)
    assert not (tmp_path / "replies").exists()


def test_fedavg_with_the_norm_rule_on_disk_gives_the_same_bits_as_without(tmp_path):
    nodes = {n: client(f"c{n}", lambda task, n=n: reply_to(task, change=0.1 * n, num_examples=n)) for n in range(1, 6)}
    plain, _ = run(tmp_path / "plain", nodes)
    kept, _ = run(tmp_path / "kept", nodes, federation__norm_factor=50.0)
    assert plain.model.received.tobytes() == kept.model.received.tobytes()


def test_an_outlier_is_left_out_named_and_counted(tmp_path):
    nodes = {n: client(f"c{n}", lambda task: reply_to(task, change=1.0)) for n in range(1, 5)}
    nodes[5] = client("liar", liar)
    federation, _ = run(tmp_path, nodes, federation__norm_factor=5.0, federation__rounds=1)
    assert federation.model.received.tolist() == [1.0] * MANIFEST.size
    assert list(federation.record.reasons(1)) == ["liar"]
    assert "times the clients' median" in federation.record.reasons(1)["liar"]


@pytest.mark.parametrize("strategy", ["krum", "multikrum"])
def test_krum_with_too_few_clients_is_refused_before_the_first_round(tmp_path, strategy):
    mailbox = ScriptedMailbox({1: client("alpha"), 2: client("beta")})
    federation = federation_over(mailbox, settings_with(federation__strategy=strategy), tmp_path)
    with pytest.raises(UserError, match="needs 5 clients in each round, and there are 2; start more"):
        federation.run()
    assert [task.kind for _, task in mailbox.tasks] == ["join", "join"]


def test_krum_that_loses_too_many_replies_ends_with_the_last_model(tmp_path):
    nodes = {n: client(f"c{n}") for n in range(1, 5)} | {5: client("c5", lambda task: reply_to(task, change=np.nan))}
    with pytest.raises(NotEnoughClients, match="round 1: 4 of 5 clients gave a usable reply, 5 are needed"):
        run(tmp_path, nodes, federation__strategy="krum")
    assert not (tmp_path / "replies").exists()


def test_a_client_refused_three_times_running_is_set_aside_and_told_of(tmp_path):
    """And one that fails twice and then answers is not."""
    bad = client("bad", lambda task: reply_to(task, change=np.nan) if task.kind == "train" else reply_to(task))
    shaky = client("shaky", lambda task: reply_to(task, change=np.nan if task.server_round % 3 else 1.0))
    nodes = {1: client("alpha"), 2: client("beta"), 3: bad, 4: shaky}
    federation, _ = run(tmp_path, nodes, federation__rounds=6)
    asked = [task.server_round for node, task in federation.mailbox.tasks if node == 3 and task.kind == "train"]
    assert asked == [1, 2, 3]
    asked = [task.server_round for node, task in federation.mailbox.tasks if node == 4 and task.kind == "train"]
    assert asked == [1, 2, 3, 4, 5, 6]
    lines = [event["line"] for event in EventReader(tmp_path).new_events() if event["kind"] == "warning"]
    assert lines == ["bad gave no usable reply 3 times running and is set aside; start it again to let it in"]
