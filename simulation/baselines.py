"""Training without a federation, with the federation's own training step and evaluation, and the same budget."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from clients.local_update import Workplace, open_workplace, val_people_digest
from clients.site import SiteSettings
from common import config
from common.checkpoints import read_tensors, write_bytes, write_tensors
from common.config import Settings
from common.evaluation import EvaluationSums, evaluate
from common.faces.pack import FacePack
from common.metrics.verification import roc_auc, roc_curve
from common.models.pretrained import load_pretrained
from common.models.recogniser import EmbeddingModel
from common.plots import curves, verification
from common.precision import resolve_compute, threads_for
from common.runtime import num_cores
from common.tracking.registry import register_model
from common.tracking.run import TrackedRun, open_run
from common.training import Compute, make_optimiser, train_epochs
from common.version import facefed_version, git_commit
from server.run_folder import new_run_folder
from server.runs import flat_params
from server.scores import closed_scores, open_scores


@dataclass(frozen=True, kw_only=True)
class LocalSummary:
    """How local training ended."""

    folder: Path
    epochs: int
    best_epoch: int
    untrained_auc: float
    test_auc: float
    registered: str


@dataclass(kw_only=True)
class LocalRun:
    """One holder's training: what it needs, and the best epoch so far (by validation AUC, never by test)."""

    settings: Settings
    workplace: Workplace
    compute: Compute
    tracked: TrackedRun
    folder: Path
    best_epoch: int = 0
    best_val_auc: float = float("-inf")

    def train(self, out: TextIO) -> list[dict[str, float]]:
        """All epochs; returns one row of figures for each, and leaves the best and the last model in checkpoints/."""
        epochs = self.settings.local_training_epochs
        recogniser = self.workplace.recogniser
        self.compute.place(recogniser)
        optimiser = make_optimiser(recogniser, self.settings.training)
        rows = []
        for epoch in range(epochs):
            started = time.perf_counter()
            sums = train_epochs(
                recogniser,
                optimiser,
                self.workplace.pack,
                settings=self.settings,
                compute=self.compute,
                epochs=range(epoch, epoch + 1),
                total_epochs=epochs,
                stream_name=self.workplace.site.name,
            )
            row = {**sums.merged(), "learning_rate": sums.lr_last, "epoch_seconds": time.perf_counter() - started}
            row |= self._validate(epoch + 1)
            self.tracked.log_metrics(row, step=epoch + 1)
            rows.append({"step": float(epoch + 1), **row})
            out.write(
                f"epoch {epoch + 1} of {epochs}: train loss {row['train_loss']:.3f}, val AUC {row['val_roc_auc']:.3f},"
                f" {row['epoch_seconds']:.1f} s\n"
            )
            out.flush()
        self._save("last", epochs)
        return rows

    def _validate(self, epoch: int) -> dict[str, float]:
        scores = figures(evaluate(self.workplace.recogniser, self.workplace.pack, "val", self.compute))
        if scores["roc_auc"] > self.best_val_auc:
            self.best_epoch, self.best_val_auc = epoch, scores["roc_auc"]
            self._save("best", epoch)
        names = {"val_loss": "loss", "val_acc": "accuracy", "val_roc_auc": "roc_auc"}
        return {name: scores[key] for name, key in names.items() if key in scores}

    def checkpoint(self, role: str) -> Path:
        """The file of the "best" or the "last" model."""
        return self.folder / "checkpoints" / f"{role}.safetensors"

    def _save(self, role: str, epoch: int) -> None:
        write_tensors(self.checkpoint(role), self.workplace.recogniser.state_dict(), {"epoch": str(epoch)})

    def load(self, role: str) -> None:
        """Put the "best" or the "last" model back into the recogniser."""
        tensors, _ = read_tensors(self.checkpoint(role))
        self.workplace.recogniser.load_state_dict(tensors)

    def test(self) -> EvaluationSums:
        """The present model on the test split."""
        return evaluate(self.workplace.recogniser, self.workplace.pack, "test", self.compute)


def figures(sums: EvaluationSums) -> dict[str, float]:
    """The scores of both sets; those of the closed set are missing when no picture was left for it."""
    return closed_scores(sums) | open_scores(sums)


def _begin_tracking(settings: Settings, site: SiteSettings, pack: FacePack, folder: Path) -> TrackedRun:
    write_bytes(folder / "config.toml", config.to_toml(settings).encode())
    tracked = open_run(
        settings.tracking,
        uri=settings.tracking.uri,
        folder=folder,
        experiment=f"{settings.tracking.experiment_prefix}_local_{site.name}",
        run_name=f"{site.name}_{settings.model.backbone}_{folder.name}",
        tags={
            "mode": "local",
            "model_type": settings.model.backbone,
            "dataset": site.dataset,
            "dataset_size": str(len(pack.person)),
            "device": site.device,
            "facefed_version": facefed_version(),
            "git_commit": git_commit(),
        },
        params={**flat_params(settings), "client": site.name, "num_training_people": pack.num_classes},
    )
    tracked.log_file(folder / "config.toml", "config.toml")
    return tracked


def run_local(settings: Settings, site: SiteSettings, pack: FacePack, out: TextIO) -> LocalSummary:
    """Train one holder alone, score the best epoch on test, register it.  Raises TrainingFailed."""
    folder = new_run_folder(settings)
    tracked = _begin_tracking(settings, site, pack, folder)
    status = "FAILED"
    try:
        compute = resolve_compute(
            settings, device=site.device, threads=threads_for(settings, 1, num_cores()), cache_dir=site.cache_dir
        )
        workplace = open_workplace(site, settings)
        # In a federation the server loads these weights and sends them; here nobody else does.
        load_pretrained(
            workplace.recogniser.backbone, name=settings.model.backbone, pretrained=settings.model.pretrained
        )
        run = LocalRun(
            settings=settings,
            workplace=workplace,
            compute=compute,
            tracked=tracked,
            folder=folder,
        )
        summary = _train_and_test(run, out)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracked.finish(status)
    return summary


def _train_and_test(run: LocalRun, out: TextIO) -> LocalSummary:
    untrained = run.test()
    rows = run.train(out)
    run.load("best")
    tested = run.test()
    scores = figures(tested)
    run.tracked.log_metrics({f"test_{name}": value for name, value in scores.items()}, step=run.best_epoch)
    results: dict[str, Any] = {
        "best_epoch": run.best_epoch,
        "best_val_auc": run.best_val_auc,
        "test": scores,
        "untrained": figures(untrained),
        "epochs": rows,
    }
    run.tracked.log_dict(results, "metrics.json")
    _draw(run, rows, untrained, tested)
    return LocalSummary(
        folder=run.folder,
        epochs=run.settings.local_training_epochs,
        best_epoch=run.best_epoch,
        untrained_auc=roc_auc(untrained.pairs),
        test_auc=scores["roc_auc"],
        registered=_register(run),
    )


def _draw(run: LocalRun, rows: list[dict[str, float]], untrained: EvaluationSums, tested: EvaluationSums) -> None:
    if run.settings.tracking.plots == "none":
        return
    run.tracked.log_figure(curves.training_curves(rows), "plots/training.png")
    shown = {
        label: (*roc_curve(sums.pairs), roc_auc(sums.pairs))
        for label, sums in (("untrained", untrained), ("local", tested))
    }
    run.tracked.log_figure(verification.roc(shown), "plots/roc.png")
    run.tracked.log_figure(verification.score_histograms(tested.pairs), "plots/score_histograms.png")


def _register(run: LocalRun) -> str:
    settings, site = run.settings, run.workplace.site
    if not settings.tracking.enabled:
        return ""
    name = f"{site.name}_{settings.model.backbone}_local"
    version = register_model(
        run.tracked,
        EmbeddingModel(run.workplace.recogniser.backbone).eval(),
        name=name,
        image_size=settings.data.image_size,
        step=run.best_epoch,
        role="best",
        val_auc=run.best_val_auc,
        val_people=val_people_digest(run.workplace.pack),
        metrics={},
    )
    return f"models:/{name}/{version}" if version else ""
