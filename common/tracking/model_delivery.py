"""One model's way from a run's folder into MLflow's registry; done again after a cut, it goes on where it was cut."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHAMPION = "champion"
AUC_TAG = "val_roc_auc"
PEOPLE_TAG = "val_people"
MODEL_KEY_TAG = "facefed.model_key"


def deliver_model(client: Any, run_id: str, folder: Path, entry: Mapping[str, Any]) -> str:  # noqa: ANN401 - MlflowClient
    """Upload the exported model, register it, link its metrics, move the champion; returns the version.

    folder: what `mlflow.pytorch.save_model` wrote.  entry: the spool's event "model".  Raises what MLflow raises.
    """
    experiment = client.get_run(run_id).info.experiment_id
    mine = client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'")
    model = next((found for found in mine if found.tags.get(MODEL_KEY_TAG) == entry["model_key"]), None)
    if model is None:
        tags = {**entry["tags"], MODEL_KEY_TAG: entry["model_key"]}
        model = client.create_logged_model(experiment, "model", run_id, tags=tags)
    if str(model.status) != "READY":
        _upload(client, run_id, model, folder, entry["step"])
    _link_metrics(client, run_id, model.model_id, entry)
    version = _register(client, run_id, model.model_id, entry)
    if entry["people"]:
        _crown(client, entry["name"], version, float(entry["tags"][AUC_TAG]), entry["people"])
    return version


def _upload(client: Any, run_id: str, model: Any, folder: Path, step: int) -> None:  # noqa: ANN401 - MlflowClient
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    outputs = client.get_run(run_id).outputs
    if model.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else ())}:
        client.log_outputs(run_id, models=[LoggedModelOutput(model.model_id, step=step)])  # twice is an error
    about = Model.load(str(folder))
    about.run_id, about.model_id, about.model_uuid = run_id, model.model_id, model.model_id
    about.artifact_path = model.artifact_location
    about.save(str(folder / "MLmodel"))
    client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, status="READY")


def _link_metrics(client: Any, run_id: str, model_id: str, entry: Mapping[str, Any]) -> None:  # noqa: ANN401 - MlflowClient
    from mlflow.entities import Metric

    linked = [
        Metric(key, float(value), time_ms, entry["step"], model_id=model_id, run_id=run_id)
        for key, value, time_ms in entry["metrics"]
        if math.isfinite(float(value))
    ]
    if linked:
        client.log_batch(run_id, metrics=linked, synchronous=True)


def _register(client: Any, run_id: str, model_id: str, entry: Mapping[str, Any]) -> str:  # noqa: ANN401 - MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(entry["name"])
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"models:/{model_id}"
    made = client.search_model_versions(f"name = '{entry['name']}'")
    version = next((found for found in made if found.source == source), None)
    if version is None:
        version = client.create_model_version(
            entry["name"], source, run_id=run_id, tags=dict(entry["tags"]), model_id=model_id
        )
    return str(version.version)


def _crown(client: Any, name: str, version: str, val_auc: float, val_people: str) -> None:  # noqa: ANN401 - MlflowClient
    """Move the alias when this version's AUC is higher than the champion's on the same validation people."""
    if not math.isfinite(val_auc):
        return
    champion = client.get_registered_model(name).aliases.get(CHAMPION)
    if champion is not None:
        tags = client.get_model_version(name, champion).tags
        if tags.get(PEOPLE_TAG) != val_people or not val_auc > float(tags.get(AUC_TAG, "-inf")):
            return
    client.set_registered_model_alias(name, CHAMPION, version)
