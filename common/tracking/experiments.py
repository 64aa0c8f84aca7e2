"""An experiment by its name, made where it is missing, its artifacts in a place that stays the same."""

from pathlib import Path
from typing import Any

from common.errors import TrackingError
from common.redact import shown_uri
from common.tracking.address import SERVERS, sqlite_path

ARTIFACTS = "mlruns"  # MLflow's own name for it
_BEHIND_A_SERVER = "mlflow-artifacts:"


def experiment_id(client: Any, uri: str, name: str, place: Path) -> str:  # noqa: ANN401 - MlflowClient
    """MLflow's id of the active experiment `name` at `uri` (from `resolve_uri`); safe beside others that make it.

    A server says itself where artifacts go.  A database does not, and MLflow would take whatever folder the program
    was started from.  So an experiment made here has them in `mlruns/NAME`, beside a sqlite file, and for PostgreSQL
    and MySQL below `place`, a folder of this machine.  The database keeps that absolute path: an `mlflow server` over
    it shows them while it runs on this machine and may read the folder; other machines have the numbers only.
    Raises TrackingError for a deleted experiment and, without a server, for one whose artifacts only a server reaches.
    """
    found = client.get_experiment_by_name(name) or make_experiment(client, uri, name, place)
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"experiment {name!r} of {shown_uri(uri)} was deleted; bring it back with"
            f" `mlflow experiments restore -x {found.experiment_id}`, then `facefed tracking sync` sends what is kept."
        )
    if not uri.startswith(SERVERS) and str(found.artifact_location).startswith(_BEHIND_A_SERVER):
        raise TrackingError(
            f"experiment {name!r} of {shown_uri(uri)} keeps its artifacts behind an MLflow server; give that server's"
            " address as --tracking-uri, or name another experiment."
        )
    return str(found.experiment_id)


def make_experiment(client: Any, uri: str, name: str, place: Path) -> Any:  # noqa: ANN401 - MLflow's own types
    """Make the experiment, or find the one that another process made meanwhile; see `experiment_id`."""
    from mlflow.exceptions import MlflowException

    database = sqlite_path(uri)
    folder = (database.parent if database else place.resolve()) / ARTIFACTS / name
    try:
        client.create_experiment(name, artifact_location=None if uri.startswith(SERVERS) else folder.as_uri())
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process may make it at the same moment
            raise
    return client.get_experiment_by_name(name)
