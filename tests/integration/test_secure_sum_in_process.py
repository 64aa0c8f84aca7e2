"""Federations with secure aggregation, whole and in this process: what is opened is the sum, and nothing else shows."""

import json

import numpy as np
import pytest
from secure_federation import secure_mailbox
from tiny_federation import enter_tiny_federation, settings_with

import clients.masked_reply
import clients.message_handler
import clients.secure_sum
import server.secure_sum
from clients.privacy_budget import budget_file
from common.privacy.accounting import mu_of, noise_multiplier
from common.protocol.spending import releases_in
from server.app import Surroundings, federate

THREE = ("alpha", "beta", "gamma")


@pytest.fixture(autouse=True)
def tiny_packs(monkeypatch):
    enter_tiny_federation(monkeypatch)


def federation(folder, names=THREE, tamper=lambda _name, _task, reply: reply, *, others_may_come=False, **values):
    """Run it; returns (outcome, summary, the mailbox)."""
    clients.message_handler._workplaces.clear()
    usual = {
        "secagg__enabled": True,
        "federation__rounds": 2,
        "federation__min_clients": 3,
        "federation__join_timeout_s": 20.0,
    }
    mailbox = secure_mailbox(names, folder / "sites", tamper)
    run = folder / "run-1"
    run.mkdir(parents=True)
    federate(
        settings_with(**(usual | values)),
        mailbox,
        Surroundings(
            run_folder=run,
            stopped=lambda: False,
            all_nodes_are_here=lambda: not others_may_come,
            git_commit="none",
        ),
    )
    outcome = json.loads((run / "outcome.json").read_text())
    summary = run / "metrics.json"
    return outcome, json.loads(summary.read_text()) if summary.exists() else {}, mailbox


def test_a_federation_of_three_sites_ends_and_its_sum_is_that_of_their_words_to_the_bit(tmp_path, monkeypatch):
    words, opened = {}, []

    def masked(vector, kept, own, adverts, context, **more):
        words.setdefault(context.attempt, []).append(vector.copy())
        return real_masked(vector, kept, own, adverts, context, **more)

    def unmask(total, secrets, keys, adverts, context, **more):
        real_unmask(total, secrets, keys, adverts, context, **more)
        opened.append((context.attempt, total.copy()))

    real_masked, real_unmask = clients.secure_sum.masked, server.secure_sum.unmask
    monkeypatch.setattr(clients.secure_sum, "masked", masked)
    monkeypatch.setattr(server.secure_sum, "unmask", unmask)
    outcome, summary, _ = federation(tmp_path)
    assert outcome == {"exit_code": 0, "line": ""}
    assert summary["refused_replies"] == 0
    assert [attempt for attempt, _ in opened] == [1, 2, 3]  # two rounds, and the last model's scores
    for attempt, total in opened:
        assert np.array_equal(total, np.sum(words[attempt], axis=0, dtype=np.uint32))
    assert np.isfinite(summary["best"]["roc_auc"])
    assert summary["clients"] == {}


def test_a_federation_with_shared_noise_ends_and_its_sum_has_as_much_of_it_as_was_planned_and_a_half_more(
    tmp_path, monkeypatch
):
    """Two noises of three sites are the planned one, so three are one and a half times its variance."""
    means = []

    def mean(self):
        found = real_mean(self)
        means.append((found * (sum(self._weights.values()) / self.most[0]), self.noise, self.layout.step))
        return found

    real_mean = server.secure_sum.SecureAttempt.mean
    monkeypatch.setattr(server.secure_sum.SecureAttempt, "mean", mean)
    private = {
        "model__backbone": "vit_tiny",
        "model__depth": 1,
        "privacy__unit": "person",
        "privacy__noise": "shared",
        "privacy__group_people": 3,
        "privacy__epsilon": 2.0,
    }
    outcome, _, mailbox = federation(tmp_path, **private)
    assert outcome == {"exit_code": 0, "line": ""}
    assert len(means) == 2
    planned = noise_multiplier(2.0, 1e-5, 2) * (2 * 0.1 / 2)  # two groups at each site, of equal pictures
    for found, noise, step in means:
        assert noise == (pytest.approx(0.1), 2)
        assert np.abs(found / step - np.rint(found / step)).max() < 1e-2
        assert found.std() == pytest.approx(planned * np.sqrt(1.5), rel=0.02)
    for site in mailbox.sites.values():
        lines = list(releases_in(budget_file(site)))
        assert [line["noises"] for line in lines] == [2, 2]
        assert sum(line["squared_mu"] for line in lines) == pytest.approx(mu_of(2.0, 1e-5) ** 2)
