"""What a program tells of its run: values, files and models, for the run's folder, MLflow and TensorBoard.

Each call writes to the run's folder first.  Nothing here waits for a server or raises because of one, or because of a
full disk: what could not be kept is told once, and the tags `missing_artifacts` and `lost_records` name it.
"""

import contextlib
import json
import logging
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common.redact import shown_uri
from common.system.files import bring_to_disk
from common.tracking.notes import NOTE_TAG
from common.tracking.sender import Sender
from common.tracking.spool import KeptFiles, SavesFigure, Spool, event_line, metric_line, now_ms
from common.tracking.tensorboard import Board

if TYPE_CHECKING:
    from torch import Tensor, nn

MISSING_TAG = "missing_artifacts"  # names of what could not be written
LOST_TAG = "lost_records"  # number of the spool's lines that could not be written
FINISH_TIMEOUT_S = 120.0  # a new sqlite database alone takes 5 to 40 s on a busy machine

Beside = Callable[[Mapping[str, float]], Mapping[str, float]]

_log = logging.getLogger("facefed.tracking")


def nothing_beside(_metrics: Mapping[str, float]) -> Mapping[str, float]:
    """No value has a second name."""
    return {}


class TrackedRun:
    """A run, or a nested run of it: hides where its record goes (folder, MLflow, TensorBoard), and whether one is away.

    Its methods are what a run can tell (`log_*`, `keep_figure`, `set_tags`), its beginning, end and nested runs.
    """

    def __init__(
        self,
        *,
        folder: Path,
        spool: Spool,
        sender: Sender | None,
        board: Board | None,
        name: str,
        uri: str,
        beside: Beside = nothing_beside,
    ) -> None:
        """Use `open_run` and `child`.  name: "" for the run itself, else the nested run's name in the spool.

        beside: of metrics by name, the values that are recorded under other names as well.
        """
        self.folder = folder
        self.uri = uri
        self._spool = spool
        self._sender = sender
        self._board = board
        self._name = name
        self._beside = beside
        self._files = KeptFiles(folder, name)
        self._params: dict[str, str] = {}
        self._description: dict[str, str] = {}
        self._step = 0  # the latest, under which pictures are shown
        self._num_samples = 0  # of the machine
        self._before_finish: list[Callable[[], None]] = []
        self._children: dict[str, TrackedRun] = {}
        self._finished = False
        self._told: frozenset[tuple[str, str, int]] = frozenset()  # (run, metric, step) of a run that goes on

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
        metrics = {**metrics, **self._beside(metrics)}
        if self._told:
            metrics = {key: value for key, value in metrics.items() if (self._name, key, step) not in self._told}
        time_ms = now_ms()
        self._append(b"".join(metric_line(self._name, k, float(v), step, time_ms) for k, v in metrics.items()))
        if self._board:
            self._board.scalars(metrics, step, time_ms)

    def skip_what_was_told(self) -> None:
        """Take no value of a metric and step that the spool has already: a run that goes on repeats some work."""
        self._told = frozenset((e["run"], e["key"], e["step"]) for e in self._spool.entries() if "key" in e)

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

    def describe(self, **parts: str) -> None:
        """Say in the run's description what it is, which data it used, what came of it; one said before is replaced.

        parts: sentences by a name of their own; they stand in the order in which they were first given.
        """
        self._description |= parts
        self.set_tags({NOTE_TAG: "\n\n".join(part for part in self._description.values() if part)})

    def described(self, part: str) -> str:
        """A part of the run's description; "" where nothing was said."""
        return self._description.get(part, "")

    def log_dataset(self, *, name: str, digest: str, context: str, profile: Mapping[str, int]) -> None:
        """Record which data the run used, as MLflow's "dataset": its name, a digest and counts, never where it lies.

        digest: at most 36 characters.  context: "training" or "testing".
        """
        self._event("dataset", name=name, digest=digest[:36], context=context, profile=dict(profile))

    def log_figure(self, figure: SavesFigure, name: str) -> Path:
        """Keep a figure as RUN/`name` (for example "plots/roc.png") and among MLflow's artifacts; returns its path.

        TensorBoard shows a PNG at the step of the metrics logged last.
        """
        if self._keep_picture(figure, name):
            self._tell_artifact(name)
        return self._files.place(name)

    def keep_figure(self, figure: SavesFigure, name: str) -> Path:
        """The same without MLflow, which may be another machine: for figures that show people's faces."""
        self._keep_picture(figure, name)
        return self._files.place(name)

    def _keep_picture(self, figure: SavesFigure, name: str) -> bool:
        path = self._files.place(name)
        is_kept = self._keep(name, partial(figure.savefig, format=path.suffix.removeprefix(".") or "png"))
        if is_kept and self._board:
            self._board.picture(path, name, self._step, now_ms())
        return is_kept

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
        if self._keep(name, lambda part: part.write_text(text, encoding="utf-8")):
            self._tell_artifact(name)
        return self._files.place(name)

    def log_file(self, path: Path, name: str) -> Path:
        """Put a file among MLflow's artifacts as `name`; one outside the run's folder is copied into it first."""
        if path.resolve().is_relative_to(self.folder.resolve()):
            with contextlib.suppress(OSError):
                bring_to_disk(path)
            self._event("artifact", file=str(path.resolve().relative_to(self.folder.resolve())), name=name)
            return path
        content = path.read_bytes()
        if self._keep(name, lambda part: part.write_bytes(content)):
            self._tell_artifact(name)
        return self._files.place(name)

    def log_model(
        self,
        folder: Path,
        *,
        name: str,
        step: int,
        tags: Mapping[str, str],
        metrics: Mapping[str, float],
        people: str,
        note: str = "",
        about: str = "",
    ) -> str:
        """Have a model that is kept in `folder`, below the run's, registered as `name`; returns the key of its version.

        metrics: linked to the model at `step`.  people: of a candidate for champion, their digest; else empty.
        note, about: descriptions of the version, and of all of that name.
        """
        key = uuid.uuid4().hex
        mine = [e for e in self._spool.entries() if self._is_mine(e) and e.get("step") == step]
        told = {e["key"]: [str(float(e["value"])), e["time_ms"]] for e in mine}
        # With the value and time of the run's own point MLflow has it once; a repeated round measures some anew.
        linked = [[k, *told.get(k, [str(float(v)), now_ms()])] for k, v in metrics.items()]
        for file in folder.rglob("*"):
            with contextlib.suppress(OSError):
                bring_to_disk(file)
        place = str(folder.relative_to(self.folder))
        fields = {"model_key": key, "name": name, "step": step, "tags": dict(tags), "metrics": linked, "people": people}
        self._event("model", folder=place, note=note, about=about, **fields)
        return key

    def version_of(self, key: str) -> str:
        """The registered version of a model that `log_model` gave this key; empty while MLflow has not taken it."""
        return self._sender.version(key) if self._sender else ""

    def verdict_on(self, key: str) -> str:
        """Whether that version is the champion now, in words; empty where it was no candidate, or is not taken yet."""
        return self._sender.verdict(key) if self._sender else ""

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
            nested._told = self._told
            nested.start(self._experiment, run_name, {**self._tags, **tags}, {}, self._about)
            self._children[run_name] = nested
        return self._children[run_name]

    def start(
        self, experiment: str, run_name: str, tags: Mapping[str, str], params: Mapping[str, object], about: str
    ) -> None:
        """Record that the run begins, or goes on (called by `open_run` and `child`)."""
        self._experiment, self._about = experiment, about
        self._tags = dict(tags)
        key = self._sender.run_key if self._sender else uuid.uuid4().hex
        self._event(
            "start",
            run_key=key,
            experiment=experiment,
            about=about,
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

    def pause(self) -> None:
        """Stop recording without an end of the run, which goes on when its folder is opened again.

        For a run that is kept in its folder alone: raises ValueError for one that goes to MLflow, or is nested.
        """
        if self._name or self._sender:
            raise ValueError(f"run {self.folder.name!r} is nested or goes to MLflow; finish it")
        while self._before_finish:
            self._before_finish.pop()()
        self._finished = True
        if self._board:
            self._board.close()
        self._spool.close()

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
        self._tag_missing()  # again: a disk that was full may have taken no line either
        self._event("finish", status=status)
        self._finished = True
        if self._board:
            self._board.close()
        if self._name:
            return
        if self._sender and not self._sender.close(timeout_s):
            unsent = self._sender.backlog()
            _log.warning(
                "Tracking: %d records and %d files of %s are not at %s; the record is whole in that folder, and"
                " `facefed tracking sync` sends it.",
                unsent.num_records,
                unsent.num_files,
                self.folder,
                shown_uri(self.uri),
            )
        self._spool.close()

    def _keep(self, name: str, write: Callable[[Path], object]) -> bool:
        before = dict(self._files.missing)
        is_kept = self._files.write(name, write)
        if self._files.missing != before:
            self._tag_missing()
        return is_kept

    def _tell_artifact(self, name: str) -> None:
        self._event("artifact", file=str(self._files.place(name).relative_to(self.folder)), name=name)

    def _tag_missing(self) -> None:
        """Say in the record what a full disk took from it."""
        tags = {MISSING_TAG: ", ".join(self._files.missing)} if self._files.missing else {}
        if self._spool.num_lost and not self._name:
            tags[LOST_TAG] = str(self._spool.num_lost)
        if tags:
            self.set_tags(tags)

    def _event(self, event: str, **fields: object) -> None:
        self._append(event_line(self._name, event, now_ms(), fields))

    def _append(self, lines: bytes) -> None:
        if self._finished:
            raise RuntimeError(f"run {self._name or self.folder.name!r} has finished")
        self._spool.append(lines)
        if self._sender:
            self._sender.wake()
