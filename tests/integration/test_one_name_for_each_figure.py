"""One figure has one name in all kinds of runs, in groups, the guides' names beside ours."""

import io
import json
from collections import defaultdict

import pytest
from tiny_federation import InProcessMailbox, enter_run, settings_with, site_settings, tiny_pack

import clients.message_handler
import clients.packs
from common.metrics.names import present
from common.plots.curves import client_curves
from server.app import Surroundings, federate
from simulation.alone.baselines import run_centralized, run_local

SETTINGS = settings_with(federation__rounds=2, federation__join_timeout_s=20.0)
NAMES = ("alpha", "beta")
# The guides' own lists (mlflow-integration-guide.md).
GUIDES = {
    "local": {"train_loss", "train_acc", "val_loss", "val_acc", "learning_rate", "test_accuracy", "test_roc_auc"},
    "centralized": {"train_loss", "train_acc", "val_loss", "val_acc", "test_precision", "test_recall", "test_f1"},
    "federated": {"round_train_loss", "round_train_acc", "round_test_loss", "round_test_acc", "alpha_test_accuracy"},
}


def _points(folder):
    """Run's name in the spool ("" for the run itself) -> metric -> {step: value}."""
    found = defaultdict(lambda: defaultdict(dict))
    for line in (folder / "spool.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "key" in entry and not entry["key"].startswith("system/"):
            found[entry["run"]][entry["key"]][entry["step"]] = entry["value"]
    return found


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Mode -> the points of such a run, and of a federation's nested ones."""
    root = tmp_path_factory.mktemp("runs")
    packs = {name: tiny_pack(name) for name in NAMES}
    sites = {name: site_settings(name, root) for name in NAMES}
    with pytest.MonkeyPatch.context() as patch:
        enter_run(patch)
        patch.setattr(clients.message_handler, "_workplaces", {})
        patch.setattr(clients.packs, "open_pack", lambda _dataset, data, *_, **__: packs[data.parent.name])
        for mode in GUIDES:
            (root / mode).mkdir()
        run_local(SETTINGS, sites["alpha"], packs["alpha"], root / "local", io.StringIO())
        run_centralized(SETTINGS, sites, packs, root / "centralized", io.StringIO())
        federate(
            SETTINGS,
            InProcessMailbox(NAMES, root / "sites", lambda _name, _task, reply: reply),
            Surroundings(
                run_folder=root / "federated",
                stopped=lambda: False,
                all_nodes_are_here=lambda: True,
                git_commit="none",
            ),
        )
    return {mode: _points(root / mode) for mode in GUIDES}


def test_curves_and_results_have_the_same_names_in_every_kind_of_run(told):
    everywhere = {"train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_roc_auc", "val_eer"}
    everywhere |= {f"test_{name}" for name in ("accuracy", "loss", "f1", "roc_auc", "eer", "tar_at_far_1e-3")}
    runs = {mode: told[mode][""] for mode in GUIDES} | {f"nested {name}": told["federated"][name] for name in NAMES}
    for kind, points in runs.items():
        assert everywhere <= set(points), kind
        assert set(points["train_loss"]) == {1, 2}, kind
        assert len(points["test_roc_auc"]) == 1, f"{kind}: of the model that was chosen, once"


def test_the_guides_names_stand_beside_ours_with_the_same_points(told):
    for mode, names in GUIDES.items():
        assert names <= set(told[mode][""]), mode
    federated, local = told["federated"][""], told["local"][""]
    assert federated["round_train_acc"] == federated["train_accuracy"]
    assert federated["round_test_acc"] == federated["round_test_accuracy"]
    assert federated["alpha_test_accuracy"] == federated["client/alpha/test_accuracy"]
    assert local["val_acc"] == local["val_accuracy"]
    assert not {"train_acc", "round_train_acc"} & set(told["federated"]["alpha"])


def test_seconds_bytes_and_clients_are_groups(told):
    federated, nested = told["federated"][""], told["federated"]["alpha"]
    assert {"time/round_seconds", "time/wait_seconds", "bytes/down", "bytes/up"} <= set(federated)
    assert {"time/train_seconds", "time/wait_seconds", "bytes/up"} <= set(nested)
    assert "time/epoch_seconds" in told["local"][""]
    assert {f"client/{name}/test_roc_auc" for name in NAMES} <= set(federated) & set(told["centralized"][""])
    # What a page of MLflow shows before any group is unfolded.
    assert len([name for name in federated if "/" not in name]) < 45
    assert not [name for name in federated if name.endswith(("_seconds", "_bytes")) and "/" not in name]


def test_the_picture_of_the_clients_has_all_its_panels_with_a_curve_of_each(told):
    rows = {
        name: [
            {"step": step, **{metric: own[step] for metric, own in told["federated"][name].items() if step in own}}
            for step in (0, 1, 2)
        ]
        for name in NAMES
    }
    axes = client_curves(rows).axes
    assert [one.get_title() for one in axes] == [
        "Training loss",
        "Training accuracy, own identities",
        "Validation loss",
        "Validation accuracy, own identities",
        "Validation, people never seen",
        "Test accuracy, own identities",
        "Test, people never seen",
    ]
    assert all([line.get_label() for line in one.get_lines()] == list(NAMES) for one in axes)


def test_figures_of_a_run_that_began_under_earlier_names_are_found_under_the_present_ones(told):
    former = {
        "round_val_auc": 1.0, "round_test_twins_auc": 2.0, "round_val_auc_median": 3.0, "round_train_acc": 4.0,
        "bytes_up": 5.0, "round_seconds": 6.0, "round_work_seconds": 7.0, "round_public_auc": 8.0,
    }  # fmt: skip
    assert present(former) == {
        "val_roc_auc": 1.0, "round_test_twins_roc_auc": 2.0, "val_roc_auc_median": 3.0, "train_accuracy": 4.0,
        "bytes/up": 5.0, "time/round_seconds": 6.0, "time/work_seconds": 7.0, "public/roc_auc": 8.0,
    }  # fmt: skip
    row = {"test_roc_auc": 1.0, "val_accuracy": 2.0, "wait_seconds": 3.0}
    assert present(row, of_client_row=True) == {
        "round_test_roc_auc": 1.0,
        "val_accuracy": 2.0,
        "time/wait_seconds": 3.0,
    }
    theirs = {"round_train_loss", "round_train_acc", "round_test_acc"}  # of the guides; no checkpoint has them
    now = [name for name in told["federated"][""] if name not in theirs]
    assert set(present(dict.fromkeys(now, 0.0))) == set(now), "present names stay"
