"""`flower-simulation`: what it prints, its run folder, its MLflow record, its model in a stranger's Python."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from champions import assert_crowned_unless_held_back, best_version
from programs import BIN, run_folder, sha_of, state_of

from common import config
from common.settings import Settings
from tests.another_account import as_another_account
from tests.without_facefed import BLOCKER

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),  # MLflow's tables
]
NAME = "cnn_federated_fedavg"
TAGS = (
    "model_type", "dataset", "dataset_size", "device", "gpu_type", "mode", "facefed_version", "git_commit",
    "mlflow.user", "mlflow.source.name", "mlflow.note.content",
)  # fmt: skip

# Runs with `python -I` in an empty folder, where FaceFed cannot be imported.
STRANGER = """
import mlflow, torch
mlflow.set_tracking_uri(sys.argv[1])
torch.manual_seed(0)
x = torch.rand(5, 3, 32, 32) * 2 - 1
for uri in sys.argv[2:]:
    with torch.no_grad():
        y = mlflow.pytorch.load_model(uri)(x)
    print(tuple(y.shape), y.dtype, bool(torch.allclose(y.norm(dim=1), torch.ones(5), atol=1e-5)))
"""


@pytest.fixture(scope="module")
def run(simulated):
    assert simulated.ended.code == 0, simulated.ended
    return run_folder(simulated.cwd)


@pytest.fixture(scope="module")
def client(simulated):
    assert simulated.ended.code == 0, simulated.ended
    from mlflow import MlflowClient

    uri = f"sqlite:///{simulated.cwd}/mlflow.db"
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@pytest.fixture(scope="module")
def tracked(client):
    [experiment] = [e for e in client.search_experiments() if e.name != "Default"]
    assert experiment.name == "facial_recognition_federated_fedavg"
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 3
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    assert len(parents) == 1
    nested = {r.info.run_name: r for r in runs if r.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id}
    return parents[0], nested


def test_it_says_what_was_learned_and_where_to_look(simulated, run):
    ended = simulated.ended
    assert ended.code == 0
    assert ended.err == ""
    for line in (
        r"^celeba: 12 people, 96 pictures \(\d+ people to train on\), cpu$",
        r"^  model       cnn, .* parameters \(.* numbers shared\), and at each client its own \w+ head$",
        r"^  device      cpu, .* for each client$",
        r"^starting \d process(es)? that train for the clients$",
        r"^the untrained model: val AUC ",
        r"^round 2 of 2: 2 clients, train loss \d+\.\d+, \d+\.\d s; val AUC 0\.\d{3} \([+-]0\.\d{3}\), .*; test AUC",
        r"^untrained +0\.\d{3} ",
        r"^  at celeba +0\.\d{3} ",
        r"^test AUC on people never seen: untrained 0\.\d{3} -> federated 0\.\d{3} \(EER .*\), best round [12] of 2$",
        r"^model SHA-256 [0-9a-f]{64}$",
        rf"^registered: models:/{NAME}/[12] \(best( and last)?, round [12]\)",
        rf"^run folder: {re.escape(str(run))} ",
        r"^tracking: sqlite:////.*mlflow\.db$",
        r"^to look: facefed tracking serve$",
        r"^this run, then: http://127\.0\.0\.1:5000/#/experiments/\d+/runs/[0-9a-f]{32}$",
    ):
        assert re.search(line, ended.out, re.MULTILINE), (line, ended.out)


def test_nothing_of_ray_is_left_over(simulated):
    assert not simulated.left


READ_ALL = """
for above, folders, files in os.walk("."):
    for name in files:
        path = os.path.join(above, name)
        try:
            with open(path, "rb") as file:
                file.read(1)
        except PermissionError:
            continue
        print(path)
"""


def test_another_account_reads_nothing_of_pictures_people_heads_ledger_and_tracking(simulated):
    """It may enter the folder that the program was started in, as under the usual umask."""
    cwd = simulated.cwd
    ours = [str(path.relative_to(cwd)) for path in cwd.rglob("*") if path.is_file() and path.parent != cwd]
    kinds = ("packs/.*/00000.pictures", "packs/.*/manifest.json", "clients/celeba/private/", "clients/celeba/egress/")
    for kind in (*kinds, "runs/.*/checkpoints/", "mlruns/"):
        assert [path for path in ours if re.search(kind, path)], (kind, ours)
    cwd.chmod(0o755)
    read = as_another_account(READ_ALL, imports=f"import os\nos.chdir({str(cwd)!r})").split()
    assert [path for path in read if path.count("/") > 1] == []
    assert "./mlflow.db" not in read
    assert (cwd / "mlflow.db").exists()
    assert "./left.json" in read  # the test's own: it did look


def test_tensorboard_has_the_same_curves_and_the_machine_is_watched(simulated, run, client, tracked):
    """In the folder that the command was typed in: the ServerApp itself runs in another one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = simulated.cwd / "logs" / "tensorboard" / run.name
    for folder, found in ((board, tracked[0]), (board / "celeba", tracked[1]["celeba"])):
        shown = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        shown.Reload()
        assert set(shown.Tags()["scalars"]) == set(found.data.metrics)
        assert ("plots/convergence" in shown.Tags()["images"]) == (folder == board)
        for name in shown.Tags()["scalars"]:
            told = client.get_metric_history(found.info.run_id, name)
            points = [(p.step, pytest.approx(p.value, rel=1e-6, nan_ok=True), p.timestamp) for p in told]
            assert sorted((p.step, p.value, round(p.wall_time * 1000)) for p in shown.Scalars(name)) == sorted(
                points, key=lambda point: point[0]
            )
    assert tracked[0].data.metrics["system/cpu_utilization_percentage"] > 0


def test_the_run_folder_is_whole(simulated, run):
    settings = config.load(run / "config.toml")
    assert settings.data.image_size == 32
    assert settings.federation.min_clients == 2
    assert settings.tracking.uri == f"sqlite:///{simulated.cwd}/mlflow.db"
    state = state_of(run)
    assert state["round"] == 2
    assert state["sha256"] == sha_of(simulated.ended.out)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["model_sha256"] == state["sha256"]
    assert [row["step"] for row in metrics["rounds_table"]] == [0, 1, 2]
    assert metrics["best_round"] in (1, 2)
    assert set(metrics["clients"]) == {"celeba", "vggface2"}
    kinds = [json.loads(line)["kind"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert kinds.count("joined") == 2
    assert kinds.count("round") == 2
    assert kinds[-1] == "finished"
    assert json.loads((run / "outcome.json").read_text()) == {"exit_code": 0, "line": ""}
    assert (run / "spool.jsonl").stat().st_size > 0
    for name in ("convergence", "clients", "roc", "score_histograms"):
        assert (run / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_each_round_is_one_point_and_the_untrained_model_is_round_0(client, tracked):
    parent, nested = tracked
    steps = {
        key: [point.step for point in client.get_metric_history(parent.info.run_id, key)]
        for key in parent.data.metrics
        if key.startswith(("round_", "val_", "train_", "bytes/", "time/"))
    }
    for name in ("val_roc_auc", "round_test_roc_auc", "round_test_eer", "round_test_loss", "round_test_acc"):
        assert sorted(steps[name]) == [0, 1, 2], name
    for name in ("train_loss", "round_train_loss", "round_train_acc", "time/round_seconds", "bytes/up", "bytes/down"):
        assert sorted(steps[name]) == [1, 2], name
    assert set(nested) == {"celeba", "vggface2"}
    for child in nested.values():
        curve = client.get_metric_history(child.info.run_id, "train_loss")
        assert sorted(point.step for point in curve) == [1, 2]
        scores = client.get_metric_history(child.info.run_id, "round_test_roc_auc")
        assert sorted(point.step for point in scores) == [0, 1, 2]
        [final] = client.get_metric_history(child.info.run_id, "test_roc_auc")
        assert final.step == int(parent.data.metrics["best_round"])


def test_every_run_has_its_tags_its_parameters_and_its_end(client, tracked):
    parent, nested = tracked
    for found in (parent, *nested.values()):
        missing = [tag for tag in TAGS if not found.data.tags.get(tag)]
        assert not missing, (found.info.run_name, missing)
        assert found.info.status == "FINISHED"
    assert parent.data.tags["dataset"] == "celeba+vggface2"
    assert parent.data.tags["dataset_size"] == "192"
    assert nested["celeba"].data.tags["dataset"] == "celeba"
    assert nested["celeba"].data.tags["dataset_size"] == "96"
    flat = {f"{s}.{k}" for s, values in config.to_mapping(Settings()).items() for k in values}
    assert flat <= set(parent.data.params)
    artifacts = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {"config.toml", "metrics.json", "plots"} <= artifacts


def test_the_registered_model_works_without_facefed(simulated, client, tmp_path):
    assert_crowned_unless_held_back(client, NAME)
    done = subprocess.run(
        [sys.executable, "-I", "-c", BLOCKER + STRANGER, f"sqlite:///{simulated.cwd}/mlflow.db",
         f"models:/{NAME}/1", f"models:/{NAME}/{best_version(client, NAME)}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["(5, 32) torch.float32 True"] * 2, done.stderr


def test_a_second_start_reuses_the_packs_and_needs_no_mlflow(simulated, again):
    """FedProx beside FedAvg: same data, same seed, same packs, another model; --no-mlflow leaves nothing of MLflow."""
    ended, packs = again.ended, simulated.cwd / ".facefed" / "packs"
    before = json.loads((again.cwd / "packs.json").read_text())
    assert "packing celeba: 96 pictures" in simulated.ended.out
    assert ended.code == 0, ended
    assert "packing" not in ended.out
    assert {str(path): path.stat().st_mtime_ns for path in packs.rglob("*.pictures")} == before
    assert "tracking: off; the record is spool.jsonl in the run folder" in ended.out
    assert "registered" not in ended.out
    assert not list(again.cwd.glob("ml*"))
    assert (run_folder(again.cwd) / "spool.jsonl").stat().st_size > 0
    assert sha_of(ended.out) != sha_of(simulated.ended.out)


def test_an_environment_that_others_made_is_no_obstacle(again):
    """A long TMPDIR, a proxy that is not there, RAY_ADDRESS, a terminal of ASCII: a Ray of its own, and the result."""
    assert again.ended.code == 0, again.ended
    assert sha_of(again.ended.out)
    assert again.ended.out.isascii()


def test_a_shared_memory_of_64_mb_is_enough(again):
    """What a container has by default: Ray's store of objects goes into the folder of temporary files, and says so."""
    told = again.cwd / "shm.txt"
    if not told.exists():
        pytest.skip("this account may not mount a /dev/shm of its own")
    assert told.read_text().split()[-1] == str(64 * 2**20)
    assert again.ended.code == 0, again.ended
    assert all("instead of /dev/shm because" in line for line in again.ended.error_lines)  # Ray's word, and no other
    assert len(again.ended.error_lines) <= 1


def test_train_federated_is_the_same_federation(again):
    """By the guide's name; each client draws its own people, here and only here."""
    run = run_folder(again.cwd)
    about = json.loads((run / "run.json").read_text())
    assert (about["mode"], about["strategy"], about["clients"]) == ("federated", "fedprox", ["celeba", "vggface2"])
    results = json.loads((run / "metrics.json").read_text())
    assert set(results["test_pairs"]) == {"celeba", "vggface2"}
    assert results["num_pictures_processed"] > 0
    for client in ("celeba", "vggface2"):
        own = again.cwd / "runs" / "clients" / client / "runs" / run.name
        names = {"confusion.png", "embeddings.png", "hardest_pairs.png"}
        assert {path.name for path in (own / "plots").iterdir()} == names
        told = json.loads((own / "metrics.json").read_text())
        assert told["test"]["roc_auc"] == pytest.approx(results["clients"][client]["test_roc_auc"])
        assert not list(run.rglob("embeddings.png")), "embeddings stay where the pictures are"
        assert not list(run.rglob("hardest_pairs.png")), "and so do faces"


@pytest.mark.shared
def test_real_faces(shared_faces, faces, programs):
    ended = programs.run(
        "flower-simulation", "--client", f"celeba={shared_faces}/celeba", "--client",
        f"vggface2={shared_faces}/vggface2", *faces.bare, "--rounds", 1, "--batch-size", 32, "--no-mlflow",
        "--max-identities", 30, "--actors", 1,
    )  # fmt: skip
    assert ended.code == 0, ended
    auc = re.search(r"untrained (0\.\d+) -> federated (0\.\d+)", ended.out)
    assert all(np.isfinite(float(value)) for value in auc.groups())


def test_help_of_every_program_names_its_options():
    for name, option in (
        ("flower-server", "--min-clients"),
        ("flower-client", "--dataset"),
        ("flower-simulation", "--client"),
        ("facefed", "train"),
    ):
        done = subprocess.run([BIN / name, "--help"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0
        assert option in done.stdout
        assert done.stderr == ""
