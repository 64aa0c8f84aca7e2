"""Noise that the sites of a masked sum draw together: enough of it in every sum that can be opened, and paid for."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch
from test_privacy_mechanism import lower_bound_of_epsilon
from tiny_federation import settings_with, task_for, tiny_workplace

import clients.private_round
from clients.local_update import train
from clients.masked_reply import step_of
from clients.policy import DEFAULT, OWN_MACHINE, against_settings
from clients.privacy_budget import budget_file
from common.errors import ConfigError, SecureSumRefused
from common.privacy.accounting import epsilon_of, noise_multiplier
from common.privacy.mechanism import GRID, grid_of, released
from common.privacy.people import words_of
from common.privacy.shared_noise import deviation_of_each, fewest_noises, grid_of_sum, sensitivity_of, within_words
from common.protocol.codec import decode
from common.protocol.parameters import Part, flatten, manifest_of
from common.protocol.secure_vector import Layout, Sums
from common.protocol.secure_words import WorkAsked, read, write
from common.protocol.spending import releases_in
from common.secagg.sites import threshold_of
from common.settings import PrivacySettings
from simulation.admin.privacy_report import report_spending
from tests.hostile.secure_server import NAMES, Server, Sites

ROUNDS = 3
ON = {
    "model__backbone": "vit_tiny",
    "model__depth": 1,
    "secagg__enabled": True,
    "federation__min_clients": 3,
    "federation__rounds": ROUNDS,
    "privacy__unit": "person",
    "privacy__noise": "shared",
    "privacy__epsilon": 4.0,
    "privacy__group_people": 3,
}
PRIVACY = PrivacySettings(unit="person", noise="shared", epsilon=1.0, delta=0.05, clip=0.7)


@pytest.mark.parametrize(
    ("members", "colluding", "sure"),
    [(3, 1, 2), (3, 2, 1), (4, 1, 2), (5, 1, 3), (10, 1, 5), (10, 3, 2), (10, 4, 0), (30, 1, 16), (3, 3, 0)],
)
def test_so_many_noises_are_in_any_sum_whatever_lists_a_server_sends(members, colluding, sure):
    threshold = threshold_of(0.667, members)
    assert fewest_noises(members, num_keys=members, threshold=threshold, colluding=colluding) == sure
    if sure:  # a site that sent keys and is not in the sum is one noise less
        found = fewest_noises(members - 1, num_keys=members, threshold=threshold, colluding=colluding)
        assert found == sure - 1


def test_a_server_with_its_lists_takes_as_many_sites_out_of_a_sum_as_is_said_and_no_more():
    """Counted out: shares of mask keys that honest sites show, each of one list, dealt as well as a server can."""
    for members in range(3, 40):
        threshold = threshold_of(0.667, members)
        for colluding in range(1, members // 3):
            shown = (members - colluding) * (members - threshold)  # each honest site, of so many it says are lost
            taken = 0
            while shown >= threshold - colluding:
                shown, taken = shown - (threshold - colluding), taken + 1
            wanted = members - colluding - taken
            found = fewest_noises(members, num_keys=members, threshold=threshold, colluding=colluding)
            assert found == (wanted if 2 * threshold > members + colluding else 0)


def summed(number, deviation, grid, sums_of_groups, first_seed=0):
    """What is opened of so many sites' words, [size] float64, by their own code."""
    size = len(sums_of_groups[0])
    manifest = manifest_of({"a": torch.zeros(size)})
    part = Part.of(manifest, moving={"a"}, trainable={"a"})
    layout = Layout(change=part, splits=(), num_members=number, step=grid)
    total = np.zeros(layout.size, dtype=np.uint32)
    for site, own in enumerate(sums_of_groups):
        seed = bytes([first_seed + site]) * 32
        change = released(within_words(own, deviation), [slice(0, size)], deviation=deviation, divisor=1.0, seed=seed)
        assert np.array_equal(change / grid, np.rint(change / grid))  # on the grid, as float32 too
        coded = layout.in_words(change, np.zeros(size, np.float32), 1.0)
        assert coded.saturated == 0
        total += layout.words(coded, Sums(evaluations={}, content={}))
    return layout.mean(total, np.zeros(size, np.float32), 1.0).astype(np.float64)


@pytest.mark.parametrize("there", ["all", "the fewest"])
def test_the_sum_has_the_planned_variance_with_the_fewest_noises_and_more_with_all(there):
    """Of ten sites five noises are sure: they alone are the planned one, and all ten twice its variance."""
    sensitivity, noises = 0.02, 5
    deviation = deviation_of_each(PRIVACY, ROUNDS, sensitivity=sensitivity, noises=noises)
    grid = grid_of_sum(PRIVACY, ROUNDS, sensitivity=sensitivity, noises=noises)
    number = 10 if there == "all" else noises
    found = summed(number, deviation, grid, [np.full(200_000, 0.001 * site) for site in range(number)])
    planned = (noise_multiplier(1.0, 0.05, ROUNDS) * sensitivity) ** 2
    assert found.mean() == pytest.approx(0.001 * sum(range(number)), abs=5 * math.sqrt(planned * number / 5 / 200_000))
    assert found.var() == pytest.approx(planned * number / noises, rel=0.02)
    assert GRID <= deviation / grid < 2 * GRID


@pytest.mark.parametrize(("factor", "holds"), [(1.0, True), (0.5, False)])
def test_the_claimed_epsilon_holds_of_the_opened_sum_and_would_not_with_half_the_noise(factor, holds):
    """By trials (arXiv:2006.07709): three sites, of which one tells its noise, so that two hide a person of a third."""
    sensitivity = 0.02
    deviation = factor * deviation_of_each(PRIVACY, 1, sensitivity=sensitivity, noises=2)
    grid = grid_of_sum(PRIVACY, 1, sensitivity=sensitivity, noises=2)
    grid *= factor  # as `released` takes it

    def opened(total, seed):
        others = np.full(len(total), 0.3 * grid)  # whatever another site has, between two steps
        return summed(2, deviation, grid, [total, others], first_seed=10 * seed[0])

    found = lower_bound_of_epsilon(opened, sensitivity=sensitivity, delta=0.05, trials=400_000)
    assert (found <= 1.0) is holds
    assert found > 0.7


def test_what_is_far_beyond_the_noise_is_cut_so_that_words_add_exactly():
    """64 sites at the end of what a word of each may be: float32 has the number to its last step, and no sum wraps."""
    deviation = 0.01
    grid = grid_of(deviation)
    found = summed(64, deviation, grid, [np.full(1000, 1e9)] * 64)
    assert abs(found.mean() / grid / 64 / 2**23 - 1) < 1e-3
    assert found.std() == pytest.approx(deviation * 8, rel=0.1)


def work_of(sensitivity, noises, **values):
    usual = {"attempt": 1, "members": ("alpha", "beta", "gamma"), "shares": {}, "most_examples": 24, "most_pictures": 0}
    return WorkAsked(**(usual | values), sensitivity=sensitivity, noises=noises)


def workplace_in(folder, **values):
    settings = settings_with(**(ON | values))
    state = tiny_workplace(settings, folder)
    return state, flatten(state.recogniser.state_dict(), state.manifest)


def own_sensitivity(state, share=1.0):
    return sensitivity_of(state.settings.privacy, num_people=state.pack.num_classes, share=share)


def trained(state, shared, asked):
    task = task_for(state.manifest, state.settings, secure=write(asked))
    return decode(train(state, task, shared).change).astype(np.float64)


def test_a_site_adds_its_part_of_the_noise_in_the_units_of_the_sum_and_pays_for_the_whole(tmp_path, monkeypatch):
    given = []

    def keep(total, spans, **values):
        given.append((total.copy(), values))
        return released(total, spans, **values)

    monkeypatch.setattr(clients.private_round, "released", keep)
    state, shared = workplace_in(tmp_path)
    largest = own_sensitivity(state) * 1.5  # that of another site
    asked = work_of(largest, 4, most_examples=48)  # this one counts for half as much as another
    change = trained(state, shared, asked)
    ((total, values),) = given
    z = noise_multiplier(4.0, 1e-5, ROUNDS)
    assert values["deviation"] == pytest.approx(z * largest / 2.0)
    assert values["divisor"] == 1.0
    assert np.linalg.norm(total) <= 0.5 * state.settings.privacy.clip  # half of a mean of clipped changes
    grid = step_of(state.settings, asked)
    assert np.array_equal(change / grid, np.rint(change / grid))
    (line,) = releases_in(budget_file(state.site))
    assert (line["noises"], line["colluding_sites"]) == (4, 1)
    assert line["squared_mu"] == pytest.approx(1.0 / z**2)


def test_the_same_work_gets_the_same_bits_and_other_members_noise_of_its_own(tmp_path):
    state, shared = workplace_in(tmp_path)
    asked = work_of(own_sensitivity(state), 2)
    first = trained(state, shared, asked)
    again = trained(state, shared, dataclasses.replace(asked, attempt=2))
    assert np.array_equal(first, again)
    assert len(list(releases_in(budget_file(state.site)))) == 1
    other = trained(state, shared, dataclasses.replace(asked, members=("alpha", "beta", "gamma", "delta")))
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.1
    assert len(list(releases_in(budget_file(state.site)))) == 2


@pytest.mark.parametrize(("factor", "noises"), [(0.99, 2), (1.0, 0)])
def test_a_site_whose_people_move_the_sum_further_than_was_told_pays_and_answers_nothing(factor, noises, tmp_path):
    state, shared = workplace_in(tmp_path)
    with pytest.raises(SecureSumRefused, match="one person here moves the sum by"):
        trained(state, shared, work_of(own_sensitivity(state) * factor, noises))
    assert not list(releases_in(budget_file(state.site)))


def test_a_site_counts_on_no_more_noises_than_are_sure(tmp_path):
    """Five sites, four of them a threshold: three noises."""
    server = Server(Sites(tmp_path))
    server.exchange(1)
    shares = {name: server.sealed[1][name]["ada"] for name in NAMES if name != "ada"}
    asked = work_of(0.1, 3, members=NAMES, shares=shares)
    server.sites.by_name["ada"].require_turn(asked, 1)
    with pytest.raises(SecureSumRefused, match=r"the noise of 4 sites .* of the 5 sites of this sum 3 are sure"):
        server.sites.by_name["ada"].require_turn(dataclasses.replace(asked, noises=4), 1)
    few = dataclasses.replace(asked, members=NAMES[:4], shares={n: shares[n] for n in NAMES[1:4]})
    server.sites.by_name["ada"].require_turn(dataclasses.replace(few, noises=2), 1)
    with pytest.raises(SecureSumRefused, match="2 are sure"):
        server.sites.by_name["ada"].require_turn(few, 1)


@pytest.mark.parametrize("asked", [(0.0, 0), (0.1, 0), (0.0, 2)])
def test_a_task_and_a_run_that_do_not_agree_on_whose_noise_it_is_are_refused(asked):
    with pytest.raises(SecureSumRefused, match=r'privacy.noise = "shared", and the task has the noise of'):
        step_of(settings_with(**ON), work_of(*asked))
    own = settings_with(**(ON | {"privacy__noise": "own"}))
    assert step_of(own, work_of(0.0, 0)) == 0.0
    with pytest.raises(SecureSumRefused, match=r'privacy.noise = "own"'):
        step_of(own, work_of(0.1, 2))


@pytest.mark.parametrize("value", [-0.1, True, 1, "0.1", None])
def test_what_is_no_sensitivity_is_refused(value):
    assert read(WorkAsked, write(work_of(0.1, 2))) == work_of(0.1, 2)
    text = json.dumps(json.loads(write(work_of(0.1, 2))) | {"sensitivity": value})
    with pytest.raises(SecureSumRefused, match="sensitivity is no number of ours"):
        read(WorkAsked, text)


def test_a_sensitivity_without_end_is_refused():
    text = write(work_of(math.inf, 2))
    assert "Infinity" in text
    with pytest.raises(SecureSumRefused, match="sensitivity is no number of ours"):
        read(WorkAsked, text)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"secagg__enabled": False}, "hides a person in the sum only"),
        ({"privacy__unit": "site", "secagg__enabled": False}, 'is for privacy.unit = "person"'),
        ({"federation__upload_codec": "int8"}, "has words of 32 bits in steps of its own"),
        ({"privacy__colluding_sites": 2}, "of 1 sites alone the noise is sure to be unknown"),
        ({"privacy__colluding_sites": 3}, "of 0 sites alone the noise is sure to be unknown"),
    ],
)
def test_what_shared_noise_needs_is_told_with_one_line(values, words):
    if values.get("privacy__unit") == "site":
        values = values | {"federation__clients_per_round": 2}
    with pytest.raises(ConfigError, match=words):
        settings_with(**(ON | values))
    assert settings_with(**(ON | {"privacy__noise": "own", "privacy__colluding_sites": 3})).privacy.noise == "own"


def test_a_sites_policy_takes_it_only_where_it_says_so():
    settings = settings_with(**ON)
    policy = dataclasses.replace(DEFAULT, require_dp=True, min_training_people=2)
    found = [one.setting for one in against_settings(policy, settings)]
    assert "privacy.noise" in found
    allowed = dataclasses.replace(policy, shared_noise=True)
    assert "privacy.noise" not in [one.setting for one in against_settings(allowed, settings)]
    own = settings_with(**(ON | {"privacy__noise": "own"}))
    assert "privacy.noise" not in [one.setting for one in against_settings(policy, own)]
    assert OWN_MACHINE.shared_noise


def test_the_report_says_what_it_is_worth_without_the_others(tmp_path):
    state, shared = workplace_in(tmp_path)
    trained(state, shared, work_of(own_sensitivity(state), 2))
    out = io.StringIO()
    report_spending(state.site.cache_dir, DEFAULT, out, shape="text")
    z = noise_multiplier(4.0, 1e-5, ROUNDS)
    alone = epsilon_of(math.sqrt(2.0) / z, 1e-5)
    assert (
        "by the noise of several sites, while at most 1 of them tell theirs; by this site's own alone epsilon"
        f" {alone:.3g}" in out.getvalue()
    )
    out = io.StringIO()
    report_spending(state.site.cache_dir, DEFAULT, out, shape="json")
    (found,) = json.loads(out.getvalue())
    run = found["runs"]["run-1"]
    assert run["epsilon"] == pytest.approx(epsilon_of(1.0 / z, 1e-5))
    assert run["epsilon_by_own_noise"] == pytest.approx(alone)
    assert "alone" not in run


def test_whoever_watches_is_told_whose_noise_it_is():
    assert "by all sites' noise while at most 1 of them tell theirs" in words_of(settings_with(**ON).privacy)
    assert "whose own noise it is" in words_of(dataclasses.replace(PRIVACY, noise="own"))
