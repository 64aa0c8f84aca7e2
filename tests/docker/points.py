"""What MLflow has of a run, asked over its published port as a browser would."""

import base64
import json
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any


class Tracking:
    """An MLflow server's REST interface."""

    def __init__(self, port: int, password: Callable[[], str]) -> None:
        """password: reads the administrator's, where it is when something is asked."""
        self._password = password
        self._base = f"http://127.0.0.1:{port}/api/2.0/mlflow"

    def _ask(self, path: str, body: dict[str, object] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        basic = base64.b64encode(f"admin:{self._password()}".encode()).decode()
        request = urllib.request.Request(  # noqa: S310 - the address is our own
            f"{self._base}/{path}",
            data=data,
            headers={"Content-Type": "application/json", "Authorization": f"Basic {basic}"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            found: dict[str, Any] = json.load(answer)
        return found

    def runs(self, run_id: str) -> dict[str, dict[str, Any]]:
        """The run of that folder under "", its nested runs under their clients' names."""
        experiments = self._ask("experiments/search?max_results=1000").get("experiments", [])
        ids = [one["experiment_id"] for one in experiments]
        found = self._ask("runs/search", {"experiment_ids": ids, "max_results": 1000}).get("runs", [])
        [parent] = [run for run in found if _tag(run, "run_folder") == run_id and not _tag(run, "mlflow.parentRunId")]
        nested = [run for run in found if _tag(run, "mlflow.parentRunId") == parent["info"]["run_id"]]
        return {"": parent, **{run["info"]["run_name"]: run for run in nested}}

    def counts(self, run: dict[str, Any]) -> Counter[tuple[str, int]]:
        """(metric, step) -> how many points."""
        counted: Counter[tuple[str, int]] = Counter()
        for key in {metric["key"] for metric in run["data"].get("metrics", [])}:
            path = f"metrics/get-history?run_id={run['info']['run_id']}&metric_key={key}"
            for point in self._ask(path).get("metrics", []):
                counted[key, int(point.get("step", 0))] += 1
        return counted


def _tag(run: dict[str, Any], key: str) -> str:
    return next((tag["value"] for tag in run["data"].get("tags", []) if tag["key"] == key), "")


def check_points(
    tracking: Tracking, runs: dict[str, dict[str, Any]], recorded: Iterable[dict[str, object]], rounds: int
) -> str:
    """Each step once, none missing, all finished; returns a line with the numbers.  Raises AssertionError."""
    assert {run["info"]["status"] for run in runs.values()} == {"FINISHED"}, runs
    told = {(str(point["run"]), str(point["key"]), int(str(point["step"]))) for point in recorded}
    stored = {name: tracking.counts(run) for name, run in runs.items()}
    twice = {(name, *point): n for name, counted in stored.items() for point, n in counted.items() if n != 1}
    assert not twice, f"more than once: {twice}"
    have = {(name, *point) for name, counted in stored.items() for point in counted}
    assert not told - have, f"lost: {sorted(told - have)[:10]}"
    assert {step for key, step in stored[""] if key == "train_loss"} == set(range(1, rounds + 1))
    assert {step for key, step in stored[""] if key == "val_roc_auc"} == set(range(rounds + 1))
    return f"{len(told)} MLflow points, 0 lost, 0 doubled"
