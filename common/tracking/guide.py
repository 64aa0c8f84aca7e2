"""Tracking for a script of one's own, in the five words that MLflow's users know.

    from common.tracking import log_metrics, log_params, setup_mlflow, start_run

    setup_mlflow("my_experiment")
    with start_run(run_name="my_run"):
        log_params({"learning_rate": 0.001})
        log_metrics({"loss": 0.5}, step=1)

They record as every program here does: into a folder of the run first, so that no call waits for a server and
`facefed tracking sync` sends what one missed.  A program of several threads uses `common.tracking.run` itself.
"""

import contextlib
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from common.errors import TrackingError
from common.settings import TrackingSettings
from common.system.runtime import go_silent, tracking_uri_of_environment
from common.tracking.address import resolve_uri
from common.tracking.run import TrackedRun, finishing, open_run
from common.tracking.tensorboard import OFF


@dataclass(frozen=True, kw_only=True)
class _Setup:
    experiment: str
    uri: str  # resolved; empty: the local record only
    out: Path
    tensorboard: str


_setup: _Setup | None = None
_active: list[TrackedRun] = []  # the innermost run is the last


def setup_mlflow(
    experiment_name: str, tracking_uri: str | None = None, *, out: Path | str = "runs", tensorboard: str = OFF
) -> None:
    """Say where the runs that follow are recorded; asks no server.

    tracking_uri: sqlite:///FILE or http://HOST:PORT; None for MLFLOW_TRACKING_URI, else sqlite:///mlflow.db; "" for the
    local record alone.  out: where each run gets a folder.  tensorboard: its folder, or "none".
    Raises TrackingError for an address that MLflow cannot use, and while a run is active.
    """
    global _setup
    if _active:
        raise TrackingError("setup_mlflow was called inside a run; call it before start_run.")
    go_silent()  # before MLflow is imported
    given = tracking_uri_of_environment() or TrackingSettings().uri if tracking_uri is None else tracking_uri
    uri = resolve_uri(given, Path.cwd()) if given else ""
    _setup = _Setup(experiment=experiment_name, uri=uri, out=Path(out), tensorboard=tensorboard)


@contextlib.contextmanager
def start_run(run_name: str, tags: Mapping[str, str] | None = None) -> Iterator[TrackedRun]:
    """Record what the block logs as one run; it ends as FINISHED, after Ctrl-C as KILLED, else as FAILED.

    Raises TrackingError without `setup_mlflow`, and inside another run.
    """
    if _setup is None:
        raise TrackingError("start_run came before setup_mlflow; call setup_mlflow('EXPERIMENT') first.")
    if _active:
        raise TrackingError(f"run {run_name!r} would begin inside another; use create_nested_run({run_name!r}).")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    run = open_run(
        TrackingSettings(enabled=bool(_setup.uri), uri=_setup.uri, tensorboard=_setup.tensorboard),
        uri=_setup.uri,
        folder=_setup.out.resolve() / f"{stamp}-{secrets.token_hex(3)}",
        experiment=_setup.experiment,
        run_name=run_name,
        tags=tags or {},
        params={},
    )
    with finishing(run), _as_active(run):
        yield run


@contextlib.contextmanager
def create_nested_run(run_name: str, tags: Mapping[str, str] | None = None) -> Iterator[TrackedRun]:
    """Record what the block logs as a run below the active one, for example a client's; it ends with that run.

    The same name again in one run goes on with the same nested run, as rounds do.
    Raises TrackingError outside a run and inside a nested one.
    """
    if len(_active) != 1:
        where = (
            "outside a run; use `with start_run(...)` first" if not _active else "inside a nested one; end that first"
        )
        raise TrackingError(f"nested run {run_name!r} would begin {where}.")
    nested = _active[0].child(run_name, tags or {})
    with _as_active(nested):
        yield nested


def log_params(params: Mapping[str, object]) -> None:
    """Record settings of the active run; MLflow keeps the first value of each name.

    Raises TrackingError outside a run.
    """
    _innermost("log_params").log_params(params)


def log_metrics(metrics: Mapping[str, float], step: int | None = None) -> None:
    """Record values of the active run at a step; 0 if none is given, as MLflow does.

    Raises TrackingError outside a run.
    """
    _innermost("log_metrics").log_metrics(metrics, 0 if step is None else step)


def _innermost(caller: str) -> TrackedRun:
    if not _active:
        raise TrackingError(f"{caller} was called outside a run; use `with start_run(...)` around it.")
    return _active[-1]


@contextlib.contextmanager
def _as_active(run: TrackedRun) -> Iterator[None]:
    _active.append(run)
    try:
        yield
    finally:
        _active.remove(run)
