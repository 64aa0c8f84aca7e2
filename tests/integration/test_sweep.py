"""A search over settings: nested trials judged by validation alone, and a break that changes nothing."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_federation import site_settings
from tiny_twins import SETTINGS, assert_same_bits, killed_at, points, spool, write_twins

from common import config
from common.errors import TrainingFailed
from common.faces.pack import FacePack
from common.settings import TrackingSettings
from common.system.files import read_json
from common.system.runtime import SILENCE
from simulation.alone import epochs as epochs_module
from simulation.alone import sweep as sweep_module
from simulation.alone.sweep import run_sweep
from simulation.alone.sweep_plan import load_plan
from tests.tiny_settings import changed

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
PLAN = """
[sweep]
trials = 4
base = "base.toml"
metric = "val_twins_roc_auc"
[sweep.space]
"training.lr" = { low = 1e-4, high = 1e-2, log = true }
"model.glca_fraction" = { choices = [0.1, 0.3, 0.5] }
"model.depth" = { low = 1, high = 2 }
"""


def sweep(folder: Path, pack: FacePack, settings=SETTINGS, text: str = PLAN):
    folder.mkdir(exist_ok=True)
    (folder.parent / "plan.toml").write_text(text, encoding="utf-8")
    out = io.StringIO()
    plan = load_plan(folder.parent / "plan.toml")
    return run_sweep(settings, plan, site_settings("twins", folder.parent), pack, folder, out), out.getvalue()


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(twins, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, sweep(folder, twins, config.with_value(SETTINGS, "tracking", "plots", "final"))[0]


def test_each_trial_is_a_nested_run_and_knows_no_test_figure(whole):
    folder, _ = whole
    lines = spool(folder)
    starts = {line["run"]: line for line in lines if line.get("event") == "start"}
    names = [f"trial-00{number}" for number in range(4)]
    assert list(starts) == ["", *names]
    assert {line["experiment"] for line in starts.values()} == {"twin-verification-hyperparameter-search"}
    for name, row in zip(names, table(folder), strict=True):
        own = [line for line in lines if line["run"] == name]
        logged = {line["key"]: line["value"] for line in own if "key" in line}
        assert {"train_loss", "val_roc_auc", "val_twins_roc_auc", "best_epoch"} <= logged.keys()
        assert not [key for key in logged if key.startswith("test_")], "a trial that saw test could be chosen by it"
        [params] = [line["values"] for line in own if line.get("event") == "params"]
        assert float(params["training.lr"]) == float(row["training.lr"])
        assert params["model.depth"] == row["model.depth"]
        assert {"state": row["state"]} in [line["values"] for line in own if line.get("event") == "tags"]
        if row["state"] == "complete":
            assert logged["final_val_twins_roc_auc"] == float(row["val_twins_roc_auc"])
    assert {line["run"] for line in lines if str(line.get("key", "")).startswith("test_")} == {""}


def test_the_value_of_a_trial_is_its_best_epochs_and_the_best_trial_is_tested(whole):
    folder, summary = whole
    rows = [row for row in table(folder) if row["state"] == "complete"]
    assert {row["state"] for row in table(folder)} <= {"complete", "pruned"}
    best = max(rows, key=lambda row: float(row["val_twins_roc_auc"]))
    assert summary.best_trial == f"trial-00{best['trial']}"
    results = read_json(folder / "metrics.json")
    [epoch] = [row for row in results["epochs"] if row["step"] == results["best_epoch"]]
    assert epoch["val_twins_roc_auc"] == float(best["val_twins_roc_auc"]) == summary.best_value
    assert epoch["val_roc_auc"] == results["best_val_auc"] == max(row["val_roc_auc"] for row in results["epochs"])
    assert results["sweep"]["best_trial"] == int(best["trial"])
    assert len(results["sweep"]["trials"]) == 4
    assert results["twins"]["figures"]["twins"]["roc_auc"]["value"] > 0
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [summary.best_trial]
    assert (folder / "plots" / "sweep.png").stat().st_size > 0


def test_the_best_configuration_is_one_to_train_with(whole):
    folder, summary = whole
    best = config.load(folder / "best.toml")
    assert best.training.lr == summary.params["training.lr"]
    assert best.model.glca_fraction == summary.params["model.glca_fraction"]
    assert best.tracking == TrackingSettings()
    assert best.data == SETTINGS.data


def test_optuna_says_nothing_of_its_own(twins, tmp_path, capfd):
    sweep(tmp_path / "run", twins, changed(SETTINGS, training__epochs=1), PLAN.replace("trials = 4", "trials = 1"))
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


@pytest.mark.parametrize(
    ("holder", "name", "number"),
    [
        (sweep_module, "_suggested", 5),  # the second trial's first setting is drawn, its second is not
        (epochs_module, "save_private", 4),  # trained, not saved
        (epochs_module.TrackedRun, "log_metrics", 5),
        (sweep_module, "_judge", 5),  # saved, not told to Optuna
        (sweep_module, "_tell", 2),  # told to all but Optuna
        (sweep_module, "record_results", 1),  # all trials are done
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_search_that_was_killed_tries_and_finds_the_same(whole, twins, tmp_path, holder, name, number):
    with killed_at(holder, name, number):
        sweep(tmp_path / "killed", twins)
    _, said = sweep(tmp_path / "killed", twins)
    assert table(tmp_path / "killed") == table(whole[0])
    first = re.findall(r"^(trial-\d+) \(", said, re.MULTILINE)[:1]
    assert first == ([] if name == "record_results" else ["trial-001"]), "finished trials are kept"
    assert_same_bits(whole[0], tmp_path / "killed", [whole[1].best_trial])
    curves = [points(folder, "val_twins_roc_auc") for folder in (whole[0], tmp_path / "killed")]
    assert curves[0] == curves[1], "each point once"


def test_a_journal_cut_short_and_a_lock_left_behind_are_cleared(whole, twins, tmp_path):
    folder = tmp_path / "run"
    one = PLAN.replace("trials = 4", "trials = 1")
    sweep(folder, twins, text=one)
    journal = folder / "sweep.journal"
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"wor')
    (folder / "sweep.journal.lock").symlink_to(journal)
    sweep(folder, twins, text=PLAN.replace("trials = 4", "trials = 2"))
    assert table(folder) == table(whole[0])[:2]
    for line in journal.read_text().splitlines():
        json.loads(line)


def test_a_trial_that_fails_counts_and_the_search_goes_on(twins, tmp_path, monkeypatch):
    real, calls = epochs_module.train_epochs, []

    def failing(*arguments, **keywords):
        calls.append(1)
        if len(calls) in (1, 4):
            raise TrainingFailed("the loss of step 3 is not finite (nan)")
        return real(*arguments, **keywords)

    monkeypatch.setattr(epochs_module, "train_epochs", failing)
    summary, said = sweep(tmp_path / "run", twins, text=PLAN.replace("trials = 4", "trials = 3"))
    rows = table(tmp_path / "run")
    assert [row["state"] for row in rows] == ["failed", "complete", "failed"]
    assert rows[0]["error"] == "the loss of step 3 is not finite (nan)"
    assert rows[0]["val_twins_roc_auc"] == ""
    assert summary.best_trial == "trial-001"
    assert "trial-000: failed: the loss of step 3 is not finite (nan)\n" in said
    status = {line["run"]: line["status"] for line in spool(tmp_path / "run") if line.get("event") == "finish"}
    assert status == {"trial-000": "FAILED", "trial-001": "FINISHED", "trial-002": "FAILED", "": "FINISHED"}


def test_without_a_trial_trained_to_its_end_there_is_no_result(twins, tmp_path, monkeypatch):
    def failing(*_, **__):
        raise TrainingFailed("the loss of step 1 is not finite (nan)")

    monkeypatch.setattr(epochs_module, "train_epochs", failing)
    with pytest.raises(TrainingFailed, match=r"none of 2 trials was trained to its end; .*sweep\.csv says why"):
        sweep(tmp_path / "run", twins, text=PLAN.replace("trials = 4", "trials = 2"))
    assert [row["state"] for row in table(tmp_path / "run")] == ["failed", "failed"]
    assert not (tmp_path / "run" / "best.toml").exists()


def test_a_trial_worse_than_the_median_is_pruned(twins, tmp_path, monkeypatch):
    """Validation is scripted: three good trials, then one that is worse at each epoch; its last two are never begun."""
    monkeypatch.setattr(
        epochs_module.Epochs,
        "_validate",
        lambda epochs: {
            "val_roc_auc": 0.5 + epochs.progress.epoch / 100,
            "val_twins_roc_auc": 0.1 if epochs.folder.name == "trial-003" else 0.9,
        },
    )
    settings = changed(SETTINGS, training__epochs=4)
    sweep(tmp_path / "run", twins, settings)
    rows = table(tmp_path / "run")
    assert [row["state"] for row in rows] == ["complete", "complete", "complete", "pruned"]
    assert [row["epochs"] for row in rows] == ["4", "4", "4", "2"]
    status = {line["run"]: line["status"] for line in spool(tmp_path / "run") if line.get("event") == "finish"}
    assert status["trial-003"] == "KILLED"


PROGRAM = """
import os, sys
from simulation.alone import epochs
real, calls = epochs.save_private, []
def dying(*arguments):
    calls.append(1)
    real(*arguments)
    if len(calls) == 3:
        os._exit(137)
epochs.save_private = dying
from simulation.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_program_goes_on_after_its_process_is_gone(tmp_path):
    """The process ends without a word in the second trial; --resume alone, and --sweep beside it, know the rest."""
    write_twins(tmp_path / "data")
    text = config.to_toml(SETTINGS).replace('"runs"', json.dumps(str(tmp_path / "runs")))
    (tmp_path / "base.toml").write_text(text, encoding="utf-8")
    (tmp_path / "plan.toml").write_text(PLAN.replace("trials = 4", "trials = 2"), encoding="utf-8")
    environment = {**os.environ, **SILENCE}

    def facefed(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "simulation.cli"]
        common = ["train", "twins", "--data-dir", str(tmp_path / "data"), "--cache-dir", str(tmp_path / "packs")]
        return subprocess.run(
            [*command, *common, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )

    assert facefed("--sweep", str(tmp_path / "plan.toml"), code=PROGRAM).returncode == 137
    [folder] = [path.parent for path in (tmp_path / "runs").glob("*/run.json")]
    assert not (folder / "metrics.json").exists()
    (tmp_path / "other.toml").write_text(PLAN, encoding="utf-8")
    refused = facefed("--resume", str(folder), "--sweep", str(tmp_path / "other.toml"))
    assert refused.returncode == 2
    assert "began with another plan" in refused.stderr
    done = facefed("--resume", str(folder), "--sweep", str(tmp_path / "plan.toml"))
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(trial-\d+) \(", done.stdout, re.MULTILINE) == ["trial-001"]
    assert re.findall(r"^epoch (\d)", done.stdout, re.MULTILINE) == ["1", "2"]
    assert f"configuration: {folder / 'best.toml'}" in done.stdout
    again = facefed("--resume", str(folder))
    assert again.returncode == 2
    assert "that run is finished" in again.stderr
