"""A run of any kind: its folder, what its record is told first, how it ends, and what `--resume RUN` goes on with."""

import contextlib
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from common import config
from common.errors import EXIT_DONE, ConfigError, InterruptedRun, UserError
from common.metrics.names import beside
from common.redact import shown_uri
from common.settings import Settings
from common.system.events import OUTCOME_FILE, RUN_FILE, STOP_FILE
from common.system.files import read_json, write_bytes, write_json
from common.system.runtime import facefed_version, git_commit
from common.tracking.hardware import gpu_type, sample_hardware
from common.tracking.notes import data_note, experiment_note, run_note
from common.tracking.run import TrackedRun, finishing, open_run

CHECKPOINTS = "checkpoints"  # in the run's folder
STATE_FILE = "state.json"  # in that one, written last
CONFIG_FILE = "config.toml"  # its settings, resolved
_SHOWN_CONFIG_FILE = "config.shown.toml"  # the same as others may see it, where that differs
WEIGHTS_FILE = "pretrained.safetensors"  # what it began with, where that came from another run
EVALUATED = "federated_evaluation"  # mode of a run in which sites score a model and train nothing
_MAY_DIFFER = ("run.out", "run.log_level")


def new_run_folder(settings: Settings, address: str = "") -> Path:
    """Make the folder of a new run, absolute; the id sorts by time and is unique.

    address: of the tracking, which a run that trains finds with its password in RUN/config.toml, and nowhere else.
    Raises UserError when it cannot be made.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = Path(settings.run.out).expanduser().resolve() / f"{stamp}-{secrets.token_hex(3)}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {settings.run.out}: no folder can be made there: {error.strerror}.") from None
    if address:
        write_config_file(folder, settings, address)
    return folder


def has_checkpoint(folder: Path) -> bool:
    """Whether the run can go on from something."""
    return (folder / CHECKPOINTS / STATE_FILE).is_file()


@dataclass(frozen=True, kw_only=True)
class RunKind:
    """What a run is, beside its settings."""

    mode: str  # local | centralized | federated | federated_evaluation | twins | ablation | sweep | evaluation
    experiment: str  # without the prefix, where it has one
    label: str  # opens the run's name in the tracking
    clients: Sequence[str] = ()  # in order of their names; a federation's are known later
    trains: bool = True  # with all its settings in the record
    prefixed: bool = True  # whether tracking.experiment_prefix begins the experiment's name
    strategy: str = ""
    program: str = ""  # that made it
    data: Mapping[str, str] = field(default_factory=dict)  # client -> key of its pack, to go on with the same data
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, object] = field(default_factory=dict)


def _guide_params(settings: Settings) -> dict[str, object]:
    """The settings most looked for, under their short names too."""
    return {
        "model": settings.model.backbone,
        "learning_rate": settings.training.lr,
        "batch_size": settings.training.batch_size,
        "max_identities": settings.data.max_people,
    }


def all_params(settings: Settings, kind: RunKind) -> dict[str, object]:
    """The tracking's parameters of a run that trains: all settings, the most looked for twice, and its kind's."""
    flat = {f"{section}.{key}": v for section, table in config.to_mapping(settings).items() for key, v in table.items()}
    return {**flat, **_guide_params(settings), **kind.params}


def federated_kind(settings: Settings, program: str = "") -> RunKind:
    """The kind of a federated run.  program: that made it."""
    federation = settings.federation
    if federation.evaluate_only:
        return RunKind(
            mode=EVALUATED,
            experiment=EVALUATED,
            label=f"{settings.model.backbone}_evaluated",
            program=program,
            params={"evaluated": settings.model.pretrained},
        )
    return RunKind(
        mode="federated",
        experiment=f"federated_{federation.strategy}",
        label=f"{settings.model.backbone}_{federation.strategy}",
        strategy=federation.strategy,
        program=program,
        tags={"strategy": federation.strategy},
        params={
            "method": federation.strategy,
            "rounds": federation.rounds,
            "epochs": settings.planned,  # of each picture: comparable with a run without a federation
            "local_epochs": federation.local_epochs,
            "local_steps": federation.local_steps,
        },
    )


def write_run_file(folder: Path, settings: Settings, kind: RunKind, clients: Sequence[str]) -> None:
    """Say in RUN/run.json what the folder holds, for whoever looks for a model later."""
    about = {
        "mode": kind.mode,
        "strategy": kind.strategy,
        "backbone": settings.model.backbone,
        "normalisation": settings.model.normalisation,
        "clients": sorted(clients),
        "data": dict(kind.data),
    }
    write_json(folder / RUN_FILE, about)


def write_config_file(folder: Path, settings: Settings, address: str = "") -> Path:
    """Write the resolved settings as RUN/config.toml; returns the file of them that others may see.

    Where the tracking address has a password, config.toml is for this user alone, and another file is without it.
    """
    own = shown = folder / CONFIG_FILE
    if address not in ("", settings.tracking.uri):
        shown = folder / _SHOWN_CONFIG_FILE
        write_bytes(own, config.to_toml(settings, address).encode(), mode=0o600)
    write_bytes(shown, config.to_toml(settings).encode())
    return shown


def _own_address(folder: Path, settings: Settings) -> str:
    """The tracking address with its password, where the folder's config.toml has it of the same one."""
    own = config.load_of_run(folder / CONFIG_FILE)[1] if (folder / CONFIG_FILE).exists() else ""
    return own if shown_uri(own) == settings.tracking.uri else settings.tracking.uri


def begin_tracking(settings: Settings, folder: Path, commit: str, kind: RunKind, address: str = "") -> TrackedRun:
    """Begin a run's record, or go on with it, under its kind's name, tags and parameters, and write RUN/run.json.

    One that trains has its settings as parameters too, and as the artifact config.toml; how busy this machine is
    becomes part of it, every `tracking.system_metrics_s`, until the run finishes.
    address: of the tracking; "": what the folder's config.toml has, else the settings.
    Raises TrackingError, and writes nothing, when another process uses the folder.
    """
    shown: list[Path] = []
    address = address or _own_address(folder, settings)

    def prepare() -> None:
        write_run_file(folder, settings, kind, kind.clients)
        if kind.trains:
            shown.append(write_config_file(folder, settings, address))

    gpu = {"gpu_type": gpu_type(kind.tags["device"])} if "device" in kind.tags else {}  # a federation's is known later
    tracked = open_run(
        settings.tracking,
        uri=address,
        folder=folder,
        experiment=f"{settings.tracking.experiment_prefix}_{kind.experiment}" if kind.prefixed else kind.experiment,
        run_name=f"{kind.label}_{folder.name}",
        tags={
            "mode": kind.mode,
            "model_type": settings.model.backbone,
            "facefed_version": facefed_version(),
            "git_commit": commit,
            "run_folder": folder.name,
            **_source(kind.program, commit),
            **_origin(settings),
            **gpu,
            **kind.tags,
        },
        params=all_params(settings, kind) if kind.trains else kind.params,
        prepare=prepare,
        beside=partial(beside, kind.mode),
        about=experiment_note(kind.mode),
    )
    size = settings.data.image_size if kind.trains else None
    model = kind.tags.get("model_type", settings.model.backbone)
    tracked.describe(what=run_note(kind.mode, model, size, kind.strategy))
    if "dataset" in kind.tags:  # a federation's are known later
        tracked.describe(data=data_note(kind.tags["dataset"], kind.tags["dataset_size"], len(kind.clients)))
    for file in shown:
        tracked.log_file(file, CONFIG_FILE)
        sample_hardware(tracked, settings.tracking)
    return tracked


def _source(program: str, commit: str) -> dict[str, str]:
    """MLflow's own tags of where a run comes from."""
    source = {"mlflow.source.type": "LOCAL", "mlflow.source.name": program} if program else {}
    return source | ({"mlflow.source.git.commit": commit} if re.fullmatch("[0-9a-f]{40}", commit) else {})


def _origin(settings: Settings) -> dict[str, str]:
    """Which model a run began with, where its weights came from another: models:/NAME/VERSION, or a run's id."""
    path = Path(settings.model.pretrained)
    if path.name != WEIGHTS_FILE or not path.is_file():
        return {}
    from common.system.checkpoints import read_tensors

    return {"pretrained_from": read_tensors(path)[1].get("from", "unknown")}


@contextlib.contextmanager
def recorded(
    settings: Settings, folder: Path, kind: RunKind, *, address: str = "", command: str = "", commit: str = ""
) -> Iterator[TrackedRun]:
    """A run's record from `begin_tracking` until it finishes with the block, as `finishing` says.

    command: the one that goes on with the run, as `facefed train local`; with it, Ctrl-C becomes an InterruptedRun that
    names it.  commit: of the code; "": this checkout's.
    """
    tracked = begin_tracking(settings, folder, commit or git_commit(), kind, address)
    try:
        with finishing(tracked):
            yield tracked
    except KeyboardInterrupt:
        if not command:
            raise
        raise InterruptedRun(f"stopped; to go on: {command} --resume {folder}") from None


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


def unfinished_federation(run: str, out: str, given: tuple[Settings, str] | None) -> tuple[Path, Settings, str]:
    """The folder, the settings and the tracking address of a federation to go on with.

    given: those of a --config beside --resume, which must be the run's own.  Raises UserError, ConfigError.
    """
    folder, _ = unfinished_run(
        run, out, command="federated", modes=("federated", EVALUATED), is_finished=has_ended_well
    )
    if not has_checkpoint(folder):
        raise UserError(f"--resume {run}: that run was stopped before its first checkpoint; start a new one.")
    own = config.load_of_run(folder / CONFIG_FILE)
    if given is not None:
        _refuse_other_settings(own, given)
    return folder, *own


def _refuse_other_settings(own: tuple[Settings, str], given: tuple[Settings, str]) -> None:
    ours, theirs = config.to_mapping(own[0]), config.to_mapping(given[0])
    differing = [
        f"--resume: {section}.{key} is {value!r} in the run, {theirs[section][key]!r} in --config; leave --config out,"
        " or start a new run."
        for section, values in ours.items()
        for key, value in values.items()
        if theirs[section][key] != value and f"{section}.{key}" not in _MAY_DIFFER
    ]
    if not differing and own[1] != given[1]:  # what it was, nobody is told
        differing = ["--resume: tracking.uri has another password in the run than in --config; leave --config out."]
    if differing:
        raise ConfigError(differing)


def forget_its_end(folder: Path) -> None:
    """Remove what told that the run was over, or should be."""
    for name in (OUTCOME_FILE, STOP_FILE):
        (folder / name).unlink(missing_ok=True)
