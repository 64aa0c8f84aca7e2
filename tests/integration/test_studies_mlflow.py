"""Both studies in a real MLflow database: nested runs under one parent, each with its own record and end."""

import io

import pytest
from tiny_federation import site_settings
from tiny_twins import SETTINGS

from common.system.files import read_json
from common.system.runtime import PATIENCE, SILENCE, user_name
from common.tracking.address import resolve_uri
from common.tracking.page import run_page
from simulation.alone.studies import run_ablation
from simulation.alone.sweep import run_sweep
from simulation.alone.sweep_plan import load_plan
from tests.tiny_settings import changed

PLAN = """
[sweep]
trials = 2
base = "base.toml"
metric = "val_eer"
[sweep.space]
"training.lr" = { low = 1e-4, high = 1e-2, log = true }
"""

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),  # MLflow's tables
    pytest.mark.usefixtures("one_thread", "tables_once"),
]


@pytest.fixture(scope="module")
def studies(twins, tmp_path_factory):
    """The folders of an ablation and of a search, and a client of the database that they are in."""
    root = tmp_path_factory.mktemp("studies")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SILENCE, **PATIENCE}.items():
            patch.setenv(name, value)
        # How a model is registered has tests of its own, and takes longer than all of this.
        patch.setattr("simulation.alone.sweep.register_trained", lambda *_: [])
        uri = resolve_uri("sqlite:///data/mlflow.db", root)
        settings = changed(SETTINGS, tracking__enabled=True, tracking__uri=uri, training__epochs=1)
        site = site_settings("twins", root)
        folders = root / "ablation", root / "sweep"
        for folder in folders:
            folder.mkdir()
        over = changed(settings, ablation__over="model.attention", ablation__values="sa, dcal")
        run_ablation(over, site, twins, folders[0], io.StringIO())
        (root / "plan.toml").write_text(PLAN, encoding="utf-8")
        run_sweep(settings, load_plan(root / "plan.toml"), site, twins, folders[1], io.StringIO())
        from mlflow import MlflowClient

        yield *folders, MlflowClient(tracking_uri=uri, registry_uri=uri)


def runs_of(client, experiment: str):
    """(the parent, its nested runs by name)"""
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    [parent] = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    nested = {run.info.run_name: run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert len(nested) == len(found) - 1
    return parent, nested


def artifacts(client, run_id: str, folder: str | None = None) -> set[str]:
    return {item.path for item in client.list_artifacts(run_id, folder)}


def test_mlflows_pages_say_what_runs_are_of_which_data_and_who_made_them(studies):
    _, folder, client = studies
    name = "twin-verification-hyperparameter-search"
    parent, nested = runs_of(client, name)
    experiment = client.get_experiment_by_name(name)
    assert experiment.tags["mlflow.note.content"].startswith("Searches for good settings")
    for run in (parent, *nested.values()):
        tags = run.data.tags
        assert (tags["mlflow.user"], tags["mlflow.source.name"]) == (user_name(), "facefed train twins")
        assert tags["mlflow.source.type"] == "LOCAL"
        assert "`, pictures of " in tags["mlflow.note.content"]
        assert f"Data: {tags['dataset']}, {tags['dataset_size']} pictures." in tags["mlflow.note.content"]
    assert parent.data.tags["mlflow.note.content"].startswith("A search for good settings of `vit_tiny`")
    assert "Best epoch: 1 of 1, chosen by validation (AUC 0." in parent.data.tags["mlflow.note.content"]
    [trial, _] = [run.data.tags["mlflow.note.content"] for run in nested.values()]
    assert trial.startswith("Training on twins of `vit_tiny")
    uri = parent.data.params["tracking.uri"]
    assert run_page(uri, folder).endswith(f"/#/experiments/{experiment.experiment_id}/runs/{parent.info.run_id}")


def test_the_variants_of_an_ablation(studies):
    folder, _, client = studies
    parent, nested = runs_of(client, "twin-verification-ablation-glca")
    assert set(nested) == {"attention-sa", "attention-dcal"}
    assert {name: run.data.tags["model_type"] for name, run in nested.items()} == {
        "attention-sa": "vit_tiny",
        "attention-dcal": "vit_tiny_dcal",
    }
    for name, run in nested.items():
        assert run.info.status == "FINISHED"
        assert run.data.params["model.attention"] == name.removeprefix("attention-")
        own = read_json(folder / name / "metrics.json")
        assert run.data.metrics["test_twins_roc_auc"] == own["twins"]["figures"]["twins"]["roc_auc"]["value"]
        assert {"config.toml", "metrics.json"} <= artifacts(client, run.info.run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.params["ablation.values"] == "sa, dcal"
    assert {"ablation.csv", "metrics.json", "config.toml"} <= artifacts(client, parent.info.run_id)
    [gap] = [row["twins_gap"] for row in read_json(folder / "metrics.json")["variants"] if "twins_gap" in row]
    assert parent.data.metrics["dcal/twins_gap"] == gap


def test_the_trials_of_a_search(studies):
    _, folder, client = studies
    parent, nested = runs_of(client, "twin-verification-hyperparameter-search")
    assert set(nested) == {"trial-000", "trial-001"}
    for run in nested.values():
        assert (run.info.status, run.data.tags["state"]) == ("FINISHED", "complete")
        assert not [name for name in run.data.metrics if name.startswith("test_")]
    assert len({run.data.params["training.lr"] for run in nested.values()}) == 2
    results = read_json(folder / "metrics.json")
    best = min(nested.values(), key=lambda run: run.data.metrics["final_val_eer"])
    assert parent.data.tags["best_trial"] == best.info.run_name
    assert parent.data.metrics["best_val_eer"] == best.data.metrics["final_val_eer"] == results["sweep"]["best_value"]
    assert parent.data.metrics["test_roc_auc"] == results["test"]["roc_auc"]
    assert {"sweep.csv", "sweep.toml", "best.toml", "metrics.json"} <= artifacts(client, parent.info.run_id)
