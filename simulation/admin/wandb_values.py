"""What of a Weights & Biases run becomes what in MLflow, and nothing is sent.

config -> params (nested names joined by dots); numbers of the history -> metrics; numbers of the summary that the
history does not end with -> metrics at the last step; all else that was logged -> lines of JSON.  Who trained it is not
carried: neither wandb's entity nor what it noted by itself about the account, the person and the machine's folders.
"""

import hashlib
import json
import math
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from simulation.admin.wandb_log import Row, RunFacts, Tree, is_number, leaves, read_history

MAX_NAME: Final = 250  # MLflow's limits, in characters
MAX_PARAM: Final = 6000
MAX_TAG: Final = 5000
SUMMARY_PREFIX: Final = "summary."
_OF_WANDB: Final = ("_step", "_runtime", "_timestamp")  # not logged by the user
_OF_THE_MACHINE: Final = (
    "os", "python", "heartbeatAt", "startedAt", "state", "memory", "cpu_count", "cpu_count_logical", "cpu_freq", "gpu",
    "gpu_count", "gpu_nvidia", "gpu_amd", "gpu_apple", "gpudevices", "apple", "tpu", "cuda", "cudaVersion",
)  # fmt: skip
_NOT_ALLOWED = re.compile(r"[^\w\-. :/]")


class Point(NamedTuple):
    """One metric value; `value` may be NaN, never infinite."""

    key: str
    value: float
    step: int
    time_ms: int


class Apart(NamedTuple):
    """A logged value that is no metric: a text, a list, a picture's description, an infinity."""

    key: str
    value: Any
    step: int
    time_ms: int


class Names:
    """MLflow's name for each of wandb's; names that would fall together are kept apart in the order they come."""

    def __init__(self) -> None:
        self._given: dict[str, str] = {}
        self._taken: set[str] = set()

    def __call__(self, name: str) -> str:
        """The same name where MLflow takes it, else the nearest that it takes."""
        if name not in self._given:
            self._given[name] = self._free(nearest_name(name))
            self._taken.add(self._given[name])
        return self._given[name]

    def _free(self, wanted: str) -> str:
        free, count = wanted, 1
        while free in self._taken:
            count += 1
            free = f"{wanted[: MAX_NAME - 8]}_{count}"
        return free

    def changed(self) -> dict[str, str]:
        """MLflow's names by wandb's, where they differ."""
        return {name: given for name, given in self._given.items() if name != given}


def nearest_name(name: str) -> str:
    """A name that MLflow takes for metrics, params and tags: its characters, a clean relative path, not too long."""
    nearest = _NOT_ALLOWED.sub("_", name)
    if nearest != posixpath.normpath(nearest) or nearest.startswith(("/", "..")) or nearest == ".":
        nearest = nearest.replace("/", "_").replace("..", "__") or "_"
        nearest = "_" if nearest == "." else nearest
    if len(nearest) > MAX_NAME:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        nearest = f"{nearest[: MAX_NAME - 9]}_{digest}"
    return nearest


def run_name(entity: str, project: str, run_id: str) -> str:
    """What a run is found again by: runs of two entities stay two runs, and no entity can be read from it."""
    apart = hashlib.sha256(entity.encode()).hexdigest()[:8] if entity else ""
    return nearest_name("/".join(part for part in (apart, project, run_id) if part))


def of_the_machine(metadata: object) -> Tree:
    """What wandb noted of the machine and the commit, without account, host, folders, command line and remote."""
    if not isinstance(metadata, dict):
        return {}
    kept = {key: metadata[key] for key in _OF_THE_MACHINE if key in metadata}
    git = metadata.get("git")
    return {**kept, "git": {"commit": git["commit"]}} if isinstance(git, dict) and "commit" in git else kept


def split_row(row: Row, names: Names) -> Iterator[Point | Apart]:
    """The metrics of a row, truth values as 1 and 0, and what is none."""
    for key, value in leaves(row.values):
        number = as_metric(value)
        if number is None:
            yield Apart(key, value, row.step, row.time_ms)
        else:
            yield Point(names(key), number, row.step, row.time_ms)


def as_metric(value: object) -> float | None:
    """The value as MLflow takes it: a finite number or NaN; None for all else."""
    if isinstance(value, bool) or is_number(value):
        return float(value)
    return math.nan if isinstance(value, float) and math.isnan(value) else None


def apart_line(apart: Apart) -> str:
    """A line of JSON."""
    line = {"step": apart.step, "time_ms": apart.time_ms, "key": apart.key, "value": plain(apart.value)}
    return json.dumps(line, ensure_ascii=False) + "\n"


def plain(value: object) -> object:
    """The value as JSON has it: "nan", "inf" and "-inf" are texts, as in a spool."""
    if isinstance(value, dict):
        return {key: plain(below) for key, below in value.items()}
    if isinstance(value, list):
        return [plain(below) for below in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def is_infinite(value: object) -> bool:
    """Whether it is an infinity, which MLflow would turn into 1.8e308."""
    return isinstance(value, float) and math.isinf(value)


def params_of(facts: RunFacts, names: Names) -> dict[str, str]:
    """The config as params; long values are cut (all of it is kept as an artifact)."""
    return {names(key): _shown(value)[:MAX_PARAM] for key, value in leaves(facts.config)}


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def tags_of(facts: RunFacts) -> dict[str, str]:
    """What describes the run, and the texts of its summary."""
    described = {
        "mlflow.note.content": facts.notes,
        "wandb.tags": ", ".join(facts.tags),
        "wandb.project": facts.project,
        "wandb.group": facts.group,
        "wandb.job_type": facts.job_type,
        "wandb.sweep_id": facts.sweep_id,
        "wandb.exit_code": "" if facts.exit_code is None else str(facts.exit_code),
    }
    tags = {key: value[:MAX_TAG] for key, value in described.items() if value}
    names = Names()
    for key, value in leaves(facts.summary):
        if isinstance(value, str):
            tags[names(f"wandb.summary.{key}")] = value[:MAX_TAG]
    return tags


def final_points(
    summary: Tree, last: Mapping[str, Point], names: Names, step: int, time_ms: int, *, whole: bool
) -> list[Point]:
    """Numbers of the summary that are not simply what the history ends with.

    last: the last point of each metric.  A best value under the name of a metric becomes "summary.<name>", if the log
    is `whole`; in another one the summary may just be a row ahead of the history.
    """
    points = []
    for key, value in leaves({key: value for key, value in summary.items() if key not in _OF_WANDB}):
        number = as_metric(value)
        if number is None:
            continue
        before = last.get(names(key))
        if before is None:
            points.append(Point(names(key), number, step, time_ms))
        elif whole and not _same(before.value, number):
            points.append(Point(names(SUMMARY_PREFIX + key), number, step, time_ms))
    return points


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def steps_of(log: Path, facts: RunFacts, read_to: int = 0) -> dict[str, set[int]]:
    """The steps of each metric in a log's history, from `read_to` on."""
    steps, names = dict[str, set[int]](), Names()
    for row in read_history(log, facts.start_ms):
        for value in split_row(row, names):
            if not isinstance(value, Apart) and row.offset >= read_to:
                steps.setdefault(value.key, set()).add(value.step)
    return steps
