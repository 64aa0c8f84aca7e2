"""A registered model's card says what is known of it, with intervals, and fits into MLflow's description."""

import math

import numpy as np
import pytest

from common.metrics.sums import NUM_BINS
from common.metrics.thresholds import thresholds_from
from common.settings import ModelSettings, PrivacySettings, Settings, TrackingSettings
from common.tracking.card import MOST_CHARACTERS, Card, model_card
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
