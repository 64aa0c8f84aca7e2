"""Training without a federation, with the federation's own training step and evaluation, and the same budget."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from clients.site import SiteSettings
from common.config import Settings
from common.errors import InterruptedRun
from common.faces.pack import FacePack
from common.tracking.run import TrackedRun, finishing
from common.version import git_commit
from server.runs import RunKind, begin_tracking
from simulation.epochs import Epochs
from simulation.results import record_datasets, record_results, register_models
from simulation.trainee import Trainee, centralized_trainee, local_trainee


@dataclass(frozen=True, kw_only=True)
class BaselineSummary:
    """How a run ended."""

    folder: Path
    epochs: int
    best_epoch: int
    untrained_auc: float
    test_auc: float
    registered: list[str]


def _kind(mode: str, trainee: Trainee, sites: Mapping[str, SiteSettings]) -> RunKind:
    backbone = trainee.settings.model.backbone
    local = mode == "local"
    return RunKind(
        mode=mode,
        experiment=f"local_{trainee.name}" if local else mode,
        label=f"{trainee.name}_{backbone}" if local else f"{backbone}_{mode}",
        clients=list(trainee.clients),
        data={name: pack.key for name, pack in trainee.clients.items()},
        tags={
            "dataset": "+".join(site.dataset for site in sites.values()),
            "dataset_size": str(len(trainee.pack)),
            "device": trainee.compute.device,
        },
        params={
            "client": "+".join(trainee.clients),
            "epochs": trainee.settings.local_training_epochs,
            **trainee.sizes(),
        },
    )


def run_local(settings: Settings, site: SiteSettings, pack: FacePack, folder: Path, out: TextIO) -> BaselineSummary:
    """Train one holder alone into the run's folder, or go on there; score the best epoch on test, register it.

    Raises TrainingFailed, CheckpointError.
    """
    trainee = local_trainee(settings, site, pack)
    return _run("local", trainee, {site.name: site}, f"{site.name}_{settings.model.backbone}_local", folder, out)


def run_centralized(
    settings: Settings, sites: Mapping[str, SiteSettings], packs: Mapping[str, FacePack], folder: Path, out: TextIO
) -> BaselineSummary:
    """Train on all holders' pictures in one place, what a federation is measured against; otherwise as `run_local`.

    sites, packs: by client, in order of their names.
    """
    trainee = centralized_trainee(settings, sites, packs)
    return _run("centralized", trainee, sites, f"{settings.model.backbone}_centralized", folder, out)


def _run(
    mode: str, trainee: Trainee, sites: Mapping[str, SiteSettings], model_name: str, folder: Path, out: TextIO
) -> BaselineSummary:
    tracked = begin_tracking(trainee.settings, folder, git_commit(), _kind(mode, trainee, sites))
    try:
        with finishing(tracked):
            return _train_and_test(mode, trainee, tracked, model_name, out)
    except KeyboardInterrupt:
        raise InterruptedRun(f"stopped; to go on: facefed train {mode} --resume {folder}") from None


def _train_and_test(mode: str, trainee: Trainee, tracked: TrackedRun, model_name: str, out: TextIO) -> BaselineSummary:
    record_datasets(tracked, trainee)
    epochs = Epochs(trainee=trainee, tracked=tracked, folder=tracked.folder / "checkpoints")
    untrained = trainee.evaluate("test")
    epochs.restore()
    epochs.run(out)
    registered = register_models(epochs, model_name)
    results = record_results(epochs, mode, untrained)
    return BaselineSummary(
        folder=tracked.folder,
        epochs=epochs.progress.epoch,
        best_epoch=epochs.progress.best_epoch,
        untrained_auc=results["untrained"]["roc_auc"],
        test_auc=results["test"]["roc_auc"],
        registered=registered,
    )
