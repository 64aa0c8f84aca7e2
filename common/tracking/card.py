"""The card of a registered model (Mitchell et al., FAT* 2019): what it is, of which data, how good, for what, and not.

Markdown, kept beside the model and shown as its version's description.  Counts, figures and settings alone: no person's
name and no path.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from common.metrics.membership import Estimate, Membership
from common.metrics.thresholds import Thresholds
from common.settings import PrivacySettings, Settings

MOST_CHARACTERS: Final = 5000  # of a version's description, in MLflow's tables
MOST_SITES: Final = 3  # whose audit a card shows; of more their number and the span of their AUC
NOT_STATED: Final = "not stated"
# The figures that a card shows, by their names among a model's.
_SHOWN: Final = {
    "roc_auc": "ROC AUC",
    "eer": "equal error rate",
    "tar_at_far_1e-2": "TAR at FAR 1e-2",
    "tar_at_far_1e-3": "TAR at FAR 1e-3",
    "ten_fold_accuracy": "ten-fold accuracy",
    "accuracy": "accuracy, own people",
}
_USE: Final = (
    "Comparing two aligned pictures of faces, and finding a face among enrolled people, by those who may use these"
    " pictures, with a person who decides where a mistake costs somebody something. Not for deciding alone over anyone,"
    " not for people or pictures unlike those it was measured on, and not against pictures held up to the camera:"
    " nothing here tells those."
)
# A card is written once, and `evaluate` comes later: of what that finds the card can say only where it is.
_GROUPS: Final = (
    "Not measured when this version was registered. `facefed evaluate --by ATTRIBUTE` measures errors by group, for"
    " data sets that tell attributes of their people, and keeps them with its own run, in groups.json."
)
_LIMITS: Final = (
    "Its figures are of its test people, on pictures like theirs: others give others, and groups that are"
    " rare in the data fare worse, which these figures do not show. Small,"
    " blurred, turned and covered faces are mistaken more often. Sites'"
    " people are never compared with each other in training or in these figures. An embedding is personal data: from"
    " it a face can partly be drawn again."
)
_PRIVACY: Final = "## Privacy\n\n"
_AUDITED: Final = (
    "Membership inference, tried at sites with their own people (`facefed privacy audit`; an AUC of 0.5 is chance, in"
    " brackets 95 % intervals):"
)


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known of a model when it is registered.

    opening: what it is, and how to load it.  chosen: which round or epoch, a sentence.  data: counts, a sentence.
    tested: figure -> value and ends of its 95 % interval (NaN: none), on test people; empty where it was not tested.
    """

    opening: str
    chosen: str
    data: str
    settings: Settings
    is_federated: bool
    tested: Mapping[str, tuple[float, float, float]]
    intervals: str
    thresholds: Thresholds | None
    groups: str = ""  # errors by group, Markdown; "": not measured


def model_card(card: Card) -> str:
    """The card as Markdown, at most MOST_CHARACTERS long."""
    data = card.data.removeprefix("Data: ")
    text = "\n\n".join(
        [
            card.opening,
            f"## Data\n\n{data} Licence, as stated by who trained it: {card.settings.tracking.data_licence}.",
            f"## Training\n\n{_training(card)} {card.chosen}",
            f"{_PRIVACY}{_privacy(card)}",
            f"## Figures on test people\n\n{_figures(card)}",
            f"## Thresholds\n\n{_thresholds(card.thresholds)}",
            f"## Groups\n\n{card.groups or _GROUPS}",
            f"## Intended use\n\n{_USE}",
            f"## Limits\n\n{_LIMITS}",
        ]
    )
    return _fitting(text)


def with_membership(card: str, audited: Mapping[str, Mapping[str, Membership]]) -> str:
    """The card with what audits found at the end of its privacy, in the place of what stood there of earlier ones.

    audited: site -> what the attacker has -> what they reached, the run's model first; sites beyond MOST_SITES are
    counted.  A card without that section, as somebody may have rewritten it, gets one at its end.
    """
    before, section, after = card.partition(_PRIVACY)
    own, heading, rest = after.partition("\n\n## ")
    own = own.partition(f"\n\n{_AUDITED}")[0] if section else ""
    told = "\n".join([_AUDITED, "", *_audit_rows(audited)])
    text = f"{before.rstrip()}\n\n{_PRIVACY}" if not section else f"{before}{_PRIVACY}{own}\n\n"
    return _fitting(f"{text}{told}{heading}{rest}".lstrip())


def _audit_rows(audited: Mapping[str, Mapping[str, Membership]]) -> Iterator[str]:
    yield "| site | the attacker has | AUC | true positives at 1 % false ones | |"
    yield "|---|---|---|---|---|"
    by_auc = sorted(audited, key=lambda site: -next(iter(audited[site].values())).auc.value)
    for site in by_auc[:MOST_SITES]:
        for attacker, found in audited[site].items():
            verdict = "at chance" if found.is_at_chance else "above chance"
            yield f"| {site} | {attacker} | {_estimate(found.auc)} | {_estimate(found.tpr)} | {verdict} |"
    if others := [next(iter(audited[site].values())).auc.value for site in by_auc[MOST_SITES:]]:
        yield ""
        yield f"Of {len(others)} more sites, all lower: AUC {min(others):.3f} to {max(others):.3f}."


def _estimate(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def _fitting(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 2].rstrip() + " …"


def _training(card: Card) -> str:
    settings = card.settings
    model, training, federation = settings.model, settings.training, settings.federation
    if card.is_federated:
        passes = (
            settings.planned if isinstance(settings.planned, str) else f"{settings.planned} passes over each picture"
        )
        how = f"Federated by {federation.strategy}: {federation.rounds} rounds, {passes}"
    else:
        how = f"In one place: epochs at most {settings.local_training_epochs}"
    begun = "random weights" if model.pretrained == "none" else "weights of an earlier training"
    return (
        f"{how}; head {model.head}, {training.optimiser} at {training.lr:g}, batches of {training.batch_size}, seed"
        f" {settings.run.seed}, begun with {begun}; `data.alignment = {settings.data.alignment}`."
    )


def _privacy(card: Card) -> str:
    privacy = card.settings.privacy
    if not privacy.is_on:
        return (
            "No differential privacy: whoever has the model may find out whether a person was in its training data"
            " better than by guessing (`facefed privacy audit` measures how much)."
        )
    return (
        f"Differential privacy of each {privacy.unit}: epsilon at most {privacy.epsilon:g} at delta {privacy.delta:g}"
        f" over the whole run{_whose_noise(privacy)}, changes clipped to {privacy.clip:g}. What it does not cover"
        " stands in docs/PRIVACY.md."
    )


def _whose_noise(privacy: PrivacySettings) -> str:
    if not privacy.is_shared:
        return ""
    return f" (by all sites' noise together, while at most {privacy.colluding_sites} of them tell theirs)"


def _figures(card: Card) -> str:
    known = {name: card.tested[name] for name in _SHOWN if name in card.tested}
    if not known:
        return "This version was not scored on test people; that of the best round or epoch was."
    rows = ["| figure | value | 95 % interval |", "|---|---|---|"]
    for name, (value, low, high) in known.items():
        ends = "-" if math.isnan(low) or math.isnan(high) else f"{low:.3f} to {high:.3f}"
        rows.append(f"| {_SHOWN[name]} | {value:.4f} | {ends} |")
    return "\n".join([*rows, "", f"{card.intervals}."])


def _thresholds(thresholds: Thresholds | None) -> str:
    if thresholds is None:
        return "None: there were no validation people with genuine and impostor pairs."
    rows = ["| FAR | cosine | FAR measured | TAR measured |", "|---|---|---|---|"]
    rows += [
        f"| {row.far:g} | {row.threshold:.4f} | {row.measured_far:.2g} ({row.far_low:.2g} to {row.far_high:.2g})"
        f" | {row.measured_tar:.3f} ({row.tar_low:.3f} to {row.tar_high:.3f}) |"
        for row in thresholds.rows
    ]
    beyond = ", ".join(f"{far:g}" for far in thresholds.unsupported)
    return "\n".join(
        [
            f"From {thresholds.num_people:,} validation people, {thresholds.num_genuine_pairs:,} genuine and"
            f" {thresholds.num_impostor_pairs:,} impostor pairs; EER {thresholds.eer:.3f} ({thresholds.eer_low:.3f} to"
            f" {thresholds.eer_high:.3f}). In brackets 95 % intervals (Wilson; each pair of people, and each person,"
            " counts once).",
            "",
            *(rows if thresholds.rows else ["No FAR is supported by so few pairs."]),
            *(["", f"Too few impostor pairs for FAR {beyond}."] if beyond and thresholds.rows else []),
        ]
    )
