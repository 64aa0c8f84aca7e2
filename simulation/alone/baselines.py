"""Training without a federation, with the federation's own training step and evaluation, and the same budget.

At its end the best model's test scores, its pictures, metrics.json and the registry.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from clients.site import SiteSettings
from common.errors import DataError
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.metrics.bootstrap import Drawn
from common.metrics.figures import AUC, FEW_PEOPLE, known_scores, known_threshold
from common.metrics.intervals import FROM_PEOPLE, Intervals, intervals_of_people
from common.metrics.names import of_client
from common.metrics.sums import EvaluationSums, pooled
from common.plots import curves
from common.plots.comparison import client_comparison
from common.plots.style import SHOWN_METHODS
from common.private_figures import HARDEST, hardest, private_pictures
from common.results import Trained, draw_scores, margin_words, register_models, worse_than_untrained
from common.runs import CHECKPOINTS, RunKind, recorded
from common.settings import Settings
from common.system.run_view import begin_rows, compute_words, header_lines, model_words
from common.system.runtime import stream_seed
from common.tracking.notes import chosen_note
from common.tracking.page import where_to_look
from common.tracking.run import TrackedRun
from common.training.evaluation import embed, people_digest
from simulation.alone.epochs import VAL_AUC, AfterEpoch, Epochs, go_on, show_graph
from simulation.alone.trainee import Trainee, centralized_trainee, local_trainee
from simulation.alone.twin_results import NUM_REPLICATES, missing_pairs, twin_results

log = logging.getLogger("facefed.simulation")


@dataclass(frozen=True, kw_only=True)
class BaselineSummary:
    """How a run ended."""

    folder: Path
    epochs: int
    best_epoch: int
    best_val_auc: float
    untrained: Mapping[str, float]  # test figures
    test: Mapping[str, float]  # of the best model, over all clients
    clients: Mapping[str, Mapping[str, float]]  # likewise of each
    below_untrained: str  # what training made worse, in words; "" where nothing is
    few_people: Mapping[str, int]  # client -> how many people its test figures stand on, where these are few
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
        program=f"facefed train {mode}",
        data={name: pack.key for name, pack in trainee.clients.items()},
        tags={
            "model_type": model_type(settings),
            "dataset": "+".join(site.dataset for site in sites.values()),
            "dataset_size": str(len(trainee.pack)),
            "device": trainee.compute.devices,
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
    command = f"facefed train {mode}"
    write_header(trainee, folder, out)
    with recorded(trainee.settings, folder, kind_of(mode, trainee, sites), command=command) as tracked:
        return train_and_test(mode, trainee, tracked, model_name, out)


def write_header(trainee: Trainee, folder: Path, out: TextIO, *, study: str = "") -> None:
    """The first lines of a run without a federation.  study: what is tried in it, in words; "" where nothing is."""
    rows = {"study": study, **_header(trainee, folder)}
    out.writelines(f"{line}\n" for line in header_lines(f"run {folder.name}", rows))
    out.flush()


def _header(trainee: Trainee, folder: Path) -> dict[str, str]:
    recogniser, compute, sizes = trainee.recogniser, trainee.compute, trainee.sizes()
    in_backbone = sum(parameter.numel() for parameter in recogniser.backbone.parameters())
    in_all = sum(parameter.numel() for parameter in recogniser.parameters())
    return {
        "model": model_words(trainee.settings, num_parameters=in_backbone, head=in_all - in_backbone),
        "device": compute_words(compute.devices, compute.precision, compute.threads),
        "data": f"{'; '.join(trainee.clients)}: {sizes['num_training_people']:,} people,"
        f" {sizes['num_training_pictures']:,} pictures to train on; pictures of people kept for validation"
        f" {sizes['num_val_people_pictures']:,}, for test {sizes['num_test_people_pictures']:,}",
        **begin_rows(trainee.settings, folder, look=where_to_look(trainee.settings)),
    }


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
        folder=checkpoints or tracked.folder / CHECKPOINTS,
        after_epoch=after_epoch,
    )
    show_graph(trainee, tracked)
    untrained = score_untrained(trainee)
    epochs.restore()
    epochs.run(out)
    tested = score_best(epochs)
    worse = below_untrained(epochs, untrained, tested)
    registered = register_trained(epochs, model_name, worse, tested) if model_name else []
    results = record_results(epochs, label, untrained, tested)
    return BaselineSummary(
        folder=tracked.folder,
        epochs=epochs.progress.epoch,
        best_epoch=epochs.progress.best_epoch,
        best_val_auc=epochs.progress.best_val_auc,
        untrained=results["untrained"],
        test=results["test"],
        clients=results["clients"],
        below_untrained=worse,
        few_people=few_people(trainee),
        twins=results.get("twins", {}),
        registered=registered,
    )


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


@dataclass(frozen=True, kw_only=True)
class Untrained:
    """The sums of the model before training."""

    val: EvaluationSums  # over all clients
    test: Mapping[str, EvaluationSums]  # by client


def score_untrained(trainee: Trainee) -> Untrained:
    """Score the model as it is before anything is trained or restored."""
    return Untrained(val=trainee.evaluate_pooled("val"), test=trainee.evaluate("test"))


def score_best(epochs: Epochs) -> dict[str, EvaluationSums]:
    """Put the best model into the recogniser and score it on test: client -> sums."""
    epochs.load("best")
    return epochs.trainee.evaluate("test")


def below_untrained(epochs: Epochs, untrained: Untrained, tested: Mapping[str, EvaluationSums]) -> str:
    """What training made worse, as `worse_than_untrained` says it; also a tag of the run."""
    progress = epochs.progress
    best = next((row for row in progress.rows if row["step"] == progress.best_epoch), {})
    worse = worse_than_untrained(
        {"validation": known_scores(untrained.val).get(AUC), "test": known_scores(pooled(untrained.test)).get(AUC)},
        {"validation": best.get(VAL_AUC), "test": known_scores(pooled(tested)).get(AUC)},
    )
    if worse:
        epochs.tracked.set_tags({"below_untrained": worse})
    return worse


def few_people(trainee: Trainee) -> dict[str, int]:
    """Of each client whose test figures stand on fewer than FEW_PEOPLE people, how many these are."""
    tested = {
        name: len(np.unique(pack.person[pack.indices(Split.TEST_PEOPLE)])) for name, pack in trainee.clients.items()
    }
    return {name: number for name, number in tested.items() if 0 < number < FEW_PEOPLE}


def record_results(
    epochs: Epochs, label: str, untrained: Untrained, tested: Mapping[str, EvaluationSums]
) -> dict[str, Any]:
    """Tell the best model's test figures, draw, and write metrics.json; returns its content.

    label: "local" or "centralized".  tested: its test sums by client.  The recogniser holds the best model.
    """
    trainee, tracked, progress = epochs.trainee, epochs.tracked, epochs.progress
    scores = {name: known_scores(sums) for name, sums in tested.items()}
    total = known_scores(pooled(tested))
    validation = trainee.evaluate_pooled("val").pairs
    threshold = known_threshold(validation)
    logged = {f"test_{name}": value for name, value in total.items()}
    if len(tested) > 1:
        logged |= {
            of_client(client, f"test_{name}"): value for client, own in scores.items() for name, value in own.items()
        }
    budget = {"num_pictures_processed": progress.num_pictures, "num_gradient_steps": progress.num_steps}
    twins = _twins(trainee, tracked, progress.best_epoch)
    logged |= {} if threshold is None else {"test_threshold": threshold}
    best = {"best_epoch": progress.best_epoch, f"best_{VAL_AUC}": progress.best_val_auc}
    tracked.log_metrics(logged | budget | best, step=progress.best_epoch)
    tracked.describe(result=chosen_note("epoch", progress.best_epoch, progress.epoch, progress.best_val_auc))
    results: dict[str, Any] = {
        "best_epoch": progress.best_epoch,
        "best_val_auc": progress.best_val_auc,
        "threshold": threshold,
        "last_epoch": progress.epoch,
        **budget,
        "num_warmup_pictures": progress.num_warmup_pictures,
        "test": total,
        "clients": scores,
        "untrained": known_scores(pooled(untrained.test)),
        "untrained_val_auc": known_scores(untrained.val).get(AUC),
        "test_pairs": {
            name: people_digest(pack, "test", trainee.settings.verification.max_pairs)
            for name, pack in trainee.clients.items()
        },
        "epochs": progress.rows,
        **twins,
    }
    if trainee.settings.tracking.plots != "none":
        label = SHOWN_METHODS.get(label, label)
        compared = {"untrained": pooled(untrained.test).pairs, label: pooled(tested).pairs}
        tracked.log_figure(
            curves.training_curves(progress.rows, margin=margin_words(trainee.settings)), "plots/training.png"
        )
        draw_scores(tracked, compared, label, validation)
        _draw_clients(trainee, tracked, tested, threshold)
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


def _draw_clients(
    trainee: Trainee, tracked: TrackedRun, tested: Mapping[str, EvaluationSums], threshold: float | None
) -> None:
    """The clients side by side, where there are several, and what only whoever holds their pictures can draw."""
    if len(tested) > 1:
        scores, of_all = _intervals(trainee, tested)
        figure = client_comparison(scores, pooled=of_all, about=FROM_PEOPLE)
        tracked.log_figure(figure, "plots/client_comparison.png")
    for client, pack in trainee.clients.items():
        recogniser, compute = trainee.own(client), trainee.compute
        pictures = private_pictures(recogniser, pack, compute, client=client, seed=trainee.settings.run.seed)
        for name, picture in pictures.items():
            tracked.log_figure(picture, _place(trainee, client, f"plots/{name}"))
        faces = hardest(recogniser, pack, compute, client=client, threshold=threshold)
        if faces is not None:
            tracked.keep_figure(faces, _place(trainee, client, HARDEST))


def _place(trainee: Trainee, client: str, name: str) -> str:
    """A picture's place: plots/a.png, of several clients plots/CLIENT/a.png."""
    return name if len(trainee.clients) == 1 else name.replace("plots/", f"plots/{client}/", 1)


def _intervals(trainee: Trainee, tested: Mapping[str, EvaluationSums]) -> tuple[dict[str, Intervals], Intervals]:
    """Every figure with its interval, of each client and of all, those of pairs with people drawn."""
    drawn = {}
    for client, pack in trainee.clients.items():
        indices, person, family = pack.shown_in(Split.TEST_PEOPLE)
        embeddings = embed(trainee.recogniser, pack, indices, trainee.compute)
        seed = stream_seed(trainee.settings.run.seed, client, "bootstrap")  # as in `facefed evaluate`
        drawn[client] = Drawn.by_seed(embeddings, person, family, num_replicates=NUM_REPLICATES, seed=seed)
    return intervals_of_people(tested, drawn)


def register_trained(epochs: Epochs, name: str, held_back: str, tested: Mapping[str, EvaluationSums]) -> list[str]:
    """Register the last, then the best, model under `name`; returns what was registered, for the summary.

    held_back: why the best shall not become champion; "": it may.  tested: the best model's test sums by client.
    The recogniser holds the best model afterwards, where tracking is enabled.
    """
    trainee, progress = epochs.trainee, epochs.progress

    def trained(role: str, epoch: int) -> Trained:
        row = next(row for row in progress.rows if row["step"] == epoch)
        return Trained(
            step=epoch,
            val_auc=row.get(VAL_AUC, float("nan")),
            load=partial(epochs.load, role),
            validation=lambda: [sums.pairs for sums in trainee.evaluate("val").values()],
            tested=lambda: tested if epoch == progress.best_epoch else {},
        )

    return register_models(
        epochs.tracked,
        trainee.settings,
        trainee.recogniser,
        name=name,
        unit="epoch",
        val_people=trainee.val_people,
        cuts=[pack.cut for pack in trainee.clients.values()],
        last=trained("last", progress.epoch),
        best=trained("best", progress.best_epoch),
        held_back=held_back,
    )
