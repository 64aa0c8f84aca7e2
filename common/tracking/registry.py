"""Models in MLflow's registry: exported as a graph, loadable without a line of ours, with a guarded champion; and read
back, as the settings that they were trained with and as plain tensors.

Input float32 [B, 3, H, W] in [-1, 1], any B; output float32 [B, D].
"""

import json
import logging
import math
import shutil
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from common import config
from common.errors import CheckpointError, TrackingError
from common.redact import shown_uri
from common.settings import TrackingSettings
from common.system.files import read_json
from common.system.runtime import go_silent, tracking_uri_of_environment
from common.tracking.address import resolve_uri, sqlite_path
from common.tracking.delivery import AUC_TAG, CHAMPION, PEOPLE_TAG, open_client, quieten
from common.tracking.run import TrackedRun
from common.tracking.sender import short_reason
from common.tracking.spool import now_ms

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from common.metrics.thresholds import Thresholds
    from common.models.recogniser import EmbeddingModel

MODELS = "models"  # below the run's folder
THRESHOLDS: Final = "thresholds.json"  # beside a model, see `common.metrics.thresholds`
MODEL_CARD: Final = "model_card.md"  # likewise, see `common.tracking.card`
HELD_BACK_TAG = "held_back"  # of a version: why it did not become champion
BEST_AND_LAST: Final = "best and last"
LAST_TAG: Final = "is_last"  # of a version: of the run's last round or epoch; with role "best" it is both
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
    held_back: str = "",
    tell: Callable[[str], object] = str,
    note: str = "",
    about: str = "",
    beside: Mapping[str, str] | None = None,
    more_tags: Mapping[str, str] | None = None,
) -> str | None:
    """Export the model, log it with the run, register it as a version of `name`, and move the champion if it is better.

    model: float32 [B, 3, image_size, image_size] in [-1, 1] -> float32 [B, D]; its mode is left as it was found.
    step: the round or epoch it stands for.  role: "best" (may become champion), "last", or BEST_AND_LAST of weights
    that are both: one version then, whose tags say so.
    val_auc: on the validation people whose digest is `val_people`.  metrics: recorded with the model, at `step`.
    held_back: why a best model shall not become champion, for its version's tags; "": it may.
    tell: is told in words what became of the champion, as far as that is known.
    note: the version's description, see `common.tracking.notes`.  about: that of all versions, where there is none yet.
    beside: name -> text of files that are kept with the model.  more_tags: of its version, beside those of its role.
    It is exported to RUN/models first; the sending thread brings it to MLflow, or later `facefed tracking sync` does.
    Returns the version, or None when tracking is off or MLflow is away (then with one warning: nothing is raised).
    """
    if role not in ("best", "last", BEST_AND_LAST):
        raise ValueError(f"role = {role!r}; use 'best', 'last' or {BEST_AND_LAST!r}")
    if not run.reaches_mlflow:
        return None
    first = "last" if role == "last" else "best"
    tags = {"role": first, "step": str(step), AUC_TAG: repr(float(val_auc)), PEOPLE_TAG: val_people}
    tags |= {LAST_TAG: "true"} if role != "best" else {}
    if held_back:
        tags[HELD_BACK_TAG] = held_back
    tags |= more_tags or {}
    folder = run.folder / MODELS / f"{name}_{first}_{step}_{now_ms()}"
    try:
        _export(model, folder, image_size)
        for file, text in (beside or {}).items():
            (folder / file).write_text(text, encoding="utf-8")
    except Exception as error:  # tracing fails in many ways; it must not cost the run, whose checkpoint is there
        shutil.rmtree(folder, ignore_errors=True)
        _log.warning(
            "Tracking: model %s (%s) is not registered (%s); its checkpoint is kept.", name, role, short_reason(error)
        )
        return None
    people = val_people if first == "best" and not held_back else ""
    key = run.log_model(folder, name=name, step=step, tags=tags, metrics=metrics, people=people, note=note, about=about)
    if not run.flush(FLUSH_TIMEOUT_S):
        _log.warning("Tracking: model %s is not registered yet, since MLflow is away; it is kept in %s.", name, folder)
    elif verdict := "it does not become champion" if held_back else run.verdict_on(key):
        tell(verdict)
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
    # Without names: MLflow hands named ones over as a dict, which its own wrapper of torch's models then refuses.
    inputs = Schema([TensorSpec(kind, (-1, 3, image_size, image_size))])
    outputs = Schema([TensorSpec(kind, (-1, width))])
    return noise, ModelSignature(inputs=inputs, outputs=outputs)


def _requirements() -> list[str]:
    import mlflow
    import numpy as np
    import torch

    public = torch.__version__.partition("+")[0]  # "+cpu" and the like are not on the package index
    return [f"torch=={public}", f"numpy=={np.__version__}", f"mlflow=={mlflow.__version__}"]


# -- which version, and what it is -------------------------------------------------------------------------------------


PREFIX = "models:/"
EXPORTED = "data/model.pt2"  # in what `mlflow.pytorch.save_model` writes


@dataclass(frozen=True, kw_only=True)
class Registered:
    """One version of a registered model, and what its run wrote down."""

    uri: str  # models:/NAME/VERSION
    address: str  # of the registry, resolved; the run may have been recorded under another one
    step: int  # the epoch or round it stands for
    settings: Mapping[str, Any]  # the run's config.toml
    metrics: Mapping[str, Any]  # the run's metrics.json; empty where it has none


def find_registered(address: str, name: str) -> Registered | None:
    """The champion of a model, else its newest version with the role "best"; None when there is none.

    address: of the tracking, resolved.  A registry that cannot be asked has none, with a warning.
    """
    if _has_no_database(address):
        return None
    try:
        version = _champion_or_best(address, name)
        return None if version is None else _read(address, version)
    except (CheckpointError, TrackingError):
        raise
    except Exception as error:  # MLflow raises what its database or network library raises
        _log.warning("Tracking: %s cannot be asked for %s (%s).", shown_uri(address), name, short_reason(error))
        return None


def read_registered(address: str, uri: str) -> Registered:
    """The version that models:/NAME/VERSION or models:/NAME@ALIAS means.  Raises TrackingError.

    address: of the tracking, resolved; "": it is off.
    """
    text = uri.removeprefix(PREFIX)
    name, at, alias = text.partition("@")
    if not at:
        name, _, alias = text.rpartition("/")
    if not uri.startswith(PREFIX) or not (name and alias):
        raise TrackingError(f"{uri}: write models:/NAME/VERSION or models:/NAME@{CHAMPION}.")
    _require_registry(address, uri)
    try:
        client = client_of(address)
        found = client.get_model_version_by_alias(name, alias) if at else client.get_model_version(name, alias)
        return _read(address, found)
    except (CheckpointError, TrackingError):
        raise
    except Exception as error:
        reason = short_reason(error)
        raise TrackingError(f"{uri}: not found at {shown_uri(address)} ({reason}); name one that is.") from None


def version_of_run(address: str, run_id: str) -> str:
    """models:/NAME/VERSION of the best model that a run of MLflow's registered.  Raises TrackingError.

    address: of the tracking, resolved; "": it is off.
    """
    _require_registry(address, run_id)
    try:
        found = client_of(address).search_model_versions(f"run_id = '{run_id}'")
    except Exception as error:
        raise TrackingError(f"{run_id}: {shown_uri(address)} cannot be asked ({short_reason(error)}).") from None
    best = {int(version.version): version.name for version in found if version.tags.get("role") == "best"}
    if not best:
        raise TrackingError(
            f"{run_id}: no run at {shown_uri(address)} registered a model under that id; name models:/NAME/VERSION."
        )
    return f"{PREFIX}{best[max(best)]}/{max(best)}"


def _require_registry(address: str, what: str) -> None:
    if not address:
        raise TrackingError(f"{what}: tracking is off, so the registry is not asked; leave --no-mlflow out.")
    if _has_no_database(address):
        raise TrackingError(f"{what}: there is no registry at {shown_uri(address)}; give its --tracking-uri.")


def load_state(registered: Registered) -> "dict[str, Tensor]":
    """The tensors of a registered model under its backbone's names, "backbone.linear.weight".

    Raises TrackingError, also for a model that is more than tensors: `mlflow.pytorch.load_model` would unpickle it, and
    import the modules that it brings.
    """
    quieten()
    import mlflow.artifacts

    # download_artifacts takes its server from here.
    mlflow.set_tracking_uri(registered.address)
    mlflow.set_registry_uri(registered.address)
    try:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(mlflow.artifacts.download_artifacts(artifact_uri=registered.uri, dst_path=folder))
            return read_exported(model / EXPORTED)
    except Exception as error:
        reason = short_reason(error)
        raise TrackingError(f"{registered.uri} cannot be loaded ({reason}); name its run's folder instead.") from None


def load_model(uri: str, tracking_uri: str | None = None) -> "EmbeddingModel":
    """A registered model, built by our code and filled with the tensors alone: nothing that a registry holds is run.

    `mlflow.pytorch.load_model` runs it: a pickle unless MLFLOW_ALLOW_PICKLE_DESERIALIZATION is false, and the formulas
    of an exported graph, which torch evaluates as Python, even then (MLflow 3.17, torch 2.14).
    uri: models:/NAME@champion or models:/NAME/VERSION.  tracking_uri: None for MLFLOW_TRACKING_URI, else
    sqlite:///mlflow.db.  Raises TrackingError; ConfigError where the settings of its run are none.
    """
    from common.models.recogniser import EmbeddingModel, build_backbone

    go_silent()  # before MLflow is imported
    registered = read_registered(_address(tracking_uri), uri)
    settings = config.from_mapping(config.without_gone(registered.settings), f"{registered.uri}: config.toml")
    tensors = load_state(registered)
    model = EmbeddingModel(build_backbone(settings.model, settings.data.image_size))
    needed = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    try:
        absent = needed.intersection(model.load_state_dict(tensors, strict=False).missing_keys)
    except RuntimeError as error:  # of another shape
        reason = short_reason(error)
        raise TrackingError(f"{registered.uri} is no {settings.model.backbone} of its run ({reason}).") from None
    if absent:
        raise TrackingError(f"{registered.uri} is no {settings.model.backbone} of its run: {min(absent)} is missing.")
    return model


def thresholds_of(uri: str, tracking_uri: str | None = None) -> "Thresholds | None":
    """The thresholds that a registered model was given by its validation people; None where it has none.

    uri, tracking_uri: as `load_model` takes them.  Raises TrackingError, also where what is there is damaged.
    """
    from common.metrics.thresholds import Thresholds

    go_silent()  # before MLflow is imported
    registered = read_registered(_address(tracking_uri), uri)
    content = file_of_model(registered, THRESHOLDS)
    if content is None:
        return None
    try:
        return Thresholds.from_json(json.loads(content))
    except (KeyError, TypeError, ValueError) as error:
        reason = short_reason(error)
        raise TrackingError(f"{registered.uri}: its {THRESHOLDS} is damaged ({reason}); register it again.") from None


def file_of_model(registered: Registered, name: str) -> str | None:
    """A text file that was kept beside a model; None where there is none.  Raises TrackingError."""
    quieten()
    import mlflow.artifacts

    mlflow.set_tracking_uri(registered.address)
    mlflow.set_registry_uri(registered.address)
    try:
        there = {file.path for file in mlflow.artifacts.list_artifacts(artifact_uri=registered.uri) or ()}
        if name not in there:
            return None
        with tempfile.TemporaryDirectory() as folder:
            file = mlflow.artifacts.download_artifacts(artifact_uri=f"{registered.uri}/{name}", dst_path=folder)
            return Path(file).read_text(encoding="utf-8")
    except Exception as error:
        reason = short_reason(error)
        raise TrackingError(f"{registered.uri}: {name} cannot be had ({reason}); try again.") from None


def _address(tracking_uri: str | None) -> str:
    given = tracking_uri_of_environment() or TrackingSettings().uri if tracking_uri is None else tracking_uri
    return resolve_uri(given, Path.cwd()) if given else ""


def _has_no_database(address: str) -> bool:
    """Whether asking would only make an empty database."""
    database = sqlite_path(address)
    return database is not None and not database.exists()


def _champion_or_best(address: str, name: str) -> Any:  # noqa: ANN401 - MLflow's own type
    client = client_of(address)
    versions = client.search_model_versions(f"name = '{name}'")
    best = [version for version in versions if version.tags.get("role") == "best"]
    if not best:
        return None
    champion = client.get_registered_model(name).aliases.get(CHAMPION)
    by_number = {int(version.version): version for version in best}
    return by_number.get(int(champion) if champion is not None else -1, by_number[max(by_number)])


def _read(address: str, version: Any) -> Registered:  # noqa: ANN401 - MLflow's own type
    uri = f"{PREFIX}{version.name}/{version.version}"
    client = client_of(address)
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = Path(client.download_artifacts(version.run_id, "config.toml", folder))
            settings = tomllib.loads(config.read_text(encoding="utf-8"))
        except Exception as error:
            reason = short_reason(error)
            raise TrackingError(
                f"{uri}: its run has no readable config.toml ({reason}), so nobody knows how to build it; name a"
                " run's folder instead."
            ) from None
        metrics: dict[str, Any] = {}
        if any(file.path == "metrics.json" for file in client.list_artifacts(version.run_id)):
            metrics = read_json(Path(client.download_artifacts(version.run_id, "metrics.json", folder)))
    step = int(version.tags.get("step", 0))
    return Registered(uri=uri, address=address, step=step, settings=settings, metrics=metrics)


def client_of(address: str) -> Any:  # noqa: ANN401 - MLflow is imported late and untyped here
    """MLflow's client of a resolved address, with its reports kept off the terminal.  Raises TrackingError."""
    quieten()
    return open_client(address)


# -- the tensors of an exported model ----------------------------------------------------------------------------------


CONFIG: Final = "data/weights/model_weights_config.json"
_DTYPES: Final = {5: "int64", 7: "float32"}  # by their numbers in torch._export.serde.schema.ScalarType


class NotPlain(ValueError):
    """The archive is none of ours, or is no plain one."""


def read_exported(path: Path) -> "dict[str, Tensor]":
    """Name -> tensor of a model.pt2 that `torch.export` saved.

    `torch.export.load` unpickles what an archive tells it to and evaluates the formulas of its graph, so whoever can
    write to a registry could run code here.  The archive is a zip of uncompressed files: CONFIG names each tensor, its
    file beside it holds the bytes.  Raises NotPlain when it is damaged or holds anything but plain tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            config = _config_of(archive)
            folder = config.removesuffix(CONFIG.rpartition("/")[2])
            tensors = json.loads(archive.read(config))["config"]
            return {name: _tensor(archive, folder, about) for name, about in tensors.items()}
    except NotPlain:
        raise
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise NotPlain(f"it is damaged: {type(error).__name__}: {error}") from None


def _config_of(archive: zipfile.ZipFile) -> str:
    if any(one.compress_type != zipfile.ZIP_STORED for one in archive.infolist()):
        raise NotPlain("it is compressed, which nothing of ours is")
    for name in archive.namelist():
        if name.partition("/")[2] == CONFIG:
            return name
    raise NotPlain(f"it has no {CONFIG}")


def _tensor(archive: zipfile.ZipFile, folder: str, about: Any) -> "Tensor":  # noqa: ANN401 - whatever the file holds
    import torch

    meta = about["tensor_meta"]
    dtype = _DTYPES.get(meta["dtype"])
    if about["use_pickle"] or dtype is None:
        raise NotPlain(f"the tensor in {about['path_name']!r} is no plain float32 or int64")
    sizes, strides = (tuple(int(one["as_int"]) for one in meta[key]) for key in ("sizes", "strides"))
    flat = torch.frombuffer(bytearray(archive.read(f"{folder}{about['path_name']}")), dtype=getattr(torch, dtype))
    if len(sizes) != len(strides) or min((*sizes, *strides), default=0) < 0 or math.prod(sizes) > len(flat):
        raise NotPlain(f"the tensor in {about['path_name']!r} is larger than its file")
    return flat.as_strided(sizes, strides, int(meta["storage_offset"]["as_int"])).clone()
