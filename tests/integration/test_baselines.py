"""Training without a federation: the same step and budget, and a run that goes on gives the same bits."""

import io
import json
import re

import numpy as np
import pytest
from tiny_federation import settings_with, site_settings, tiny_pack

from common import config
from common.errors import CheckpointError
from common.system.checkpoints import read_tensors
from simulation.alone import epochs as epochs_module
from simulation.alone.baselines import run_centralized, run_local
from simulation.alone.trainee import centralized_trainee

SETTINGS = settings_with(training__epochs=3, training__optimiser="adamw", training__lr=0.002, model__dropout=0.2)


def spooled(folder):
    lines = [json.loads(line) for line in (folder / "spool.jsonl").read_text().splitlines()]
    return [(line["key"], line["step"], line["value"]) for line in lines if "key" in line]


def local(tmp_path, name="run", settings=SETTINGS):
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    out = io.StringIO()
    summary = run_local(settings, site_settings("alpha", tmp_path), tiny_pack("alpha"), folder, out)
    return folder, summary, out.getvalue()


def centralized(tmp_path, name="central", settings=SETTINGS):
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    sites = {client: site_settings(client, tmp_path) for client in ("alpha", "beta")}
    packs = {client: tiny_pack(client) for client in sites}
    return folder, run_centralized(settings, sites, packs, folder, io.StringIO())


class Killed(Exception):
    """Stands for kill -9: nothing of ours runs after it."""


@pytest.mark.parametrize("point", ["save_private", "write_json", "log_metrics"])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(tmp_path, monkeypatch, point):
    """Killed right before one of the steps in which an epoch's end is written; dropout and AdamW's state count."""
    whole, _, _ = local(tmp_path, "whole")
    holder = epochs_module.TrackedRun if point == "log_metrics" else epochs_module
    real, calls = getattr(holder, point), []

    def dying(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return real(*arguments, **keywords)

    monkeypatch.setattr(holder, point, dying)
    with pytest.raises(Killed):
        local(tmp_path, "killed")
    monkeypatch.undo()
    killed, _, out = local(tmp_path, "killed")
    assert re.findall(r"^epoch (\d)", out, re.MULTILINE)[0] in ("2", "3"), "it goes on and does not begin anew"
    for name in ("best", "last"):
        one, _ = read_tensors(whole / "checkpoints" / f"{name}.safetensors")
        other, _ = read_tensors(killed / "checkpoints" / f"{name}.safetensors")
        assert all(np.array_equal(one[key], other[key]) for key in one), name
    losses = [(step, value) for key, step, value in spooled(killed) if key == "train_loss"]
    assert losses == [(step, value) for key, step, value in spooled(whole) if key == "train_loss"], "each point once"
    whole_rows, rows = (json.loads((f / "metrics.json").read_text())["epochs"] for f in (whole, killed))
    assert [row["val_roc_auc"] for row in rows] == [row["val_roc_auc"] for row in whole_rows]


def test_a_resume_state_that_is_cut_short_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(epochs_module.Epochs, "_save_model", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        local(tmp_path)
    monkeypatch.undo()
    folder, _, _ = local(tmp_path, "other")
    [state] = (folder / "checkpoints" / "resume").glob("round-*.safetensors")
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"resume: the state of epoch 3 is missing; start a new run"):
        local(tmp_path, "other")


def test_training_stops_when_validation_is_out_of_patience(tmp_path, monkeypatch):
    """Validation gets worse from the second epoch on, so with patience 2 the fourth epoch is not begun."""
    scores = iter([0.9, 0.8, 0.7, 0.95, 0.99])
    monkeypatch.setattr(epochs_module.Epochs, "_validate", lambda _: {"val_roc_auc": next(scores)})
    settings = config.with_value(config.with_value(SETTINGS, "training", "epochs", 5), "training", "patience", 2)
    folder, summary, out = local(tmp_path, settings=settings)
    assert (summary.best_epoch, summary.epochs) == (1, 3)
    assert "stopped early after epoch 3" in out
    assert read_tensors(folder / "checkpoints" / "best.safetensors")[1] == {"epoch": "1"}


def test_all_in_one_place_processes_every_picture_as_often_as_the_holders_alone(tmp_path):
    _, _, _ = local(tmp_path)
    folder, summary = centralized(tmp_path)
    results = json.loads((folder / "metrics.json").read_text())
    alone = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert alone["num_pictures_processed"] == 3 * 24
    assert results["num_pictures_processed"] == 2 * alone["num_pictures_processed"]
    assert results["num_gradient_steps"] == 3 * 6
    assert set(results["clients"]) == {"alpha", "beta"} == set(results["test_pairs"])
    assert summary.test == results["test"]
    assert 0.0 <= results["untrained_val_auc"] <= 1.0
    assert read_tensors(folder / "checkpoints" / "best.safetensors")[0]["head.weight"].shape[0] == 12
    about = json.loads((folder / "run.json").read_text())
    assert (about["mode"], about["clients"]) == ("centralized", ["alpha", "beta"])


def test_the_common_models_pooled_figures_are_the_sum_of_the_clients_pairs(tmp_path):
    sites = {client: site_settings(client, tmp_path) for client in ("alpha", "beta")}
    trainee = centralized_trainee(SETTINGS, sites, {client: tiny_pack(client) for client in sites})
    by_client = trainee.evaluate("test")
    pooled = trainee.evaluate_pooled("test")
    np.testing.assert_array_equal(pooled.pairs, by_client["alpha"].pairs + by_client["beta"].pairs)
    assert pooled.closed.num_examples == 12
    assert pooled.pairs.sum() == 2 * 36  # nine pictures of each client's test people, and none across clients
