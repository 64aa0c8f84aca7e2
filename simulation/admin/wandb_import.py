"""Sends offline runs of Weights & Biases to MLflow, without the wandb package and without its cloud.

What becomes what stands in `wandb_values`, where the runs and their files lie in `wandb_folders`; all that was logged
and is no metric is kept as an artifact.

A run is found again by its tag RUN_TAG, and a tag for each log says how far it was read: importing again adds nothing,
and a log that has grown adds what is new.  An import that is cut off is simply repeated: MLflow keeps equal points
once.
"""

import contextlib
import itertools
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple, TextIO

from common.errors import EXIT_DONE, TrackingError, escaped
from common.redact import shown_uri
from common.tracking.delivery import (
    METRICS_PER_CALL,
    NAMES_PER_CALL,
    NONFINITE_TAG,
    experiment_id,
    open_client,
    quieten,
)
from common.tracking.sender import short_reason
from simulation.admin.wandb_folders import METADATA_FILE, digest_of, files_of, find_logs, is_below
from simulation.admin.wandb_log import CUT_SHORT, Damage, RunFacts, is_number, read_facts, read_history
from simulation.admin.wandb_values import (
    SUMMARY_PREFIX,
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
    steps_of,
    tags_of,
)

RUN_TAG: Final = "facefed.wandb_run"  # `run_name` of it
READ_TAG: Final = (
    "facefed.wandb_read"  # .<the log's folder>: bytes read without damage, bytes in all, its files' digest
)
DOUBLED_TAG: Final = "facefed.wandb_doubled"  # the log that brought points beside those of another log
NO_PROJECT: Final = "uncategorized"  # as wandb itself calls it
MOST_TOLD: Final = 5  # of the files that were left out

_log = logging.getLogger("facefed.tracking")

Steps = Mapping[str, set[int]]  # of each metric


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
    num_replaced: int  # points that were left out for those of the same step in a later log of the run
    num_doubled: int  # points at steps that the run has already, from a log that was imported by itself
    former: str  # the id of MLflow's run that this one stands in for, which is deleted there; "" where there was none
    outside: tuple[str, ...]  # files that were left out: links that lead out of the run's folder
    damages: tuple[Damage, ...]
    not_carried: Mapping[str, int]


class Importer:
    """Sends logs to one MLflow server or database."""

    def __init__(self, uri: str, experiment: str, *, follow_links: bool = False) -> None:
        """uri: from `resolve_uri`.  experiment: made where missing; empty for each run's own wandb project.

        follow_links: take also files that lie elsewhere, and are in the run's folder by a link.
        """
        quieten()
        self._uri = uri
        self._experiment = experiment
        self._follow_links = follow_links
        with self._one_line():
            self._client = open_client(uri)

    def send_run(self, logs: Mapping[Path, RunFacts]) -> Iterator[Imported]:
        """`send` the logs of a run that was resumed offline, as one curve: at equal steps the later log's value wins.

        logs: in order of time.  Where MLflow has values of an earlier log that a later one replaces, the run is
        imported afresh: MLflow takes no value back.
        """
        steps = {log: steps_of(log, facts) for log, facts in logs.items()} if len(logs) > 1 else {}
        order = list(logs)
        later = {
            log: _merged(steps[other] for other in order[number + 1 :] if _source(other) != _source(log))
            for number, log in enumerate(order)
            if steps
        }
        with self._one_line():
            former = self._give_way(logs, steps)
        for log, facts in logs.items():
            done = self.send(log, facts, later.get(log, {}))
            yield done._replace(former=former)
            former = ""

    def _give_way(self, logs: Mapping[Path, RunFacts], steps: Mapping[Path, Steps]) -> str:
        """Delete MLflow's run where it has points that a later log replaces now; returns its id, or ""."""
        if not steps:
            return ""
        facts = next(iter(logs.values()))
        project = facts.project or NO_PROJECT
        found = self._find(self._experiment or nearest_name(project), run_name(facts.entity, project, facts.run_id))
        if found is None:
            return ""
        run_id, tags = found
        sent = dict[str, set[int]]()
        for log, facts in logs.items():
            read = _read_to(tags, log)
            if DOUBLED_TAG in tags or _num_shared(sent, steps_of(log, facts, read) if read else steps[log]):
                self._client.delete_run(run_id)
                return run_id
            if read:
                sent = _merged([sent, steps[log]])
        return ""

    def send(self, log: Path, facts: RunFacts, later: Steps | None = None) -> Imported:
        """Send what of a log MLflow has not.  facts: from `read_facts`.  Raises TrackingError: MLflow takes nothing.

        later: the steps of each metric in later logs of the run, whose values stand there instead.
        """
        with self._one_line():
            return self._send(log, facts, later or {})

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

    def _send(self, log: Path, facts: RunFacts, later: Steps) -> Imported:
        project = facts.project or NO_PROJECT
        # Names from the file go into filters and paths.
        name = run_name(facts.entity, project, facts.run_id)
        experiment = self._experiment or nearest_name(project)
        run_id, tags = self._find_or_create(experiment, name, facts)
        source = _source(log)
        read_tag = nearest_name(f"{READ_TAG}.{source}")
        files, outside = files_of(log, follow_links=self._follow_links)
        state = f"{facts.sound_end} {facts.end} {digest_of(files)}"
        before = tags.get(read_tag, "")
        if before == state:
            return self._imported(log, name, experiment, run_id, facts)._replace(outside=outside)
        read_to = _read_to(tags, log)
        doubled = self._num_doubled(run_id, log, facts, tags, read_to)
        if doubled:
            self._log(run_id, "tags", _tags({DOUBLED_TAG: source}))
        params = self._send_params(run_id, params_of(facts, Names()))
        self._log(run_id, "tags", _tags(tags_of(facts)))
        with tempfile.TemporaryDirectory() as folder:
            kept = Path(folder)
            points, apart, replaced = self._send_history(log, facts, run_id, read_to, kept, later)
            _keep(kept / "config.json", facts.config)
            _keep(kept / "summary.json", facts.summary)
            metadata = log.parent / "files" / METADATA_FILE
            if self._follow_links or is_below(metadata, log.parent):
                _keep_metadata(kept / "metadata.json", metadata)
            self._client.log_artifacts(run_id, str(kept), f"wandb/{source}")
        for target, path in files.items():
            self._send_file(run_id, target, path)
        self._end(log, facts, run_id)
        self._log(run_id, "tags", _tags({read_tag: state}))  # last: only now it is all there
        done = self._imported(log, name, experiment, run_id, facts)
        return done._replace(
            num_points=points, num_params=params, num_files=len(files), num_apart=apart, outside=outside,
            num_replaced=replaced, num_doubled=doubled,
        )  # fmt: skip

    @staticmethod
    def _imported(log: Path, name: str, experiment: str, run_id: str, facts: RunFacts) -> Imported:
        return Imported(
            log, name, experiment, run_id, 0, 0, 0, 0, 0, 0, "", (), tuple(facts.damages), facts.not_carried
        )

    # -- the run ---------------------------------------------------------------------------------------------------

    def _find_or_create(self, experiment: str, name: str, facts: RunFacts) -> tuple[str, Mapping[str, str]]:
        """MLflow's id and tags of the run."""
        number = experiment_id(self._client, self._uri, experiment, Path.cwd())
        if found := self._find(experiment, name):
            return found
        tags = {RUN_TAG: name}
        made = self._client.create_run(
            number, start_time=facts.start_ms or None, tags=tags, run_name=facts.name or facts.run_id
        )
        return made.info.run_id, tags

    def _find(self, experiment: str, name: str) -> tuple[str, Mapping[str, str]] | None:
        number = experiment_id(self._client, self._uri, experiment, Path.cwd())
        found = self._client.search_runs([number], f"tags.`{RUN_TAG}` = '{name}'", max_results=1)
        return (found[0].info.run_id, found[0].data.tags) if found else None

    def _num_doubled(self, run_id: str, log: Path, facts: RunFacts, tags: Mapping[str, str], read_to: int) -> int:
        """New points of a log at steps where MLflow has another's, of a log of this run that was imported before it."""
        own = nearest_name(f"{READ_TAG}.{_source(log)}")
        if not any(tag.startswith(f"{READ_TAG}.") and tag != own for tag in tags):
            return 0
        number = 0
        for key, steps in steps_of(log, facts, read_to).items():
            number += len(steps & {point.step for point in self._client.get_metric_history(run_id, key)})
        return number

    def _end(self, log: Path, facts: RunFacts, run_id: str) -> None:
        """A run whose end the log does not tell was stopped, as far as anybody knows."""
        status = "KILLED" if facts.exit_code is None else "FINISHED" if facts.exit_code == 0 else "FAILED"
        stamp = facts.summary.get("_timestamp")
        end_ms = int(stamp * 1000) if is_number(stamp) else int(log.stat().st_mtime * 1000)
        self._client.set_terminated(run_id, status=status, end_time=max(end_ms, facts.start_ms))

    # -- values ----------------------------------------------------------------------------------------------------

    def _send_history(
        self, log: Path, facts: RunFacts, run_id: str, read_to: int, kept: Path, later: Steps
    ) -> tuple[int, int, int]:
        """Send the points that begin at `read_to` or behind, and the summary's, but for those that `later` has.

        Returns how many, how many values were kept apart, and how many points a later log replaces.
        """
        names, last, infinite = Names(), dict[str, Point](), set[str]()
        num_apart = num_replaced = step = 0
        time_ms = facts.start_ms

        def new_points(lines: TextIO) -> Iterator[Point]:
            nonlocal num_apart, num_replaced, step, time_ms
            for row in read_history(log, facts.start_ms):
                step, time_ms = row.step, row.time_ms
                for value in split_row(row, names):
                    if isinstance(value, Apart):
                        num_apart += 1
                        lines.write(apart_line(value))
                        infinite.update([value.key] if is_infinite(value.value) else [])
                        continue
                    last[value.key] = value
                    if value.step in later.get(value.key, ()):
                        num_replaced += 1
                    elif row.offset >= read_to:
                        yield value
            if read_to < facts.end:
                whole = facts.exit_code is not None and not facts.damages
                final = final_points(facts.summary, last, names, step, time_ms, whole=whole)
                yield from (point for point in final if point.key.removeprefix(SUMMARY_PREFIX) not in later)

        with (kept / "no_metrics.jsonl").open("w", encoding="utf-8") as lines:
            count = self._send_points(run_id, new_points(lines))
        if names.changed():
            _keep(kept / "renamed.json", names.changed())
        if infinite:
            self._log(run_id, "tags", _tags({NONFINITE_TAG: ", ".join(sorted(infinite))}))
        return count, num_apart, num_replaced

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


def _merged(parts: Iterable[Steps]) -> dict[str, set[int]]:
    merged = dict[str, set[int]]()
    for part in parts:
        for key, steps in part.items():
            merged.setdefault(key, set()).update(steps)
    return merged


def _num_shared(one: Steps, other: Steps) -> int:
    return sum(len(steps & other.get(key, set())) for key, steps in one.items())


def _read_to(tags: Mapping[str, str], log: Path) -> int:
    """Bytes of a log that an earlier import has read."""
    return int(tags.get(nearest_name(f"{READ_TAG}.{_source(log)}"), "").partition(" ")[0] or 0)


def _source(log: Path) -> str:
    """Names the log among those of a run that was resumed: wandb's folder for it, else the file."""
    return log.parent.name if "run-" in log.parent.name else log.stem


def _keep_metadata(path: Path, source: Path) -> None:
    try:
        found = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # none, or damaged
        return
    _keep(path, of_the_machine(found))


def _keep(path: Path, content: object) -> None:
    path.write_text(json.dumps(plain(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# -- all runs below folders --------------------------------------------------------------------------------------------


def import_folders(
    folders: Sequence[str], uri: str, experiment: str, out: TextIO, err: TextIO, *, follow_links: bool = False
) -> int:
    """Import every offline run of `folders` and say so, a line each; returns the exit code.

    uri: from `resolve_uri`.  experiment: empty for each run's own wandb project.  follow_links: also what a link leads
    to outside of those folders.  A file that is none does not keep the others back.  Raises TrackingError: nothing
    found, MLflow does not take them, or at the end how many were refused.
    """
    logs, refused = find_logs((Path(folder) for folder in folders), follow_links=follow_links)
    num_logs = len(logs) + len(refused)
    found = dict[Path, RunFacts]()
    for log in logs:
        try:
            found[log] = read_facts(log)
        except TrackingError as error:
            refused.append(str(error))
    if num_logs == 1 and refused:
        raise TrackingError(refused[0])
    importer = Importer(uri, experiment, follow_links=follow_links)
    runs = dict[str, dict[Path, RunFacts]]()
    for log, facts in sorted(found.items(), key=lambda one: one[1].start_ms):
        runs.setdefault(run_name(facts.entity, facts.project or NO_PROJECT, facts.run_id), {})[log] = facts
    for logs_of_run in runs.values():
        for done in importer.send_run(logs_of_run):
            out.writelines(f"{escaped(line)}\n" for line in _report(done))
            out.flush()
    if refused:
        err.writelines(f"{escaped(line)}\n" for line in refused)
        raise TrackingError(f"{len(refused)} of {num_logs} files could not be read; the others are imported.")
    return EXIT_DONE


def _report(done: Imported) -> Iterator[str]:
    place = f"{done.name} -> experiment {done.experiment}, run {done.mlflow_run_id}"
    if done.num_points or done.num_params or done.num_files:
        yield f"{place}: {done.num_points:,} points, {done.num_params:,} params, {done.num_files:,} files"
    else:
        yield f"{place}: nothing new"
    if done.former:
        yield (
            f"  imported afresh, for the run was resumed and its later values win: what MLflow had of it is the deleted"
            f" run {done.former} there (`mlflow runs restore --run-id {done.former}` brings it back)"
        )
    if done.num_replaced:
        yield f"  {done.num_replaced:,} points are left out: the run was resumed, and has later values at their steps"
    if done.num_doubled:
        yield (
            f"  {done.num_doubled:,} points stand beside others of the same step, of a log of this run that was"
            " imported by itself: import all folders of the run together for one curve"
        )
    if done.num_apart:
        yield f"  {done.num_apart:,} logged values are no metrics: no_metrics.jsonl among its artifacts has them"
    if done.outside:
        told = ", ".join(done.outside[:MOST_TOLD]) + (", ..." if len(done.outside) > MOST_TOLD else "")
        yield (
            f"  {len(done.outside):,} files left out: links that lead out of the run's folder ({told}); --follow-links"
            " takes them, if you trust who made the folder"
        )
    if done.not_carried:
        left = ", ".join(f"{count:,} records of {what}" for what, count in done.not_carried.items())
        yield f"  not imported: {left} (they stay in the log)"
    for damage in done.damages:
        kept = "what came before it is imported" if damage.what == CUT_SHORT else "the whole records are imported"
        yield f"  {done.log}: damaged at byte {damage.offset:,}: {damage.what}; {kept}"
