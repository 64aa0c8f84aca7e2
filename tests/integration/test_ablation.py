"""An ablation: variants that differ in one setting only, in one parent run, and a break that leaves no trace."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import tiny_twins
import torch
from tiny_federation import site_settings
from tiny_twins import assert_same_bits, killed_at, points, spool, write_twins

from common import config
from common.errors import InterruptedRun, UserError
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.metrics.bootstrap import paired_gap
from common.system.checkpoints import read_tensors
from common.system.files import read_json
from common.system.runtime import stream_seed
from common.training.evaluation import embed
from simulation.alone import epochs as epochs_module
from simulation.alone.studies import ablation_lines, run_ablation, variants_of
from simulation.alone.trainee import local_trainee
from simulation.commands import Machine, train_local, train_twins
from tests.tiny_settings import changed

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ["attention-sa", "attention-glca", "attention-dcal"]
SETTINGS = changed(tiny_twins.SETTINGS, ablation__over="model.attention", ablation__values="sa, glca, dcal")


def ablation(folder: Path, pack: FacePack, settings=SETTINGS):
    folder.mkdir(exist_ok=True)
    out = io.StringIO()
    return run_ablation(settings, site_settings("twins", folder.parent), pack, folder, out), out.getvalue()


@pytest.fixture(scope="module")
def whole(twins, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    settings = config.with_value(SETTINGS, "tracking", "plots", "final")
    return folder, ablation(folder, twins, settings)[0]


def test_each_variant_is_a_nested_run_with_its_own_tags_params_metrics_and_figures(whole):
    folder, _ = whole
    lines = spool(folder)
    starts = {line["run"]: line for line in lines if line.get("event") == "start"}
    assert list(starts) == ["", *NAMES]
    assert {line["experiment"] for line in starts.values()} == {"twin-verification-ablation-glca"}
    assert {name: line["tags"]["model_type"] for name, line in starts.items()} == {
        "": "vit_tiny",
        "attention-sa": "vit_tiny",
        "attention-glca": "vit_tiny_glca",
        "attention-dcal": "vit_tiny_dcal",
    }
    for name in NAMES:
        own = [line for line in lines if line["run"] == name]
        [params] = [line["values"] for line in own if line.get("event") == "params"]
        assert params["model.attention"] == name.removeprefix("attention-")
        assert params["learning_rate"] == "0.002"
        assert {"train_loss", "val_twins_roc_auc", "test_twins_roc_auc"} <= {line.get("key") for line in own}
        artifacts = {line["name"]: line["file"] for line in own if line.get("event") == "artifact"}
        assert artifacts["plots/roc_twins.png"] == f"plots/{name}/roc_twins.png"
        assert config.load(folder / artifacts["config.toml"]).model.attention == name.removeprefix("attention-")
        assert [line["status"] for line in own if line.get("event") == "finish"] == ["FINISHED"]
    assert (folder / "plots" / "ablation.png").stat().st_size > 0


def test_all_that_differs_is_the_setting(whole, twins):
    folder, summary = whole
    rows = summary.rows
    assert len({(row["num_gradient_steps"], row["num_pictures_processed"]) for row in rows}) == 1
    assert rows[0]["num_gradient_steps"] > 0
    first = read_tensors(folder / "checkpoints" / "attention-sa" / "best.safetensors")[0]
    other = read_tensors(folder / "checkpoints" / "attention-dcal" / "best.safetensors")[0]
    shared = set(first) & set(other)
    assert any(not np.array_equal(first[name], other[name]) for name in shared), "they were trained apart"
    fresh = [local_trainee(v.settings, site_settings("twins", folder.parent), twins) for v in variants_of(SETTINGS)]
    states = [trainee.recogniser.state_dict() for trainee in fresh]
    assert all(torch.equal(states[0][name], state[name]) for state in states for name in set(states[0]) & set(state))


def test_the_table_is_the_variants_own_figures_and_the_paired_gaps(whole, twins):
    folder, summary = whole
    with (folder / "ablation.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["variant"] for row in table] == ["sa", "glca", "dcal"]
    content = read_json(folder / "metrics.json")
    assert content["variants"] == list(summary.rows)
    assert (content["over"], content["compared_with"]) == ("model.attention", "sa")
    assert content["num_test_families"] == 2
    indices = twins.indices(Split.TEST_PEOPLE)
    person = twins.person[indices]
    embeddings = {}
    for variant in variants_of(SETTINGS):
        trainee = local_trainee(variant.settings, site_settings("twins", folder.parent), twins)
        state, _ = read_tensors(folder / "checkpoints" / variant.name / "best.safetensors")
        trainee.recogniser.load_state_dict(state)
        embeddings[variant.value] = embed(trainee.recogniser, twins, indices, trainee.compute)
    logged = {line["key"]: line["value"] for line in spool(folder) if "key" in line and line["run"] == ""}
    for row in table:
        own = read_json(folder / f"attention-{row['variant']}" / "metrics.json")["twins"]["figures"]
        assert float(row["twins_roc_auc"]) == own["twins"]["roc_auc"]["value"]
        assert float(row["strangers_eer_high"]) == own["strangers"]["eer"]["high"]
        assert logged[f"{row['variant']}/twins_roc_auc"] == float(row["twins_roc_auc"])
        if row["variant"] == "sa":
            assert row["twins_gap"] == ""
            continue
        gap = paired_gap(
            [embeddings[row["variant"]]], [embeddings["sa"]], person, twins.family[person], "twins", "roc_auc",
            num_replicates=1000, seed=stream_seed(SETTINGS.run.seed, "families"),
        )  # fmt: skip
        assert [float(row[f"twins_gap{part}"]) for part in ("", "_low", "_high")] == [gap.value, gap.low, gap.high]
    text = "".join(ablation_lines(summary))
    assert text.count("\n") == 2 + 3 + 2


def test_no_embedding_is_written_anywhere(whole):
    folder, _ = whole
    kept = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kept == {".csv", ".json", ".jsonl", ".toml", ".png", ".safetensors"}
    trained = {path.relative_to(folder / "checkpoints").parts[0] for path in folder.rglob("*.safetensors")}
    assert trained == set(NAMES)
    names = {
        name.removeprefix("model/").partition("/")[0]
        for path in folder.rglob("*.s*s")
        for name in read_tensors(path)[0]
    }
    assert not [name for name in names if not name.startswith(("backbone.", "head.", "optimiser", "glca", "loss"))]


@pytest.mark.parametrize(
    ("holder", "name", "number"),
    [
        ("epochs", "save_private", 4),  # second variant, end of its second epoch
        ("epochs", "write_json", 3),  # second variant: the state of its first epoch is there, what it is, is not
        ("ablation", "write_json", 1),  # the first variant is trained and tested; nobody wrote that down
        ("ablation", "paired_gap", 1),  # all are trained
    ],
)
def test_an_ablation_that_was_killed_goes_on_to_the_same_bits(whole, twins, tmp_path, holder, name, number):
    module = {"epochs": epochs_module, "ablation": __import__("simulation.alone.studies", fromlist=["x"])}[holder]
    with killed_at(module, name, number):
        ablation(tmp_path / "killed", twins)
    assert not (tmp_path / "killed" / "metrics.json").exists(), "it is not finished"
    summary, said = ablation(tmp_path / "killed", twins)
    assert ("attention-sa: finished before" in said) == ((holder, name) != ("ablation", "write_json"))
    expected = [{key: value for key, value in row.items() if key != "train_seconds"} for row in whole[1].rows]
    assert [{k: v for k, v in row.items() if k != "train_seconds"} for row in summary.rows] == expected
    assert_same_bits(whole[0], tmp_path / "killed", NAMES)
    assert points(whole[0], "train_loss") == points(tmp_path / "killed", "train_loss"), "each point once"


def test_the_command_goes_on_with_an_ablation(twins, tmp_path, monkeypatch):
    """Stopped by Ctrl-C in the second variant, it says how to go on, and that command knows what kind of run it is."""
    del twins  # the command packs its own
    settings = config.with_value(SETTINGS, "run", "out", str(tmp_path / "runs"))
    machine = Machine(
        clients=[], data_dirs=[str(write_twins(tmp_path / "data"))], device="cpu", cache_dir=tmp_path / "p"
    )
    real, calls = epochs_module.train_epochs, []

    def stopping(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments, **keywords)

    monkeypatch.setattr(epochs_module, "train_epochs", stopping)
    with pytest.raises(InterruptedRun, match=r"stopped; to go on: facefed train twins --resume .*") as stopped:
        train_twins(settings, machine, "", io.StringIO())
    folder = Path(str(stopped.value).rpartition(" ")[2])
    status = {line["run"]: line["status"] for line in spool(folder) if line.get("event") == "finish"}
    assert status == {"attention-sa": "FINISHED", "attention-glca": "KILLED", "": "KILLED"}
    out = io.StringIO()
    assert train_twins(tiny_twins.SETTINGS, machine, str(folder), out) == 0
    assert "attention-sa: finished before\n\nattention-glca\nepoch 2 of 2" in out.getvalue()
    assert [row["variant"] for row in read_json(folder / "metrics.json")["variants"]] == ["sa", "glca", "dcal"]
    with pytest.raises(UserError, match="that run is ablation, not local"):
        train_local(tiny_twins.SETTINGS, machine, str(folder), io.StringIO())


def test_r_is_ablated_in_the_same_way(twins, tmp_path):
    settings = changed(SETTINGS, ablation__over="model.glca_fraction", ablation__values="0.1, 1.0", training__epochs=1)
    summary, _ = ablation(tmp_path / "run", twins, settings)
    assert [row["variant"] for row in summary.rows] == ["0.1", "1.0"]
    assert summary.rows[0]["best_val_auc"] != summary.rows[1]["best_val_auc"]
