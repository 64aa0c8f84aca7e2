"""`facefed evaluate --by`: from a data set with attributes on disk to each model's errors by group."""

import io
import json

import pytest

from common.errors import UserError
from simulation.compare.evaluate import Request, evaluate_models
from simulation.data.synthetic import SynthSettings, write_dataset
from tests.comparable_models import write_run
from tests.tiny_federation import settings_with


@pytest.fixture(scope="module")
def celeba(tmp_path_factory):
    """Drawn people, whose list says of each picture who is Male and who is Young."""
    root = tmp_path_factory.mktemp("by") / "celeba"
    write_dataset(SynthSettings(layout="celeba", num_people=40, pictures_per_person=4), root)
    return root


def evaluated(folder, celeba, *by, **changes):
    write_run(folder / "runs", "l", clients=("celeba",))
    said = io.StringIO()
    request = Request(
        mode="single",
        compare="local",
        runs=(),
        clients=("celeba",),
        data_dirs=(str(celeba),),
        device="cpu",
        cache_dir=celeba.parent / "packs",
        by=by,
    )
    settings = settings_with(run__out=str(folder / "runs"), tracking__plots="none", **changes)
    assert evaluate_models(settings, request, said) == 0
    files = list((folder / "runs").glob("*/groups.json"))
    return said.getvalue(), json.loads(files[0].read_text()) if files else None


def test_errors_by_group_are_shown_and_kept(celeba, tmp_path):
    said, kept = evaluated(tmp_path, celeba, "Male", "Young", verification__group_people=2)
    [model] = kept["models"]
    assert kept["least_people"] == 2
    assert model["model"] == "local-celeba"
    errors = {row["group"]: row for row in model["errors"]}
    people = {row["group"]: row["num_people"] for row in model["errors"]} | model["too_small"]
    assert people["Male"] + people["not Male"] == people["Young"] + people["not Young"] == 8, (
        "all test people are either"
    )
    for row in errors.values():
        assert 0.0 <= row["fmr_low"] <= row["fmr"] <= row["fmr_high"] <= 1.0
        assert 0.0 <= row["fnmr_low"] <= row["fnmr"] <= row["fnmr_high"] <= 1.0
    far = model["threshold"]["far"]
    assert f"local-celeba by group, at its threshold (cosine {model['threshold']['threshold']:.4f}, FAR {far:g}" in said
    assert "worst to best: FMR" in said


def test_groups_of_few_people_are_named_but_not_scored(celeba, tmp_path):
    said, kept = evaluated(tmp_path, celeba, "Male", verification__group_people=30)
    [model] = kept["models"]
    assert model["errors"] == []
    male, others = model["too_small"]["Male"], model["too_small"]["not Male"]
    assert male + others == 8
    assert f"left out, fewer than 30 people: Male {male}, not Male {others}" in said


def test_without_it_nothing_is_said_of_groups_and_an_unknown_attribute_is_refused(celeba, tmp_path):
    said, kept = evaluated(tmp_path, celeba)
    assert kept is None
    assert "by group" not in said
    with pytest.raises(UserError, match="attribute = 'Mael' is unknown; did you mean 'Male'"):
        evaluated(tmp_path / "other", celeba, "Mael")
