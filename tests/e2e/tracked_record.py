"""One small run's record, written as our programs write theirs, and the look whether a server holds all of it, once.

As a program, `python tracked_record.py URI FOLDER EXPERIMENT`, it writes the record in a process of its own.
"""

import math
import sys
import tempfile
from pathlib import Path

import torch

from common.settings import TrackingSettings
from common.system.runtime import go_silent
from common.tracking.address import resolve_uri
from common.tracking.registry import register_model
from common.tracking.run import TrackedRun, open_run

STEPS = 120
PARAMS = {"lr": "0.1", "long": "x" * 3000, "unit": "grad/µs ∇"}
PROFILE = '{"num_pictures": 96}'
NOTE = "notes/celeba ∇.txt"
TEXT = "what a client kept: ∇ and 😀\n"
PICTURE = bytes(range(256)) * 40
IMAGE_SIZE = 8


def values(step: int) -> dict[str, float]:
    """What is logged at a step: ordinary, tiny, huge, no number now and then, and exact where a float is not."""
    return {
        "loss": math.nan if step % 40 == 39 else 1.0 / (step + 3),
        "tiny": 5e-324 * (step + 1),
        "val_roc_auc": -1.7e308 + step * 1e300,
        "seconds": 0.1 + step,
    }


def model() -> torch.nn.Module:
    """The same for everybody."""
    made = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * IMAGE_SIZE**2, 4))
    with torch.no_grad():
        made[1].weight.copy_(torch.linspace(-1, 1, made[1].weight.numel()).reshape_as(made[1].weight))
        made[1].bias.fill_(0.25)
    return made


def begin(uri: str, folder: Path, experiment: str) -> TrackedRun:
    """The run, open; its name is its folder's."""
    return open_run(
        TrackingSettings(tensorboard="none"),
        uri=resolve_uri(uri, folder),
        folder=folder,
        experiment=experiment,
        run_name=folder.name,
        tags={"mode": "local", "device": "cpu"},
        params=PARAMS,
    )


def log_steps(run: TrackedRun, steps: range) -> None:
    """Some of the points, of the run and of its nested run."""
    nested = run.child(f"{run.folder.name}_celeba", {"client": "celeba"})
    for step in steps:
        run.log_metrics(values(step), step=step)
        nested.log_metrics({"train_loss": step / 7}, step=step)


def log_rest(run: TrackedRun, *, registers: bool = True) -> None:
    """All that is no point; a model of the run's own name where it `registers`."""
    nested = run.child(f"{run.folder.name}_celeba", {})
    run.set_tags({"device": "cpu (∇)"})
    run.log_dataset(name="celeba", digest="0123456789abcdef", context="training", profile={"num_pictures": 96})
    nested.log_text(TEXT, NOTE)
    picture = run.folder / "plots" / "roc.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(PICTURE)
    run.log_file(picture, "plots/roc.png")
    if registers:
        register_model(
            run, model(), name=f"{run.folder.name}_local", image_size=IMAGE_SIZE, step=3, role="best", val_auc=0.75,
            val_people="p", metrics={"seconds": values(3)["seconds"]},
        )  # fmt: skip


def write(uri: str, folder: Path, experiment: str) -> TrackedRun:
    """All of it, to the end."""
    run = begin(uri, folder, experiment)
    log_steps(run, range(STEPS))
    log_rest(run)
    run.finish("FINISHED")
    return run


def assert_whole(client, experiment: str, name: str, *, registers: bool = True) -> str:
    """A server has the run with each point once and exact, and everything else; returns its id.

    client: MlflowClient.  name: of the run's folder.
    """
    number = client.get_experiment_by_name(experiment).experiment_id
    found = [one for one in client.search_runs([number]) if one.info.run_name.startswith(name)]
    by_name = {one.info.run_name: one for one in found}
    assert sorted(one.info.run_name for one in found) == [name, f"{name}_celeba"]
    run, nested = by_name[name], by_name[f"{name}_celeba"]
    _assert_points(client, run.info, {key: [values(step)[key] for step in range(STEPS)] for key in values(0)})
    _assert_points(client, nested.info, {"train_loss": [step / 7 for step in range(STEPS)]})
    assert run.data.params == PARAMS
    assert {"mode": "local", "device": "cpu (∇)", "nonfinite_metrics": "loss"}.items() <= run.data.tags.items()
    assert (nested.data.tags["client"], nested.data.tags["mlflow.parentRunId"]) == ("celeba", run.info.run_id)
    assert [run.info.status, nested.info.status] == ["FINISHED", "FINISHED"]
    [data] = [one.dataset for one in run.inputs.dataset_inputs]
    assert (data.name, data.digest, data.profile) == ("celeba", "0123456789abcdef", PROFILE)
    assert read_artifact(client, run.info.run_id, "plots/roc.png") == PICTURE
    assert read_artifact(client, nested.info.run_id, NOTE).decode() == TEXT
    if registers:
        version = client.get_model_version_by_alias(f"{name}_local", "champion")
        assert (str(version.version), version.run_id) == ("1", run.info.run_id)
        assert len(client.search_model_versions(f"name = '{name}_local'")) == 1
    return run.info.run_id


def _assert_points(client, info, expected: dict[str, list[float]]) -> None:
    for key, wanted in expected.items():
        points = client.get_metric_history(info.run_id, key)
        assert [point.step for point in sorted(points, key=lambda point: point.step)] == list(range(len(wanted))), key
        for point in points:
            kept = wanted[point.step]
            assert point.value == kept or (math.isnan(point.value) and math.isnan(kept)), (key, point)
            assert info.start_time <= point.timestamp <= info.end_time, (key, point)


def read_artifact(client, run_id: str, name: str) -> bytes:
    """An artifact's bytes, by the way that a client takes."""
    with tempfile.TemporaryDirectory() as folder:
        return Path(client.download_artifacts(run_id, name, folder)).read_bytes()


def main() -> None:
    """Write the record to URI from FOLDER into EXPERIMENT; when it ends, everything has been sent."""
    go_silent()
    run = write(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
    assert run.mlflow_run_id


if __name__ == "__main__":
    main()
