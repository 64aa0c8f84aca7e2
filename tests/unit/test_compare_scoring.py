"""Scores of found models: with the right head, on the same pairs, with intervals that are paired."""

import dataclasses

import numpy as np
import pytest
import torch

from common.errors import CheckpointError, DataError, UserError
from common.faces.splits import Split
from common.metrics.bootstrap import Drawn, Estimate
from common.metrics.figures import closed_scores, open_set_scores, scores, wilson
from common.models.recogniser import for_people
from common.system.checkpoints import write_tensors
from common.training.evaluation import embed, evaluate, people_digest
from simulation.compare.comparison import (
    check_same_pairs,
    cpu_seconds_of,
    describe,
    gaps_of,
    notes_of,
    notes_of_size,
    with_pooled,
)
from simulation.compare.model_lookup import Search, Wanted, find_models
from simulation.compare.scoring import POOLED, gap, score
from tests.comparable_models import CLIENTS, CPU, PACKS, one_person_test, write_private, write_run
from tests.tiny_federation import settings_with

FEDAVG, FEDBN = Wanted(kind="fedavg"), Wanted(kind="fedbn")
CENTRALIZED = Wanted(kind="centralized")
ALPHA, BETA = (Wanted(kind="local", client=name) for name in CLIENTS)


def _find(out, *wanted, clients=CLIENTS):
    search = Search(settings=settings_with(run__out=str(out)), clients=clients)
    return find_models(search, wanted, {})


def _score(model, packs=PACKS, clients=CLIENTS, seed=1):
    return score(model, packs, clients, CPU, seed)


def _value(scored, figure):
    return scored.figures[figure].value


def test_a_local_model_at_home_and_away(tmp_path):
    trained = write_run(tmp_path, "1", clients=("alpha",))
    [model] = _find(tmp_path, ALPHA)
    scored = _score(model)
    wanted = evaluate(trained, PACKS["alpha"], "test", CPU)
    assert {name: e.value for name, e in scored["alpha"].figures.items()} == pytest.approx(
        {name: value for name, value in scores(wanted).items() if name != "loss"}
    )
    assert scored["alpha"].num_closed == 6
    away = evaluate(trained, PACKS["beta"], "test", CPU)
    assert _value(scored["beta"], "roc_auc") == open_set_scores(away.pairs)["roc_auc"]
    assert scored["beta"].no_head == "it was not trained on beta"
    for place in ("beta", POOLED):
        assert "accuracy" not in scored[place].figures
        assert scored[place].num_closed == 0
    pooled = open_set_scores(wanted.pairs + away.pairs)
    assert {name: _value(scored[POOLED], name) for name in pooled} == pytest.approx(pooled)


def _know_everyone(trained, checkpoint):
    """Give each person's row of the head the mean embedding of its training pictures, in the checkpoint too."""
    for number, name in enumerate(CLIENTS):
        pack = PACKS[name]
        for label in range(pack.num_classes):
            rows = np.flatnonzero((pack.training_labels == label) & (pack.split == Split.TRAIN))
            mean = embed(trained, pack, rows, CPU).mean(0)
            with torch.no_grad():
                trained.head.weight[number * pack.num_classes + label] = mean
    write_tensors(checkpoint, trained.state_dict(), {})


def test_the_centralised_heads_rows_are_each_clients_own_people(tmp_path):
    trained = write_run(tmp_path, "1", mode="centralized", clients=CLIENTS)
    [model] = _find(tmp_path, CENTRALIZED)
    _know_everyone(trained, model.checkpoint)
    scored = _score(model)
    for name, rows in (("alpha", slice(0, 6)), ("beta", slice(6, 12))):
        own = closed_scores(evaluate(for_people(trained, rows), PACKS[name], "test", CPU).closed)["accuracy"]
        assert _value(scored[name], "accuracy") == own > 0.8  # with other rows it would be about 1 in 6
    alone = {name: _score(model, {name: PACKS[name]}, (name,))[name] for name in CLIENTS}
    for name in CLIENTS:  # the other client's data need not be here
        assert _value(alone[name], "accuracy") == _value(scored[name], "accuracy")
    assert scored[POOLED].num_closed == 12


def test_a_head_over_other_people_is_not_used(tmp_path):
    write_run(tmp_path, "1", mode="centralized", clients=CLIENTS)
    [model] = _find(tmp_path, CENTRALIZED)
    fewer = dataclasses.replace(PACKS["beta"], split=np.where(PACKS["beta"].person == 0, 5, PACKS["beta"].split))
    scored = _score(model, {"alpha": PACKS["alpha"], "beta": fewer})
    assert "accuracy" not in scored["alpha"].figures
    assert scored["alpha"].no_head == "its head has 12 people, which are not those of the data now"


def test_a_federated_model_with_the_heads_that_are_here(tmp_path):
    settings = settings_with()
    shared = write_run(tmp_path, "1", mode="federated", clients=CLIENTS, strategy="fedavg")
    whole = write_private(tmp_path, "1", "alpha", shared, settings)
    [model] = _find(tmp_path, FEDAVG)
    scored = _score(model)
    wanted = scores(evaluate(whole, PACKS["alpha"], "test", CPU))
    assert _value(scored["alpha"], "accuracy") == wanted["accuracy"]
    assert _value(scored["alpha"], "roc_auc") == wanted["roc_auc"]
    assert scored["beta"].no_head.startswith("the head of beta is not in ")
    assert "accuracy" not in scored["beta"].figures
    assert "accuracy" not in scored[POOLED].figures
    assert notes_of([model], {"fedavg": scored}) == [
        f"fedavg: no accuracy on own people at beta: {scored['beta'].no_head}"
    ]


def test_private_normalisation_is_each_clients_own_or_an_error(tmp_path):
    settings = settings_with(model__normalisation="private")
    shared = write_run(
        tmp_path, "1", mode="federated", clients=CLIENTS, strategy="fedavg", model__normalisation="private"
    )
    own = {name: write_private(tmp_path, "1", name, shared, settings, seed=len(name)) for name in CLIENTS}
    [model] = _find(tmp_path, FEDBN)
    scored = _score(model)
    for name in CLIENTS:
        assert _value(scored[name], "roc_auc") == scores(evaluate(own[name], PACKS[name], "test", CPU))["roc_auc"]
    next((tmp_path / "clients" / "beta" / "private" / "1").iterdir()).unlink()
    with pytest.raises(UserError, match=r"fedbn \(1\) has private normalisation, and that of beta is not in .*beta"):
        _score(model)


def test_a_checkpoint_cut_short_or_of_another_model_is_named(tmp_path):
    write_run(tmp_path, "1")
    [model] = _find(tmp_path, ALPHA)
    whole = model.checkpoint.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:4], b""):
        model.checkpoint.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"1/checkpoints/best.safetensors is not a whole safetensors file"):
            _score(model)
    model.checkpoint.unlink()
    with pytest.raises(CheckpointError, match=r"1/checkpoints/best.safetensors does not exist"):
        _score(model)
    model.checkpoint.write_bytes(whole)
    other = dataclasses.replace(model, settings=settings_with(model__width=0.5))
    with pytest.raises(CheckpointError, match=r"best.safetensors: backbone\..* is of shape .*; it is of another model"):
        _score(other)


def test_models_tested_on_other_pairs_are_refused_with_the_setting(tmp_path):
    write_run(tmp_path, "1")
    write_run(tmp_path, "2", mode="centralized", clients=CLIENTS, data__fraction_test_people=0.4, data__image_size=48)
    models = _find(tmp_path, ALPHA, CENTRALIZED)
    split = PACKS["alpha"].split.copy()
    split[np.flatnonzero(split == 4)[:3]] = 3  # one test person less
    fewer = {**PACKS, "alpha": dataclasses.replace(PACKS["alpha"], split=split)}
    packs = {models[0].settings.data: PACKS, models[1].settings.data: fewer}
    with pytest.raises(UserError) as error:
        check_same_pairs(models, packs, CLIENTS)
    assert str(error.value) == (
        "local-alpha (1) and centralized (2) are tested on different pairs of alpha: data.fraction_test_people = 0.2"
        " and 0.4; train one again with the other's setting, or name another run with --run centralized=RUN."
    )
    check_same_pairs(models, dict.fromkeys(packs, PACKS), CLIENTS)  # equal people: the size of pictures may differ


def test_a_data_set_that_changed_since_training_is_refused(tmp_path):
    digest = people_digest(PACKS["alpha"], "test")
    write_run(tmp_path, "1", metrics={"best_epoch": 2, "test_pairs": {"alpha": digest}})
    write_run(tmp_path, "2", clients=("beta",), metrics={"best_epoch": 2, "test_pairs": {"beta": "0123", "gamma": "4"}})
    same, changed = _find(tmp_path, ALPHA, BETA)
    check_same_pairs([same], {same.settings.data: PACKS}, CLIENTS)
    with pytest.raises(UserError, match=r"local-beta \(2\) was tested on other pairs of beta .*digest 0123, now "):
        check_same_pairs([changed], {changed.settings.data: PACKS}, CLIENTS)


def test_a_test_set_of_one_person_or_of_none_is_an_error():
    one = one_person_test(PACKS["alpha"])
    nobody = dataclasses.replace(one, split=np.where(one.split == 4, 5, one.split))
    for pack, number in ((one, 1), (nobody, 0)):
        with pytest.raises(DataError, match=rf"alpha: the test set has {number} people"):
            describe("alpha", pack)
    whole = describe("alpha", PACKS["alpha"])
    assert (whole.num_people, whole.num_pictures, whole.num_genuine, whole.num_impostor) == (3, 9, 9, 27)
    assert with_pooled({"alpha": whole, "beta": whole})[POOLED].num_impostor == 54
    assert list(with_pooled({"alpha": whole})) == ["alpha"]


def test_replicates_are_paired(tmp_path):
    write_run(tmp_path, "1", clients=("alpha",))
    write_run(tmp_path, "2", clients=("beta",), seed=1)  # the same backbone under another name
    one, same = _find(tmp_path, ALPHA, BETA)
    scored = {"one": _score(one), "same": _score(same), "other draws": _score(same, seed=2)}
    nothing = gap(scored, "one", "same", POOLED, "roc_auc")
    assert nothing.gap == Estimate(value=0.0, low=0.0, high=0.0)
    assert not nothing.excludes_zero
    unpaired = gap(scored, "one", "other draws", POOLED, "roc_auc")
    assert unpaired.gap.value == 0.0
    assert unpaired.gap.low < 0.0 < unpaired.gap.high
    auc = scored["one"][POOLED].figures["roc_auc"]
    assert auc.low <= auc.value <= auc.high
    assert auc.low < auc.high


def test_which_gaps_are_shown(tmp_path):
    write_run(tmp_path, "1", clients=("alpha",))
    write_run(tmp_path, "2", clients=("beta",), seed=3)
    write_run(tmp_path, "3", mode="centralized", clients=CLIENTS, seed=5)
    write_run(tmp_path, "4", mode="federated", clients=CLIENTS, strategy="fedavg", seed=7, federation__rounds=9)
    models = _find(tmp_path, ALPHA, BETA, CENTRALIZED, FEDAVG)
    scored = {model.name: _score(model) for model in models}
    pooled = {name: _value(scored[name][POOLED], "roc_auc") for name in ("local-alpha", "local-beta")}
    gaps = [g for g in gaps_of(models, [POOLED, *CLIENTS], scored) if g.figure == "roc_auc"]
    assert [(g.minuend, g.subtrahend, g.test_set) for g in gaps] == [
        ("fedavg", "centralized", POOLED),
        ("fedavg", max(pooled, key=pooled.get), POOLED),
        ("fedavg", "centralized", "alpha"),
        ("fedavg", "local-alpha", "alpha"),
        ("fedavg", "centralized", "beta"),
        ("fedavg", "local-beta", "beta"),
    ]
    for g in gaps:
        values = (_value(scored[name][g.test_set], "roc_auc") for name in (g.minuend, g.subtrahend))
        assert g.gap.value == pytest.approx(next(values) - next(values))
    notes = notes_of(models, scored)
    assert any(note.startswith("the budgets differ: epochs") and "fedavg 9" in note for note in notes)


def test_wilsons_interval_of_8_in_10():
    """z^2 / n = 0.384146; the middle is (0.8 + 0.192073) / 1.384146 = 0.716740 and half the width is
    sqrt(0.16 * 0.384146 + 0.384146^2 / 4) / 1.384146 = 0.226577."""
    assert wilson(8, 10) == pytest.approx((0.490163, 0.943317), abs=1e-5)
    assert wilson(10, 10)[1] == pytest.approx(1.0)


def test_every_tensor_comes_from_the_checkpoint(tmp_path):
    """A model built anew has other weights; if one stayed, the scores of two runs could not differ by it alone."""
    trained = write_run(tmp_path, "1")
    [model] = _find(tmp_path, ALPHA)
    from simulation.compare.model_loading import ModelFiles

    ready = ModelFiles(model).at("alpha", PACKS["alpha"], {"alpha": 6})
    for name, tensor in ready.recogniser.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, trained.state_dict()[name]), name


def test_a_very_large_test_set_is_looked_at_once_and_told_of(monkeypatch):
    monkeypatch.setattr("common.metrics.bootstrap.EXACT_PAIRS", 10)
    monkeypatch.setattr("simulation.compare.comparison.EXACT_PAIRS", 10)
    test = describe("alpha", PACKS["alpha"])
    assert test.is_linear
    assert cpu_seconds_of([test]) == pytest.approx(2 * test.num_pairs / 4e7)
    [note] = notes_of_size({"alpha": test})
    assert note.startswith(f"alpha has {test.num_pairs:,} pairs, all of them scored")
    indices, person, family = PACKS["alpha"].shown_in(Split.TEST_PEOPLE)
    embeddings = np.random.default_rng(1).normal(size=(len(indices), 8)).astype(np.float32)
    drawn = Drawn.by_seed(embeddings, person, family, num_replicates=5, seed=1)
    assert drawn.sums is not None
    looks = []
    monkeypatch.setattr("common.metrics.bootstrap.bootstrap_histograms", lambda *_, **__: looks.append(1))
    assert drawn.counts("all", drawn.sums.histogram, None)["pairs"].shape == (5, 2, 512)
    assert not looks
