"""A registered model's card says what is known of it, with intervals, and fits into MLflow's description."""

import math

import numpy as np
import pytest

from common.metrics.membership import Estimate, Membership
from common.metrics.sums import NUM_BINS
from common.metrics.thresholds import thresholds_from
from common.settings import ModelSettings, PrivacySettings, Settings, TrackingSettings
from common.tracking.card import MOST_CHARACTERS, MOST_SITES, Card, model_card, with_membership
from common.tracking.notes import version_note

FIGURES = dict.fromkeys(("roc_auc", "eer", "tar_at_far_1e-2", "tar_at_far_1e-3"), (0.91234, 0.8, 0.95))


def card_of(**changes):
    histogram = np.zeros((2, NUM_BINS), dtype=np.int64)
    histogram[0, 4000:8000], histogram[1, 2000:6000] = 3, 7
    given = {
        "opening": version_note("resnet18_federated_fedavg", "resnet18", 112),
        "chosen": "Best round: 7; validation AUC 0.9000.",
        "data": "Data: celeba, vggface2, 2 sites, 2,760 pictures.",
        "settings": Settings(tracking=TrackingSettings(data_licence="research only")),
        "is_federated": True,
        "tested": FIGURES | {"loss": (1.0, math.nan, math.nan)},
        "intervals": "95 % intervals from sums",
        "thresholds": thresholds_from([histogram]),
    }
    return model_card(Card(**(given | changes)))


def test_it_says_what_is_known():
    card = card_of()
    for words in (
        "## Data\n\nceleba, vggface2, 2 sites, 2,760 pictures. Licence, as stated by who trained it: research only.",
        f"Federated by fedavg: {Settings().federation.rounds} rounds",
        "Best round: 7; validation AUC 0.9000.",
        "No differential privacy",
        "| ROC AUC | 0.9123 | 0.800 to 0.950 |",
        "genuine and 28,000 impostor pairs",
        "| 0.001 | ",
        "Too few impostor pairs for FAR 0.0001.",
        "## Intended use",
        "## Limits",
        "Not measured when this version was registered. `facefed evaluate --by ATTRIBUTE` measures",
    ):
        assert words in card
    assert "loss" not in card.partition("## Figures")[2].partition("## Thresholds")[0]


def test_of_training_in_one_place_and_with_privacy():
    private = Settings(
        privacy=PrivacySettings(unit="person", epsilon=6.0), model=ModelSettings(pretrained="w.safetensors")
    )
    card = card_of(settings=private, is_federated=False)
    assert "In one place: epochs at most" in card
    assert "epsilon at most 6 at delta 1e-05 over the whole run" in card
    assert "begun with weights of an earlier training" in card
    assert "w.safetensors" not in card, "no path"
    assert "Licence, as stated by who trained it: not stated." in card


def test_what_is_not_known_is_said():
    card = card_of(tested={}, thresholds=None)
    assert "This version was not scored on test people" in card
    assert "None: there were no validation people" in card


@pytest.mark.parametrize("licence", ["x" * 100, "x" * 9000])
def test_it_fits_into_a_description(licence):
    card = card_of(settings=Settings(tracking=TrackingSettings(data_licence=licence)))
    assert len(card) <= MOST_CHARACTERS
    assert card.endswith("…") == (len(licence) > 1000)


def seen(auc):
    estimate = Estimate(auc, auc - 0.1, auc + 0.1)
    rate = Estimate(0.02, 0.01, 0.03)
    return Membership(auc=estimate, tpr=rate, fpr=rate, num_members=9, num_calibrating=8, num_held_out=7)


def test_audits_stand_at_the_end_of_privacy_in_the_place_of_earlier_ones():
    card = card_of()
    first = with_membership(card, {"alpha": {"the run's model": seen(0.5), "its own reply": seen(0.75)}})
    before, _, after = card.partition("\n\n## Figures")
    assert first.startswith(f"{before}\n\nMembership inference, ")
    assert first.endswith(f"\n\n## Figures{after}")
    assert "| alpha | the run's model | 0.500 (0.400 to 0.600) | 0.020 (0.010 to 0.030) | at chance |" in first
    assert "| alpha | its own reply | 0.750 (0.650 to 0.850) | 0.020 (0.010 to 0.030) | above chance |" in first
    second = with_membership(first, {"alpha": {"the run's model": seen(0.625)}})
    assert "0.625" in second
    assert "0.500" not in second
    assert len(second) < len(first)


def test_of_many_sites_the_most_exposed_are_shown_and_the_others_counted():
    sites = {f"s{n}": {"the run's model": seen(0.5 + n / 100)} for n in range(MOST_SITES + 4)}
    card = with_membership(card_of(), sites)
    assert [f"| s{n} |" in card for n in range(MOST_SITES + 4)] == [False] * 4 + [True] * MOST_SITES
    assert "Of 4 more sites, all lower: AUC 0.500 to 0.530." in card
    assert len(card) < MOST_CHARACTERS


def test_a_description_that_somebody_wrote_anew_gets_a_section():
    card = with_membership("My best model.", {"alpha": {"the run's model": seen(0.5)}})
    assert card.startswith("My best model.\n\n## Privacy\n\nMembership inference, ")
