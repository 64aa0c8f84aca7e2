"""What must be true of a run that has ended, whatever happened to it."""

import collections
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from bench.mlflow_server import MlflowServer
from tests.chaos.deployment import CLIENTS

# What a repeated round measures anew, while the record keeps what it was told first.
MEASURED = ("_seconds", "images_per_second")


AUC_TOLERANCE = 0.1  # of runs that differ in what one head lost


@dataclass(frozen=True)
class Undisturbed:
    """What the same configuration makes where nothing happens."""

    sha256: str
    best_val_auc: float


@dataclass
class Verdict:
    """How a run ended."""

    sha256: str = ""
    same_model: bool = False
    refused_replies: int = 0
    num_points: int = 0
    lost: int = 0  # points that the record or MLflow lacks
    doubled: int = 0
    wrong: list[str] = field(default_factory=list)  # a line for each thing that is not as it must be

    def demand(self, truth: bool, line: str) -> None:
        """Note the line unless it is true."""
        if not truth:
            self.wrong.append(line)


def judge(run: Path, mlflow: MlflowServer, *, rounds: int, undisturbed: Undisturbed, may_differ: bool) -> Verdict:
    """Look at the run's folder and at the tracking server's database.

    With as many clients as federation.min_clients no round is whole without all of them, so every run must end with the
    undisturbed model.  may_differ: unless a client's own state was lost; then with as good a one.
    """
    verdict = Verdict()
    summary = json.loads((run / "metrics.json").read_text())
    outcome = json.loads((run / "outcome.json").read_text())
    verdict.sha256, verdict.refused_replies = summary["model_sha256"], summary["refused_replies"]
    verdict.same_model = summary["model_sha256"] == undisturbed.sha256
    verdict.demand(outcome["exit_code"] == 0, f"outcome.json: {outcome}")
    verdict.demand(summary["rounds"] == rounds, f"{summary['rounds']} of {rounds} rounds")
    if not may_differ:
        verdict.demand(verdict.same_model, f"model {verdict.sha256[:12]} instead of {undisturbed.sha256[:12]}")
    apart = abs(summary["best_val_auc"] - undisturbed.best_val_auc)
    verdict.demand(apart <= AUC_TOLERANCE, f"validation AUC {apart:.3f} from the undisturbed run's")
    finite = all(math.isfinite(value) for value in summary["best"].values())
    verdict.demand(finite, f"figures that are not finite: {summary['best']}")
    _judge_points(verdict, run, mlflow, summary, rounds)
    return verdict


def _judge_points(verdict: Verdict, run: Path, mlflow: MlflowServer, summary: dict, rounds: int) -> None:
    entries = _entries(run / "spool.jsonl")
    told = collections.Counter((e["run"], e["key"], e["step"], float(e["value"])) for e in entries if "key" in e)
    keys = collections.Counter(point[:3] for point in told.elements())
    root, ids = _runs(mlflow, run)
    verdict.demand(sorted(ids.values()) == sorted(["", *CLIENTS]), f"MLflow's runs are {sorted(ids.values())}")
    there: collections.Counter = collections.Counter()
    for run_id, name in ids.items():
        rows = mlflow.rows("select key, step, value from metrics where run_uuid = ?", run_id)
        there.update((name, key, step, value) for key, step, value in rows)
    expected = _expected(summary, rounds)
    missing = {point for point in expected if point not in keys}
    verdict.num_points = there.total()
    verdict.lost = (told - there).total() + len(missing)
    per_step = collections.Counter(point[:3] for point in there.elements())
    verdict.doubled = sum(count - 1 for count in (*keys.values(), *per_step.values()) if count > 1)
    strange = (there - told).total()
    verdict.demand(
        not verdict.lost, f"{verdict.lost} points lost, such as {sorted([*missing, *(told - there)], key=str)[:3]}"
    )
    twice = [(point, count) for point, count in (keys + per_step).items() if max(keys[point], per_step[point]) > 1]
    verdict.demand(not verdict.doubled, f"{verdict.doubled} points doubled, such as {sorted(twice, key=str)[:3]}")
    unknown = sorted((there - told).elements(), key=str)[:3]
    verdict.demand(not strange, f"{strange} points in MLflow that the run's record has not, such as {unknown}")
    values = {point[:3]: point[3] for point in told}
    for row in summary["rounds_table"]:
        for key, value in row.items():
            if key != "step" and not key.endswith(MEASURED) and values.get(("", key, int(row["step"])), value) != value:
                verdict.wrong.append(
                    f"{key} of round {row['step']:g} is {value} in metrics.json, another in the record"
                )
    statuses = {status for (status,) in mlflow.rows("select status from runs")}
    verdict.demand(statuses == {"FINISHED"}, f"statuses of MLflow's runs: {statuses}")
    versions = mlflow.rows("select source from model_versions where run_id = ?", root)
    wanted = 1 if summary["best_round"] == summary["rounds"] else 2  # the best and the last, once where they are one
    verdict.demand(len(versions) == wanted, f"{len(versions)} models are registered, not {wanted}")
    verdict.demand(len(set(ids)) == len(CLIENTS) + 1, "a run is twice in MLflow")


def _expected(summary: dict, rounds: int) -> set[tuple[str, str, int]]:
    """The points that any whole run has."""
    points = {("", key, int(row["step"])) for row in summary["rounds_table"] for key in row if key != "step"}
    points |= {("", "train_loss", step) for step in range(1, rounds + 1)}
    points |= {("", key, step) for key in ("val_roc_auc", "round_test_roc_auc") for step in range(rounds + 1)}
    points |= {(name, "train_loss", step) for name in CLIENTS for step in range(1, rounds + 1)}
    return points


def _entries(path: Path) -> list[dict]:
    entries = []
    for line in path.read_bytes().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:  # cut by a full disk or by kill -9
            continue
    return entries


def _runs(mlflow: MlflowServer, run: Path) -> tuple[str, dict[str, str]]:
    """MLflow's id of the run, and id -> name in the record for it and its nested runs."""
    rows = mlflow.rows("select run_uuid from tags where key = 'run_folder' and value = ?", run.name)
    ids = [run_id for (run_id,) in rows]
    names = {}
    for run_id in ids:
        parent = mlflow.rows("select value from tags where key = 'mlflow.parentRunId' and run_uuid = ?", run_id)
        client = mlflow.rows("select value from tags where key = 'client' and run_uuid = ?", run_id)
        param = mlflow.rows("select value from params where key = 'client' and run_uuid = ?", run_id)
        names[run_id] = (client or param)[0][0] if parent else ""
    return next((run_id for run_id, name in names.items() if not name), ""), names
