"""A sweep's TOML file: how many trials, over which settings, judged by which validation figure.

    [sweep]
    trials = 12
    base = "twins_dcal"               # a configuration: NAME, or a path, also one relative to this file
    metric = "val_twins_roc_auc"      # never a test figure: the choice would be made on what it is reported on
    [sweep.space]
    "training.lr" = { low = 1e-4, high = 3e-3, log = true }
    "model.glca_fraction" = { choices = [0.1, 0.3, 0.5] }
    "model.depth" = { low = 4, high = 8, step = 2 }

Everything is checked before the first trial, all problems together.  Only the standard library is imported.
"""

import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from common import config
from common.errors import ConfigError, unknown_name
from common.metrics.figures import AUC, validated
from common.settings import Settings
from common.system.files import read_text

DEFAULT_METRIC: Final = f"val_{AUC}"
DIRECTIONS: Final = ("maximize", "minimize")  # Optuna's words
PLAN_FILE: Final = "sweep.toml"  # the copy in the run's folder
NOT_SWEPT: Final = ("training.device",)
_KEYS: Final = ("trials", "base", "metric", "direction", "space")
_MOST_TRIED: Final = 200  # combinations that are checked before the first trial

Scalar = bool | int | float | str


@dataclass(frozen=True, kw_only=True)
class Span:
    """What one setting may be: one of `choices`; where there are none, a number from `low` to `high`, both allowed."""

    choices: tuple[Scalar, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: int = 1  # of whole numbers
    is_whole: bool = False

    def probes(self) -> tuple[Scalar, ...]:
        """All choices; of a range its ends."""
        return self.choices or (self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """A sweep as its file describes it."""

    trials: int
    metric: str
    direction: str
    base: str  # a configuration
    space: Mapping[str, Span]
    path: Path = field(compare=False)
    text: str = field(compare=False)  # the file's

    @property
    def is_maximised(self) -> bool:
        """Whether higher is better."""
        return self.direction == "maximize"


def load_plan(path: Path) -> SweepPlan:
    """The plan in a file.  Raises ConfigError with all problems at once."""
    try:
        text = read_text(path)
        raw = tomllib.loads(text)
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"{path}: not valid TOML: {error}"]) from None
    sweep = raw.get("sweep")
    if not isinstance(sweep, dict):
        raise ConfigError([f"{path}: no [sweep] in it; a configuration is given with --config."])
    problems = [
        f"section = {name!r} does not belong in a sweep; put it into its base." for name in raw if name != "sweep"
    ]
    problems += [
        unknown_name("setting", f"sweep.{key}", [f"sweep.{k}" for k in _KEYS]) for key in sweep if key not in _KEYS
    ]
    problems += _own_problems(sweep)
    space = _read_space(sweep.get("space"), problems)
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    metric = sweep.get("metric", DEFAULT_METRIC)
    return SweepPlan(
        trials=sweep["trials"],
        metric=metric,
        direction=sweep.get("direction", allowed_metrics()[metric]),
        base=sweep["base"],
        space=space,
        path=path,
        text=text,
    )


def allowed_metrics() -> dict[str, str]:
    """The validation figures that a sweep may choose by -> which way is better; those to maximise come first."""
    rows = {metric: row for metric, (_, row) in validated().items()}
    found = {metric: DIRECTIONS[0] for metric, row in rows.items() if row.is_best == "highest"}
    return found | {metric: DIRECTIONS[1] for metric, row in rows.items() if row.is_best == "lowest"}


def _own_problems(sweep: Mapping[str, Any]) -> list[str]:
    problems = []
    trials, base = sweep.get("trials"), sweep.get("base")
    if not isinstance(trials, int) or isinstance(trials, bool) or trials < 1:
        problems.append(f"sweep.trials = {trials!r} must be a whole number of at least 1.")
    if not isinstance(base, str) or not base.strip():
        problems.append(f'sweep.base = {base!r} must name a configuration, such as "twins_dcal".')
    metric, metrics = sweep.get("metric", DEFAULT_METRIC), allowed_metrics()
    if isinstance(metric, str) and metric.startswith("test_"):
        problems.append(
            f"sweep.metric = {metric!r} is a test figure; choosing by it would spoil the test. Use"
            f" {metric.replace('test_', 'val_', 1)!r}."
            if metric.replace("test_", "val_", 1) in metrics
            else f"sweep.metric = {metric!r} is a test figure; choose by validation: {', '.join(metrics)}."
        )
    elif not isinstance(metric, str) or metric not in metrics:
        problems.append(unknown_name("sweep.metric", str(metric), list(metrics)))
    elif sweep.get("direction", metrics[metric]) != metrics[metric]:
        problems.append(
            f"sweep.direction = {sweep['direction']!r} looks for the worst {metric}; write {metrics[metric]!r}."
        )
    return problems


def _read_space(raw: object, problems: list[str]) -> dict[str, Span]:
    """The settings and what they may be; what is wrong is added to `problems`."""
    if not isinstance(raw, Mapping) or not raw:
        problems.append('[sweep.space] is empty; write lines such as "training.lr" = { low = 1e-4, high = 1e-3 }.')
        return {}
    space: dict[str, Span] = {}
    for name, span in raw.items():
        if name in config.STUDIED_SECTIONS:
            problems.append(f'sweep.space: write a setting\'s name in quotes, such as "{name}.KEY" = {{ ... }}.')
            continue
        problem = config.setting_problem("sweep.space", name, without=NOT_SWEPT)
        found = _span_problems(name, span) if problem is None else [problem]
        problems += found
        if not found:
            space[name] = _span(name, span)
    return space


def _span_problems(name: str, raw: object) -> list[str]:
    what = f"sweep.space {name}"
    if not isinstance(raw, Mapping):
        return [f"{what} = {raw!r} must be {{ low = ..., high = ... }} or {{ choices = [...] }}."]
    unknown = [key for key in raw if key not in ("choices", "low", "high", "log", "step")]
    if unknown:
        return [unknown_name(f"{what}: key", unknown[0], ("choices", "low", "high", "log", "step"))]
    if "choices" in raw:
        return _choices_problems(what, name, raw)
    if "low" not in raw or "high" not in raw:
        return [f"{what}: write low and high, or choices."]
    problems = [config.value_problem(name, raw[end]) for end in ("low", "high")]
    told = [f"{what}: {problem}" for problem in problems if problem]
    if told:
        return told
    return _range_problems(what, raw, is_whole=not config.takes_fractions(name))


def _choices_problems(what: str, name: str, raw: Mapping[str, Any]) -> list[str]:
    choices = raw["choices"]
    if len(raw) > 1 or not isinstance(choices, list) or not choices:
        return [f"{what}: choices = {choices!r} must be a list of values, and stand alone."]
    problems = [config.value_problem(name, value) for value in choices]
    if any(problems):
        return [f"{what}: {problem}" for problem in problems if problem]
    twice = [value for place, value in enumerate(choices) if value in choices[:place]]
    return [f"{what}: the choice {twice[0]!r} comes twice."] if twice else []


def _range_problems(what: str, raw: Mapping[str, Any], *, is_whole: bool) -> list[str]:
    """What is wrong with ends that fit the setting each."""
    low, high, log, step = raw["low"], raw["high"], raw.get("log", False), raw.get("step", 1)
    if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high)):
        return [f"{what}: low = {low!r} and high = {high!r} must be numbers; use choices for other values."]
    if low >= high:
        return [f"{what}: low = {low} must be less than high = {high}."]
    if not isinstance(log, bool) or (log and low <= 0):
        return [f"{what}: log = {log!r} with low = {low}; a logarithmic range is true or false and begins above 0."]
    if "step" in raw and (not is_whole or log or not isinstance(step, int) or isinstance(step, bool) or step < 1):
        return [f"{what}: step = {step!r} must be a whole number of a range of whole numbers without log."]
    if (high - low) % step and is_whole:
        return [f"{what}: step = {step} does not lead from low = {low} to high = {high}."]
    return []


def _span(name: str, raw: Mapping[str, Any]) -> Span:
    """A range of whole numbers where the setting itself is one, else of any numbers."""
    is_float = config.takes_fractions(name)
    if "choices" in raw:
        return Span(
            choices=tuple(float(value) if _is_number(value) and is_float else value for value in raw["choices"])
        )
    number = float if is_float else int
    return Span(
        low=number(raw["low"]),
        high=number(raw["high"]),
        log=raw.get("log", False),
        step=raw.get("step", 1),
        is_whole=not is_float,
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def base_config(plan: SweepPlan) -> str:
    """The file of the base: beside the sweep's own, else what `--config` would find.  Raises ConfigError."""
    beside = plan.path.parent / plan.base
    for file in (beside, beside.with_name(f"{beside.name}.toml")):
        if file.is_file():
            return str(file)
    return str(config.find_config(plan.base, f"{plan.path}: sweep.base"))


def plan_of_run(folder: Path, given: SweepPlan | None) -> SweepPlan | None:
    """The plan that a run began with, None where it is no sweep.  given: by `--sweep`.

    Raises ConfigError when another plan is given.
    """
    file = folder / PLAN_FILE
    own = load_plan(file) if file.exists() else None
    if given is not None and own != given:
        what = "began with another plan" if own else "is no sweep"
        raise ConfigError([f"--sweep: the run {folder.name} {what}; leave --sweep out, or start a new run."])
    return own


def check_together(plan: SweepPlan, settings: Settings) -> None:
    """Refuse a space with combinations that do not go together, or a base with an ablation in it.

    All choices are combined with each other and with the ends of all ranges, the first 200 combinations of them.
    Raises ConfigError.
    """
    if settings.ablation.over != "none":
        line = f"sweep.base varies {settings.ablation.over} in an ablation; use another configuration."
        raise ConfigError([f"{plan.path}: {line}"])
    for params in itertools.islice(_combinations(plan.space), _MOST_TRIED):
        shown = ", ".join(f"{name} = {value!r}" for name, value in params.items())
        config.with_values(settings, params, f"{plan.path}: sweep.space with {shown}")


def _combinations(space: Mapping[str, Span]) -> Iterator[dict[str, Scalar]]:
    probes: Sequence[tuple[Scalar, ...]] = [span.probes() for span in space.values()]
    return (dict(zip(space, values, strict=True)) for values in itertools.product(*probes))
