"""`facefed train local`: one holder alone."""

import re

import pytest
from champions import assert_crowned_unless_held_back
from programs import run_folder

from common import config
from common.system.checkpoints import read_tensors

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),  # MLflow's tables
]


def test_one_holder_alone(faces, programs, with_tables):
    with_tables(programs.cwd)
    program = programs.start(
        "facefed", "train", "local", "--client", "celeba", "--data-dir", faces.celeba, "--epochs", 2, *faces.small,
        *faces.cache,
    )  # fmt: skip
    ended = program.ended()
    assert ended.code == 0, ended
    assert ended.err == ""
    assert re.search(
        r"^test AUC on people never seen: untrained 0\.\d{3} -> local 0\.\d{3} \(", ended.out, re.MULTILINE
    )
    assert re.search(r"best epoch [12] of 2$", ended.out, re.MULTILINE)
    assert re.search(r"^  device      cpu, \w+, \d+ threads?$", ended.out, re.MULTILINE)
    assert re.search(r"^untrained +0\.\d{3} ", ended.out, re.MULTILINE)
    registered = re.findall(
        r"^registered: models:/celeba_cnn_local/(\d) \((best and last|last|best), epoch [12]\)", ended.out, re.MULTILINE
    )
    best_is_last = "best epoch 2 of 2\n" in ended.out
    assert registered == ([("1", "best and last")] if best_is_last else [("1", "last"), ("2", "best")])
    program.assert_nothing_left()
    from mlflow import MlflowClient

    uri = f"sqlite:///{programs.cwd}/mlflow.db"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    experiment = client.get_experiment_by_name("facial_recognition_local_celeba")
    [found] = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.tags["mode"] == "local"
    tags = {"dataset", "dataset_size", "device", "gpu_type", "model_type", "facefed_version", "git_commit"}
    assert tags <= set(found.data.tags)
    assert {"system/cpu_utilization_percentage", "gradient_norm/head"} <= set(found.data.metrics)
    assert [p.step for p in client.get_metric_history(found.info.run_id, "train_loss")] == [1, 2]
    assert_crowned_unless_held_back(client, "celeba_cnn_local")
    run = run_folder(programs.cwd)
    assert [path.name for path in (programs.cwd / "logs" / "tensorboard").iterdir()] == [run.name]
    assert config.load(run / "config.toml").training.epochs == 2
    for name in ("training", "roc", "det", "score_histograms", "confusion", "embeddings", "hardest_pairs"):
        assert (run / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert read_tensors(run / "checkpoints" / "best.safetensors")[0]


def test_by_default_each_picture_is_processed_as_often_as_in_the_federation(faces, programs):
    """2 rounds of 2 local epochs: 4 epochs alone."""
    ended = programs.run(
        "facefed", "train", "local", "--client", f"vggface2={faces.vggface2}", *faces.bare, *faces.cache,
        "--set", "federation.local_epochs=2", "--no-mlflow",
    )  # fmt: skip
    assert ended.code == 0, ended
    assert re.findall(r"^epoch (\d) of 4:", ended.out, re.MULTILINE) == ["1", "2", "3", "4"]
    assert "registered" not in ended.out
    assert not list(programs.cwd.glob("ml*"))
