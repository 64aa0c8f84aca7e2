"""Membership inference for people: scores by hand, intervals that cover, a model that overfits and one under noise."""

import io
import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from clients.policy import DEFAULT
from clients.privacy_budget import FOLDER
from common.errors import UserError
from common.metrics.membership import membership, person_scores
from common.privacy.accounting import epsilon_of, squared_mu
from common.protocol.spending import write_spend
from simulation.admin.privacy_report import report_spending


def test_a_persons_score_is_the_similarity_within_less_that_to_all_others():
    embeddings = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0], [-1.0, 1.0], [5.0, 0.0]], dtype=np.float32)
    person = np.array([4, 4, 7, 7, 9])
    people, scores = person_scores(embeddings, person)
    assert people.tolist() == [4, 7]  # the third has one picture
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosine = unit @ unit.T
    assert scores == pytest.approx(
        [
            cosine[0, 1] - cosine[np.ix_([0, 1], [2, 3, 4])].mean(),
            cosine[2, 3] - cosine[np.ix_([2, 3], [0, 1, 4])].mean(),
        ],
        abs=1e-6,
    )


def test_the_auc_is_scikit_learns_and_its_interval_holds_it():
    random = np.random.default_rng(0)
    members, calibrating, held_out = random.normal(0.7, 1, 200), random.normal(0, 1, 150), random.normal(0, 1, 150)
    found = membership(members, calibrating, held_out)
    labels = np.repeat([1, 0], [200, 300])
    assert found.auc.value == pytest.approx(roc_auc_score(labels, np.concatenate([members, calibrating, held_out])))
    assert found.auc.low < 0.69 < found.auc.high  # Phi(0.7 / sqrt(2))
    assert found.auc.high - found.auc.low < 0.12
    assert not found.is_at_chance
    threshold = np.sort(calibrating)[::-1][1]
    assert found.tpr.value == (members > threshold).mean()
    assert found.fpr.value == (held_out > threshold).mean()


def test_strangers_are_at_chance_and_too_few_are_refused():
    random = np.random.default_rng(1)
    assert membership(random.normal(size=80), random.normal(size=40), random.normal(size=40)).is_at_chance
    few = membership(np.array([1.0, 2.0]), np.array([0.0, 5.0]), np.array([0.0, 1.0]))
    assert few.tpr.value == 0.0  # 1 % of two is nobody, so nobody held out is above
    with pytest.raises(ValueError, match="1 calibrating are too few"):
        membership(np.zeros(2), np.zeros(1), np.zeros(2))


# ---- the report of what is spent


def spend_in(folder, run, times, multiplier, **words):
    known = {"client": "celeba", "dataset": "celeba", "data_dir": "/data", "delta": 1e-5, "epsilon": 4.0}
    for number in range(times):
        write_spend(folder / FOLDER / "abc.jsonl", run, squared_mu(multiplier), known | words | {"round": number + 1})


def test_the_report_adds_up_runs_and_holds_them_against_the_policy(tmp_path):
    spend_in(tmp_path, "run-1", 4, 4.0)
    spend_in(tmp_path, "run-2", 1, 2.0, epsilon=3.0)
    out = io.StringIO()
    assert report_spending(tmp_path, DEFAULT, out, shape="text") == 0
    lines = out.getvalue().splitlines()
    in_all = epsilon_of((4 / 16 + 1 / 4) ** 0.5, 1e-5)
    assert "run run-1: 4 noisy replies" in lines[1]
    assert f"epsilon {epsilon_of(0.5, 1e-5):.3g} of 4 at delta 1e-05" in lines[1]
    assert f"over all runs: epsilon {in_all:.3g} at delta 1e-05; this policy allows 10" in lines[3]
    out = io.StringIO()
    report_spending(tmp_path, DEFAULT, out, shape="json")
    [found] = json.loads(out.getvalue())
    assert found["epsilon"] == pytest.approx(in_all)
    assert (found["replies"], found["runs"]["run-2"]["replies"]) == (5, 1)
    assert 0.0 < found["fraction_left"] < 1.0


def test_the_report_says_what_a_spent_budget_means(tmp_path):
    spend_in(tmp_path, "run-1", 100, 4.0)
    out = io.StringIO()
    report_spending(tmp_path, DEFAULT, out, shape="text")
    assert "this policy allows 10, and it is spent: a flower-client takes no part in a further run" in out.getvalue()


def test_where_nothing_is_spent_the_report_says_where_it_looked(tmp_path):
    with pytest.raises(UserError, match=f"{FOLDER} holds no line"):
        report_spending(tmp_path, DEFAULT, io.StringIO(), shape="text")
