"""Whole federations with differential privacy in this process: they end well, without scores, within budget."""

import dataclasses
import io
import json

import numpy as np
import pytest
from tiny_federation import InProcessMailbox, enter_tiny_federation, settings_with, tiny_pack

import clients.message_handler
from clients.own_machine import ClientOption
from clients.policy import DEFAULT
from clients.privacy_budget import Release, budget_file, spend
from common.errors import ConfigError
from common.privacy.accounting import epsilon_of, noise_multiplier
from common.protocol.codec import encode
from common.protocol.spending import releases_in, spent_in
from server.app import Surroundings, federate
from server.site_privacy import BudgetSpent, NoisySum, SitePrivacy
from simulation.compare import membership
from simulation.compare.membership import AuditRequest, audit_privacy
from simulation.compare.model_lookup import FoundModel, Wanted

ON = {
    "model__backbone": "vit_tiny",
    "model__depth": 1,
    "privacy__group_people": 3,
    "privacy__clip": 0.1,
    "federation__rounds": 3,
    "federation__join_timeout_s": 20.0,
}
PERSON = ON | {"privacy__unit": "person"}
SITE = ON | {"privacy__unit": "site", "federation__clients_per_round": 2, "privacy__delta": 1e-3}


@pytest.fixture(autouse=True)
def tiny_packs(monkeypatch):
    enter_tiny_federation(monkeypatch)


def federation(folder, values, prepare=lambda _sites: None):
    """Run it; returns (outcome, summary, the lines that were told)."""
    clients.message_handler._workplaces.clear()
    mailbox = InProcessMailbox(("alpha", "beta"), folder / "sites")
    prepare(mailbox.sites)
    run = folder / "run-1"
    run.mkdir(parents=True, exist_ok=True)
    federate(
        settings_with(**values),
        mailbox,
        Surroundings(run_folder=run, stopped=lambda: False, all_nodes_are_here=lambda: True, git_commit="none"),
    )
    outcome = json.loads((run / "outcome.json").read_text())
    summary = run / "metrics.json"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return outcome, json.loads(summary.read_text()) if summary.exists() else {}, events


def test_a_run_with_noise_at_the_sites_ends_with_its_last_round_and_no_score(tmp_path):
    outcome, summary, events = federation(tmp_path, PERSON)
    assert outcome == {"exit_code": 0, "line": ""}
    assert (summary["rounds"], summary["best_round"], summary["refused_replies"]) == (3, 3, 0)
    assert summary["best"] == summary["last"] == {}
    assert all(event.get("train_loss") is None for event in events)
    sites = InProcessMailbox(("alpha", "beta"), tmp_path / "sites").sites.values()
    for site in sites:
        lines = list(releases_in(budget_file(site)))
        assert [line["round"] for line in lines] == [1, 2, 3]
        assert epsilon_of(spent_in(budget_file(site)).in_all ** 0.5, 1e-5) == pytest.approx(8.0)


def test_the_audit_of_a_run_shows_the_attack_beside_the_model_before_training(tmp_path, monkeypatch):
    federation(tmp_path, PERSON | {"federation__rounds": 1})
    settings = settings_with(**PERSON)
    found = FoundModel(
        wanted=Wanted(kind="fedavg"),
        source="run-1",
        settings=settings,
        clients=("alpha",),
        step=1,
        folder=tmp_path / "run-1",
    )
    option = ClientOption(name="alpha", dataset="folder", data_dir=tmp_path / "sites" / "alpha")
    asked = []
    monkeypatch.setattr(membership, "find_model", lambda *_: found)
    monkeypatch.setattr(membership, "data_options", lambda names, _: asked.append(names) or [option])
    monkeypatch.setattr(membership, "pack_at_the_door", lambda *_: tiny_pack("alpha"))
    request = AuditRequest(run="run-1", clients=[], data_dirs=[], device="cpu", cache_dir=tmp_path)
    text, content = io.StringIO(), io.StringIO()
    assert audit_privacy(settings, request, text, shape="text") == 0
    lines = text.getvalue().splitlines()
    assert asked == [("alpha",)]
    assert lines[0] == "run-1, step 1: epsilon 8 at delta 1e-05 of a person"
    assert lines[1].startswith("alpha: 6 people trained on; held out: 3 set the threshold, 3 test it")
    assert [line.split(":")[1].strip() for line in lines[2:4]] == ["the run's model", "the model before training"]
    assert lines[4] == "alpha: 1 % of 3 is nobody: the threshold is the highest score held out"
    assert lines[-2] == "alpha: no reply of its own is kept here, so none was tried (--state-dir)"
    assert lines[-1].startswith(f"kept in {tmp_path / 'run-1' / 'membership.json'}")
    [site] = InProcessMailbox(("alpha",), tmp_path / "sites").sites.values()
    request, text = dataclasses.replace(request, state_dir=site.state_dir), io.StringIO()
    assert audit_privacy(settings, request, text, shape="text") == 0
    lines = text.getvalue().splitlines()
    assert lines[4].startswith("alpha: its own reply of round 1, to whoever received it: membership AUC ")
    assert lines[-2].startswith("alpha: its own reply of round 1, to whoever received it: ")
    assert audit_privacy(settings, request, content, shape="json") == 0
    told = json.loads(content.getvalue())
    assert told["no_reply_kept"] == []
    assert told["clients"]["alpha"]["its own reply of round 1, to whoever received it"]["num_members"] == 6
    assert told["privacy"]["unit"] == "person"
    assert told["clients"]["alpha"]["the run's model"]["num_members"] == 6
    assert (
        told["clients"]["alpha"]["the run's model"]["auc"]
        != told["clients"]["alpha"]["the model before training"]["auc"]
    )


def test_a_run_ends_by_itself_and_well_where_a_sites_budget_is_spent_on_the_way(tmp_path):
    def little_left(sites):
        """Both sites have room for one reply and a half."""
        each = Release(
            run_id="earlier",
            server_round=1,
            noise_multiplier=noise_multiplier(8.0, 1e-5, 3) / 1.5**0.5,
            num_groups=2,
        )
        privacy = settings_with(**PERSON).privacy
        for node, site in sites.items():
            site = dataclasses.replace(site, policy=dataclasses.replace(site.policy, max_epsilon=8.0, max_delta=1e-5))
            spend(site, each, privacy)
            sites[node] = site

    outcome, summary, events = federation(tmp_path, PERSON, little_left)
    assert outcome == {"exit_code": 0, "line": ""}
    assert (summary["rounds"], summary["best_round"], summary["stopped_early"]) == (1, 1, True)
    told = [event["line"] for event in events if event["kind"] == "stopped_early"]
    assert told == [
        "stopped after round 1 of 3: privacy.epsilon is spent (a round that is repeated with other noise is paid for"
        " twice), or a site's own highest is"
    ]
    assert set(summary["policy_refusals"]) == {"alpha", "beta"}


def test_a_site_whose_policy_allows_less_takes_no_part(tmp_path):
    def strict(sites):
        for node, site in sites.items():
            sites[node] = dataclasses.replace(site, policy=dataclasses.replace(site.policy, max_epsilon=2.0))

    outcome, _, events = federation(tmp_path, PERSON | {"federation__join_timeout_s": 0.5}, strict)
    assert outcome["exit_code"] == 1
    assert "privacy.epsilon (max_epsilon)" in json.dumps(events)
    assert DEFAULT.max_epsilon == 10.0


# ---- the noise of whole clients, by the server


def test_a_run_with_noise_at_the_server_spends_before_each_model_is_seen(tmp_path):
    outcome, summary, _ = federation(tmp_path, SITE)
    assert outcome == {"exit_code": 0, "line": ""}
    assert (summary["rounds"], summary["best_round"]) == (3, 3)
    lines = list(releases_in(tmp_path / "run-1" / "privacy.jsonl"))
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert epsilon_of(lines[-1]["spent"] ** 0.5, 1e-3) == pytest.approx(8.0)


def test_a_servers_sum_is_clipped_once_more_weighs_all_alike_and_is_divided_by_what_was_planned(tmp_path):
    size = 4000
    spans = ((slice(0, 3000), True), (slice(3000, size), False))
    settings = settings_with(**SITE)
    noisy = NoisySum(size, [spans[0][0]], clip=0.1, deviation=1e-9, planned=2)
    for length, weight in ((50.0, 1), (0.05, 10**6)):
        change = np.zeros(size, dtype=np.float32)
        change[0] = length
        noisy.add(encode(change, "float32"), weight)
    noisy.add(encode(np.full(size, np.nan, dtype=np.float32), "float32"), 1)
    mean = noisy.mean()
    assert mean[0] == pytest.approx((0.1 + 0.05) / 2, rel=1e-5)
    assert not mean[3000:].any()
    assert np.abs(mean[1:3000]).max() < 1e-8

    made = SitePrivacy(settings.privacy, settings.federation, tmp_path).empty_sum(size, spans)
    drawn = made.mean()
    deviation = noise_multiplier(8.0, 1e-3, 3) * 0.1 / 2
    assert drawn[:3000].std() == pytest.approx(deviation, rel=0.1)
    assert not drawn[3000:].any()


def test_a_server_that_goes_on_pays_for_a_round_again_and_stops_where_nothing_is_left(tmp_path):
    settings = settings_with(**SITE)
    privacy = SitePrivacy(settings.privacy, settings.federation, tmp_path)
    for server_round in (1, 2, 2):
        privacy.require_room(10)
        privacy.spend(server_round)
    with pytest.raises(BudgetSpent):
        privacy.require_room(10)
    with pytest.raises(BudgetSpent):  # another process
        SitePrivacy(settings.privacy, settings.federation, tmp_path).require_room(10)
    with pytest.raises(Exception, match=r"one of 1000 clients .* below 0.001"):
        privacy.require_room(1000)


def test_a_fixed_number_of_clients_is_asked_for():
    with pytest.raises(ConfigError, match=r"set federation\.clients_per_round"):
        settings_with(**(SITE | {"federation__clients_per_round": "all"}))
