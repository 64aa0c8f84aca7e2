"""The doctor's write test: what a run does on its tracking server, in an experiment of its own, then deleted again."""

import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from common.errors import FaceFedError
from common.processes import is_loopback
from common.runtime import machine_digest
from common.tracking.address import SERVERS
from common.tracking.delivery import quieten
from common.tracking.experiments import make_experiment
from common.tracking.spool import now_ms

_VALUE = 0.5
_FILE = "doctor.txt"


def write_and_remove(uri: str) -> tuple[float, str]:
    """Write a metric, a parameter and a file, read them back, delete all.

    uri: from `resolve_uri`.  Returns the seconds it took and what is worth knowing, "" or "; ...".
    MLflow keeps deleted rows until `mlflow gc`: one experiment for each machine, which this uses each time.
    Raises FaceFedError when something else is read than was written, and what MLflow raises when it refuses.
    """
    quieten()
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    began = time.monotonic()
    experiment = _own_experiment(client, uri)
    run = None
    try:
        run = client.create_run(experiment, run_name="facefed tracking doctor")
        note = _artifacts_note(uri, run.info.artifact_uri)
        _write(client, run.info.run_id)
    except Exception:
        with contextlib.suppress(Exception):  # what broke the test may break this; the test's own reason is to tell
            _remove(client, uri, experiment, run)
        raise
    _remove(client, uri, experiment, run)
    return time.monotonic() - began, note


def _own_experiment(client: Any, uri: str) -> str:  # noqa: ANN401 - MLflow's own type
    # An experiment keeps the artifacts' address it was made with, and only a server's clients can use a server's.
    name = f"facefed-doctor-{machine_digest()}" + ("" if uri.startswith(SERVERS) else "-database")
    found = client.get_experiment_by_name(name) or make_experiment(client, uri, name, Path.cwd())
    if found.lifecycle_stage != "active":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _artifacts_note(uri: str, artifact_uri: str) -> str:
    """A server without the proxy tells clients to write to its own disk, which other machines do not have."""
    if not uri.startswith(SERVERS) or urlsplit(artifact_uri).scheme not in ("", "file"):
        return ""
    text = f"the server keeps artifacts in {artifact_uri} without its proxy; start it with --artifacts-destination"
    if is_loopback(urlsplit(uri).hostname or ""):
        return f"; {text} before other machines use it"
    raise FaceFedError(f"{text}.")


def _write(client: Any, run_id: str) -> None:  # noqa: ANN401 - MLflow's own type
    from mlflow.entities import Metric, Param

    metric = Metric("doctor", _VALUE, now_ms(), 0)
    client.log_batch(run_id, metrics=[metric], params=[Param("doctor", "well")], synchronous=True)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / _FILE
        source.write_text(run_id, encoding="utf-8")
        client.log_artifact(run_id, str(source))
        source.unlink()
        read_back = Path(client.download_artifacts(run_id, _FILE, folder)).read_text(encoding="utf-8")
    told = [point.value for point in client.get_metric_history(run_id, "doctor")]
    param = client.get_run(run_id).data.params.get("doctor")
    if (told, param, read_back) != ([_VALUE], "well", run_id):
        raise FaceFedError(
            f"{_VALUE}, 'well' and a file were written, and {told}, {param!r}, {read_back!r} read; look into the"
            " server's log."
        )


def _remove(client: Any, uri: str, experiment: str, run: Any) -> None:  # noqa: ANN401 - MLflow's own types
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    if run is not None:
        repository: Any = get_artifact_repository(run.info.artifact_uri, tracking_uri=uri)
        repository.delete_artifacts()
        with contextlib.suppress(OSError):
            _remove_empty_folders(run.info.artifact_uri)
        client.set_terminated(run.info.run_id)
        client.delete_run(run.info.run_id)
    client.delete_experiment(experiment)


def _remove_empty_folders(artifact_uri: str) -> None:
    """The folders of a run, its experiment and all experiments on this machine, where nothing is in them."""
    parts = urlsplit(artifact_uri)
    if parts.scheme in ("", "file"):
        for folder in list(Path(unquote(parts.path)).parents)[:3]:
            folder.rmdir()
