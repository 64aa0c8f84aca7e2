"""What a search tells: a row for each trial, RUN/sweep.csv, the best configuration, RUN/best.toml, and the picture."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from optuna.trial import FrozenTrial, TrialState

from common import config
from common.plots.studies import TrialPoint, search_trials
from common.settings import RunSettings, Settings, TrackingSettings
from common.tracking.run import TrackedRun
from simulation.studies import csv_text
from simulation.sweep_plan import Scalar, SweepPlan
from simulation.twin_results import twin_lines

CSV_FILE: Final = "sweep.csv"
BEST_FILE: Final = "best.toml"
STATES: Final = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
_WORDS: Final = {state: word for word, state in STATES.items()}


@dataclass(frozen=True, kw_only=True)
class SweepSummary:
    """How a search ended."""

    folder: Path
    best_trial: str
    metric: str
    best_value: float
    params: dict[str, Scalar]
    twins: dict[str, Any]  # as in metrics.json
    registered: list[str]


def trial_name(number: int) -> str:
    """The nested run of a trial, and its folders."""
    return f"trial-{number:03d}"


def shown_value(value: Scalar) -> str:
    """A setting's value on a terminal."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def trial_rows(plan: SweepPlan, trials: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
    """A row for each finished trial: its number, state, value (a pruned one's is its last epoch's), epochs, settings.

    What a trial lacks, such as the value of a failed one, is missing in its row.
    """
    rows = []
    for trial in trials:
        row: dict[str, Any] = {"trial": trial.number, "state": _WORDS[trial.state]}
        row |= {plan.metric: trial.value} if trial.value is not None else {}
        row |= {name: trial.user_attrs[name] for name in ("best_epoch", "epochs") if name in trial.user_attrs}
        rows.append(row | trial.params | {"error": trial.user_attrs.get("error", "")})
    return rows


def record_trials(parent: TrackedRun, plan: SweepPlan, trials: Sequence[FrozenTrial]) -> None:
    """The finished trials in the parent run: a point for each, and the best so far; what is there already stays."""
    best: float | None = None
    for trial in trials:
        if trial.state != TrialState.COMPLETE or trial.value is None:
            continue
        choose = max if plan.is_maximised else min
        best = trial.value if best is None else choose(best, trial.value)
        points = {f"trial_{plan.metric}": trial.value, f"best_{plan.metric}": best}
        parent.log_missing_metrics(points, step=trial.number)
    parent.log_text(csv_text(trial_rows(plan, trials)), CSV_FILE)


def record_best(
    parent: TrackedRun, plan: SweepPlan, settings: Settings, trials: Sequence[FrozenTrial], best: FrozenTrial
) -> None:
    """The configuration of the best trial, and the picture of all.  settings: of the best trial."""
    parent.log_text(_best_toml(plan, settings, best), BEST_FILE)
    parent.set_tags({"best_trial": trial_name(best.number)})
    if settings.tracking.plots == "none":
        return
    points = [
        TrialPoint(trial.number, _WORDS[trial.state], math.nan if trial.value is None else trial.value, trial.params)
        for trial in trials
    ]
    figure = search_trials(
        points,
        metric=plan.metric,
        best_is="highest" if plan.is_maximised else "lowest",
        logarithmic=[name for name, span in plan.space.items() if span.log],
    )
    parent.log_figure(figure, "plots/sweep.png")


def _best_toml(plan: SweepPlan, settings: Settings, best: FrozenTrial) -> str:
    """A configuration for --config; where runs are kept and tracked is left to whoever uses it."""
    run = dataclasses.replace(settings.run, out=RunSettings().out)
    portable = dataclasses.replace(settings, run=run, tracking=TrackingSettings())
    heading = f"# The best of {plan.trials} trials by {plan.metric} = {best.value} ({trial_name(best.number)})."
    return f"{heading}\n\n{config.to_toml(portable)}"


def sweep_lines(summary: SweepSummary) -> list[str]:
    """What a search shows at its end."""
    lines = [f"\nbest: {summary.best_trial}, {summary.metric} {summary.best_value:.4f}\n"]
    lines += [f"  {name} = {shown_value(value)}\n" for name, value in summary.params.items()]
    lines += twin_lines(summary.twins)
    lines += [f"registered: {name}\n" for name in summary.registered]
    return [*lines, f"configuration: {summary.folder / BEST_FILE}\n"]
