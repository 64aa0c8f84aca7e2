"""Turns entries of a spool into calls of MLflow, so that sending any of them twice changes nothing.

What knows MLflow's API is here, in `registry` and in `wandb_import`.  `Delivery.send` raises whatever MLflow raises
when the server cannot take an entry now; an entry that no server would ever take is skipped with a warning and stays in
the spool.
"""

import contextlib
import itertools
import json
import logging
import math
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.parse import urlsplit

from common.errors import TrackingError
from common.redact import shown_uri, without_password
from common.system.processes import can_connect, is_this_machine
from common.system.runtime import reach_directly
from common.tracking.address import ARTIFACTS, SERVERS, sqlite_path
from common.tracking.notes import NOTE_TAG, VERSION
from common.tracking.sender import StartOver, short_reason
from common.tracking.spool import SPOOL_NAME, Sent, entries_of

DATABASE_PORTS: Final[Mapping[str, int]] = {"postgresql": 5432, "mysql": 3306}


def check_database(uri: str) -> str:
    """Log into a PostgreSQL or MySQL database and return its address.  Raises TrackingError."""
    parts = urlsplit(uri)
    kind = parts.scheme.partition("+")[0]
    host, port = parts.hostname, parts.port or DATABASE_PORTS[kind]
    if host and not can_connect(host, port, 5.0):
        raise TrackingError(
            f"{shown_uri(uri)}: nothing answers at {host}:{port}; start the database, or correct the address."
        )
    from mlflow.store.db.utils import create_sqlalchemy_engine

    make_engine: Callable[[str], Any] = create_sqlalchemy_engine  # untyped
    try:
        engine = make_engine(uri)
        with engine.connect():
            pass
        engine.dispose()
    except Exception as error:  # each driver has errors of its own
        reason = without_password(short_reason(error), uri)
        raise TrackingError(
            f"{shown_uri(uri)} cannot be opened ({reason}); make the database, or correct user, password and name."
        ) from None
    return uri


def open_client(uri: str) -> Any:  # noqa: ANN401 - MlflowClient
    """MLflow's client of an address from `resolve_uri`, tracking and registry; a sqlite database's folder is made.

    Asks a PostgreSQL or MySQL database first: MLflow would try one that refuses again for 100 s, and hold up every
    other database of this process meanwhile.  Raises TrackingError.
    """
    from mlflow import MlflowClient

    database = sqlite_path(uri)
    if database:
        database.parent.mkdir(parents=True, exist_ok=True)
    elif not uri.startswith(SERVERS):
        check_database(uri)
    elif is_this_machine(host := urlsplit(uri).hostname or ""):
        reach_directly(host)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


# -- experiments -------------------------------------------------------------------------------------------------------


_BEHIND_A_SERVER = "mlflow-artifacts:"


def experiment_id(client: Any, uri: str, name: str, place: Path, about: str = "") -> str:  # noqa: ANN401 - MlflowClient
    """MLflow's id of the active experiment `name` at `uri` (from `resolve_uri`); safe beside others that make it.

    A server says itself where artifacts go.  A database does not, and MLflow would take whatever folder the program
    was started from.  So an experiment made here has them in `mlruns/NAME`, beside a sqlite file, and for PostgreSQL
    and MySQL below `place`, a folder of this machine.  The database keeps that absolute path: an `mlflow server` over
    it shows them while it runs on this machine and may read the folder; other machines have the numbers only.
    about: its description, where it is made.
    Raises TrackingError for a deleted experiment and, without a server, for one whose artifacts only a server reaches.
    """
    found = client.get_experiment_by_name(name) or make_experiment(client, uri, name, place, about)
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


def make_experiment(client: Any, uri: str, name: str, place: Path, about: str = "") -> Any:  # noqa: ANN401 - MLflow's own types
    """Make the experiment, or find the one that another process made meanwhile; see `experiment_id`."""
    from mlflow.exceptions import MlflowException

    database = sqlite_path(uri)
    folder = (database.parent if database else place.resolve()) / ARTIFACTS / name
    try:
        location = None if uri.startswith(SERVERS) else folder.as_uri()
        described = {"tags": {NOTE_TAG: about}} if about else {}
        client.create_experiment(name, artifact_location=location, **described)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process may make it at the same moment
            raise
    return client.get_experiment_by_name(name)


# -- entries -----------------------------------------------------------------------------------------------------------


METRICS_PER_CALL = 1000  # MLflow's own limits
NAMES_PER_CALL = 100
RUN_KEY_TAG = "facefed.run_key"
NONFINITE_TAG = "nonfinite_metrics"
LOST_EXPERIMENT = "facefed_recovered"  # of a spool whose every first line is damaged
_REFUSED_FOR_GOOD = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
_FORBIDDEN = (*_REFUSED_FOR_GOOD, "PERMISSION_DENIED", "UNAUTHENTICATED")

_log = logging.getLogger("facefed.tracking")


def quieten() -> None:
    """Import MLflow and keep its and its database library's reports off the terminal."""
    import mlflow  # noqa: F401 - 2 to 5 s, only where something is tracked

    # MLflow 3.17's tables under SQLAlchemy 2.1.  A filter, since catch_warnings is not safe in the sending thread.
    warnings.filterwarnings("ignore", "The ``noload`` loader strategy is deprecated", DeprecationWarning)

    # Its model classes, when the first model is logged.
    warnings.filterwarnings("ignore", ".*Any type hint is inferred as AnyType", UserWarning)
    # What goes wrong is told by our own one line; MLflow shows 60 of them each time that its database is away.
    for chatty in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(chatty).setLevel(logging.CRITICAL)


class Delivery:
    """One spool's way to one MLflow server or database."""

    def __init__(self, uri: str, folder: Path, sent: Sent) -> None:
        """uri: resolved.  folder: the run's folder.  sent: what the server has; its run ids are filled in here.

        Experiments made in a PostgreSQL or MySQL database without a server keep artifacts beside the run's folder, in
        `mlruns` (see `experiment_id`).  Raises TrackingError when such a database cannot be opened now.
        """
        self._uri = uri
        self._folder = folder
        self._sent = sent
        self._begun: dict[str, dict[str, Any]] = {}  # runs that this object began, until they end: tags and params
        self._client = open_client(uri)

    def send(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Send entries in their order; the metrics between two events travel together, one call for each run."""
        for is_event, group in itertools.groupby(entries, key=lambda entry: "event" in entry):
            if is_event:
                for entry in group:
                    self._send_event(entry["run"], entry)
                continue
            by_run: dict[str, list[Mapping[str, Any]]] = {}
            for entry in group:
                by_run.setdefault(entry["run"], []).append(entry)
            for run, metrics in by_run.items():
                self._recover(run, metrics[0]["time_ms"])
                self._send_metrics(run, metrics)

    def _send_event(self, run: str, entry: Mapping[str, Any]) -> None:
        kind = entry["event"]
        if kind == "start":
            self._start(run, entry)
            return
        self._recover(run, entry["time_ms"])
        # A registry may be closed to us while the run is not.
        for_good = _FORBIDDEN if kind == "model" else _REFUSED_FOR_GOOD
        refusal = self._refusal(self._run_id(run), for_good, lambda: self._send_known_event(run, kind, entry))
        if refusal:
            _log.warning(
                "Tracking: MLflow takes no %s %r (%s); it is kept in the run's folder.",
                kind,
                entry.get("name", run),
                short_reason(refusal),
            )

    def _refusal(self, run_id: str, for_good: Sequence[str], send: Callable[[], None]) -> Exception | None:
        """Call `send`; returns why MLflow will never take it, or None when it did.  Raises what may pass.

        MLflow answers BAD_REQUEST for a database connection that broke in its hands as well.  So what counts is to be
        refused twice, with the run found in between.
        """
        from mlflow.exceptions import MlflowException

        refusal: MlflowException | None = None
        for _ in range(2):
            try:
                send()
            except MlflowException as error:
                if error.error_code not in for_good or not self._is_active(run_id):
                    raise
                refusal = error
                if error.error_code != "BAD_REQUEST":
                    break
            else:
                return None
        return refusal

    def _send_known_event(self, run: str, kind: str, entry: Mapping[str, Any]) -> None:
        if kind == "params":
            self._send_params(run, entry["values"])
        elif kind == "tags":
            self._send_tags(run, entry["values"])
        elif kind == "dataset":
            self._send_dataset(run, entry)
        elif kind == "artifact":
            self._send_artifact(run, entry["file"], entry["name"])
        elif kind == "model":
            self._send_model(run, entry)
        elif kind == "finish":
            self._client.set_terminated(self._run_id(run), status=entry["status"], end_time=entry["time_ms"])
            self._begun.pop(run, None)
        else:
            _log.warning("Tracking: the spool's event %r is unknown here and is not sent.", kind)

    def _run_id(self, run: str) -> str:
        return self._sent.run_ids[run]

    def check(self) -> None:
        """Ask for anything at all: raises what MLflow raises when the server is away or does not know us."""
        self._client.search_experiments(max_results=1)

    def is_gone(self) -> bool:
        """Whether a run that the server had was deleted there."""
        return not all(self._is_active(run_id) for run_id in self._sent.run_ids.values())

    def end_killed(self, times_ms: Mapping[str, int]) -> None:
        """Mark runs whose process died as killed, at the time of their last word; those that ended stay as they are."""
        for run, time_ms in times_ms.items():
            run_id = self._sent.run_ids.get(run)
            if run_id and self._client.get_run(run_id).info.status == "RUNNING":
                self._client.set_terminated(run_id, status="KILLED", end_time=time_ms)

    # -- runs ----------------------------------------------------------------------------------------------------------

    def _start(self, run: str, entry: Mapping[str, Any]) -> None:
        """Create the run, or open it again; a run that was deleted on the server is made anew, with all its record."""
        known = self._sent.run_ids.get(run)
        begun = {name: entry[name] for name in ("tags", "params")}
        if known and self._begun.get(run) == begun:  # it paused and went on; the server was told
            return
        if not known:
            self._sent.run_ids[run] = self._find_or_create(run, entry)
        elif self._is_active(known):
            self._client.update_run(known, status="RUNNING")
            if not (run or self._sent.experiment_id):
                self._sent.experiment_id = str(self._client.get_run(known).info.experiment_id)
        else:
            del self._sent.run_ids[run]
            self._sent.offset = 0
            raise StartOver(f"run {known} is gone from {shown_uri(self._uri)}")
        self._send_tags(run, entry["tags"])
        self._send_params(run, entry["params"])
        self._begun[run] = begun

    def _recover(self, run: str, time_ms: int) -> None:
        """Make a run whose first line is damaged, so that the rest of its record has a place."""
        if run in self._sent.run_ids:
            return
        if run:
            self._recover("", time_ms)
        starts = (entry for entry in entries_of(self._folder / SPOOL_NAME) if entry.get("event") == "start")
        experiment = next((entry["experiment"] for entry in starts), LOST_EXPERIMENT)
        name = run or self._folder.name
        start: dict[str, Any] = {"experiment": experiment, "name": name, "tags": {}, "params": {}, "time_ms": time_ms}
        self._sent.run_ids[run] = self._find_or_create(run, start)

    def _find_or_create(self, run: str, entry: Mapping[str, Any]) -> str:
        key = f"{self._sent.run_key}/{run}"
        place, about = self._folder.parent, str(entry.get("about", ""))
        experiment = experiment_id(self._client, self._uri, entry["experiment"], place, about)
        if not run:
            self._sent.experiment_id = experiment
        found = self._client.search_runs([experiment], f"tags.`{RUN_KEY_TAG}` = '{key}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        tags = {RUN_KEY_TAG: key}
        if run:
            self._recover("", entry["time_ms"])
            tags["mlflow.parentRunId"] = self._run_id("")
        made = self._client.create_run(experiment, start_time=entry["time_ms"], tags=tags, run_name=entry["name"])
        return str(made.info.run_id)

    def _is_active(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    # -- values --------------------------------------------------------------------------------------------------------

    def _send_metrics(self, run: str, entries: Sequence[Mapping[str, Any]]) -> None:
        from mlflow.entities import Metric

        marked = sorted({e["key"] for e in entries if not math.isfinite(e["value"])})
        # MLflow would turn an infinity into 1.8e308 without a word: it stays in the spool, and the run says so.
        metrics = [Metric(e["key"], e["value"], e["time_ms"], e["step"]) for e in entries if not math.isinf(e["value"])]
        self._log_batch(run, "metrics", metrics, METRICS_PER_CALL)
        before = self._sent.nonfinite.get(run, [])
        if set(marked) - set(before):
            self._sent.nonfinite[run] = sorted({*before, *marked})
            self._send_tags(run, {NONFINITE_TAG: ", ".join(self._sent.nonfinite[run])})

    def _send_params(self, run: str, values: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        self._log_batch(run, "params", [Param(k, v) for k, v in values.items()], NAMES_PER_CALL)

    def _send_tags(self, run: str, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._log_batch(run, "tags", [RunTag(k, v) for k, v in values.items()], NAMES_PER_CALL)

    def _send_dataset(self, run: str, entry: Mapping[str, Any]) -> None:
        """What `mlflow.log_input` does, for a run that is not this thread's active one; equal ones are kept once."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=entry["name"],
            digest=entry["digest"],
            source_type="facefed",
            source=json.dumps({"client": entry["name"]}),
            profile=json.dumps(entry["profile"]),
        )
        context = InputTag(key="mlflow.data.context", value=entry["context"])
        self._client.log_inputs(self._run_id(run), datasets=[DatasetInput(dataset=dataset, tags=[context])])

    def _log_batch(self, run: str, kind: str, items: Sequence[Any], most: int) -> None:
        """Send items of one kind; where MLflow refuses a batch for good, only the item at fault is left out."""
        run_id = self._run_id(run)
        for part in _parts(items, most):
            if self._accepted(run_id, kind, part):
                continue
            for item in part:
                if len(part) > 1 and self._accepted(run_id, kind, [item]):
                    continue
                _log.warning("Tracking: MLflow takes no %s %r (kept in the spool).", kind.removesuffix("s"), item.key)

    def _accepted(self, run_id: str, kind: str, items: Sequence[Any]) -> bool:
        # The default would queue the batch and lose it when the server is away.
        send = partial(self._client.log_batch, run_id, **{kind: items}, synchronous=True)
        return self._refusal(run_id, _REFUSED_FOR_GOOD, send) is None

    def _send_artifact(self, run: str, file: str, name: str) -> None:
        """file: path below the run's folder.  name: path among the run's artifacts."""
        path = self._folder / file
        if not path.is_file():
            _log.warning("Tracking: %s is gone and cannot be sent as %s.", path, name)
            return
        target = PurePosixPath(name)
        parent = None if str(target.parent) == "." else str(target.parent)
        with _named(path, target.name) as source:
            self._client.log_artifact(self._run_id(run), str(source), parent)

    def _send_model(self, run: str, entry: Mapping[str, Any]) -> None:
        import mlflow

        folder = self._folder / entry["folder"]
        if entry["model_key"] in self._sent.versions:
            return
        if not (folder / "MLmodel").is_file():
            _log.warning("Tracking: %s is gone and cannot be registered as %s.", folder, entry["name"])
            return
        # Registering in a database takes the tracking address from here; every other call of ours names it.
        mlflow.set_tracking_uri(self._uri)
        mlflow.set_registry_uri(self._uri)
        key = entry["model_key"]
        self._sent.versions[key], self._sent.verdicts[key] = deliver_model(
            self._client, self._run_id(run), folder, entry
        )


def _parts(items: Sequence[Any], most: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), most):
        yield items[start : start + most]


@contextlib.contextmanager
def _named(path: Path, name: str) -> Iterator[Path]:
    """The file under the name it shall have among the artifacts."""
    if path.name == name:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copyfile(path, Path(folder) / name))


# -- models ------------------------------------------------------------------------------------------------------------


CHAMPION = "champion"
AUC_TAG = "val_roc_auc"
PEOPLE_TAG = "val_people"
MODEL_KEY_TAG = "facefed.model_key"


def deliver_model(
    client: Any,  # noqa: ANN401 - MlflowClient
    run_id: str,
    folder: Path,
    entry: Mapping[str, Any],
) -> tuple[str, str]:
    """Upload the exported model, register it, link its metrics, move the champion.

    Returns the version, and what became of the champion in words ("" for a model that is no candidate).

    folder: what `mlflow.pytorch.save_model` wrote.  entry: the spool's event "model".  Raises what MLflow raises.
    """
    experiment = client.get_run(run_id).info.experiment_id
    mine = client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'")
    model = next((found for found in mine if found.tags.get(MODEL_KEY_TAG) == entry["model_key"]), None)
    if model is None:
        tags = {**entry["tags"], MODEL_KEY_TAG: entry["model_key"]}
        model = client.create_logged_model(experiment, entry["tags"].get("role", "model"), run_id, tags=tags)
    if str(model.status) != "READY":
        _upload(client, run_id, model, folder, entry["step"])
    _link_metrics(client, run_id, model.model_id, entry)
    version = _register(client, run_id, model.model_id, entry)
    if not entry["people"]:
        return version, ""
    return version, _crown(client, entry["name"], version, float(entry["tags"][AUC_TAG]), entry["people"])


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
        client.create_registered_model(entry["name"], description=entry.get("about") or None)
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
    if entry.get("note") and not version.description:  # which tells how to load this very version
        note = entry["note"].replace(VERSION, str(version.version))
        client.update_model_version(entry["name"], str(version.version), description=note)
    return str(version.version)


def _crown(client: Any, name: str, version: str, val_auc: float, val_people: str) -> str:  # noqa: ANN401 - MlflowClient
    """Move the alias when this version's AUC is higher than the champion's on the same validation people.

    Returns in words whether it did, and why not.
    """
    champion = client.get_registered_model(name).aliases.get(CHAMPION)
    if str(champion) == version:  # sent a second time
        return "it is the champion"
    stays = "there is no champion" if champion is None else f"version {champion} stays champion"
    if not math.isfinite(val_auc):
        return f"{stays}: this one has no validation AUC"
    if champion is not None:
        tags = client.get_model_version(name, champion).tags
        if tags.get(PEOPLE_TAG) != val_people:
            return f"{stays}: it was validated on other people, so the two cannot be compared"
        former = float(tags.get(AUC_TAG, "-inf"))
        if not val_auc > former:
            return f"{stays}: its validation AUC is {former:.4f}, this one's {val_auc:.4f}"
    client.set_registered_model_alias(name, CHAMPION, version)
    return "it is the champion now" + ("" if champion is None else f", instead of version {champion}")
