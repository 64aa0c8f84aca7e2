"""Training without a federation, with the federation's own training step and evaluation, and the same budget."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from clients.site import SiteSettings
from common.errors import DataError, InterruptedRun
from common.faces.pack import FacePack
from common.settings import Settings
from common.tracking.run import TrackedRun, finishing
from common.version import git_commit
from server.runs import RunKind, begin_tracking
from simulation.epochs import AfterEpoch, Epochs, go_on
from simulation.results import record_datasets, record_results, register_models
from simulation.trainee import Trainee, centralized_trainee, local_trainee
from simulation.twin_results import missing_pairs
from simulation.watching import show_graph


@dataclass(frozen=True, kw_only=True)
class BaselineSummary:
    """How a run ended."""

    folder: Path
    epochs: int
    best_epoch: int
    best_val_auc: float
    untrained_auc: float
    test_auc: float
    twins: Mapping[str, Any]  # as in metrics.json; empty where there are no families
    registered: list[str]


def experiment_of_twins(settings: Settings) -> str:
    """The tracking's experiment of a run on twins: a baseline when attention has no branch beside self-attention."""
    return "twin-verification-baseline" if settings.model.attention == "sa" else "twin-face-verification"


def model_type(settings: Settings) -> str:
    """What the tracking calls the kind of model: the backbone, with the branches it has beside self-attention."""
    attention = settings.model.attention
    return settings.model.backbone if attention == "sa" else f"{settings.model.backbone}_{attention}"


def kind_of(mode: str, trainee: Trainee, sites: Mapping[str, SiteSettings]) -> RunKind:
    """The kind of a run without a federation.  mode: local, centralized or twins."""
    settings, backbone = trainee.settings, trainee.settings.model.backbone
    experiment = {"local": f"local_{trainee.name}", "twins": experiment_of_twins(settings)}.get(mode, mode)
    return RunKind(
        mode=mode,
        experiment=experiment,
        prefixed=mode != "twins",
        label={"local": f"{trainee.name}_{backbone}", "twins": f"twins_{model_type(settings)}"}.get(
            mode, f"{backbone}_{mode}"
        ),
        clients=list(trainee.clients),
        data={name: pack.key for name, pack in trainee.clients.items()},
        tags={
            "model_type": model_type(settings),
            "dataset": "+".join(site.dataset for site in sites.values()),
            "dataset_size": str(len(trainee.pack)),
            "device": trainee.compute.device,
        },
        params={
            "client": "+".join(trainee.clients),
            "epochs": settings.local_training_epochs,
            "precision": trainee.compute.precision,
            "memory_format": trainee.compute.memory_format,
            "compiled": trainee.compute.compiled,
            "threads": trainee.compute.threads,
            **trainee.sizes(),
        },
    )


def run_local(settings: Settings, site: SiteSettings, pack: FacePack, folder: Path, out: TextIO) -> BaselineSummary:
    """Train one holder alone into the run's folder, or go on there; score the best epoch on test, register it.

    Raises TrainingFailed, CheckpointError.
    """
    trainee = local_trainee(settings, site, pack)
    return _run("local", trainee, {site.name: site}, f"{site.name}_{settings.model.backbone}_local", folder, out)


def check_twins(site: SiteSettings, pack: FacePack) -> None:
    """Raise DataError when the data set has no families, or test or validation lack a kind of pairs."""
    if pack.family is None:
        raise DataError(f"{site.data_dir}: {site.dataset} says nothing of families; train twins needs a set of twins.")
    lacking = missing_pairs(pack)
    if lacking:
        raise DataError(f"{site.data_dir}: {lacking}; each needs two families, and siblings with two pictures each.")


def run_twins(settings: Settings, site: SiteSettings, pack: FacePack, folder: Path, out: TextIO) -> BaselineSummary:
    """Train on a data set of twins, otherwise as `run_local`.

    Raises also DataError when the data set has no families, or test or validation lack a kind of pairs.
    """
    check_twins(site, pack)
    trainee = local_trainee(settings, site, pack)
    return _run("twins", trainee, {site.name: site}, f"{settings.model.backbone}_twins", folder, out)


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
    tracked = begin_tracking(trainee.settings, folder, git_commit(), kind_of(mode, trainee, sites))
    try:
        with finishing(tracked):
            return train_and_test(mode, trainee, tracked, model_name, out)
    except KeyboardInterrupt:
        raise InterruptedRun(f"stopped; to go on: facefed train {mode} --resume {folder}") from None


def train_and_test(
    label: str,
    trainee: Trainee,
    tracked: TrackedRun,
    model_name: str,
    out: TextIO,
    *,
    checkpoints: Path | None = None,
    after_epoch: AfterEpoch = go_on,
) -> BaselineSummary:
    """Train into a record that was begun, and score the best epoch on test.

    label: of the model in pictures.  model_name: to register under; "": not registered.
    checkpoints: where they lie; by default in the run's folder.
    """
    record_datasets(tracked, trainee)
    epochs = Epochs(
        trainee=trainee,
        tracked=tracked,
        folder=checkpoints or tracked.folder / "checkpoints",
        after_epoch=after_epoch,
    )
    show_graph(trainee, tracked)
    untrained = trainee.evaluate("test")
    epochs.restore()
    epochs.run(out)
    registered = register_models(epochs, model_name) if model_name else []
    results = record_results(epochs, label, untrained)
    return BaselineSummary(
        folder=tracked.folder,
        epochs=epochs.progress.epoch,
        best_epoch=epochs.progress.best_epoch,
        best_val_auc=epochs.progress.best_val_auc,
        untrained_auc=results["untrained"]["roc_auc"],
        test_auc=results["test"]["roc_auc"],
        twins=results.get("twins", {}),
        registered=registered,
    )
