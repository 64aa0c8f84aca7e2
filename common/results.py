"""What every run that trained tells at its end, with a federation or without: its registered models and its curves."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.cuts import counted, cut_words
from common.metrics.figures import known_threshold, roc_auc, roc_curve
from common.metrics.intervals import FROM_SUMS, intervals_from_sums
from common.metrics.sums import EvaluationSums
from common.metrics.thresholds import Thresholds, thresholds_from
from common.models.recogniser import EmbeddingModel, Recogniser
from common.plots import verification
from common.settings import Settings
from common.system.files import write_json
from common.tracking.card import Card, model_card
from common.tracking.notes import VERSION, registered_note, version_note
from common.tracking.registry import BEST_AND_LAST, MODEL_CARD, THRESHOLDS, register_model
from common.tracking.run import TrackedRun


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model that a run ends with."""

    step: int  # its round or epoch
    val_auc: float  # NaN where nobody knows it
    load: Callable[[], None]  # puts it into the recogniser
    metrics: Mapping[str, float] = field(default_factory=dict)  # recorded with it
    # The pairs of its validation people, [2, NUM_BINS] of each client; asked for when it was loaded.
    validation: Callable[[], Sequence[NDArray[np.int64]]] = tuple
    # The sums of its test people by client, likewise; of no client where it was not tested.
    tested: Callable[[], Mapping[str, EvaluationSums]] = dict
    groups: str = ""  # its errors by group, for its card; "": not measured


def register_models(
    tracked: TrackedRun,
    settings: Settings,
    recogniser: Recogniser,
    *,
    name: str,
    unit: str,
    val_people: str,
    last: Trained,
    best: Trained,
    cuts: Collection[str] = (),
    held_back: str = "",
) -> list[str]:
    """Register the best after the last model under `name`, or once what is both; returns what was, for the summary.

    unit: of their steps, "round" or "epoch".  val_people: a digest of the people who were validated on.
    cuts: how the pictures of each data set were cut out in truth, of `common.cuts.CUTS`.
    held_back: why the best shall not become champion, as `worse_than_untrained` says it; "": it may.
    The best model's thresholds are kept in the run's folder too, whether it is registered or not.
    The recogniser holds the best model afterwards.
    """
    done = []
    if not settings.tracking.enabled:
        best.load()
        keep_thresholds(tracked, best, cuts)
    models = [(BEST_AND_LAST, best)] if last.step == best.step else [("last", last), ("best", best)]
    for role, model in models if settings.tracking.enabled else ():
        model.load()
        words: list[str] = []
        thresholds = _thresholds(model, cuts)
        chosen = f"{role.capitalize()} {unit}: {model.step}; validation AUC {model.val_auc:.4f}."
        data = " ".join(filter(None, (tracked.described("data"), _cut_line(cuts))))
        card = _card(data, settings, model, name=name, chosen=chosen, thresholds=thresholds)
        if model is best:
            _keep(tracked, thresholds)
        version = register_model(
            tracked,
            EmbeddingModel(recogniser.backbone).eval(),
            name=name,
            image_size=settings.data.image_size,
            step=model.step,
            role=role,
            val_auc=model.val_auc,
            val_people=val_people,
            metrics=model.metrics,
            held_back=held_back if role != "last" else "",
            tell=words.append,
            note=card,
            about=registered_note(name, settings.model.backbone),
            beside={MODEL_CARD: card.replace(VERSION, "VERSION")}
            | ({} if thresholds is None else {THRESHOLDS: json.dumps(thresholds.to_json(), indent=2)}),
            more_tags={
                **({"cut": cut_words(counted(cuts))} if counted(cuts) else {}),
                **({} if thresholds is None else threshold_tags(thresholds)),
            },
        )
        if version is not None:
            done.append("; ".join([f"models:/{name}/{version} ({role}, {unit} {model.step})", *words]))
    return done


def _card(
    data: str, settings: Settings, model: Trained, *, name: str, chosen: str, thresholds: Thresholds | None
) -> str:
    tested = model.tested()
    return model_card(
        Card(
            opening=version_note(name, settings.model.backbone, settings.data.image_size),
            chosen=chosen,
            data=data,
            settings=settings,
            is_federated=name.startswith(f"{settings.model.backbone}_federated_"),
            tested=intervals_from_sums(tested)[1] if tested else {},
            intervals=FROM_SUMS,
            thresholds=thresholds,
            groups=model.groups,
        )
    )


def _cut_line(cuts: Collection[str]) -> str:
    known = counted(cuts)
    return f"Pictures cut out by: {cut_words(known)}." if known else ""


def keep_thresholds(tracked: TrackedRun, best: Trained, cuts: Collection[str]) -> None:
    """Those of the best model, in the run's folder: nothing is registered, and no model is built for it."""
    _keep(tracked, _thresholds(best, cuts))


def _keep(tracked: TrackedRun, thresholds: Thresholds | None) -> None:
    """In the run's folder: whoever uses a run's model without a registry needs them as well."""
    if thresholds is not None:
        write_json(tracked.folder / THRESHOLDS, thresholds.to_json())


def _thresholds(model: Trained, cuts: Collection[str]) -> Thresholds | None:
    """None where nobody was validated on, or only people of one sort of pairs."""
    histograms = model.validation()
    if not histograms or not np.sum(np.stack(histograms), axis=0).any(axis=1).all():
        return None
    return thresholds_from(histograms, counted(cuts))


def threshold_tags(thresholds: Thresholds) -> dict[str, str]:
    """Tags of a model's version: its EER, and its threshold at each FAR that its pairs support."""
    tags = {"val_eer": f"{thresholds.eer:.4f}"}
    return tags | {
        f"threshold_at_far_{row.far:.0e}".replace("e-0", "e-"): f"{row.threshold:.6f}" for row in thresholds.rows
    }


def worse_than_untrained(untrained: Mapping[str, float | None], trained: Mapping[str, float | None]) -> str:
    """What training made worse, in words; "" where nothing is worse.

    untrained, trained: AUC by split, as far as it is known: {"validation": 0.61, "test": 0.58}.  Such a model does not
    become champion.  Nothing is chosen by this: of all rounds or epochs the best is still the one of validation.
    """
    worse = []
    for split, before in untrained.items():
        after = trained.get(split)
        if before is not None and after is not None and after < before:
            worse.append(f"{split} AUC {before:.3f} -> {after:.3f}")
    return f"training ended below the untrained model ({', '.join(worse)})" if worse else ""


_MARGINS: Final[Mapping[str, str]] = {"cosface": "CosFace margin {:g}", "arcface": "ArcFace margin {:g} rad"}


def margin_words(settings: Settings) -> str:
    """What makes the training loss higher than the same model's loss on test, for pictures; "" where nothing does."""
    model = settings.model
    return _MARGINS[model.head].format(model.head_margin) if model.head in _MARGINS and model.head_margin else ""


def draw_scores(
    tracked: TrackedRun,
    compared: Mapping[str, NDArray[np.int64]],
    label: str,
    validation: NDArray[np.int64] | None = None,
) -> None:
    """ROC and DET of all models, and the scores' histograms of the one of that label, where it is among them.

    compared: label -> pair counts [2, bins] int64.  validation: that model's on validation people, for the threshold.
    """
    shown = {name: (*roc_curve(pairs), float(roc_auc(pairs))) for name, pairs in compared.items()}
    if shown:
        tracked.log_figure(verification.roc(shown), "plots/roc.png")
        tracked.log_figure(verification.det(shown), "plots/det.png")
    if label in compared:
        threshold = None if validation is None else known_threshold(validation)
        figure = verification.score_histograms(compared[label], threshold)
        tracked.log_figure(figure, "plots/score_histograms.png")
