"""What a run has asked of this site so far, on its disk, and the quotas of the site's policy that follow from it.

One small file for each run, in the state folder: how many tasks, which models by their SHA-256, the settings it began
with, CPU time, refusals.  A server that is started again, or a trainer, changes nothing of it.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from clients.policy import Against, Policy, PolicyRefusal
from common.errors import CheckpointError
from common.settings import Settings
from common.system.events import SHOWN
from common.system.files import read_json, replacing

log = logging.getLogger("facefed.client")

FOLDER = "policy"  # in a site's state folder
DAY_S = 86_400.0
BACK = 2  # rounds that a server may go back: it loses as many when it is killed
# What may differ between a run's beginning and a server that goes on with it.
_NOT_THE_RUNS = {"run": ("out", "log_level"), "tracking": None, "verification": None}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _of_the_run(settings: Settings) -> dict[str, dict[str, Any]]:
    values = dataclasses.asdict(settings)
    for section, keys in _NOT_THE_RUNS.items():
        for key in keys or list(values[section]):
            del values[section][key]
    return values


@dataclass(kw_only=True)
class PastTasks:
    """One run's record.  What is asked is first taken (`take`, `take_model`), then answered, then `save`d."""

    path: Path
    policy: Policy
    began: float  # seconds since 1970, as all times here
    settings: str = ""  # digest of what the run began with; empty before its first task
    data: str = ""  # digest of its [data]
    num_tasks: int = 0
    num_refusals: int = 0
    last_round: int = 0  # the highest that was trained, or whose model was scored
    cpu_seconds: float = 0.0
    models: dict[str, float] = field(default_factory=dict)  # SHA-256 of each that was taken -> when first
    by_round: dict[str, str] = field(default_factory=dict)  # round -> SHA-256 of the model that it made, as told last
    model_round: int = -1  # of the model that was taken last; -1: none yet
    moved: dict[str, float] = field(default_factory=dict)  # tensor -> norm of what own training moved it last
    most_moved: dict[str, float] = field(default_factory=dict)  # likewise, in any round

    @classmethod
    def of(cls, state_dir: Path, run_id: str, policy: Policy) -> Self:
        """The record of a run, or that of a new one; a damaged one, after a power cut, is begun anew."""
        path = state_dir / FOLDER / f"{run_id}.json"
        if path.exists():
            try:
                return cls(path=path, policy=policy, **read_json(path))
            except (CheckpointError, TypeError) as error:
                log.warning("%sthe record of run %s is begun anew: %s", SHOWN, run_id, error)
        return cls(path=path, policy=policy, began=time.time())

    def take(self, kind: str, server_round: int, settings: Settings) -> None:
        """Count a task.  Raises PolicyRefusal where the run has had its share, or goes where no run of ours goes."""
        if not self.settings:
            self._begin(settings)
        self.num_tasks += 1
        if self.num_refusals >= self.policy.max_refusals:
            raise _refusal("run", "max_refusals", self.num_refusals, self.policy.max_refusals)
        if self.settings != _digest(_of_the_run(settings)):
            raise _refusal("settings", "max_runs_a_day", "other settings", "those that the run began with")
        self._at_most("tasks", "max_tasks_a_run", self.num_tasks)
        self._at_most("tasks", "max_cpu_hours_a_run", self.cpu_seconds / 3600.0)
        if kind == "train":
            if server_round < self.last_round - BACK:
                raise _refusal("round", "max_rounds", server_round, f"{self.last_round - BACK} or later")
            self.last_round = max(self.last_round, server_round)

    def _begin(self, settings: Settings) -> None:
        others = list(self._others_of_today())
        self._at_most("run", "max_runs_a_day", 1 + sum(one["began"] >= time.time() - DAY_S for one in others))
        self.data = _digest(dataclasses.asdict(settings.data))
        self._at_most("data", "max_data_choices_a_day", len({self.data, *(one["data"] for one in others)}))
        self.settings = _digest(_of_the_run(settings))

    def take_model(self, sha256: str, model_round: int, rounds: int) -> None:
        """Count a model that is scored; one that was here before is not counted again.

        model_round: the round that made it.  rounds: of the run.  A second, different one of a round is taken only of
        those that a killed server repeats, with other members, and is one more.  Raises PolicyRefusal.
        """
        first = self.by_round.get(str(model_round), sha256)
        if sha256 not in self.models and first != sha256 and model_round < self.last_round - 1 - BACK:
            raise _refusal("model", "max_extra_models", f"a second model of round {model_round}", "the first")
        if sha256 not in self.models:
            now = time.time()
            others = sum(when >= now - DAY_S for one in self._others_of_today() for when in one["models"].values())
            today = sum(when >= now - DAY_S for when in self.models.values())
            if len(self.models) >= rounds + self.policy.max_extra_models:
                allowed = rounds + self.policy.max_extra_models
                raise _refusal("model", "max_extra_models", len(self.models) + 1, allowed)
            self._at_most("model", "max_models_a_day", 1 + today + others)
            self.models[sha256] = now
        self.model_round = model_round
        self.by_round[str(model_round)] = sha256

    def require_disk(self, folder: Path) -> None:
        """Raises PolicyRefusal where the run's private states take more than their share.  folder: where they lie."""
        num_bytes = sum(file.stat().st_size for file in folder.glob("*")) if folder.is_dir() else 0
        self._at_most("tasks", "max_disk_gb_a_run", num_bytes / 1e9)

    def trained(self, moved: Mapping[str, float]) -> None:
        """Own training moved the tensors by these norms."""
        self.moved = dict(moved)
        self.most_moved = {name: max(norm, self.most_moved.get(name, 0.0)) for name, norm in moved.items()}

    def save(self) -> None:
        """Write the record."""
        values = {name: value for name, value in vars(self).items() if name not in ("path", "policy")}
        with replacing(self.path, synced=False) as aside:
            aside.write_text(json.dumps(values), encoding="utf-8")

    def _at_most(self, asked: str, limit: str, number: float) -> None:
        allowed = getattr(self.policy, limit)
        if number > allowed:
            raise _refusal(asked, limit, f"{number:g}", f"{allowed:g}")

    def _others_of_today(self) -> Iterator[dict[str, Any]]:
        since = time.time() - DAY_S
        for path in self.path.parent.glob("*.json"):
            with contextlib.suppress(CheckpointError, OSError):  # damaged, or just removed
                if path != self.path and path.stat().st_mtime >= since:
                    yield {"began": 0.0, "data": "", "models": {}} | read_json(path)


def _refusal(asked: str, limit: str, seen: object, allowed: object) -> PolicyRefusal:
    return PolicyRefusal(Against(asked, limit, str(seen), str(allowed)))


def prune_runs(state_dir: Path, run_id: str, keep: int) -> None:
    """Delete the private states of all runs but this one and the newest others, `keep` in all."""
    folders = [path for path in (state_dir / "private").glob("*") if path.is_dir() and path.name != run_id]
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)[max(0, keep - 1) :]:
        shutil.rmtree(folder, ignore_errors=True)
    for folder in (state_dir / FOLDER).glob("*"):
        if folder.is_dir() and folder.name != run_id:
            shutil.rmtree(folder, ignore_errors=True)
