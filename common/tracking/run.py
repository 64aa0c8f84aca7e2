"""One tracked run: each call writes to the run's folder first; MLflow hears of it from a thread, when it can.

    open_run -> TrackedRun -> Spool (RUN/spool.jsonl) -> Sender (thread) -> Delivery (MLflow)
                           -> Board (logs/tensorboard/RUN)

Nothing here blocks on a server or raises because of one.  With `tracking.enabled = false` the record in the folder is
the same and MLflow is never imported; with `tracking.tensorboard = "none"` TensorBoard is not.
"""

import contextlib
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from common.settings import TrackingSettings
from common.tracking.address import shown_uri, sqlite_path
from common.tracking.delivery import Delivery, quieten
from common.tracking.sender import Send, Sender
from common.tracking.spool import Sent, Spool, event_line, load_sent, metric_line, now_ms, save_sent
from common.tracking.tensorboard import OFF, Board

if TYPE_CHECKING:
    from torch import Tensor, nn

FINISH_TIMEOUT_S = 120.0  # a new sqlite database alone takes 5 to 40 s on a busy machine

_log = logging.getLogger("facefed.tracking")


class SavesFigure(Protocol):
    """What a matplotlib Figure offers; matplotlib itself stays in common.plots."""

    def savefig(self, fname: Path, *, format: str) -> None:  # noqa: A002 - matplotlib's word
        """Write the picture."""


class TrackedRun:
    """A run, or a nested run of it, that is recorded in a folder, in MLflow and in TensorBoard."""

    def __init__(
        self, *, folder: Path, spool: Spool, sender: Sender | None, board: Board | None, name: str, uri: str
    ) -> None:
        """Use `open_run` and `child`.  name: "" for the run itself, else the nested run's name in the spool."""
        self.folder = folder
        self.uri = uri
        self._spool = spool
        self._sender = sender
        self._board = board
        self._name = name
        self._params: dict[str, str] = {}
        self._step = 0  # the latest, under which pictures are shown
        self._num_samples = 0  # of the machine
        self._before_finish: list[Callable[[], None]] = []
        self._children: dict[str, TrackedRun] = {}
        self._finished = False

    @property
    def mlflow_run_id(self) -> str:
        """MLflow's id of this run; empty while it is unknown (the server has not answered yet) or tracking is off."""
        return self._sender.run_id(self._name) if self._sender else ""

    @property
    def reaches_mlflow(self) -> bool:
        """Whether records go to MLflow at all (not: whether it is up)."""
        return self._sender is not None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record values at a step (a round or an epoch).  Costs a write to a file, well under 1 ms.

        NaN reaches MLflow; infinities stay in the spool, and both mark the run with the tag `nonfinite_metrics`.
        """
        self._step = int(step)
        self._log_metrics(metrics, self._step)

    def log_system_metrics(self, metrics: Mapping[str, float]) -> None:
        """Record a sample of the machine, from a thread of its own; its step is the sample's number, as MLflow has it.

        A run that goes on counts on from its spool.
        """
        if self._num_samples == 0:
            steps = [e["step"] for e in self._spool.entries() if e["run"] == self._name and e.get("key") in metrics]
            self._num_samples = max(steps, default=-1) + 1
        self._log_metrics(metrics, self._num_samples)
        self._num_samples += 1

    def _log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        time_ms = now_ms()
        self._append(b"".join(metric_line(self._name, k, float(v), step, time_ms) for k, v in metrics.items()))
        if self._board:
            self._board.scalars(metrics, step, time_ms)

    def log_missing_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record those values of a step that the spool lacks: a run that was killed may not have told all."""
        told = {e.get("key") for e in self._spool.entries() if e["run"] == self._name and e.get("step") == step}
        self.log_metrics({key: value for key, value in metrics.items() if key not in told}, step)

    def log_params(self, params: Mapping[str, object]) -> None:
        """Record settings; MLflow keeps the first value of each name."""
        self._event("params", values={key: str(value) for key, value in params.items()})
        self._show_params(params)

    def _show_params(self, params: Mapping[str, object]) -> None:
        self._params = {key: str(value) for key, value in params.items()} | self._params
        if self._board and params:
            self._board.table("parameters", self._params, now_ms())

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Record tags; a later value replaces an earlier one."""
        self._event("tags", values={key: str(value) for key, value in tags.items()})

    def log_dataset(self, *, name: str, digest: str, context: str, profile: Mapping[str, int]) -> None:
        """Record which data the run used, as MLflow's "dataset": its name, a digest and counts, never where it lies.

        digest: at most 36 characters.  context: "training" or "testing".
        """
        self._event("dataset", name=name, digest=digest[:36], context=context, profile=dict(profile))

    def log_figure(self, figure: SavesFigure, name: str) -> Path:
        """Keep a figure as RUN/`name` (for example "plots/roc.png") and among MLflow's artifacts; returns its path.

        TensorBoard shows a PNG at the step of the metrics logged last.
        """
        kept = self.keep_figure(figure, name)
        self._event("artifact", file=str(kept.relative_to(self.folder)), name=name)
        return kept

    def keep_figure(self, figure: SavesFigure, name: str) -> Path:
        """The same without MLflow, which may be another machine: for figures that show people's faces."""
        path = self._place(name)
        part = path.with_name(f".{path.name}.part")
        figure.savefig(part, format=path.suffix.removeprefix(".") or "png")
        part.replace(path)
        if self._board:
            self._board.picture(path, name, self._step, now_ms())
        return path

    def log_graph(self, module: "nn.Module", example: "Tensor") -> None:
        """Show a network's graph, in evaluation, in TensorBoard; one that cannot be traced is left out with a log line.

        example: a batch that `module` takes, on its device.  The module stays as it is, and no random number is drawn.
        """
        if self._board:
            self._board.graph(module, example)

    def log_dict(self, content: object, name: str) -> Path:
        """Keep plain data as JSON, RUN/`name`, and among MLflow's artifacts; returns its path."""
        return self.log_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", name)

    def log_text(self, text: str, name: str) -> Path:
        """Keep a text as RUN/`name` and among MLflow's artifacts; returns its path."""
        path = self._place(name)
        part = path.with_name(f".{path.name}.part")
        part.write_text(text, encoding="utf-8")
        return self._log_kept(part, path, name)

    def log_file(self, path: Path, name: str) -> Path:
        """Put a file among MLflow's artifacts as `name`; one outside the run's folder is copied into it first."""
        if path.resolve().is_relative_to(self.folder.resolve()):
            self._event("artifact", file=str(path.resolve().relative_to(self.folder.resolve())), name=name)
            return path
        kept = self._place(name)
        part = kept.with_name(f".{kept.name}.part")
        shutil.copyfile(path, part)
        return self._log_kept(part, kept, name)

    def log_model(
        self, folder: Path, *, name: str, step: int, tags: Mapping[str, str], metrics: Mapping[str, float], people: str
    ) -> str:
        """Have a model that is kept in `folder`, below the run's, registered as `name`; returns the key of its version.

        metrics: linked to the model at `step`.  people: of a candidate for champion, their digest; else empty.
        """
        key = uuid.uuid4().hex
        told = {e.get("key"): e["time_ms"] for e in self._spool.entries() if self._is_mine(e) and e.get("step") == step}
        time_ms = now_ms()
        # With the time of the run's own point, MLflow draws it once.
        linked = [[k, str(float(v)), told.get(k, time_ms)] for k, v in metrics.items()]
        place = str(folder.relative_to(self.folder))
        fields = {"model_key": key, "name": name, "step": step, "tags": dict(tags), "metrics": linked, "people": people}
        self._event("model", folder=place, **fields)
        return key

    def version_of(self, key: str) -> str:
        """The registered version of a model that `log_model` gave this key; empty while MLflow has not taken it."""
        return self._sender.version(key) if self._sender else ""

    def _is_mine(self, entry: Mapping[str, object]) -> bool:
        return entry["run"] == self._name and "event" not in entry

    def child(self, run_name: str, tags: Mapping[str, str]) -> "TrackedRun":
        """A nested run, for example one client's; asking for the same name again gives the same run.

        It has this run's first tags, with `tags` over them.
        """
        if self._name:
            raise ValueError(f"run {self._name!r} is nested already")
        if run_name not in self._children:
            nested = TrackedRun(
                folder=self.folder,
                spool=self._spool,
                sender=self._sender,
                board=self._board.child(run_name) if self._board else None,
                name=run_name,
                uri=self.uri,
            )
            nested.start(self._experiment, run_name, {**self._tags, **tags}, {})
            self._children[run_name] = nested
        return self._children[run_name]

    def start(self, experiment: str, run_name: str, tags: Mapping[str, str], params: Mapping[str, object]) -> None:
        """Record that the run begins, or goes on (called by `open_run` and `child`)."""
        self._experiment = experiment
        self._tags = dict(tags)
        key = self._sender.run_key if self._sender else uuid.uuid4().hex
        self._event(
            "start",
            run_key=key,
            experiment=experiment,
            name=run_name,
            tags={key: str(value) for key, value in tags.items()},
            params={key: str(value) for key, value in params.items()},
        )
        self._show_params(params)

    def before_finish(self, close: Callable[[], None]) -> None:
        """Have `close` called at the beginning of `finish`, while the run still takes records."""
        self._before_finish.append(close)

    def flush(self, timeout_s: float) -> bool:
        """Wait until MLflow has everything; False when tracking is off, the server is away or the time is up."""
        return self._sender is not None and self._sender.flush(timeout_s)

    def finish(self, status: str, timeout_s: float = FINISH_TIMEOUT_S) -> None:
        """End the run (and its nested runs) as "FINISHED", "FAILED" or "KILLED" and send the rest, within bounds.

        What cannot be sent stays in the spool, with one warning.  A second call does nothing.
        """
        if self._finished:
            return
        while self._before_finish:
            self._before_finish.pop()()
        for nested in self._children.values():
            nested.finish(status)
        self._event("finish", status=status)
        self._finished = True
        if self._board:
            self._board.close()
        if self._name:
            return
        if self._sender and not self._sender.close(timeout_s):
            _log.warning(
                "Tracking: %d bytes of %s are not at %s; the record is whole in that file.",
                self._sender.unsent_bytes,
                self._spool.path,
                shown_uri(self.uri),
            )
        self._spool.close()

    def _place(self, name: str) -> Path:
        """Where an artifact lies in the run's folder; a nested run's in a folder of its name, plots/celeba/roc.png."""
        target = PurePosixPath(name)
        if target.is_absolute() or ".." in target.parts:
            raise ValueError(f"artifact name {name!r} leaves the run's folder")
        path = self.folder / target.parent / self._name / target.name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _log_kept(self, part: Path, path: Path, name: str) -> Path:
        part.replace(path)
        self._event("artifact", file=str(path.relative_to(self.folder)), name=name)
        return path

    def _event(self, event: str, **fields: object) -> None:
        self._append(event_line(self._name, event, now_ms(), fields))

    def _append(self, lines: bytes) -> None:
        if self._finished:
            raise RuntimeError(f"run {self._name or self.folder.name!r} has finished")
        self._spool.append(lines)
        if self._sender:
            self._sender.wake()


@contextlib.contextmanager
def finishing(run: TrackedRun) -> Iterator[None]:
    """Finish the run when the block ends: as "FINISHED", after Ctrl-C or SIGTERM as "KILLED", else as "FAILED"."""
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        run.finish(status)


def open_run(
    tracking: TrackingSettings,
    *,
    uri: str,
    folder: Path,
    experiment: str,
    run_name: str,
    tags: Mapping[str, str],
    params: Mapping[str, object],
    resume_run_id: str = "",
) -> TrackedRun:
    """Begin (or go on with) the record of a run.

    uri: from `resolve_uri`.  folder: the run's folder; a spool in it is continued, and so are its TensorBoard events,
    in a folder of the same name below `tracking.tensorboard`.  experiment: made where missing.
    resume_run_id: MLflow's id to go on with; empty for a new run, or for what the folder itself knows.
    Imports MLflow (seconds) when tracking is enabled, so that no other thread has to; the server is asked later.
    """
    spool = Spool(folder)
    sender = _sender(spool, uri, folder, resume_run_id) if tracking.enabled else None
    board = None if tracking.tensorboard == OFF else Board(Path(tracking.tensorboard) / folder.name)
    run = TrackedRun(folder=folder, spool=spool, sender=sender, board=board, name="", uri=uri if sender else "")
    run.start(experiment, run_name, tags, params)
    if sender:
        sender.start()
    return run


def _sender(spool: Spool, uri: str, folder: Path, resume_run_id: str) -> Sender:
    quieten()
    sent = load_sent(folder, shown_uri(uri))
    if resume_run_id and sent.run_ids.get("") != resume_run_id:
        sent.forget()
        sent.run_ids[""] = resume_run_id
    save_sent(folder, sent)  # its key finds the run again, should we be killed right after its creation
    return Sender(spool, sent, partial(_connect, uri, folder, sent), uri)


def _connect(uri: str, folder: Path, sent: Sent) -> Send:
    database = sqlite_path(uri)
    if database:
        database.parent.mkdir(parents=True, exist_ok=True)
    return Delivery(uri, folder, sent).send
