"""What one site may say about itself and the model: it decides neither the model, nor the best round, nor the end."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_federation import (
    MANIFEST,
    ScriptedMailbox,
    client,
    federation_over,
    reply_to,
    settings_with,
    site_named,
    sums_with,
)

from common.errors import NotEnoughClients, ReplyRefused
from common.metrics.sums import EvaluationSums
from common.protocol import wire
from common.protocol.change_bound import ChangeBound
from common.protocol.codec import encode
from common.system.events import EventReader
from server.exchange.guard import blames_the_model
from server.exchange.roster import Member, Share, share_of_each
from server.record.history import standing_out
from server.resume import resume

pytestmark = pytest.mark.usefixtures("in_a_run")
ENORMOUS = dict.fromkeys(("num_pictures", "num_training_pictures", "num_people", "num_training_people"), 10**9)


def run(folder, nodes, first=1.0, **settings):
    federation = federation_over(ScriptedMailbox(nodes), settings_with(**settings), folder, first)
    try:
        return federation, federation.run()
    except NotEnoughClients:
        federation.record._tracked.finish("FAILED")  # so that the run can go on
        raise


def warnings_of(folder):
    return [event["line"] for event in EventReader(folder).new_events() if event["kind"] == "warning"]


def summary_of(federation, outcome):
    return federation.record.finished(outcome.history, outcome.last_round, outcome.sha256)


# ---- weights and counts


def test_a_site_of_a_billion_pictures_counts_for_ten_times_the_median(tmp_path):
    """Of three sites two hold 50 pictures, so the third counts for 500: (50 * 1 + 50 * 1 + 500 * 4) / 600 = 3.5.

    Unbounded, 10^9 pictures would make it 4 to the seventh digit.
    """
    nodes = {n: client(f"h{n}", lambda task: reply_to(task, change=1.0, num_examples=50)) for n in (1, 2)}
    nodes[3] = client("mallory", lambda task: reply_to(task, change=4.0, num_examples=10**9), **ENORMOUS)
    federation, outcome = run(tmp_path, nodes, federation__rounds=1)
    assert federation.model.received == pytest.approx(1.0 + 3.5)
    lines = warnings_of(tmp_path)
    assert lines == [
        "mallory holds 1000000000 training pictures of 1000000000, and counts for 500 of 1000 at most: 10 times the"
        " median client's (federation.max_weight_factor)"
    ]
    assert summary_of(federation, outcome)["limited"] == {"mallory": lines[0]}


@pytest.mark.parametrize(
    ("held", "factor", "expected"),
    [
        ([50, 50], 10.0, 500),
        ([50, 10**9], 10.0, 500),  # of two the smaller: the larger would raise its own bound
        ([10**9, 50, 50, 50], 2.0, 100),
        ([1, 50, 50], 10.0, 500),  # one that makes itself small takes nothing from the others
    ],
)
def test_the_bound_is_a_multiple_of_the_median_clients_pictures(held, factor, expected):
    federation = settings_with(federation__max_weight_factor=factor).federation
    members = {
        str(n): Member(node_id=n, site=site_named(str(n), num_training_pictures=number, num_pictures=2 * number))
        for n, number in enumerate(held)
    }
    assert share_of_each(members, federation) == Share(num_examples=expected, num_pictures=2 * expected)
    off = settings_with(federation__max_weight_factor="off").federation
    assert share_of_each(members, off) is None


def invented(auc):
    """10^17 pairs, of a site that says that it holds 10^9 pictures."""
    sums = sums_with(auc)
    return dataclasses.replace(sums, pairs=sums.pairs * 5 * 10**14)


def test_invented_pairs_do_not_choose_the_best_round(tmp_path):
    """Two sites score the models of rounds 1, 2 and 3 with 0.6, 0.8 and 0.7; the third wants round 3 and invents 1.0.

    Its mean with theirs would follow it too: (0.7 + 0.7 + 1) / 3 against (0.8 + 0.8 + 0) / 3.
    """
    honest, wanted = {1: 0.6, 2: 0.8, 3: 0.7}, {1: 0.0, 2: 0.0, 3: 1.0}

    def scored(task):
        return task.server_round - (task.kind == "train")

    def mallory(task):
        reply = reply_to(task)
        sums = {split: invented(wanted.get(scored(task), 0.0)) for split in reply.evaluations}
        return dataclasses.replace(reply, evaluations=sums)

    nodes = {
        n: client(f"h{n}", lambda task: reply_to(task, auc=honest.get(scored(task), 0.5), test_auc=0.75))
        for n in (1, 2)
    }
    nodes[3] = client("mallory", mallory, **ENORMOUS)
    federation, outcome = run(tmp_path, nodes, federation__rounds=3)
    rows = {row["step"]: row for row in outcome.history.rows()}
    assert [rows[step]["val_roc_auc_median"] for step in (1, 2, 3)] == pytest.approx([0.6, 0.8, 0.7])
    assert outcome.history.best_round == 2
    assert summary_of(federation, outcome)["test_roc_auc_median"] == pytest.approx(0.75)
    pooled = outcome.history.at(2).totals["val"]
    assert pooled.pairs.sum() <= 1000 * 999 // 2 + 2 * 200


def test_counts_that_are_too_many_keep_their_shares_and_others_their_bits():
    sums = sums_with(0.7)
    assert sums.at_most(21) is sums  # 210 pairs, and 200 are there
    many = dataclasses.replace(
        sums,
        pairs=sums.pairs * 10**14,
        twins=sums.pairs * 10**14,
        folds=sums.folds * 10**12,
        closed=dataclasses.replace(sums.closed, num_examples=4000, correct=1000, loss_sum=8000.0),
    )
    few = many.at_most(100)
    assert isinstance(few, EvaluationSums)
    assert 4940 <= few.pairs.sum() <= 4950
    assert 4900 <= few.folds.sum() <= 4950
    assert (few.twins <= few.pairs).all()
    assert few.pairs[0, 5000] / few.pairs[0].sum() == pytest.approx(0.7, abs=0.01)
    assert (few.closed.num_examples, few.closed.correct, few.closed.loss_sum) == (100, 25, 200.0)


# ---- a change is bounded beside the model


def test_a_finite_change_of_9e14_is_refused_named_and_counted_also_of_two_sites(tmp_path):
    def mallory(task):
        return reply_to(task, change=9e14 if task.server_round == 2 else 0.5)

    nodes = {1: client("alpha"), 2: client("mallory", mallory)}
    federation, outcome = run(tmp_path, nodes, federation__rounds=3, federation__min_clients=1)
    assert federation.model.received.tolist() == [1.0 + 3 * 0.5] * MANIFEST.size
    assert federation.record.reasons(2) == {
        "mallory": "the change of parameters has the norm 2.381e+15, more than 10 times the model's 3.969"
        " (federation.max_change_factor)"
    }
    assert summary_of(federation, outcome)["refused_replies"] == 1


SPANS = ((slice(0, 3), True), (slice(3, 7), False))


@pytest.mark.parametrize("codec", ["float32", "float16", "int8"])
def test_parameters_and_running_statistics_have_a_bound_each(codec):
    """The model's parameters are 1, its statistics 10 long: 2 times its own, and 100 times as much of statistics."""
    model = np.float32([1, 0, 0, 10, 0, 0, 0])
    bound = ChangeBound(SPANS, model, 2.0)
    norms = bound.check(encode(np.float32([0, 1.5, 0, 0, 0, 150, 0]), codec))
    assert norms == pytest.approx((1.5, 150.0), rel=0.02, abs=0.6)
    with pytest.raises(ReplyRefused, match=r"change of parameters has the norm \d.* more than 2 times the model's 1 "):
        bound.check(encode(np.float32([0, 40, 0, 0, 0, 0, 0]), codec))
    with pytest.raises(ReplyRefused, match=r"change of statistics .* more than 200 times the model's 10 "):
        bound.check(encode(np.float32([0, 0, 0, 0, 4000, 0, 0]), codec))


def test_a_model_that_was_made_short_does_not_turn_honest_changes_into_long_ones():
    """Beside the longer of the received and the first model; and beside a longer one as that one is."""
    bound = ChangeBound(SPANS, np.full(7, 1.0, dtype=np.float32), 2.0)
    bound.receive(np.full(7, 1e-6, dtype=np.float32))
    bound.check(encode(np.full(7, 1.9, dtype=np.float32), "float32"))
    bound.receive(np.full(7, 5.0, dtype=np.float32))
    bound.check(encode(np.full(7, 9.0, dtype=np.float32), "float32"))
    with pytest.raises(ReplyRefused):
        bound.check(encode(np.full(7, 11.0, dtype=np.float32), "float32"))


# ---- a model that is of no use


def honest(name, change=0.5):
    """A site that can make nothing of a large model, and says so as sites do."""

    def script(task, message):
        shared = wire.read_task(message.content)[1]
        if shared is not None and float(np.abs(shared).max()) > 100.0:
            return wire.error_message(f"{name}: the loss is nan and the gradient norm nan at epoch 1, step 1", message)
        return client(name, lambda asked: reply_to(asked, change=change))(task, message)

    return script


def poisoning(*rounds, length=1e4, otherwise=0.5):
    """A change that the guard would let pass without its bound, or within it in a long model."""
    return lambda task: reply_to(task, change=length if task.server_round in rounds else otherwise)


FREE = {"federation__max_change_factor": "off", "federation__rounds": 4}


def nodes_with(*mallories, num_honest=2):
    nodes = {n: honest(f"h{n}") for n in range(1, num_honest + 1)}
    return nodes | {10 + n: client(f"mallory{n}", answer) for n, answer in enumerate(mallories)}


def asked_in(federation, node):
    return [task.server_round for asked, task in federation.mailbox.tasks if asked == node and task.kind == "train"]


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm"])
def test_the_run_goes_back_a_round_leaves_out_who_stood_out_and_goes_on(tmp_path, strategy):
    """The same model, to the bit, as where the change of round 2 was refused at once."""
    free = {**FREE, "federation__strategy": strategy}
    federation, outcome = run(tmp_path / "poisoned", nodes_with(poisoning(2)), **free)
    clean, _ = run(tmp_path / "clean", nodes_with(poisoning(2, length=np.nan)), **free)
    assert federation.model.received.tobytes() == clean.model.received.tobytes()
    assert asked_in(federation, 1) == [1, 2, 3, 2, 3, 4]
    assert asked_in(federation, 10) == [1, 2, 3, 3, 4]
    assert outcome.last_round == 4
    assert {row["step"]: row["round_clients"] for row in outcome.history.rows() if row["step"]} == {
        1: 3.0, 2: 2.0, 3: 3.0, 4: 3.0
    }  # fmt: skip
    [line] = warnings_of(tmp_path / "poisoned")
    assert line.startswith("round 2's model gave no numbers at 2 of 3 clients (h1: h1: the loss is nan")
    assert "Norms of the changes that made it: mallory0 2.646e+04; h1 1.323; h2 1.323" in line
    assert line.endswith("Back to round 1; round 2 is repeated without mallory0.")
    assert summary_of(federation, outcome)["went_back"] == [line]


def test_the_last_rounds_model_is_examined_too(tmp_path):
    federation, outcome = run(tmp_path, nodes_with(poisoning(4)), **FREE)
    assert outcome.last_round == 4
    assert federation.model.received.tolist() == [3.0] * MANIFEST.size
    state = json.loads((tmp_path / "checkpoints" / "state.json").read_text())
    assert (state["round"], state["sha256"]) == (4, outcome.sha256)


def test_two_that_collude_are_left_out_one_after_the_other(tmp_path):
    nodes = nodes_with(poisoning(2, length=1e6), poisoning(2, length=1e4), num_honest=5)
    federation, outcome = run(tmp_path, nodes, **FREE)
    assert outcome.last_round == 4
    assert len(warnings_of(tmp_path)) == 2
    assert asked_in(federation, 1) == [1, 2, 3, 2, 3, 2, 3, 4]
    assert federation.model.received.tolist() == [3.0] * MANIFEST.size


def test_it_goes_back_fewer_times_than_a_round_has_attempts(tmp_path):
    nodes = nodes_with(poisoning(2, length=1e6), poisoning(2, length=1e4), num_honest=5)
    with pytest.raises(NotEnoughClients, match="round 3: 2 of 7 clients gave a usable reply, 3 are needed"):
        run(tmp_path, nodes, federation__round_attempts=2, federation__min_clients=3, **FREE)


def test_whoever_does_it_again_and_again_is_set_aside(tmp_path):
    federation, outcome = run(tmp_path, nodes_with(poisoning(2, 3, 4, 5, 6)), **{**FREE, "federation__rounds": 7})
    assert outcome.last_round == 7
    aside = "mallory0 made the model useless 3 times and is set aside; start it again to let it in"
    assert warnings_of(tmp_path)[-1] == aside
    assert asked_in(federation, 1).count(7) == 1
    assert asked_in(federation, 10)[-1] <= 5


def test_where_nobody_stands_out_the_run_ends_as_it_did(tmp_path):
    """All of them diverge alike: a repeated round would be the same."""
    nodes = {n: honest(f"h{n}", change=200.0) for n in (1, 2, 3)}
    with pytest.raises(NotEnoughClients, match="round 2: 0 of 3 clients gave a usable reply"):
        run(tmp_path, nodes, **FREE)
    assert not [line for line in warnings_of(tmp_path) if "Back to" in line]


def test_one_site_that_says_so_turns_nothing_back(tmp_path):
    nodes = nodes_with(poisoning(), num_honest=0) | {n: client(f"h{n}") for n in (1, 2)}
    nodes[3] = lambda task, message: (
        wire.error_message("liar: the loss is nan", message) if task.kind == "train" else client("liar")(task, message)
    )
    _, outcome = run(tmp_path, nodes, **FREE)
    assert outcome.last_round == 4
    assert not [line for line in warnings_of(tmp_path) if "Back to" in line]


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm"])
def test_a_run_whose_last_whole_round_was_poisoned_goes_on_when_it_is_resumed(tmp_path, strategy):
    """It ended, or was killed, when round 2's model was on disk; the site that made it is gone when it goes on."""
    free = {**FREE, "federation__strategy": strategy}
    with pytest.raises(NotEnoughClients, match="round 3"):
        run(tmp_path, nodes_with(poisoning(2, length=1e9)), federation__round_attempts=1, **free)
    assert json.loads((tmp_path / "checkpoints" / "state.json").read_text())["round"] == 2
    again = federation_over(ScriptedMailbox(nodes_with()), settings_with(**free), tmp_path, 1.0)
    resume(again)
    outcome = again.run()
    assert outcome.last_round == 4
    assert asked_in(again, 1) == [3, 2, 3, 4]
    assert np.abs(again.model.received).max() < 100.0
    [line] = [line for line in warnings_of(tmp_path) if "Back to" in line]
    assert "mallory0 2.646e+09; h1" in line


def test_who_stands_out_is_told_by_either_norm_beside_the_others_median():
    usual = {f"h{n}": {"change_norm": 1.0 + n / 10, "change_norm_statistics": 5.0} for n in range(4)}
    assert standing_out(usual) is None
    assert standing_out(usual | {"m": {"change_norm": 9.0, "change_norm_statistics": 5.0}}) == "m"
    assert standing_out(usual | {"m": {"change_norm": 1.0, "change_norm_statistics": 50.0}}) == "m"
    assert standing_out({"a": {"change_norm": 1.0}, "b": {"change_norm": 4.0}}) == "b"
    assert standing_out({"a": {"change_norm": 1.0}}) is None
    assert standing_out({}) is None


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("the change holds nan in backbone.a", True),
        ("the change holds 3e+38 in backbone.a", True),
        ("a: the loss is inf and the gradient norm nan at epoch 1, step 1 of 3; lower training.lr (now 0.05).", True),
        ("a: the model gives embeddings that are not finite on folder's pictures.", True),
        ("a: the model's numbers are not all finite, and int8 cannot carry that; lower training.lr.", True),
        ("no answer within 3 s", False),
        ("the connection to the client was lost", False),
        ("a: its data cannot be used; the client's own output says why.", False),
        ("cpu is out of memory in information", False),
    ],
)
def test_only_numbers_that_are_none_speak_against_the_model(reason, expected):
    assert blames_the_model(reason) == expected
