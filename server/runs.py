"""The beginning of a run's record, the same for all modes: its files, and what the tracking is told first."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import config
from common.files import write_json
from common.settings import Settings
from common.tracking.hardware import gpu_type, sample_hardware
from common.tracking.run import TrackedRun, open_run
from common.tracking.settings import without_secrets
from common.version import facefed_version
from server.run_folder import CONFIG_FILE, shown_config_file, write_config_file

RUN_FILE = "run.json"  # what kind of run a folder holds


@dataclass(frozen=True, kw_only=True)
class RunKind:
    """What a run is, beside its settings."""

    mode: str  # local | centralized | federated | twins | ablation | sweep | evaluation
    experiment: str  # without the prefix, where it has one
    label: str  # opens the run's name in the tracking
    clients: Sequence[str] = ()  # in order of their names; a federation's are known later
    prefixed: bool = True  # whether tracking.experiment_prefix begins the experiment's name
    strategy: str = ""
    data: Mapping[str, str] = field(default_factory=dict)  # client -> key of its pack, to go on with the same data
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, object] = field(default_factory=dict)


def flat_params(settings: Settings) -> dict[str, object]:
    """Every setting as one tracking parameter, "model.backbone": "resnet18"."""
    shown = config.to_mapping(without_secrets(settings))
    return {f"{section}.{k}": v for section, values in shown.items() for k, v in values.items()}


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
    return {**flat_params(settings), **_guide_params(settings), **kind.params}


def federated_kind(settings: Settings) -> RunKind:
    """The kind of a federated run."""
    federation = settings.federation
    return RunKind(
        mode="federated",
        experiment=f"federated_{federation.strategy}",
        label=f"{settings.model.backbone}_{federation.strategy}",
        strategy=federation.strategy,
        tags={"strategy": federation.strategy},
        params={"method": federation.strategy, "rounds": federation.rounds, "epochs": federation.local_epochs},
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


def open_record(settings: Settings, folder: Path, commit: str, kind: RunKind) -> TrackedRun:
    """Begin a run's record (or go on with it) under its kind's name, tags and parameters, and write RUN/run.json.

    Raises TrackingError, and writes nothing, when another process uses the folder.
    """
    return _open(settings, folder, commit, kind, lambda: write_run_file(folder, settings, kind, kind.clients))


def _open(settings: Settings, folder: Path, commit: str, kind: RunKind, prepare: Callable[[], None]) -> TrackedRun:
    gpu = {"gpu_type": gpu_type(kind.tags["device"])} if "device" in kind.tags else {}  # a federation's is known later
    return open_run(
        settings.tracking,
        uri=settings.tracking.uri,
        folder=folder,
        experiment=f"{settings.tracking.experiment_prefix}_{kind.experiment}" if kind.prefixed else kind.experiment,
        run_name=f"{kind.label}_{folder.name}",
        tags={
            "mode": kind.mode,
            "model_type": settings.model.backbone,
            "facefed_version": facefed_version(),
            "git_commit": commit,
            "run_folder": folder.name,
            **gpu,
            **kind.tags,
        },
        params=kind.params,
        prepare=prepare,
    )


def begin_tracking(settings: Settings, folder: Path, commit: str, kind: RunKind) -> TrackedRun:
    """The record of a run that trains: with its settings as parameters too, and as the artifact config.toml.

    How busy this machine is becomes part of it, every `tracking.system_metrics_s`, until the run finishes.
    Raises TrackingError, and writes nothing, when another process uses the folder.
    """

    def prepare() -> None:
        write_run_file(folder, settings, kind, kind.clients)
        write_config_file(folder, settings)

    params = all_params(settings, kind)
    tracked = _open(settings, folder, commit, dataclasses.replace(kind, params=params), prepare)
    tracked.log_file(shown_config_file(folder, settings), CONFIG_FILE)
    sample_hardware(tracked, settings.tracking)
    return tracked
