"""The beginning of a federated run's record."""

from pathlib import Path

from common import config
from common.checkpoints import write_bytes
from common.config import Settings
from common.tracking.run import TrackedRun, open_run
from common.version import facefed_version


def flat_params(settings: Settings) -> dict[str, object]:
    """Every setting as one tracking parameter, "model.backbone": "resnet18"."""
    return {f"{section}.{k}": v for section, values in config.to_mapping(settings).items() for k, v in values.items()}


def begin_tracking(settings: Settings, folder: Path, commit: str) -> TrackedRun:
    """Begin the federated run's record, with its settings as parameters and as the artifact config.toml."""
    federation, model = settings.federation, settings.model
    write_bytes(folder / "config.toml", config.to_toml(settings).encode())
    tracked = open_run(
        settings.tracking,
        uri=settings.tracking.uri,
        folder=folder,
        experiment=f"{settings.tracking.experiment_prefix}_federated_{federation.strategy}",
        run_name=f"{model.backbone}_{federation.strategy}_{folder.name}",
        tags={
            "mode": "federated",
            "model_type": model.backbone,
            "strategy": federation.strategy,
            "facefed_version": facefed_version(),
            "git_commit": commit,
            "run_folder": folder.name,
        },
        params=flat_params(settings),
    )
    tracked.log_file(folder / "config.toml", "config.toml")
    return tracked
