"""Brings offline runs of Weights & Biases into MLflow, without the wandb package and without its cloud.

A run is found again by its tag RUN_TAG, and a tag for each log says how far it was read: importing again adds nothing,
and a log that has grown adds what is new.  An import that is cut off is simply repeated: MLflow keeps equal points
once.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple, TextIO

from common.errors import TrackingError
from common.redact import shown_uri
from common.tracking.address import sqlite_path
from common.tracking.delivery import METRICS_PER_CALL, NAMES_PER_CALL, NONFINITE_TAG, quieten
from common.tracking.experiments import experiment_id
from common.tracking.sender import short_reason
from common.tracking.stores import open_client
from common.tracking.wandb_file import Damage
from common.tracking.wandb_mapping import (
    FILES_ABOUT_PEOPLE,
    METADATA_FILE,
    Apart,
    Names,
    Point,
    apart_line,
    final_points,
    is_infinite,
    nearest_name,
    of_the_machine,
    params_of,
    plain,
    run_name,
    split_row,
    tags_of,
)
from common.tracking.wandb_records import RunFacts, is_number, read_history

RUN_TAG: Final = "facefed.wandb_run"  # `run_name` of it
READ_TAG: Final = (
    "facefed.wandb_read"  # .<the log's folder>: bytes read without damage, bytes in all, its files' digest
)
NO_PROJECT: Final = "uncategorized"  # as wandb itself calls it

_log = logging.getLogger("facefed.tracking")


class Imported(NamedTuple):
    """What became of one log."""

    log: Path
    name: str  # `run_name` of it
    experiment: str
    mlflow_run_id: str
    num_points: int  # metric points sent; 0 when there was nothing new
    num_params: int
    num_files: int
    num_apart: int  # logged values that are no metrics, kept in an artifact
    damages: tuple[Damage, ...]
    not_carried: Mapping[str, int]


class Importer:
    """Sends logs to one MLflow server or database."""

    def __init__(self, uri: str, experiment: str) -> None:
        """uri: from `resolve_uri`.  experiment: made where missing; empty for each run's own wandb project."""
        quieten()
        self._uri = uri
        self._experiment = experiment
        database = sqlite_path(uri)
        if database:
            database.parent.mkdir(parents=True, exist_ok=True)
        with self._one_line():
            self._client = open_client(uri)

    def send(self, log: Path, facts: RunFacts) -> Imported:
        """Send what of a log MLflow has not.  facts: from `read_facts`.  Raises TrackingError: MLflow takes nothing."""
        with self._one_line():
            return self._send(log, facts)

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            reason = short_reason(error)
            raise TrackingError(
                f"MLflow at {shown_uri(self._uri)} does not take the runs: {reason}; "
                "`facefed tracking doctor` tells more; then import again: what it has is not sent twice."
            ) from error

    def _send(self, log: Path, facts: RunFacts) -> Imported:
        project = facts.project or NO_PROJECT
        # Names from the file go into filters and paths.
        name = run_name(facts.entity, project, facts.run_id)
        experiment = self._experiment or nearest_name(project)
        run_id, tags = self._find_or_create(experiment, name, facts)
        source = _source(log)
        read_tag = nearest_name(f"{READ_TAG}.{source}")
        files = dict(_files_of(log))
        state = f"{facts.sound_end} {facts.end} {_digest(files)}"
        before = tags.get(read_tag, "")
        if before == state:
            return self._imported(log, name, experiment, run_id, facts)
        params = self._send_params(run_id, params_of(facts, Names()))
        self._log(run_id, "tags", _tags(tags_of(facts)))
        with tempfile.TemporaryDirectory() as folder:
            kept = Path(folder)
            points, apart = self._send_history(log, facts, run_id, int(before.partition(" ")[0] or 0), kept)
            _keep(kept / "config.json", facts.config)
            _keep(kept / "summary.json", facts.summary)
            _keep_metadata(kept / "metadata.json", log.parent / "files" / METADATA_FILE)
            self._client.log_artifacts(run_id, str(kept), f"wandb/{source}")
        for target, path in files.items():
            self._send_file(run_id, target, path)
        self._end(log, facts, run_id)
        self._log(run_id, "tags", _tags({read_tag: state}))  # last: only now it is all there
        done = self._imported(log, name, experiment, run_id, facts)
        return done._replace(num_points=points, num_params=params, num_files=len(files), num_apart=apart)

    @staticmethod
    def _imported(log: Path, name: str, experiment: str, run_id: str, facts: RunFacts) -> Imported:
        return Imported(log, name, experiment, run_id, 0, 0, 0, 0, tuple(facts.damages), facts.not_carried)

    # -- the run ---------------------------------------------------------------------------------------------------

    def _find_or_create(self, experiment: str, name: str, facts: RunFacts) -> tuple[str, Mapping[str, str]]:
        """MLflow's id and tags of the run."""
        number = experiment_id(self._client, self._uri, experiment, Path.cwd())
        found = self._client.search_runs([number], f"tags.`{RUN_TAG}` = '{name}'", max_results=1)
        if found:
            return found[0].info.run_id, found[0].data.tags
        tags = {RUN_TAG: name}
        made = self._client.create_run(
            number, start_time=facts.start_ms or None, tags=tags, run_name=facts.name or facts.run_id
        )
        return made.info.run_id, tags

    def _end(self, log: Path, facts: RunFacts, run_id: str) -> None:
        """A run whose end the log does not tell was stopped, as far as anybody knows."""
        status = "KILLED" if facts.exit_code is None else "FINISHED" if facts.exit_code == 0 else "FAILED"
        stamp = facts.summary.get("_timestamp")
        end_ms = int(stamp * 1000) if is_number(stamp) else int(log.stat().st_mtime * 1000)
        self._client.set_terminated(run_id, status=status, end_time=max(end_ms, facts.start_ms))

    # -- values ----------------------------------------------------------------------------------------------------

    def _send_history(self, log: Path, facts: RunFacts, run_id: str, read_to: int, kept: Path) -> tuple[int, int]:
        """Send the points that begin at `read_to` or behind, and the summary's; how many, and how many kept apart."""
        names, last, infinite = Names(), dict[str, Point](), set[str]()
        num_apart = step = 0
        time_ms = facts.start_ms

        def new_points(lines: TextIO) -> Iterator[Point]:
            nonlocal num_apart, step, time_ms
            for row in read_history(log, facts.start_ms):
                step, time_ms = row.step, row.time_ms
                for value in split_row(row, names):
                    if isinstance(value, Apart):
                        num_apart += 1
                        lines.write(apart_line(value))
                        infinite.update([value.key] if is_infinite(value.value) else [])
                        continue
                    last[value.key] = value
                    if row.offset >= read_to:
                        yield value
            if read_to < facts.end:
                whole = facts.exit_code is not None and not facts.damages
                yield from final_points(facts.summary, last, names, step, time_ms, whole=whole)

        with (kept / "no_metrics.jsonl").open("w", encoding="utf-8") as lines:
            count = self._send_points(run_id, new_points(lines))
        if names.changed():
            _keep(kept / "renamed.json", names.changed())
        if infinite:
            self._log(run_id, "tags", _tags({NONFINITE_TAG: ", ".join(sorted(infinite))}))
        return count, num_apart

    def _send_points(self, run_id: str, points: Iterable[Point]) -> int:
        from mlflow.entities import Metric

        count = 0
        for block in _blocks(points, METRICS_PER_CALL):
            metrics = [Metric(point.key, point.value, point.time_ms, point.step) for point in block]
            self._client.log_batch(run_id, metrics=metrics, synchronous=True)
            count += len(block)
        return count

    def _send_params(self, run_id: str, params: Mapping[str, str]) -> int:
        """MLflow keeps the first value of each; one that has changed since is told, and kept in the artifact."""
        from mlflow.entities import Param

        known = self._client.get_run(run_id).data.params
        for key in (key for key, value in params.items() if known.get(key, value) != value):
            _log.warning(
                "Import: %s = %r was %r when the run was first imported; MLflow keeps that one, config.json has this.",
                key,
                params[key],
                known[key],
            )
        new = [Param(key, value) for key, value in params.items() if key not in known]
        self._log(run_id, "params", new)
        return len(new)

    def _send_file(self, run_id: str, target: str, path: Path) -> None:
        from mlflow.exceptions import MlflowException

        folder = PurePosixPath(target).parent
        try:
            self._client.log_artifact(run_id, str(path), None if str(folder) == "." else str(folder))
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            _log.warning("Import: MLflow takes no file %r (%s); it is left out.", target, short_reason(error))

    def _log(self, run_id: str, kind: str, items: Sequence[object]) -> None:
        for block in _blocks(items, NAMES_PER_CALL):
            self._client.log_batch(run_id, **{kind: block}, synchronous=True)


def _tags(values: Mapping[str, str]) -> list[Any]:
    from mlflow.entities import RunTag

    return [RunTag(key, value) for key, value in values.items()]


def _blocks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while block := list(itertools.islice(rest, size)):
        yield block


def _source(log: Path) -> str:
    """Names the log among those of a run that was resumed: wandb's folder for it, else the file."""
    return log.parent.name if "run-" in log.parent.name else log.stem


def _files_of(log: Path) -> Iterator[tuple[str, Path]]:
    """The run's files by their place among the artifacts; a link of wandb's that leads nowhere is told.

    Not wandb's own files that say who trained it, on which host and in which folders.
    """
    folder = log.parent / "files"
    for place, _, names in os.walk(folder):
        for path in sorted(Path(place) / name for name in names):
            if path.parent == folder and path.name in FILES_ABOUT_PEOPLE:
                continue
            if path.is_file():
                yield path.relative_to(folder).as_posix(), path
            else:
                _log.warning("Import: %s leads to a file that is gone; it is left out.", path)


def _digest(files: Mapping[str, Path]) -> str:
    """Tells whether any file is new or another one than before, from names, sizes and times."""
    seen = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in sorted(files.items())]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]


def _keep_metadata(path: Path, source: Path) -> None:
    try:
        found = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # none, or damaged
        return
    _keep(path, of_the_machine(found))


def _keep(path: Path, content: object) -> None:
    path.write_text(json.dumps(plain(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
