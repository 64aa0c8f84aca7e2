"""The end of training without a federation: the best model's test scores, its pictures, metrics.json, the registry."""

import logging
from collections.abc import Mapping
from typing import Any

from common.evaluation import EvaluationSums, people_digest, pooled
from common.gallery import private_pictures
from common.metrics.verification import roc_auc, roc_curve
from common.models.recogniser import EmbeddingModel
from common.plots import curves, verification
from common.plots.comparison import client_comparison
from common.tracking.registry import register_model
from common.tracking.run import TrackedRun
from server.scores import figures
from simulation.epochs import Epochs
from simulation.trainee import Trainee
from simulation.twin_results import missing_pairs, twin_results

log = logging.getLogger("facefed.simulation")


def record_datasets(tracked: TrackedRun, trainee: Trainee) -> None:
    """Tell the tracking which data are used, by digest and counts."""
    for name, pack in trainee.clients.items():
        for context, digest in (("training", pack.key[:32]), ("testing", people_digest(pack, "test"))):
            tracked.log_dataset(
                name=name,
                digest=digest,
                context=context,
                profile={"num_pictures": len(pack), "num_training_people": pack.num_classes},
            )


def record_results(epochs: Epochs, label: str, untrained: Mapping[str, EvaluationSums]) -> dict[str, Any]:
    """Score the best model on test, draw, and write metrics.json; returns its content.

    label: "local" or "centralized".  untrained: the test sums of the model before training, by client.
    The recogniser holds the best model afterwards.
    """
    trainee, tracked, progress = epochs.trainee, epochs.tracked, epochs.progress
    epochs.load("best")
    tested = trainee.evaluate("test")
    scores = {name: figures(sums) for name, sums in tested.items()}
    total = figures(pooled(tested))
    logged = {f"test_{name}": value for name, value in total.items()}
    if len(tested) > 1:
        logged |= {f"{client}_test_{name}": value for client, own in scores.items() for name, value in own.items()}
    budget = {"num_pictures_processed": progress.num_pictures, "num_gradient_steps": progress.num_steps}
    twins = _twins(trainee, tracked, progress.best_epoch)
    tracked.log_metrics(logged | budget | {"best_epoch": progress.best_epoch}, step=progress.best_epoch)
    results: dict[str, Any] = {
        "best_epoch": progress.best_epoch,
        "best_val_auc": progress.best_val_auc,
        "last_epoch": progress.epoch,
        **budget,
        "num_warmup_pictures": progress.num_warmup_pictures,
        "test": total,
        "clients": scores,
        "untrained": figures(pooled(untrained)),
        "test_pairs": {name: people_digest(pack, "test") for name, pack in trainee.clients.items()},
        "epochs": progress.rows,
        **twins,
    }
    if trainee.settings.tracking.plots != "none":
        _draw(epochs, label, {"untrained": pooled(untrained), label: pooled(tested)}, scores)
    tracked.log_dict(results, "metrics.json")
    return results


def _twins(trainee: Trainee, tracked: TrackedRun, step: int) -> dict[str, Any]:
    """The figures of twins and of strangers apart, logged and drawn, of the one client that knows families."""
    pack, *others = trainee.clients.values()
    if others or pack.family is None:
        return {}
    lacking = missing_pairs(pack)
    if lacking:
        log.warning("%s: no figures of twins and strangers apart: %s.", pack.dataset, lacking)
        return {}
    found = twin_results(trainee.recogniser, pack, trainee.compute, seed=trainee.settings.run.seed)
    tracked.log_metrics(found.metrics(), step=step)
    if trainee.settings.tracking.plots != "none":
        tracked.log_figure(found.curve, "plots/roc_twins.png")
    return {"twins": found.content()}


def _draw(
    epochs: Epochs, label: str, compared: Mapping[str, EvaluationSums], scores: Mapping[str, Mapping[str, float]]
) -> None:
    trainee, tracked = epochs.trainee, epochs.tracked
    tracked.log_figure(curves.training_curves(epochs.progress.rows), "plots/training.png")
    shown = {name: (*roc_curve(sums.pairs), roc_auc(sums.pairs)) for name, sums in compared.items()}
    tracked.log_figure(verification.roc(shown), "plots/roc.png")
    tracked.log_figure(verification.det(shown), "plots/det.png")
    tracked.log_figure(verification.score_histograms(compared[label].pairs), "plots/score_histograms.png")
    if len(scores) > 1:
        tracked.log_figure(client_comparison(scores, pooled=figures(compared[label])), "plots/client_comparison.png")
    for client, pack in trainee.clients.items():
        pictures = private_pictures(
            trainee.own(client), pack, trainee.compute, client=client, seed=trainee.settings.run.seed
        )
        for name, figure in pictures.items():
            tracked.log_figure(figure, f"plots/{name}" if len(scores) == 1 else f"plots/{client}/{name}")


def register_models(epochs: Epochs, name: str) -> list[str]:
    """Register the last, then the best, model under `name`; returns what was registered, for the summary.

    The recogniser holds the best model afterwards.
    """
    trainee, progress, done = epochs.trainee, epochs.progress, []
    if not trainee.settings.tracking.enabled:
        return []
    by_epoch = {int(row["step"]): row for row in progress.rows}
    for role, epoch in (("last", progress.epoch), ("best", progress.best_epoch)):
        epochs.load(role)
        version = register_model(
            epochs.tracked,
            EmbeddingModel(trainee.recogniser.backbone).eval(),
            name=name,
            image_size=trainee.settings.data.image_size,
            step=epoch,
            role=role,
            val_auc=by_epoch[epoch].get("val_roc_auc", float("nan")),
            val_people=trainee.val_people,
            metrics={},
        )
        if version:
            done.append(f"models:/{name}/{version} ({role}, epoch {epoch})")
    return done
