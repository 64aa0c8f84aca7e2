"""`facefed train centralized` and `--resume`, as a user runs them; `train federated`: test_simulation.py."""

import json
import re
import signal

import pytest
from programs import assert_one_line, run_folder
from warm import WarmPrograms

from common.system.checkpoints import read_tensors

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),  # MLflow's tables
]


def data_dirs(faces):
    return "--data-dir", f"celeba={faces.celeba}", "--data-dir", f"vggface2={faces.vggface2}"


def test_all_in_one_place(faces, programs, with_tables):
    with_tables(programs.cwd)
    program = programs.start(
        "facefed", "train", "centralized", *data_dirs(faces), "--epochs", 2, "--max-identities", 10, *faces.small,
        *faces.cache, "--set", "tracking.plots=final",
    )  # fmt: skip
    ended = program.ended()
    assert ended.code == 0, ended
    assert ended.err == ""
    assert re.search(r"^test AUC .*: untrained 0\.\d{3} -> centralised 0\.\d{3} \(", ended.out, re.MULTILINE)
    assert re.search(r"^registered: models:/cnn_centralized/1 \((best and )?last, epoch 2\)", ended.out, re.MULTILINE)
    program.assert_nothing_left()
    run = run_folder(programs.cwd)
    pictures = {str(path.relative_to(run / "plots")) for path in (run / "plots").rglob("*.png")}
    both = {
        f"{client}/{name}.png"
        for client in ("celeba", "vggface2")
        for name in ("confusion", "embeddings", "hardest_pairs")
    }
    names = ("training", "roc", "det", "score_histograms", "client_comparison")
    assert pictures == {f"{name}.png" for name in names} | both
    sent = {json.loads(line).get("name") for line in (run / "spool.jsonl").read_text().splitlines()}
    assert {f"plots/{name}" for name in pictures} - sent == {
        f"plots/{client}/hardest_pairs.png" for client in ("celeba", "vggface2")
    }, "faces stay in the folder"
    from mlflow import MlflowClient

    uri = f"sqlite:///{programs.cwd}/mlflow.db"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    experiment = client.get_experiment_by_name("facial_recognition_centralized")
    [found] = client.search_runs([experiment.experiment_id])
    wanted = {"client", "model", "epochs", "learning_rate", "batch_size", "max_identities", "num_training_pictures"}
    assert wanted <= set(found.data.params)
    assert found.data.params["max_identities"] == "10"
    scores = ("accuracy", "precision", "recall", "f1", "roc_auc", "eer", "tar_at_far_1e-2", "ten_fold_accuracy")
    assert {f"test_{name}" for name in scores} <= set(found.data.metrics)
    assert {
        "celeba_test_accuracy",
        "vggface2_test_accuracy",
        "client/celeba/test_roc_auc",
        "client/vggface2/test_accuracy",
        "train_accuracy",
        "train_acc",
        "val_accuracy",
        "val_acc",
        "val_loss",
        "learning_rate",
    } <= set(found.data.metrics)
    inputs = {(given.dataset.name, tag.value) for given in found.inputs.dataset_inputs for tag in given.tags}
    assert inputs == {(name, use) for name in ("celeba", "vggface2") for use in ("training", "testing")}
    versions = client.search_model_versions("name='cnn_centralized'")
    assert [v.version for v in versions if v.tags["role"] == "best"]
    assert [v.version for v in versions if v.tags.get("is_last") == "true"]


def test_a_killed_run_goes_on_with_its_own_data_only_and_to_the_same_model(faces, programs, warm):
    command = ("facefed", "train", "local", "--client", f"celeba={faces.celeba}", *faces.cache)
    settings = (*faces.bare, "--epochs", 4, "--no-mlflow")
    whole = programs.run(*command, *settings, "--out", "whole")
    assert whole.code == 0, whole
    program = programs.start(*command, *settings, "--out", "killed")
    program.wait_for(r"epoch 2 of 4")
    program.signal(signal.SIGKILL)
    program.process.wait()
    program.assert_nothing_left(60)
    run = run_folder(programs.cwd, "killed")
    mistaken = ("--client", f"celeba:vggface2={faces.vggface2}", *faces.cache, "--resume", run)
    other = WarmPrograms(programs.cwd, warm).run("facefed", "train", "local", *mistaken)
    assert_one_line(other, "facefed", "the data of celeba are not those", code=2)
    resumed = programs.run(*command, "--resume", run)
    assert resumed.code == 0, resumed
    assert re.findall(r"^epoch (\d)", resumed.out, re.MULTILINE)[0] in "34"
    one, other = (
        read_tensors(folder / "checkpoints" / "last.safetensors")[0]
        for folder in (run, run_folder(programs.cwd, "whole"))
    )
    assert all(one[name].equal(other[name]) for name in one)
    again = WarmPrograms(programs.cwd, warm).run(*command, "--resume", run.name, "--out", "killed")
    assert_one_line(again, "facefed", "that run is finished", str(run), code=2)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("local", "--client", "celeba", "--resume", "nothing"), ("--resume nothing: no run is at",)),
        (("local", "--client", "celeba", "--resume", "x", "--lr", 1), ("leave --lr out",)),
        (("centralized", "--data-dir", "plain"), ("write --data-dir NAME=DIR",)),
        (("centralized", "--client", "celeba", "--max-identities", 1), ("data.max_people = 1 must be at least 2",)),
        (("federated", "--client", "celebra"), ("'celebra' is unknown",)),
    ],
)
def test_bad_input_is_one_line(tmp_path, warm, arguments, told):
    assert_one_line(WarmPrograms(tmp_path, warm).run("facefed", "train", *arguments), "facefed", *told, code=2)
