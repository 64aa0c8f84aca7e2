"""What `--resume RUN` means: a run's folder, by its id or its path, that has something left to do."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from common import config
from common.errors import EXIT_DONE, ConfigError, UserError
from common.events import OUTCOME_FILE, STOP_FILE
from common.files import read_json
from common.settings import Settings
from server.run_folder import CONFIG_FILE, has_checkpoint
from server.runs import RUN_FILE

_MAY_DIFFER = ("run.out", "run.log_level")


def _has_results(folder: Path) -> bool:
    return (folder / "metrics.json").exists()


def has_ended_well(folder: Path) -> bool:
    """A federation's results are written before its models are registered, and it may be killed in between."""
    outcome = folder / OUTCOME_FILE
    return _has_results(folder) and outcome.exists() and read_json(outcome).get("exit_code") == EXIT_DONE


def unfinished_run(
    run: str,
    out: str,
    *,
    command: str,
    modes: Collection[str],
    is_finished: Callable[[Path], bool] = _has_results,
) -> tuple[Path, dict[str, Any]]:
    """The folder of an unfinished run and what its run.json says.

    run: an id or a path.  out: where ids are looked for.  modes: the kinds of runs that `command` goes on with.
    is_finished: says of a folder whether nothing is left to do.  Raises UserError.
    """
    folders = [Path(run).expanduser(), Path(out).expanduser() / run]
    folder = next((folder.resolve() for folder in folders if (folder / RUN_FILE).is_file()), None)
    if folder is None:
        raise UserError(f"--resume {run}: no run is at {folders[0]} or {folders[1]}; give its id or its folder.")
    about = read_json(folder / RUN_FILE)
    if about.get("mode") not in modes:
        raise UserError(
            f"--resume {run}: that run is {about.get('mode')}, not {command}; use the command that began it."
        )
    if is_finished(folder):
        raise UserError(f"--resume {run}: that run is finished; its results are in {folder / 'metrics.json'}.")
    return folder, about


def unfinished_federation(run: str, out: str, given: Settings | None) -> tuple[Path, Settings]:
    """The folder and the settings of a federation to go on with.

    given: those of a --config beside --resume, which must be the run's own.  Raises UserError, ConfigError.
    """
    folder, _ = unfinished_run(run, out, command="federated", modes=("federated",), is_finished=has_ended_well)
    if not has_checkpoint(folder):
        raise UserError(f"--resume {run}: that run was stopped before its first checkpoint; start a new one.")
    settings = config.load(folder / CONFIG_FILE)
    if given is not None:
        _refuse_other_settings(settings, given)
    return folder, settings


def _refuse_other_settings(settings: Settings, given: Settings) -> None:
    ours, theirs = config.to_mapping(settings), config.to_mapping(given)
    differing = [
        f"--resume: {section}.{key} is {value!r} in the run, {theirs[section][key]!r} in --config; leave --config out,"
        " or start a new run."
        for section, values in ours.items()
        for key, value in values.items()
        if theirs[section][key] != value and f"{section}.{key}" not in _MAY_DIFFER
    ]
    if differing:
        raise ConfigError(differing)


def forget_its_end(folder: Path) -> None:
    """Remove what told that the run was over, or should be."""
    for name in (OUTCOME_FILE, STOP_FILE):
        (folder / name).unlink(missing_ok=True)
