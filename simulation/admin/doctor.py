"""Looks at everything that tracking needs and says what is well, what is worth knowing and what is wrong.

Its write test does what a run does on its tracking server, in an experiment of its own, then deletes it again.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import ssl
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import httpx

from common.errors import EXIT_DONE, EXIT_FAILED, FaceFedError, TrackingError
from common.redact import shown_uri, without_password
from common.settings import Settings
from common.system.files import InUse, lock, open_to_others
from common.system.processes import is_loopback, is_this_machine, proxy_before
from common.system.runtime import SILENCE, facefed_version, machine_digest, reach_directly
from common.tracking.address import SERVERS, local_files, resolve_uri, sqlite_path
from common.tracking.delivery import make_experiment, quieten
from common.tracking.sender import short_reason
from common.tracking.spool import LEAST_FREE_BYTES, LOW_FREE_BYTES, SPOOL_NAME, now_ms
from common.tracking.sync import unsent
from simulation.admin.tracking_server import check_backend, require_folder

OK, NOTE, WRONG = "ok", "note", "wrong"
ANSWER_WITHIN_S: Final = 10.0
STRANGER: Final = "stranger.invalid"  # a name that no server of ours has (RFC 2606)
_BAD_HOST: Final = b"Invalid Host header"  # MLflow 3.17's own words, with a 403


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: str  # OK, NOTE or WRONG
    text: str  # one line; where something is wrong, also what to do
    values: Mapping[str, object] = field(default_factory=dict)


def examine(
    settings: Settings, environment: Mapping[str, str], base: Path, address: str = "", *, shared_files: bool = False
) -> Iterator[Finding]:
    """Every finding, as soon as it is known.

    environment: of this process, with which its child processes start.  base: what relative paths start from.
    address: of the tracking, with its password; "": the settings' own is whole.
    shared_files: others are meant to read what lies here.
    Nothing stays behind but, on the tracking server, a deleted experiment of this machine.
    """
    yield _versions()
    yield _telemetry(environment)
    out = base / Path(settings.run.out).expanduser()
    kept = [out, base / ".facefed"]
    if settings.tracking.enabled:
        try:
            uri = resolve_uri(address or settings.tracking.uri, base)
        except TrackingError as error:
            yield Finding(name="address", state=WRONG, text=str(error))
        else:
            yield from _server(uri) if uri.startswith(SERVERS) else _database(uri, base)
            database = sqlite_path(uri)
            kept += local_files(uri)
            if database:
                yield _disk("disk of the database", database.parent)
    else:
        yield Finding(name="address", state=OK, text="tracking is off; records stay in the runs' folders")
    yield _disk("disk of the runs", out)
    yield _privacy(kept, shared_files=shared_files)
    yield _spools(out)


def exit_code(findings: list[Finding]) -> int:
    """0 when nothing is wrong, else 1."""
    return EXIT_FAILED if any(finding.state == WRONG for finding in findings) else EXIT_DONE


def as_line(finding: Finding) -> str:
    """A finding as a line of text."""
    return f"{finding.state.upper() if finding.state == WRONG else finding.state:5}  {finding.name}: {finding.text}"


def as_json(findings: list[Finding]) -> str:
    """All findings as JSON: {"well": ..., "findings": [{"name", "state", "text", "values"}, ...]}."""
    well = exit_code(findings) == EXIT_DONE
    return json.dumps({"well": well, "findings": [asdict(finding) for finding in findings]}, indent=2)


def _versions() -> Finding:
    versions = {"facefed": facefed_version(), "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("mlflow", "tensorboard", "flwr")}
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Finding(name="versions", state=OK, text=text, values=versions)


def _telemetry(environment: Mapping[str, str]) -> Finding:
    """Off in this process and in what it starts: both read these variables before anything is sent."""
    name = "telemetry"
    loud = [variable for variable, value in SILENCE.items() if environment.get(variable) != value]
    if loud:
        return Finding(name=name, state=WRONG, text=f"not switched off: {', '.join(loud)}; start it as `facefed`.")
    from mlflow.telemetry.client import get_telemetry_client

    if get_telemetry_client() is not None:
        return Finding(name=name, state=WRONG, text="MLflow's is on although it is switched off; leave MLflow unused.")
    return Finding(name=name, state=OK, text="off for MLflow, Flower and Ray, here and in child processes")


# -- a server ----------------------------------------------------------------------------------------------------------


def _server(uri: str) -> Iterator[Finding]:
    parts = urlsplit(uri)
    host = parts.hostname or ""
    if is_this_machine(host):
        reach_directly(host)
    status, _, reason = _ask(f"{uri}/health")
    shown = shown_uri(uri)
    if status != 200:
        seen = reason or f"status {status}"
        if proxy := proxy_before(host, parts.scheme):
            seen += f", by way of {proxy}; no_proxy={host} would leave it out"
        advice = "start it (facefed tracking serve), or correct --tracking-uri"
        yield Finding(name="reachable", state=WRONG, text=f"{shown} is not healthy ({seen}); {advice}.")
        return
    yield Finding(name="reachable", state=OK, text=f"{shown} is healthy")
    yield _server_version(uri)
    hosts = _hosts(uri)
    yield hosts
    if hosts.state != WRONG:
        yield _write_test(uri)


def _ask(url: str, host: str = "", login: tuple[str, str] | None = None) -> tuple[int, bytes, str]:
    """Of a GET the status and the first bytes, or 0 and why there was no answer.  login: user name and password."""
    parts = urlsplit(url)  # a user name in it is MLflow's affair
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    trusted = ssl.create_default_context()  # with the authorities of this machine
    try:
        with (
            httpx.Client(verify=trusted, follow_redirects=True, timeout=ANSWER_WITHIN_S, auth=login) as client,
            client.stream("GET", bare, headers={"Host": host} if host else {}) as answer,
        ):
            return answer.status_code, next(answer.iter_bytes(200), b""), ""
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        return 0, b"", short_reason(error)


def _server_version(uri: str) -> Finding:
    login = os.environ.get("MLFLOW_TRACKING_USERNAME", ""), os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    status, body, _ = _ask(f"{uri}/version", login=login if all(login) else None)
    theirs, ours = body.decode(errors="replace").strip(), importlib.metadata.version("mlflow")
    if status in (401, 403):
        return Finding(name="server's version", state=OK, text="not told before a login")
    if status != 200 or not theirs[:1].isdigit():
        return Finding(name="server's version", state=NOTE, text="unknown; it may be no MLflow server")
    same = theirs.split(".")[:2] == ours.split(".")[:2]
    text = f"MLflow {theirs}" + ("" if same else f", and {ours} here; use one version on both sides")
    return Finding(name="server's version", state=OK if same else NOTE, text=text, values={"server": theirs})


def _hosts(uri: str) -> Finding:
    """Whether the server answers under the name we call it, and under a name that is not its own."""
    name, own = "allowed hosts", urlsplit(uri).netloc.rpartition("@")[2]
    status, body, reason = _ask(f"{uri}/")
    if status == 403 and _BAD_HOST in body:
        host = urlsplit(uri).hostname or own
        return Finding(
            name=name,
            state=WRONG,
            text=f"the server answers 403 to {own}; start it with --allowed-hosts {host} (and its other names).",
            values={"own": False},
        )
    if status == 0:
        return Finding(name=name, state=WRONG, text=f"no answer from {own} ({reason}); look into the server's log.")
    status, body, _ = _ask(f"{uri}/", STRANGER)
    if status == 403 and _BAD_HOST in body:
        text = f"{own} is answered, names that are not the server's are refused"
        return Finding(name=name, state=OK, text=text, values={"own": True, "stranger": False})
    text = f"{own} is answered, and so is any other name: a web page may reach the server (DNS rebinding)"
    return Finding(name=name, state=NOTE, text=text, values={"own": True, "stranger": True})


# -- a database --------------------------------------------------------------------------------------------------------


def _database(uri: str, base: Path) -> Iterator[Finding]:
    database = sqlite_path(uri)
    try:
        if database and not database.exists():
            require_folder(_existing(database.parent), "--tracking-uri")
            yield Finding(name="reachable", state=OK, text=f"{database} is made by the first run; its folder is ready")
            return
        address = check_backend(uri, base, "--tracking-uri")
    except TrackingError as error:
        yield Finding(name="reachable", state=WRONG, text=str(error))
        return
    yield Finding(name="reachable", state=OK, text=f"{shown_uri(uri)} opens")
    yield _write_test(address)


def _write_test(uri: str) -> Finding:
    name = "write test"
    try:
        seconds, note = write_and_remove(uri)
    except FaceFedError as error:
        return Finding(name=name, state=WRONG, text=str(error))
    except Exception as error:  # MLflow raises what its database or network library raises
        reason = without_password(short_reason(error), uri)
        return Finding(name=name, state=WRONG, text=f"failed ({reason}); {_advice(reason)}.")
    text = f"a metric, a parameter and a file were written, read and deleted again in {seconds:.1f} s"
    return Finding(name=name, state=NOTE if note else OK, text=f"{text}{note}", values={"seconds": round(seconds, 2)})


def _advice(reason: str) -> str:
    if "401" in reason or "not authenticated" in reason.lower():
        return "source the server's mlflow-auth/login.env, or set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    if "403" in reason or "permission" in reason.lower():
        return "have the server's administrator let this user write"
    if "schema" in reason.lower():
        return "back the database up, then run: mlflow db upgrade"
    return "look into the server's log"


# -- this machine ------------------------------------------------------------------------------------------------------


def _privacy(kept: list[Path], *, shared_files: bool) -> Finding:
    """Whether what was written before is closed to other accounts, as all is that is written from now on."""
    name, line = "other accounts", open_to_others(kept)
    if shared_files or not line:
        text = "shared on purpose" if shared_files else "none can read or write runs, packs, state and tracking here"
        return Finding(name=name, state=OK, text=text)
    return Finding(name=name, state=NOTE, text=line.removeprefix("other accounts "))


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above that exists."""
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def _disk(name: str, folder: Path) -> Finding:
    place = _existing(folder.resolve())
    try:
        require_folder(place, name)
        free = shutil.disk_usage(place).free
    except (OSError, TrackingError) as error:
        return Finding(name=name, state=WRONG, text=str(error))
    values = {"folder": str(folder), "free_bytes": free}
    text = f"{free / 1e9:,.1f} GB free for {folder}"
    if free < LEAST_FREE_BYTES:
        return Finding(name=name, state=WRONG, text=f"{text}; no run can begin: make room.", values=values)
    if free < LOW_FREE_BYTES:
        return Finding(name=name, state=NOTE, text=f"{text}; make room soon.", values=values)
    return Finding(name=name, state=OK, text=text, values=values)


def _spools(out: Path) -> Finding:
    """What ended runs hold that their server lacks; a run that is being written sends by itself.

    Left out is what a simulation's clients keep for themselves: it is meant for no server.
    """
    waiting, running, local = {}, [], 0
    found = (path for path in out.rglob(SPOOL_NAME) if path.relative_to(out).parts[0] != "clients")
    for path in sorted(found):
        rest = unsent(path.parent)
        name = str(path.parent.relative_to(out))
        if not rest.uri:
            local += 1
        elif _in_use(path):
            running.append(name)
        elif rest.num_bytes:
            waiting[name] = rest.num_bytes
    values = {"unsent_bytes": waiting, "running": running, "local_only": local}
    if waiting:
        shown = ", ".join(f"{name} ({size:,} bytes)" for name, size in waiting.items())
        folders = " ".join(str(out / name) for name in waiting)
        text = f"{shown}; send it: facefed tracking sync {folders}"
        return Finding(name="unsent records", state=WRONG, text=text, values=values)
    text = "none" + (f"; being written: {', '.join(running)}" if running else "")
    text += f"; {local} recorded with tracking off" if local else ""
    return Finding(name="unsent records", state=OK, text=text, values=values)


def _in_use(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            lock(file)
        except InUse:
            return True
    return False


# -- the write test ----------------------------------------------------------------------------------------------------


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
