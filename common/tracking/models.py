"""Reading MLflow's registry: which version of a model to use, the settings it was trained with, and its tensors."""

import logging
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import CheckpointError, TrackingError
from common.files import read_json
from common.redact import shown_uri
from common.tracking.address import sqlite_path
from common.tracking.delivery import quieten
from common.tracking.model_delivery import CHAMPION
from common.tracking.sender import short_reason
from common.tracking.stores import open_client

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "models:/"
EXPORTED = "data/model.pt2"  # in what `mlflow.pytorch.save_model` writes

_log = logging.getLogger("facefed.tracking")


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
    if not address:
        raise TrackingError(f"{uri}: tracking is off, so the registry is not asked; leave --no-mlflow out.")
    if _has_no_database(address):
        raise TrackingError(f"{uri}: there is no registry at {shown_uri(address)}; give its --tracking-uri.")
    try:
        client = _client(address)
        found = client.get_model_version_by_alias(name, alias) if at else client.get_model_version(name, alias)
        return _read(address, found)
    except (CheckpointError, TrackingError):
        raise
    except Exception as error:
        reason = short_reason(error)
        raise TrackingError(f"{uri}: not found at {shown_uri(address)} ({reason}); name one that is.") from None


def load_state(registered: Registered) -> "dict[str, Tensor]":
    """The tensors of a registered model under its backbone's names, "backbone.linear.weight".

    Raises TrackingError, also for a model that is more than tensors: `mlflow.pytorch.load_model` would unpickle it, and
    import the modules that it brings.
    """
    quieten()
    import mlflow.artifacts

    from common.tracking.exported import read_exported

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


def _has_no_database(address: str) -> bool:
    """Whether asking would only make an empty database."""
    database = sqlite_path(address)
    return database is not None and not database.exists()


def _champion_or_best(address: str, name: str) -> Any:  # noqa: ANN401 - MLflow's own type
    client = _client(address)
    versions = client.search_model_versions(f"name = '{name}'")
    best = [version for version in versions if version.tags.get("role") == "best"]
    if not best:
        return None
    champion = client.get_registered_model(name).aliases.get(CHAMPION)
    by_number = {int(version.version): version for version in best}
    return by_number.get(int(champion) if champion is not None else -1, by_number[max(by_number)])


def _read(address: str, version: Any) -> Registered:  # noqa: ANN401 - MLflow's own type
    uri = f"{PREFIX}{version.name}/{version.version}"
    client = _client(address)
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


def _client(address: str) -> Any:  # noqa: ANN401 - MLflow is imported late and untyped here
    quieten()
    return open_client(address)
