"""Models in MLflow's registry: exported as a graph, loadable without a line of ours, with a guarded champion.

Input float32 [B, 3, H, W] in [-1, 1], any B; output float32 [B, D].
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.tracking.delivery import quieten
from common.tracking.model_delivery import AUC_TAG, PEOPLE_TAG
from common.tracking.run import TrackedRun
from common.tracking.sender import short_reason
from common.tracking.spool import now_ms

if TYPE_CHECKING:
    import torch

MODELS = "models"  # below the run's folder
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
    """Export the model, log it with the run, register it as a version of `name`, and move the champion if it is better.

    model: float32 [B, 3, image_size, image_size] in [-1, 1] -> float32 [B, D]; its mode is left as it was found.
    step: the round or epoch it stands for.  role: "best" (may become champion) or "last".
    val_auc: on the validation people whose digest is `val_people`.  metrics: recorded with the model, at `step`.
    It is exported to RUN/models first; the sending thread brings it to MLflow, or later `facefed tracking sync` does.
    Returns the version, or None when tracking is off or MLflow is away (then with one warning: nothing is raised).
    """
    if role not in ("best", "last"):
        raise ValueError(f"role = {role!r}; use 'best' or 'last'")
    if not run.reaches_mlflow:
        return None
    tags = {"role": role, "step": str(step), AUC_TAG: repr(float(val_auc)), PEOPLE_TAG: val_people}
    folder = run.folder / MODELS / f"{name}_{role}_{step}_{now_ms()}"
    try:
        _export(model, folder, image_size)
    except Exception as error:  # tracing fails in many ways; it must not cost the run, whose checkpoint is there
        shutil.rmtree(folder, ignore_errors=True)
        _log.warning(
            "Tracking: model %s (%s) is not registered (%s); its checkpoint is kept.", name, role, short_reason(error)
        )
        return None
    people = val_people if role == "best" else ""
    key = run.log_model(folder, name=name, step=step, tags=tags, metrics=metrics, people=people)
    if not run.flush(FLUSH_TIMEOUT_S):
        _log.warning("Tracking: model %s is not registered yet, since MLflow is away; it is kept in %s.", name, folder)
    return run.version_of(key) or None


def _export(model: "torch.nn.Module", folder: Path, image_size: int) -> None:
    """Write the model as a graph that MLflow loads; its mode is left as it was found."""
    quieten()
    import mlflow.pytorch
    from mlflow.models import Model

    training = model.training
    try:
        example, signature = _example_and_signature(model.eval(), image_size)
        mlflow.pytorch.save_model(
            model,
            folder,
            mlflow_model=Model(),
            input_example=example,
            signature=signature,
            pip_requirements=_requirements(),
            serialization_format="pt2",
        )
    finally:
        model.train(training)


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
