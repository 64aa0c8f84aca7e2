"""A whole federation of tiny clients in this process: it learns, repeats itself to the bit, survives bad clients."""

import argparse
import json

import numpy as np
import pytest
import torch
from tiny_federation import InProcessMailbox, enter_tiny_federation, settings_with

import clients.local_update
import clients.message_handler
from common.errors import ConfigError
from common.flags import add_run_settings, read_run_settings
from common.models.recogniser import build_recogniser
from common.models.table import BACKBONES, HEADS, BackboneRow
from common.strategies import STRATEGIES, Strategy, proximal
from common.tracking.registry import THRESHOLDS
from server.app import Surroundings, federate


@pytest.fixture(autouse=True)
def tiny_packs(monkeypatch):
    enter_tiny_federation(monkeypatch)


def federation(folder, names=("alpha", "beta"), tamper=lambda _name, _task, reply: reply, **values):
    """Run it; returns (outcome, summary) as the run's folder tells them; no summary when it failed."""
    clients.message_handler._workplaces.clear()
    settings = settings_with(**({"federation__rounds": 3, "federation__join_timeout_s": 20.0} | values))
    mailbox = InProcessMailbox(names, folder / "sites", tamper)
    run = folder / "run-1"
    run.mkdir(parents=True)
    federate(
        settings,
        mailbox,
        Surroundings(run_folder=run, stopped=lambda: False, all_nodes_are_here=lambda: True, git_commit="none"),
    )
    outcome = json.loads((run / "outcome.json").read_text())
    summary = run / "metrics.json"
    return outcome, json.loads(summary.read_text()) if summary.exists() else {}


def test_it_learns_and_the_same_seed_gives_the_same_model(tmp_path):
    outcome, first = federation(tmp_path / "a", federation__local_epochs=2)
    assert outcome == {"exit_code": 0, "line": ""}
    losses = [row["train_loss"] for row in first["rounds_table"] if "train_loss" in row]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert set(first["clients"]) == {"alpha", "beta"}
    assert first["refused_replies"] == 0
    _, again = federation(tmp_path / "b", federation__local_epochs=2)
    _, other = federation(tmp_path / "c", federation__local_epochs=2, run__seed=2)
    assert again["model_sha256"] == first["model_sha256"]
    assert again["rounds_table"][0]["val_roc_auc"] == first["rounds_table"][0]["val_roc_auc"]
    assert other["model_sha256"] != first["model_sha256"]


def test_how_sites_cut_their_pictures_is_kept_with_the_thresholds_without_a_tracking_too(tmp_path):
    """No thresholds are kept where validation has none; this one's stand in the run's folder, for `facefed verify`."""
    federation(tmp_path, federation__rounds=1, tracking__enabled=False)
    kept = json.loads((tmp_path / "run-1" / THRESHOLDS).read_text())
    assert kept["cuts"] == {"landmarks": 1, "centre square": 1}


def test_each_round_changes_the_model_and_its_checkpoint_is_the_one_named(tmp_path):
    seen = []

    def watch(_name, task, reply):
        seen.append((task.kind, task.server_round))
        return reply

    _, summary = federation(tmp_path, tamper=watch)
    state = json.loads((tmp_path / "run-1" / "checkpoints" / "state.json").read_text())
    assert (state["round"], state["sha256"]) == (3, summary["model_sha256"])
    files = list((tmp_path / "run-1" / "checkpoints").glob("round-*"))
    assert len({path.read_bytes() for path in files}) == len(files) >= 2
    assert seen.count(("train", 2)) == 2
    assert seen.count(("evaluate", 3)) == 2


def test_strategy_and_mu_reach_the_model(tmp_path):
    shas = [
        federation(
            tmp_path / str(number),
            federation__strategy=strategy,
            federation__proximal_mu=mu,
            federation__rounds=1,
            training__lr=0.1,
        )[1]["model_sha256"]
        for number, (strategy, mu) in enumerate([("fedavg", 0.5), ("fedprox", 0.0), ("fedprox", 0.5)])
    ]
    assert shas[0] == shas[1] != shas[2]


def test_private_normalisation_runs_and_registers_no_global_model(tmp_path):
    outcome, summary = federation(tmp_path, model__normalisation="private", federation__rounds=2)
    assert outcome["exit_code"] == 0
    assert summary["last"]["roc_auc"] > 0.0


def with_nan(name, task, reply):
    """gamma's change of round 2 holds one NaN."""
    if name != "gamma" or task.kind != "train" or task.server_round != 2:
        return reply
    sent = reply.content["arrays"]["change"]
    change = np.frombuffer(sent.data, dtype="<f4").copy()
    change[10] = np.nan
    poisoned = type(sent)(dtype=sent.dtype, shape=sent.shape, stype=sent.stype, data=change.tobytes())
    reply.content["arrays"]["change"] = poisoned
    return reply


def test_a_nan_in_round_2_is_dropped_named_and_counted_and_the_run_goes_on(tmp_path):
    outcome, summary = federation(tmp_path, names=("alpha", "beta", "gamma"), tamper=with_nan)
    assert outcome["exit_code"] == 0
    assert summary["refused_replies"] == 1
    assert list(summary["refusals"]["2"]) == ["gamma"]
    assert "nan in backbone." in summary["refusals"]["2"]["gamma"]
    assert np.isfinite([row["train_loss"] for row in summary["rounds_table"] if "train_loss" in row]).all()
    assert list(summary["refusals"]) == ["2"]  # and it is back in round 3
    events = [json.loads(line) for line in (tmp_path / "run-1" / "events.jsonl").read_text().splitlines()]
    assert [event["clients"] for event in events if event["kind"] == "round"] == [3, 2, 3]


def test_a_nan_ends_the_run_where_every_client_is_needed_and_keeps_round_1(tmp_path):
    outcome, summary = federation(
        tmp_path, names=("alpha", "beta", "gamma"), tamper=with_nan, federation__min_clients=3
    )
    assert outcome["exit_code"] == 1
    assert "round 2: 2 of 3 clients gave a usable reply, 3 are needed (gamma: the change holds nan" in outcome["line"]
    assert summary == {}
    assert json.loads((tmp_path / "run-1" / "checkpoints" / "state.json").read_text())["round"] == 1


def test_two_clients_of_one_name_are_the_users_mistake(tmp_path):
    outcome, _ = federation(tmp_path, names=("alpha", "alpha"))
    assert outcome["exit_code"] == 2
    assert "two clients claim the name 'alpha'" in outcome["line"]


def test_a_client_whose_pictures_cannot_be_opened_tells_the_server_that_but_not_where_they_are(
    tmp_path, monkeypatch, caplog
):
    from common.errors import DataError

    def no_pictures(*_args, **_named):
        raise DataError("data/beta holds no pictures; give the folder that holds them.")

    monkeypatch.setattr(clients.packs, "open_pack", no_pictures)
    outcome, _ = federation(tmp_path)
    assert outcome["exit_code"] == 1
    assert "alpha: its data cannot be used" in outcome["line"]
    assert "data/beta" not in outcome["line"]
    assert "data/beta holds no pictures" in caplog.text  # the site's own log says it


# ---- a new strategy, backbone or head is a row


def chosen_by_flag(flag, name):
    parser = argparse.ArgumentParser()
    add_run_settings(parser)
    return read_run_settings(parser.parse_args([flag, name]))


def test_a_row_makes_a_strategy_at_both_sides(tmp_path, monkeypatch):
    """A pull of 2 mu and a server rate of 0.5, which is FedProx with other settings: the same model to the bit."""
    row = Strategy(
        name="toy",
        paper="none",
        client_term=lambda parameters, federation: proximal(parameters, 2 * federation.proximal_mu),
        default_lr=0.5,
    )
    monkeypatch.setitem(STRATEGIES, "toy", row)
    assert chosen_by_flag("--strategy", "toy").federation.strategy == "toy"
    values = {"federation__rounds": 2, "training__lr": 0.1}
    ways = [
        {"federation__strategy": "toy", "federation__proximal_mu": 0.25},
        {"federation__strategy": "fedprox", "federation__proximal_mu": 0.5, "federation__server_lr": 0.5},
        {"federation__strategy": "fedprox", "federation__proximal_mu": 0.25, "federation__server_lr": 0.5},
    ]
    toy, same, other = (federation(tmp_path / str(n), **values | way)[1] for n, way in enumerate(ways))
    assert toy["model_sha256"] == same["model_sha256"] != other["model_sha256"]


def test_a_row_makes_a_robust_strategy_with_its_fewest_clients(tmp_path, monkeypatch):
    """Of three clients torch's own median, which is fedmedian's; with two the run ends before its first round."""

    def middle(changes, _federation):
        return torch.cat([values.median(dim=0).values for _, values in changes.pieces()])

    monkeypatch.setitem(STRATEGIES, "toy", Strategy(name="toy", paper="none", rule=middle, fewest=lambda _: 3))
    assert chosen_by_flag("--strategy", "toy").federation.strategy == "toy"
    outcome, _ = federation(tmp_path / "few", federation__strategy="toy")
    assert outcome == {
        "exit_code": 2,
        "line": "toy needs 3 clients in each round, and there are 2; start more, or choose fedmedian.",
    }
    toy, same, mean = (
        federation(tmp_path / name, names=("alpha", "beta", "gamma"), federation__rounds=2, federation__strategy=name)[
            1
        ]
        for name in ("toy", "fedmedian", "fedavg")
    )
    assert toy["model_sha256"] == same["model_sha256"] != mean["model_sha256"]


class ToyTrunk(torch.nn.Module):
    """One convolution."""

    num_features = 8

    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 8, kernel_size=5, stride=4)

    def forward(self, pictures):
        return self.convolution(pictures).relu()


def test_a_row_makes_a_backbone(tmp_path, monkeypatch):
    """It federates, and its activations can be worked out again, though it names no parts for that."""
    monkeypatch.setitem(BACKBONES, "toy", BackboneRow(name="toy", trunk=lambda _model, _size: ToyTrunk()))
    assert chosen_by_flag("--model", "toy").model.backbone == "toy"
    plain, again = (
        federation(
            tmp_path / str(is_recomputed),
            model__backbone="toy",
            federation__rounds=2,
            training__activation_checkpointing=is_recomputed,
        )[1]
        for is_recomputed in (False, True)
    )
    assert plain["model_sha256"] == again["model_sha256"]
    losses = [row["train_loss"] for row in plain["rounds_table"] if "train_loss" in row]
    assert losses[-1] < losses[0]
    with pytest.raises(ConfigError, match=r"no weights for toy; choose resnet18, resnet50, mobilenet_v2, vit_base, or"):
        build_recogniser(
            settings_with(model__backbone="toy", model__width=1.0, model__pretrained="imagenet").model,
            num_people=2, image_size=32, backbone_seed=0, head_seed=0,
        )  # fmt: skip


def test_a_row_makes_a_head(tmp_path, monkeypatch):
    """Softmax under another name: the same model to the bit."""
    monkeypatch.setitem(HEADS, "toy", HEADS["softmax"])
    assert chosen_by_flag("--head", "toy").model.head == "toy"
    toy, same, other = (
        federation(tmp_path / name, model__head=name, federation__rounds=1)[1]["model_sha256"]
        for name in ("toy", "softmax", "cosface")
    )
    assert toy == same != other
