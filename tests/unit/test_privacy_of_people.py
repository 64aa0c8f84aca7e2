"""Differential privacy of people at a site: one person moves one group, the noise is there, and the budget is kept."""

import dataclasses
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
from tiny_federation import settings_with, task_for, tiny_pack, tiny_workplace

import clients.group_training
import clients.local_update
import clients.private_round
import clients.run_state
from clients import privacy_budget
from clients.group_training import Groups, divide, summed_changes
from clients.local_update import join, open_client_state, train
from clients.policy import DEFAULT, PolicyRefusal, against_settings
from clients.privacy_budget import Release, budget_file
from clients.private_state import load_residue
from common.errors import CheckpointError, ConfigError, ReplyRefused, TrainingFailed, UserError
from common.faces.splits import Split
from common.models.recogniser import trainable_names
from common.privacy.accounting import epsilon_of, noise_multiplier, squared_mu
from common.privacy.mechanism import standard_normal
from common.privacy.people import num_groups_of
from common.protocol.codec import decode
from common.protocol.parameters import flatten, trainable_spans
from common.protocol.spending import spent_in
from common.protocol.wire import OF_CONTENT, TRAIN_FIELDS
from common.settings import Settings
from common.system.run_view import begin_rows
from common.system.site_secret import site_secret
from common.training.loop import Compute
from simulation.commands import Engine, _require_private
from tests.tiny_settings import changed

pytestmark = pytest.mark.usefixtures("in_a_run")
SEED = bytes(range(32))
CLIP, GROUP_PEOPLE, ROUNDS = 0.05, 2, 4
# Convolutions, so that there are running statistics; the file is the server's, and no client reads it.
VALUES = {
    "privacy__unit": "person",
    "privacy__clip": CLIP,
    "privacy__group_people": GROUP_PEOPLE,
    "privacy__epsilon": 4.0,
    "federation__rounds": ROUNDS,
    "model__pretrained": "weights.safetensors",
    "training__lr": 0.5,
    "training__warmup_fraction": 0.0,
}
COMPUTE = Compute(device="cpu", precision="float32", memory_format="contiguous", threads=1)


def workplace_in(folder, **values):
    settings = settings_with(**(VALUES | values))
    plain = dataclasses.replace(settings, model=dataclasses.replace(settings.model, pretrained="none"))
    state = dataclasses.replace(tiny_workplace(plain, folder), settings=settings)
    return state, flatten(state.recogniser.state_dict(), state.manifest)


def task_of(state, **values):
    return task_for(state.manifest, state.settings, **values)


def without(pack, person):
    """The pack without one person's pictures."""
    rows = np.flatnonzero(pack.person != person)
    return dataclasses.replace(
        pack, pictures=pack.pictures[rows], person=pack.person[rows], split=pack.split[rows], key="another"
    )


def sum_of(state, shared, groups):
    return summed_changes(
        state.recogniser,
        state.manifest,
        shared,
        groups,
        settings=state.settings,
        compute=COMPUTE,
        server_round=1,
        stream_name="alpha",
        head_seed=state.head_seed,
    )[0]


def groups_of(pack, folder, number=3):
    return divide(pack, number=number, secret=site_secret(folder), stream="run-1\n1")


# ---- what one person can move


def test_whoever_leaves_changes_one_group_and_no_other(tmp_path):
    pack = tiny_pack("alpha")
    before = groups_of(pack, tmp_path)
    assert sum(len(np.unique(group.person)) for group in before.packs.values()) >= 4  # of six, some may be alone
    for person in range(6):
        after = groups_of(without(pack, person), tmp_path)
        changed_groups = [
            number
            for number in range(before.number)
            if people_in(before.packs.get(number)) != people_in(after.packs.get(number))
        ]
        assert len(changed_groups) <= 1


def people_in(pack):
    return [] if pack is None else [pack.people[person] for person in np.unique(pack.person)]


def test_groups_are_drawn_by_the_secret_anew_in_each_round():
    pack = tiny_pack("alpha")
    drawn = {
        (secret, stream): [
            people_in(one) for one in divide(pack, number=3, secret=secret, stream=stream).packs.values()
        ]
        for secret in (bytes(32), SEED)
        for stream in ("run-1\n1", "run-1\n2", "run-2\n1")
    }
    assert len({json.dumps(value) for value in drawn.values()}) >= 5
    assert (num_groups_of(100, 16), num_groups_of(31, 16), num_groups_of(5, 16)) == (6, 1, 1)


def test_twins_stay_together_and_one_family_alone_is_no_group():
    pack = tiny_pack("alpha")
    family = np.arange(12) // 2 * 2  # pairs
    found = []
    for stream in "abcdefgh":
        groups = divide(dataclasses.replace(pack, family=family), number=2, secret=SEED, stream=stream)
        found += [set(np.unique(one.person).tolist()) for one in groups.packs.values()]
    assert found
    for here in found:
        assert {person ^ 1 for person in here} == here
        assert len(here) >= 4


def test_every_picture_of_training_people_is_trained_on_and_nobody_elses():
    pack = tiny_pack("alpha")
    groups = divide(pack, number=1, secret=SEED, stream="x")
    assert len(groups.packs[0]) == 36  # of six people all six pictures: none is held out
    assert set(groups.packs[0].split.tolist()) == {int(Split.TRAIN)}


def test_one_person_moves_the_sum_by_twice_the_clip_at_most_and_all_by_one_each(tmp_path):
    state, shared = workplace_in(tmp_path)
    groups = groups_of(state.pack, tmp_path)
    total = sum_of(state, shared, groups)
    assert 0.9 * CLIP < np.linalg.norm(total) <= len(groups.packs) * CLIP
    person = next(iter(groups.packs.values())).person[0]
    fewer = sum_of(state, shared, groups_of(without(state.pack, person), tmp_path))
    moved = np.linalg.norm(total - fewer)
    assert 0.0 < moved <= 2.0 * CLIP
    # the rate is such that a change is much longer than the clip, so the bound is clipping's doing
    long, _ = workplace_in(tmp_path / "long", privacy__clip=1e6)
    assert np.linalg.norm(sum_of(long, shared, groups)) > 10.0 * CLIP


def test_a_group_knows_nothing_of_the_groups_before_it(tmp_path):
    state, shared = workplace_in(tmp_path, privacy__clip=1e6)
    groups = groups_of(state.pack, tmp_path)
    alone = [sum_of(state, shared, Groups(packs={n: pack}, number=3)) for n, pack in groups.packs.items()]
    np.testing.assert_allclose(sum_of(state, shared, groups), np.sum(alone, axis=0), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(flatten(state.recogniser.state_dict(), state.manifest), shared)


def test_fedprox_pulls_each_group_to_the_received_model(tmp_path):
    lengths = []
    for number, mu in enumerate((0.0, 1.0)):
        values = {"federation__strategy": "fedprox", "federation__proximal_mu": mu, "privacy__clip": 1e6}
        state, shared = workplace_in(tmp_path / str(number), **values)
        packs = divide(state.pack, number=1, secret=SEED, stream="x")
        lengths.append(np.linalg.norm(sum_of(state, shared, packs)))
    assert lengths[1] < 0.8 * lengths[0]


def test_a_group_that_fails_adds_nothing_and_is_told_at_the_site_only(tmp_path, monkeypatch, caplog):
    state, shared = workplace_in(tmp_path)
    groups = groups_of(state.pack, tmp_path)
    first = min(groups.packs)
    usual = clients.group_training.train_round

    def fails(learner, *args, stream_name, **named):
        if stream_name.endswith(f"group-{first}"):
            raise TrainingFailed("the loss is nan")
        return usual(learner, *args, stream_name=stream_name, **named)

    others = Groups(packs={n: pack for n, pack in groups.packs.items() if n != first}, number=3)
    expected = sum_of(state, shared, others)
    monkeypatch.setattr(clients.group_training, "train_round", fails)
    np.testing.assert_array_equal(sum_of(state, shared, groups), expected)
    assert f"group {first} of round 1 adds nothing" in caplog.text


def test_running_statistics_stay_as_they_were_received(tmp_path):
    state, shared = workplace_in(tmp_path)
    change = decode(train(state, task_of(state), shared).change)
    total = sum_of(state, shared, groups_of(state.pack, tmp_path))
    spans = trainable_spans(state.manifest, trainable_names(state.recogniser))
    assert not any(total[span].any() for span, is_trained in spans if not is_trained)  # in training already
    assert any(not is_trained for _, is_trained in spans)
    for span, is_trained in spans:
        assert bool(change[span].any()) is is_trained


# ---- the noise


def test_what_leaves_is_the_clipped_sum_with_the_claimed_noise_divided_by_the_number_of_groups(tmp_path, monkeypatch):
    """Taken apart: (sum + z 2C noise) / G, of which nothing else is in the reply."""
    monkeypatch.setattr(clients.private_round.secrets, "token_bytes", lambda number: SEED[:number])
    state, shared = workplace_in(tmp_path)
    change = decode(train(state, task_of(state), shared).change).astype(np.float64)
    groups = divide(state.pack, number=3, secret=site_secret(state.site.cache_dir), stream="run-1\n1")
    total = sum_of(state, shared, groups)
    spans = trainable_spans(state.manifest, trainable_names(state.recogniser))
    trained = np.concatenate([np.arange(span.start, span.stop) for span, is_trained in spans if is_trained])
    noise = np.concatenate([part for _, part in standard_normal(SEED, len(trained))])
    deviation = noise_multiplier(4.0, 1e-5, ROUNDS) * 2.0 * CLIP
    np.testing.assert_allclose(change[trained], (total[trained] + deviation * noise) / 3, atol=deviation / 1024)
    assert (change[trained] * 3).std() == pytest.approx(deviation, rel=0.05)


def test_each_reply_has_noise_of_its_own(tmp_path):
    one, other = (workplace_in(tmp_path / name) for name in ("a", "b"))
    first, second = (decode(train(state, task_of(state), shared).change) for state, shared in (one, other))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


def test_no_sum_of_pictures_and_no_score_leaves(tmp_path, monkeypatch):
    state, shared = workplace_in(tmp_path)
    monkeypatch.setattr(clients.local_update, "evaluate", lambda *_, **__: pytest.fail("it was scored"))
    reply = train(state, task_of(state), shared)
    assert set(reply.train) == set(TRAIN_FIELDS) - set(OF_CONTENT)
    assert reply.evaluations == {}
    assert reply.withheld == {"val": "not shared", "test": "not shared"}
    assert reply.train["num_pictures"] == 24  # as the counts at the join say, however the groups turned out


# ---- the budget


def lines_of(state):
    return [json.loads(line) for line in budget_file(state.site).read_text().splitlines()]


def test_the_spend_is_on_the_disk_before_the_noise_is_drawn(tmp_path, monkeypatch):
    seen = []
    state, shared = workplace_in(tmp_path)
    site_secret(state.site.cache_dir)  # which is drawn likewise, once

    def drawn(number):
        seen.append(len(lines_of(state)))
        return SEED[:number]

    monkeypatch.setattr(clients.private_round.secrets, "token_bytes", drawn)
    for server_round in (1, 2):
        train(state, task_of(state, server_round=server_round), shared)
    assert seen == [1, 2]
    first, second = lines_of(state)
    each = squared_mu(noise_multiplier(4.0, 1e-5, ROUNDS))
    assert first["squared_mu"] == second["squared_mu"] == pytest.approx(each)
    assert (first["round"], second["round"], second["spent"]) == (1, 2, pytest.approx(2 * each))
    assert epsilon_of(math.sqrt(ROUNDS * each), 1e-5) == pytest.approx(4.0)
    assert second["previous"]


def test_the_same_question_gets_the_same_bits_and_nothing_is_spent(tmp_path, caplog):
    state, shared = workplace_in(tmp_path)
    first = train(state, task_of(state), shared).change.data
    with caplog.at_level(logging.INFO):
        assert train(state, task_of(state), shared).change.data == first
    assert "nothing is spent" in caplog.text
    assert len(lines_of(state)) == 1


@pytest.mark.parametrize("what", ["model", "threads", "data", "gone", "damaged"])
def test_another_question_or_a_lost_answer_is_a_second_release_and_told(tmp_path, caplog, what):
    state, shared = workplace_in(tmp_path)
    first = train(state, task_of(state), shared).change.data
    task, kept = task_of(state), state.state_folder("run-1") / "answer-000001.safetensors"
    if what == "model":
        shared = shared + np.float32(1e-3)
    elif what == "threads":
        task = task_of(state, threads=2)
    elif what == "data":
        state = dataclasses.replace(state, pack=dataclasses.replace(state.pack, key="another"))
    elif what == "gone":
        kept.unlink()
    else:
        content = bytearray(kept.read_bytes())
        content[-1] ^= 1
        kept.write_bytes(content)
    second = decode(train(state, task, shared).change)
    assert len(lines_of(state)) == 2
    assert "paid for again" in caplog.text
    apart = second - np.frombuffer(first, dtype="<f4")
    assert np.linalg.norm(apart) > 0.5 * np.linalg.norm(second)  # no noise was used twice


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_a_lossy_codec_comes_after_the_noise_and_is_repeated_as_it_was(tmp_path, codec):
    state, shared = workplace_in(tmp_path, federation__upload_codec=codec)
    replies = [train(state, task_of(state), shared).change.data for _ in range(2)]
    assert replies[0] == replies[1]
    deviation = noise_multiplier(4.0, 1e-5, ROUNDS) * 2.0 * CLIP / 3
    change = decode(train(state, task_of(state, server_round=2), shared).change)
    assert change.std() == pytest.approx(deviation, rel=0.2)


def test_a_kept_answer_is_put_in_words_anew_for_another_attempt(tmp_path):
    """Of a masked sum in 16 bits: over other sites its steps are others, and what it lacks is another rest."""
    state, shared = workplace_in(tmp_path, federation__upload_codec="int8")
    asked, rests = [], iter([0.25, 0.5, 0.0])

    def lose(change):
        asked.append(change.copy())
        return np.full_like(change, next(rests))

    replies = [train(state, task_of(state), shared, lose=lose).change for _ in range(2)]
    assert replies[0].codec == replies[1].codec == "float32"
    assert replies[0].data == replies[1].data
    assert np.array_equal(*asked)
    assert len(lines_of(state)) == 1
    rest = load_residue(state.state_folder("run-1"), 1, len(asked[0]))
    assert set(rest.tolist()) == {0.5}
    train(state, task_of(state, server_round=2), shared, lose=lose)
    assert asked[2].mean() == pytest.approx(0.5, abs=0.1)


def refusal_of(state, shared, **values):
    with pytest.raises(PolicyRefusal) as refused:
        train(state, task_of(state, **values), shared)
    return refused.value


def test_a_run_ends_at_its_epsilon_and_a_data_set_at_the_sites_over_all_runs(tmp_path):
    state, shared = workplace_in(tmp_path, federation__rounds=2)
    for server_round in (1, 2):
        train(state, task_of(state, server_round=server_round), shared)
    refused = refusal_of(state, shared + 1, server_round=2)
    assert str(refused) == "this site's policy does not allow it: privacy.epsilon (epsilon_of_run)."
    assert "4 of 4 at delta 1e-05 are spent in this run" in refused.against.asked
    # another run on the same data; the site's own highest is 5.5
    strict = dataclasses.replace(state.site, policy=dataclasses.replace(DEFAULT, max_epsilon=5.5))
    state = dataclasses.replace(state, site=strict)
    train(state, task_of(state, run_id="run-2"), shared)
    refused = refusal_of(state, shared, run_id="run-2", server_round=2)
    assert str(refused) == "this site's policy does not allow it: privacy.epsilon (max_epsilon)."
    assert "over all runs on these data" in refused.against.asked
    assert len(lines_of(state)) == 3
    other = dataclasses.replace(strict, data_dir=tmp_path / "other")
    train(dataclasses.replace(state, site=other), task_of(state, run_id="run-3"), shared)


def test_a_refused_round_is_not_trained(tmp_path, monkeypatch):
    state, shared = workplace_in(tmp_path)
    broke = dataclasses.replace(DEFAULT, max_epsilon=0.5)
    state = dataclasses.replace(state, site=dataclasses.replace(state.site, policy=broke))
    monkeypatch.setattr(clients.private_round, "_sum_of_groups", lambda *_: pytest.fail("it was trained"))
    refusal_of(state, shared)
    assert not budget_file(state.site).exists()


def test_noise_that_the_server_would_refuse_is_not_paid_for(tmp_path):
    state, shared = workplace_in(tmp_path, privacy__clip=100.0)
    with pytest.raises(ReplyRefused, match=r"times as long as the model, and 10 times are taken .*lower privacy\.clip"):
        train(state, task_of(state), shared)
    assert not budget_file(state.site).exists()
    state, shared = workplace_in(tmp_path, privacy__clip=100.0, federation__max_change_factor="off")
    train(state, task_of(state), shared)
    assert len(lines_of(state)) == 1


def test_nothing_leaves_where_the_spend_cannot_be_written_down(tmp_path):
    state, shared = workplace_in(tmp_path)
    budget_file(state.site).mkdir(parents=True)  # in the file's place
    with pytest.raises(CheckpointError, match=r"cannot be written .*nothing leaves that is not paid for"):
        train(state, task_of(state), shared)
    assert not list(state.state_folder("run-1").glob("answer-*"))


def test_a_cut_line_costs_nothing_and_a_damaged_one_is_never_a_saving(tmp_path):
    state, _ = workplace_in(tmp_path)
    release = Release(run_id="run-1", server_round=1, noise_multiplier=4.0, num_groups=3)
    for _ in range(3):
        privacy_budget.spend(state.site, release, dataclasses.replace(state.settings.privacy, epsilon=100.0))
    path, each = budget_file(state.site), release.squared_mu
    whole = path.read_bytes()
    assert spent_in(path, "run-1").in_all == pytest.approx(3 * each)
    path.write_bytes(whole[:-20])  # the reply of this line never left
    assert spent_in(path).in_all == pytest.approx(2 * each)
    lines = whole.splitlines(keepends=True)
    path.write_bytes(lines[0] + b"?" * 40 + b"\n" + lines[2])
    assert spent_in(path).in_all == pytest.approx(3 * each)
    path.write_bytes(lines[0] + lines[1] + b"{}\n")
    assert spent_in(path).in_all == pytest.approx(3 * each)
    assert spent_in(tmp_path / "none").in_all == 0.0


# ---- what is refused


@pytest.mark.parametrize(
    ("values", "num_people", "words"),
    [
        ({"privacy__delta": 0.1}, 10, "one of 10 people to be given away whole; it must be below 0.1"),
        ({"privacy__group_people": 7}, 6, "more than the 6 people to train on; lower it"),
    ],
)
def test_too_few_people_are_told(values, num_people, words):
    clients.run_state.require_private(settings_with(**VALUES), num_people)
    with pytest.raises(ReplyRefused, match=words):
        clients.run_state.require_private(settings_with(**(VALUES | values)), num_people)


def test_a_simulation_says_it_at_the_door_and_a_run_opens_with_its_guarantee():
    settings = settings_with(**VALUES | {"privacy__group_people": 7})
    few = {"alpha": tiny_pack("alpha")}
    with pytest.raises(UserError, match=r"alpha: privacy\.group_people = 7 is more than the 6 people"):
        _require_private(settings, 2, few, Engine())
    on = {"privacy__unit": "site", "federation__clients_per_round": 2, "privacy__delta": 0.1}
    with pytest.raises(UserError, match="one of 10 clients"):
        _require_private(settings_with(**VALUES | on), 10, few, Engine())
    _require_private(settings_with(**VALUES | {"privacy__unit": "off"}), 10, few, Engine(partition="dirichlet:0.5"))
    with pytest.raises(UserError, match=r"--partition dirichlet:0\.5 divides one person"):
        _require_private(settings_with(**VALUES), 2, {}, Engine(num_virtual=4, partition="dirichlet:0.5"))
    assert begin_rows(settings, Path("r"), look="", federated=True)["privacy"].startswith(
        "epsilon 4 at delta 1e-05, of one person at a site"
    )
    assert begin_rows(settings, Path("r"), look="")["privacy"] == ""


def test_too_few_people_are_told_before_anything_is_built(tmp_path, monkeypatch):
    for module in (clients.local_update, clients.run_state):
        monkeypatch.setattr(module, "open_site_pack", lambda *_: tiny_pack("alpha"))
    state, _ = workplace_in(tmp_path)
    for work in (join, open_client_state):
        with pytest.raises(ReplyRefused, match="more than the 6 people"):
            work(state.site, settings_with(**(VALUES | {"privacy__group_people": 7})))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model__pretrained": "none"}, "batch statistics would leave as they are"),
        ({"model__normalisation": "private", "model__pretrained": "none"}, 'use "shared"'),
        ({"training__patience": 3}, "training.patience counts scores"),
        ({"privacy__epsilon": 0.0}, "privacy.epsilon = 0.0 must be greater than 0"),
        ({"privacy__delta": 0.5}, "privacy.delta = 0.5 must be at most 0.1"),
        ({"privacy__group_people": 1}, "privacy.group_people = 1 must be at least 2"),
        ({"privacy__clip": 0.0}, "privacy.clip = 0.0 must be greater than 0"),
        ({"privacy__unit": "picture"}, "privacy.unit"),
        ({"privacy__unit": "site", "federation__strategy": "krum"}, "looks at single changes"),
        ({"privacy__unit": "site", "federation__norm_factor": 3.0}, "federation.norm_factor"),
    ],
)
def test_what_breaks_the_guarantee_is_refused_with_one_line(values, words):
    with pytest.raises(ConfigError, match=words):
        settings_with(**(VALUES | values))


def test_a_vit_has_no_batch_statistics_and_robust_rules_get_noisy_changes_of_people():
    vit = {"model__backbone": "vit_tiny", "model__pretrained": "none"}
    assert settings_with(**(VALUES | vit | {"federation__strategy": "krum"})).privacy.unit == "person"


def test_a_policy_that_wants_it_takes_runs_of_people_within_its_epsilon_only():
    policy = dataclasses.replace(DEFAULT, require_dp=True, pretrained=("any",))

    def limits(**values):
        return [one.limit for one in against_settings(policy, changed(Settings(), **values))]

    on = {"privacy__unit": "person", "model__backbone": "vit_tiny"}
    assert limits() == ["require_dp"]
    assert limits(**on) == []
    assert limits(**on | {"privacy__unit": "site", "federation__clients_per_round": 2}) == ["require_dp"]
    assert limits(**on | {"privacy__epsilon": 20.0, "privacy__delta": 1e-3}) == ["max_epsilon", "max_delta"]
