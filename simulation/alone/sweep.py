"""A search for good settings on twins: Optuna's trials as nested runs of one parent run, judged by validation alone.

Optuna's journal, RUN/sweep.journal, is what a run that was killed goes on from: finished trials are kept, and the one
that was running goes on at its last epoch. Each draw has a random stream of its own, named by seed, trial and setting,
so that a search that was interrupted tries what an uninterrupted one would have tried.

It tells a row for each trial, RUN/sweep.csv, the best configuration, RUN/best.toml, and the picture of all.
"""

import dataclasses
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TextIO, cast

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from clients.site import SiteSettings
from common import config
from common.errors import ConfigError, DataError, TrainingFailed
from common.faces.pack import FacePack
from common.metrics.names import EPOCH_SECONDS
from common.plots.comparison import TrialPoint, search_trials
from common.runs import recorded
from common.settings import RunSettings, Settings, TrackingSettings
from common.system.files import read_json, write_bytes
from common.system.runtime import stream_seed
from common.tracking.run import TrackedRun
from simulation.alone.baselines import (
    below_untrained,
    check_twins,
    record_datasets,
    record_results,
    register_trained,
    score_best,
    score_untrained,
    write_header,
)
from simulation.alone.epochs import PROGRESS_FILE, Epochs, Progress
from simulation.alone.studies import COMMAND, checkpoints_of, csv_text, nested_run, study_kind
from simulation.alone.sweep_plan import PLAN_FILE, Scalar, Span, SweepPlan
from simulation.alone.trainee import local_trainee
from simulation.alone.twin_results import twin_lines

EXPERIMENT: Final = "twin-verification-hyperparameter-search"
_JOURNAL: Final = "sweep.journal"
_STUDY: Final = "sweep"
CSV_FILE: Final = "sweep.csv"
BEST_FILE: Final = "best.toml"
STATES: Final = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
_WORDS: Final = {state: word for word, state in STATES.items()}
# As MLflow's own bridge to Optuna shows them.
_STATUS: Final = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}


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
    below_untrained: str  # what training made worse, in words; "" where nothing is


@dataclass(frozen=True, kw_only=True)
class _Sweep:
    """A search that runs."""

    settings: Settings  # the base
    plan: SweepPlan
    site: SiteSettings
    pack: FacePack
    parent: TrackedRun
    study: optuna.Study
    storage: optuna.storages.BaseStorage

    def finished(self) -> list[FrozenTrial]:
        """The trials that have ended, in their order."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished()]

    def best(self) -> FrozenTrial | None:
        """The first of the best trials that were trained to their end."""
        complete = [trial for trial in self.finished() if trial.state == TrialState.COMPLETE]
        sign = -1 if self.plan.is_maximised else 1
        return min(complete, key=lambda trial: (sign * _value(trial), trial.number), default=None)

    def checkpoints(self, number: int) -> Path:
        return checkpoints_of(self.parent.folder, trial_name(number))


def _value(trial: FrozenTrial) -> float:
    if trial.value is None:
        raise ValueError(f"trial {trial.number} has no value")
    return trial.value


def run_sweep(
    settings: Settings, plan: SweepPlan, site: SiteSettings, pack: FacePack, folder: Path, out: TextIO
) -> SweepSummary:
    """Try all trials into the run's folder, or go on there, and score the best one's model on test, once.

    settings: the base; the plan was checked against it.
    Raises DataError as `run_twins` does, TrainingFailed when no trial was trained to its end, CheckpointError.
    """
    check_twins(site, pack)
    write_bytes(folder / PLAN_FILE, plan.text.encode())
    trainee = local_trainee(settings, site, pack)
    kind = study_kind("sweep", EXPERIMENT, trainee, site)
    with recorded(settings, folder, kind, command=COMMAND) as parent:
        parent.log_file(folder / PLAN_FILE, PLAN_FILE)
        record_datasets(parent, trainee)
        tried = f"{plan.trials:,} trials over {', '.join(plan.space)}; the rows below are what they start from"
        write_header(trainee, folder, out, study=tried)
        del trainee  # of no use any more
        storage = _open_journal(folder)
        sweep = _Sweep(
            settings=settings,
            plan=plan,
            site=site,
            pack=pack,
            parent=parent,
            study=_study(storage, plan, settings.local_training_epochs),
            storage=storage,
        )
        while len(sweep.finished()) < plan.trials:
            _drop_checkpoints(sweep)
            _run_trial(sweep, _next_trial(sweep), out)
            record_trials(parent, plan, sweep.finished())
        _drop_checkpoints(sweep)
        record_trials(parent, plan, sweep.finished())
        return _test_best(sweep)


def _open_journal(folder: Path) -> optuna.storages.JournalStorage:
    """Optuna's record in the run's folder; what a process that was killed left of a line or a lock is removed.

    One process has a run's folder.
    """
    optuna.logging.disable_default_handler()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = folder / _JOURNAL
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        write_bytes(path, content[: content.rfind(b"\n") + 1])
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    return optuna.storages.JournalStorage(JournalFileBackend(str(path)))


def _study(storage: optuna.storages.BaseStorage, plan: SweepPlan, epochs: int) -> optuna.Study:
    return optuna.create_study(
        storage=storage,
        study_name=_STUDY,
        direction=StudyDirection.MAXIMIZE if plan.is_maximised else StudyDirection.MINIMIZE,
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=_num_random(plan), n_warmup_steps=1 + max(1, epochs // 4)),
    )


def _num_random(plan: SweepPlan) -> int:
    """Trials at random before the search learns from them, and before a trial is stopped early: a third, 3 to 10."""
    return min(10, max(3, plan.trials // 3))


def _next_trial(sweep: _Sweep) -> Trial:
    """The trial that was running when the run was stopped, else a new one."""
    for trial in sweep.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study_id = sweep.storage.get_study_id_from_name(_STUDY)
        return Trial(sweep.study, sweep.storage.get_trial_id_from_study_id_trial_number(study_id, trial.number))
    return sweep.study.ask()


def _draw(sweep: _Sweep, trial: Trial) -> dict[str, Scalar]:
    """The trial's settings; those drawn before the run was stopped are kept."""
    params: dict[str, Scalar] = {}
    for name, span in sweep.plan.space.items():
        sweep.study.sampler = optuna.samplers.TPESampler(
            seed=stream_seed(sweep.settings.run.seed, "sweep", trial.number, name) % 2**32,
            n_startup_trials=_num_random(sweep.plan),
            multivariate=False,
        )
        params[name] = _suggested(trial, name, span)
    return params


def _suggested(trial: Trial, name: str, span: Span) -> Scalar:
    if span.choices:
        chosen: Any = trial.suggest_categorical(name, span.choices)
        return cast("Scalar", chosen)
    if span.is_whole:
        return trial.suggest_int(name, int(span.low), int(span.high), step=span.step, log=span.log)
    return trial.suggest_float(name, span.low, span.high, log=span.log)


def _run_trial(sweep: _Sweep, trial: Trial, out: TextIO) -> None:
    """One trial to its end; one that fails counts, and the search goes on."""
    params = _draw(sweep, trial)
    shown = ", ".join(f"{name} = {shown_value(value)}" for name, value in params.items())
    out.write(f"\n{trial_name(trial.number)} ({trial.number + 1} of {sweep.plan.trials}): {shown}\n")
    try:
        trainee = local_trainee(config.with_values(sweep.settings, params), sweep.site, sweep.pack)
    except ConfigError as error:  # a combination beyond those checked before the first trial
        _tell(sweep, trial, "failed", math.nan, {"error": str(error)}, out)
        return
    child = nested_run(sweep.parent, trial_name(trial.number), trainee, sweep.site, {"trial": str(trial.number)})
    record_datasets(child, trainee)
    epochs = Epochs(
        trainee=trainee,
        tracked=child,
        folder=sweep.checkpoints(trial.number),
        after_epoch=partial(_judge, trial, sweep.plan.metric),
    )
    state, value, reason = _train(epochs, trial, sweep.plan.metric, out)
    progress = epochs.progress
    final = {} if math.isnan(value) else {f"final_{sweep.plan.metric}": value}
    child.log_metrics(final | {"best_epoch": progress.best_epoch}, step=progress.best_epoch)
    child.set_tags({"state": state} | ({"error": reason} if reason else {}))
    child.finish(_STATUS[state])
    seconds = sum(row[EPOCH_SECONDS] for row in progress.rows)
    notes = {"best_epoch": progress.best_epoch, "epochs": progress.epoch, "train_seconds": seconds, "error": reason}
    _tell(sweep, trial, state, value, notes, out)


def _train(epochs: Epochs, trial: Trial, metric: str, out: TextIO) -> tuple[str, float, str]:
    """Train, or go on: (state, the value at the best epoch or NaN, why it failed)."""
    try:
        epochs.restore()
        _judge(trial, metric, epochs)  # what was validated, but not told, before the run was stopped
        epochs.run(out)
        value = epochs.progress.rows[epochs.progress.best_epoch - 1][metric]
    except optuna.TrialPruned:
        return "pruned", math.nan, ""
    except TrainingFailed as error:
        return "failed", math.nan, str(error)
    return ("complete", value, "") if math.isfinite(value) else ("failed", math.nan, f"{metric} is not finite")


def _judge(trial: Trial, metric: str, epochs: Epochs) -> None:
    """Tell the trial what its epochs reached.  Raises TrialPruned when it is worse than the median of those before."""
    told = trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values
    for row in epochs.progress.rows:
        if metric not in row:
            raise DataError(f"validation on these data gives no {metric}; choose another sweep.metric.")
        if int(row["step"]) not in told:
            trial.report(row[metric], step=int(row["step"]))
    if 0 < epochs.progress.epoch < epochs.total and trial.should_prune():
        raise optuna.TrialPruned


def _tell(sweep: _Sweep, trial: Trial, state: str, value: float, notes: Mapping[str, object], out: TextIO) -> None:
    """End the trial in Optuna's record, the last thing to be written of it."""
    for name, note in notes.items():
        trial.set_user_attr(name, note)
    sweep.study.tell(trial, value if state == "complete" else None, state=STATES[state])
    said = f"{sweep.plan.metric} {value:.4f}" if state == "complete" else state
    best = sweep.best()
    out.write(
        f"{trial_name(trial.number)}: {said}{': ' if notes['error'] else ''}{notes['error']}"
        + (f"; best so far {trial_name(best.number)}, {best.value:.4f}\n" if best else "\n")
    )
    out.flush()


def _drop_checkpoints(sweep: _Sweep) -> None:
    """Of the trials that have ended only the best one's model is needed."""
    best = sweep.best()
    for trial in sweep.finished():
        if best is None or trial.number != best.number:
            shutil.rmtree(sweep.checkpoints(trial.number), ignore_errors=True)


def _test_best(sweep: _Sweep) -> SweepSummary:
    """Write down the best configuration, and score the model that was trained with it on test."""
    best, parent = sweep.best(), sweep.parent
    if best is None:
        raise TrainingFailed(
            f"none of {sweep.plan.trials} trials was trained to its end; {parent.folder / CSV_FILE} says why."
        )
    settings = config.with_values(sweep.settings, best.params)
    record_best(parent, sweep.plan, settings, sweep.finished(), best)
    trainee = local_trainee(settings, sweep.site, sweep.pack)
    epochs = Epochs(trainee=trainee, tracked=parent, folder=sweep.checkpoints(best.number))
    epochs.progress = Progress(**read_json(epochs.folder / "resume" / PROGRESS_FILE))
    untrained = score_untrained(trainee)
    tested = score_best(epochs)
    worse = below_untrained(epochs, untrained, tested)
    registered = register_trained(epochs, f"{settings.model.backbone}_twins", worse, tested)
    results = record_results(epochs, trial_name(best.number), untrained, tested)
    told = {"metric": sweep.plan.metric, "best_trial": best.number, "best_value": best.value, "params": best.params}
    parent.log_dict(results | {"sweep": told | {"trials": trial_rows(sweep.plan, sweep.finished())}}, "metrics.json")
    return SweepSummary(
        folder=parent.folder,
        best_trial=trial_name(best.number),
        metric=sweep.plan.metric,
        best_value=_value(best),
        params=best.params,
        twins=results["twins"],
        registered=registered,
        below_untrained=worse,
    )


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
    lines += [f"warning: {summary.below_untrained}\n"] if summary.below_untrained else []
    return [*lines, f"configuration: {summary.folder / BEST_FILE}\n"]
