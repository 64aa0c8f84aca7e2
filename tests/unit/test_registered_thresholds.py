"""Each model that a run registers gets the thresholds of its own validation people, or none where it has none."""

import json
from dataclasses import replace

import numpy as np
import pytest

from common import results
from common.metrics.sums import NOTHING, NUM_BINS
from common.metrics.thresholds import Thresholds, thresholds_from
from common.results import Trained, register_models
from common.settings import ModelSettings, Settings, TrackingSettings
from common.tracking.registry import THRESHOLDS
from server.record.history import History, RoundRecord


def histogram(seed):
    return np.random.default_rng(seed).integers(0, 9, (2, NUM_BINS))


def sums_with(pairs):
    return replace(NOTHING, pairs=pairs, folds=np.ones_like(NOTHING.folds))


class Tracked:
    def __init__(self, folder):
        self.folder = folder

    def described(self, part):
        return f"{part}."


class Given(dict):
    """What `register_model` was given, by role.  folder: the run's."""

    folder = None


@pytest.fixture
def registered(monkeypatch, tmp_path):
    given = Given()
    given.folder = tmp_path

    def register(_tracked, _model, *, role, **rest):
        given[role] = rest
        return "1"

    class Embedding:
        def __init__(self, _backbone):
            pass

        def eval(self):
            return self

    monkeypatch.setattr(results, "register_model", register)
    monkeypatch.setattr(results, "EmbeddingModel", Embedding)
    return given


def models(folder, last, best, enabled=True, cuts=()):
    recogniser = type("Recogniser", (), {"backbone": None})()
    settings = Settings(model=ModelSettings(backbone="cnn"), tracking=TrackingSettings(enabled=enabled))
    known = {"name": "m", "unit": "round", "val_people": "p", "cuts": cuts}
    register_models(Tracked(folder), settings, recogniser, **known, last=last, best=best)


def test_the_pairs_are_asked_for_when_the_model_was_loaded(registered):
    loaded = []

    def trained(step):
        def validation():
            assert loaded[-1] == step, "of another model"
            return [histogram(step), histogram(10 + step)]

        return Trained(step=step, val_auc=0.7, load=lambda: loaded.append(step), validation=validation)

    models(registered.folder, trained(3), trained(2))
    for role, step in (("last", 3), ("best", 2)):
        wanted = thresholds_from([histogram(step), histogram(10 + step)])
        assert Thresholds.from_json(json.loads(registered[role]["beside"][THRESHOLDS])) == wanted
        assert registered[role]["more_tags"]["threshold_at_far_1e-1"] == f"{wanted.at(0.1).threshold:.6f}"


def test_the_card_is_kept_beside_it_and_is_its_description(registered):
    tested = {"a": sums_with(histogram(4))}
    best = Trained(step=2, val_auc=0.7, load=lambda: None, validation=lambda: [histogram(2)], tested=lambda: tested)
    models(registered.folder, Trained(step=3, val_auc=0.6, load=lambda: None), best)
    card = registered["best"]["beside"]["model_card.md"]
    assert "| ROC AUC | " in card
    assert "models:/m/VERSION" in card
    assert registered["best"]["note"] == card.replace("VERSION", "{version}")
    assert "was not scored on test people" in registered["last"]["note"]


def test_errors_by_group_stand_in_the_card_where_they_were_measured(registered):
    best = Trained(step=2, val_auc=0.7, load=lambda: None, validation=lambda: [histogram(2)], groups="| Male |")
    models(registered.folder, Trained(step=3, val_auc=0.6, load=lambda: None), best)
    assert "## Groups\n\n| Male |\n" in registered["best"]["note"]
    assert "Not measured when this version was registered" in registered["last"]["note"]


def test_how_the_pictures_were_cut_stands_in_the_thresholds_the_tags_and_the_card(registered):
    best = Trained(step=2, val_auc=0.7, load=lambda: None, validation=lambda: [histogram(2)])
    models(registered.folder, best, best, cuts=["centre square", "landmarks", "centre square", ""])
    given = registered["best and last"]
    assert json.loads(given["beside"][THRESHOLDS])["cuts"] == {"landmarks": 1, "centre square": 2}
    assert given["more_tags"]["cut"] == "landmarks (1 data set), centre square (2 data sets)"
    assert "Pictures cut out by: landmarks (1 data set), centre square (2 data sets)." in given["note"]


@pytest.mark.parametrize("pairs", [[], [np.zeros((2, NUM_BINS), dtype=np.int64)]])
def test_without_validation_pairs_there_are_none(registered, pairs):
    models(registered.folder, *2 * [Trained(step=1, val_auc=float("nan"), load=lambda: None, validation=lambda: pairs)])
    assert THRESHOLDS not in registered["best and last"]["beside"]
    assert registered["best and last"]["more_tags"] == {}
    assert not (registered.folder / THRESHOLDS).exists()


@pytest.mark.parametrize(("enabled", "step"), [(True, 3), (True, 2), (False, 3), (False, 2)])
def test_the_best_models_are_kept_in_the_runs_folder_too(registered, enabled, step):
    loaded = []

    def trained(step):
        return Trained(
            step=step, val_auc=0.7, load=lambda: loaded.append(step), validation=lambda: [histogram(loaded[-1])]
        )

    models(registered.folder, trained(3), trained(step), enabled)
    kept = Thresholds.from_json(json.loads((registered.folder / THRESHOLDS).read_text()))
    assert kept == thresholds_from([histogram(step)])
    assert loaded[-1] == step


def test_a_federation_knows_the_pairs_of_each_client_or_of_all():
    history = History()
    of_each = {"a": sums_with(histogram(1)), "b": sums_with(histogram(2))}
    history.rounds[1] = RoundRecord(0, totals={"val": of_each["a"] + of_each["b"]}, sums={"val": of_each})
    history.rounds[2] = RoundRecord(0, totals={"val": of_each["a"] + of_each["b"]})
    history.rounds[3] = RoundRecord(0)
    assert history.tested_sums(1) == {}
    one, two, three = (history.validation_pairs(step) for step in (1, 2, 3))
    np.testing.assert_array_equal(np.stack(one), [histogram(1), histogram(2)])
    np.testing.assert_array_equal(np.stack(two), [histogram(1) + histogram(2)])
    assert three == []
