"""Models in MLflow's registry: exported as a graph, loadable without a line of ours, with a guarded champion.

Input float32 [B, 3, H, W] in [-1, 1], any B; output float32 [B, D].
"""

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from common.tracking.delivery import quieten
from common.tracking.run import TrackedRun
from common.tracking.sender import short_reason

if TYPE_CHECKING:
    import torch

CHAMPION = "champion"
AUC_TAG = "val_roc_auc"
PEOPLE_TAG = "val_people"
FLUSH_TIMEOUT_S = 120.0

_log = logging.getLogger("facefed.tracking")


def register_model(
    run: TrackedRun,
    model: "torch.nn.Module",
    *,
    name: str,
    image_size: int,
    step: int,
    role: str,
    val_auc: float,
    val_people: str,
    metrics: Mapping[str, float],
) -> str | None:
    """Log the model with the run, register it as a new version of `name`, and move the champion if it is better.

    model: float32 [B, 3, image_size, image_size] in [-1, 1] -> float32 [B, D]; its mode is left as it was found.
    step: the round or epoch it stands for.  role: "best" (may become champion) or "last".
    val_auc: on the validation people whose digest is `val_people`.  metrics: recorded with the model, at `step`.
    Returns the version, or None when tracking is off or MLflow is away (then with one warning: nothing is raised).
    """
    if role not in ("best", "last"):
        raise ValueError(f"role = {role!r}; use 'best' or 'last'")
    if not run.reaches_mlflow:
        return None
    if not run.flush(FLUSH_TIMEOUT_S) or not run.mlflow_run_id:
        _log.warning("Tracking: model %s is not registered, since MLflow is away; its checkpoint is kept.", name)
        return None
    tags = {"role": role, "step": str(step), AUC_TAG: repr(float(val_auc)), PEOPLE_TAG: val_people}
    training = model.training
    try:
        model_id = _log_model(run, model.eval(), image_size=image_size, step=step, tags=tags)
        version = _register(run, model_id, name=name, step=step, tags=tags, metrics=metrics)
        if role == "best":
            _crown(run, name, version, val_auc=val_auc, val_people=val_people)
    except Exception as error:  # a registry that fails must not cost the run; the checkpoint is there
        _log.warning(
            "Tracking: model %s (%s) is not registered (%s); its checkpoint is kept.", name, role, short_reason(error)
        )
        return None
    finally:
        model.train(training)
    return version


def _log_model(
    run: TrackedRun, model: "torch.nn.Module", *, image_size: int, step: int, tags: Mapping[str, str]
) -> str:
    """Export and upload the model; returns the id of MLflow's logged model."""
    quieten()
    import mlflow.pytorch
    from mlflow.models import Model

    # log_model takes its server from here; every other call of ours names it.
    mlflow.set_tracking_uri(run.uri)
    mlflow.set_registry_uri(run.uri)
    client = _client(run)
    example, signature = _example_and_signature(model, image_size)
    logged = client.create_logged_model(
        client.get_run(run.mlflow_run_id).info.experiment_id, "model", run.mlflow_run_id, tags=dict(tags)
    )
    # What mlflow.pytorch.log_model does, for a run that is not this thread's "active" one.
    info = Model.log(
        artifact_path=None,
        flavor=mlflow.pytorch,
        run_id=run.mlflow_run_id,
        model_id=logged.model_id,
        step=step,
        pytorch_model=model,
        input_example=example,
        signature=signature,
        pip_requirements=_requirements(),
        serialization_format="pt2",
        validate_serving_input=False,
    )
    return str(info.model_id)


def _example_and_signature(model: "torch.nn.Module", image_size: int) -> tuple[Any, Any]:
    """A batch of 2 of noise (never a face: MLflow keeps it in clear) and a signature with a free batch size."""
    import numpy as np
    import torch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    shape = (2, 3, image_size, image_size)
    noise = np.random.default_rng(0).uniform(-1.0, 1.0, shape).astype(np.float32)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.no_grad():
        width = model(torch.from_numpy(noise).to(device)).shape[1]
    kind = np.dtype(np.float32)
    inputs = Schema([TensorSpec(kind, (-1, 3, image_size, image_size), "pictures")])
    outputs = Schema([TensorSpec(kind, (-1, width), "embeddings")])
    return noise, ModelSignature(inputs=inputs, outputs=outputs)


def _requirements() -> list[str]:
    import mlflow
    import numpy as np
    import torch

    public = torch.__version__.partition("+")[0]  # "+cpu" and the like are not on the package index
    return [f"torch=={public}", f"numpy=={np.__version__}", f"mlflow=={mlflow.__version__}"]


def _register(
    run: TrackedRun, model_id: str, *, name: str, step: int, tags: Mapping[str, str], metrics: Mapping[str, float]
) -> str:
    from mlflow.exceptions import MlflowException

    client = _client(run)
    # MLflow has linked what the run recorded at this step; again would draw each point twice.
    linked = {metric.key for metric in client.get_logged_model(model_id).metrics or ()}
    for key, value in metrics.items():
        if key not in linked and math.isfinite(value):
            client.log_metric(run.mlflow_run_id, key, value, step=step, model_id=model_id, synchronous=True)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = client.create_model_version(
        name, f"models:/{model_id}", run_id=run.mlflow_run_id, tags=dict(tags), model_id=model_id
    )
    return str(made.version)


def _crown(run: TrackedRun, name: str, version: str, *, val_auc: float, val_people: str) -> None:
    """Move the alias when this version's AUC is higher than the champion's on the same validation people."""
    if not math.isfinite(val_auc):
        return
    client = _client(run)
    champion = client.get_registered_model(name).aliases.get(CHAMPION)
    if champion is not None:
        tags = client.get_model_version(name, champion).tags
        if tags.get(PEOPLE_TAG) != val_people:
            _log.info("Tracking: %s %s stays champion: version %s met other people.", name, champion, version)
            return
        if not val_auc > float(tags.get(AUC_TAG, "-inf")):
            return
    client.set_registered_model_alias(name, CHAMPION, version)


def _client(run: TrackedRun) -> Any:  # noqa: ANN401 - MLflow is imported late and untyped here
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=run.uri, registry_uri=run.uri)
