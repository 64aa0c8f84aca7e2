"""Twins through whole programs: drawn, trained on with everything recorded, looked into, and federated with others."""

import json
import re

import pytest
from champions import best_version
from programs import assert_one_line, free_port, run_folder
from warm import WarmPrograms

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),  # MLflow's tables
]

TINY = """\
[data]
image_size = 32
fraction_val_people = 0.2
fraction_test_people = 0.2

[model]
backbone = "vit_tiny"
depth = 1
width = 0.25
patch_size = 8
embedding_size = 16
attention = "dcal"
inference = "both"

[training]
optimiser = "adamw"
lr = 0.001
batch_size = 16
epochs = 2
precision = "float32"
memory_format = "contiguous"

[federation]
rounds = 1
local_epochs = 1
min_clients = 1
"""


@pytest.fixture
def twins(programs, made_once):
    """A data set of twelve families in this test's folder, where it is looked for by default."""
    synth = ("facefed", "data", "synth", "--layout", "twins", "--families", 12, "--pictures", 5, "--out", "data/twins")
    folder, [drawn] = made_once("twins", lambda here: [here.run(*synth)])
    assert drawn.code == 0, drawn
    (programs.cwd / "data").symlink_to(folder / "data")
    (programs.cwd / "tiny.toml").write_text(TINY)
    return programs


def test_a_model_is_trained_registered_and_looked_into(twins, with_tables):
    with_tables(twins.cwd)
    program = twins.start("facefed", "train", "twins", "--config", "tiny.toml", "--data-dir", "data/twins")
    ended = program.ended()
    assert ended.code == 0, ended
    assert [line for line in ended.error_lines if not line.startswith("INFO facefed.faces: ")] == []
    for kind in ("all", "twins", "strangers"):
        assert re.search(rf"^  {kind} +AUC 0\.\d{{3}} \[[01]\.\d{{3}}, [01]\.\d{{3}}\]  EER ", ended.out, re.MULTILINE)
    assert re.search(r"^registered: models:/vit_tiny_twins/[12] \(best", ended.out, re.MULTILINE)
    program.assert_nothing_left()
    from mlflow import MlflowClient

    uri = f"sqlite:///{twins.cwd}/mlflow.db"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    [found] = client.search_runs([client.get_experiment_by_name("twin-face-verification").experiment_id])
    assert found.data.tags["model_type"] == "vit_tiny_dcal"
    assert found.data.tags["dataset_size"] == "120"
    assert {"test_twins_roc_auc", "test_strangers_eer", "train_loss_pwca", "gradient_norm/glca", "val_eer"} <= set(
        found.data.metrics
    )
    run = run_folder(twins.cwd)
    for name in ("attention", "roc_twins", "training"):
        assert (run / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (twins.cwd / "logs" / "tensorboard").iterdir()] == [run.name]

    pictures = sorted((twins.cwd / "data" / "twins").rglob("*.jpg"))[:2]
    model = f"models:/vit_tiny_twins/{best_version(client, 'vit_tiny_twins')}"
    looked = twins.run("facefed", "attention", "--model", model, *pictures, "-o", "maps.png")
    assert looked.code == 0, looked
    assert (twins.cwd / "maps.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"cosine", looked.out)


def test_the_guides_spelling_and_the_default_configuration(twins):
    """--config default is twins_dcal; --mlflow_disabled as in the guide."""
    smaller = (
        "--set",
        "tracking.plots=none",
        "--set",
        "model.depth=1",
        "--set",
        "model.width=0.25",
        "--set",
        "data.image_size=32",
    )
    ended = twins.run("facefed", "train", "twins", "--config", "default", "--epochs", 1, "--mlflow_disabled", *smaller)
    assert ended.code == 0, ended
    assert "tracking: off" in ended.out
    text = (run_folder(twins.cwd) / "config.toml").read_text()
    assert 'attention = "dcal"' in text
    assert not (twins.cwd / "mlflow.db").exists()


def test_twins_are_a_client_like_any_other(twins):
    port = free_port()
    client = twins.start(
        "flower-client", "--dataset", "twins", "--data-dir", "data/twins", "--server", f"127.0.0.1:{port}", "--once"
    )
    server = twins.start(
        "flower-server",
        "--address",
        f"127.0.0.1:{port}",
        "--config",
        "tiny.toml",
        "--min-clients",
        1,
        "--no-mlflow",
        "--set",
        "tracking.plots=none",
    )
    ended = server.ended()
    assert ended.code == 0, ended
    assert client.ended(60).code == 0
    table = json.loads((run_folder(twins.cwd) / "metrics.json").read_text())["rounds_table"]
    assert all(0.0 <= row["round_test_twins_roc_auc"] <= 1.0 for row in table if "round_test_roc_auc" in row)
    assert any("round_test_twins_roc_auc" in row for row in table)


def test_a_patch_that_does_not_divide_the_picture(twins, warm):
    ended = WarmPrograms(twins.cwd, warm).run(
        "facefed", "train", "twins", "--config", "tiny.toml", "--set", "model.patch_size=7"
    )
    assert_one_line(ended, "facefed", "data.image_size = 32", "model.patch_size = 7")
    assert not (twins.cwd / "runs").exists()
