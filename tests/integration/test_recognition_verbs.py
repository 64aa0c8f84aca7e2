"""`facefed verify`, `enrol`, `identify` and `gallery`, with a small model's file and drawn faces for photographs."""

import ast
import dataclasses
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
from comparable_models import write_run
from recognition_models import DrawnFaces, face, model, put, thresholds

from common.errors import CheckpointError, DataError, UserError
from common.models.recogniser import EmbeddingModel
from common.settings import Settings
from common.system import runtime
from common.tracking.registry import THRESHOLDS
from simulation.cli import main
from simulation.recognition import asking, verbs
from simulation.recognition.gallery import add_people, open_gallery
from simulation.recognition.model import load_model, weights_sha256
from simulation.recognition.verbs import Ask, enrol, identify, list_people, remove, verify

ANN, BEN, CLEO, STRANGER = 1, 2, 3, 9


@pytest.fixture(autouse=True)
def _drawn(monkeypatch):
    for module in (asking, verbs):
        monkeypatch.setattr(module, "Photographs", lambda _size: DrawnFaces())


@pytest.fixture
def file(tmp_path):
    """A model's file."""
    model().keep(tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


@pytest.fixture
def people(tmp_path):
    """Two pictures of Ann, one of Ben, one of Cleo in which no face is."""
    for number in (0, 1):
        put(tmp_path / "people" / "Ann" / f"{number}.png", ANN, drawing=number)
    put(tmp_path / "people" / "Ben" / "b.png", BEN)
    put(tmp_path / "people" / "Cleo" / "c.png")
    return tmp_path / "people"


def said(verb, *arguments, **how):
    out = io.StringIO()
    code = verb(*arguments, out, **how)
    assert code == 0
    return out.getvalue()


def enrolled(folder, people, reference="", mode="add"):
    out, err = io.StringIO(), io.StringIO()
    assert enrol(Settings(), Ask(model=str(reference)), folder, people, out, err, mode=mode) == 0
    return out.getvalue()


def test_two_pictures_are_verified(tmp_path, file):
    first, second, other = (put(tmp_path / f"{n}.png", p, drawing=n) for n, p in enumerate((ANN, ANN, BEN)))
    ask = Ask(model=str(file))
    text = said(verify, Settings(), ask, (first, second))
    assert text.startswith("the same person: score 0.99")
    assert "threshold: FAR 0.001 (95 % interval" in text
    assert "300 genuine and 20,000 impostor pairs" in text
    assert "model: run-1 (SHA-256 " in text
    assert said(verify, Settings(), ask, (first, other)).startswith("two people: score 0.9")
    about = json.loads(said(verify, Settings(), dataclasses.replace(ask, shape="json", far=0.1), (first, other)))
    assert (about["same"], about["far"], about["num_impostor_pairs"]) == (False, 0.1, 20_000)


def test_json_has_null_for_a_number_that_is_none(tmp_path):
    model(known=dataclasses.replace(thresholds(), eer=float("nan"))).keep(tmp_path / "m.safetensors")
    picture = put(tmp_path / "a.png", ANN)
    ask = Ask(model=str(tmp_path / "m.safetensors"), anyway=True, shape="json")
    text = said(verify, Settings(), ask, (picture, picture))
    assert json.loads(text, parse_constant=pytest.fail)["eer"] is None


def test_of_several_faces_the_largest_counts_and_that_is_told(tmp_path, file):
    first, both = put(tmp_path / "a.png", ANN), put(tmp_path / "b.png", ANN, BEN)
    assert "b.png: 2 faces, of which the largest counts" in said(
        verify, Settings(), Ask(model=str(file)), (first, both)
    )


@pytest.mark.parametrize(
    ("first", "told"),
    [("none", "a.png: missing"), ("black", "a.png: no face was found"), ("text", "a.png: unreadable")],
)
def test_a_picture_that_is_none_is_one_line(tmp_path, file, first, told):
    if first == "black":
        put(tmp_path / "a.png")
    elif first == "text":
        (tmp_path / "a.png").write_text("not a picture")
    pictures = (tmp_path / "a.png", put(tmp_path / "b.png", BEN))
    with pytest.raises(DataError, match=told):
        verify(Settings(), Ask(model=str(file)), pictures, io.StringIO())


def test_a_poor_model_is_asked_only_anyway(tmp_path):
    path = tmp_path / "poor.safetensors"
    model(known=thresholds(same_below=120, other_above=8000)).keep(path)
    pictures = (put(tmp_path / "a.png", ANN), put(tmp_path / "b.png", BEN))
    with pytest.raises(UserError, match=r"judges .* of pairs wrongly at its equal error rate"):
        verify(Settings(), Ask(model=str(path)), pictures, io.StringIO())
    text = said(verify, Settings(), Ask(model=str(path), anyway=True, far=0.1), pictures)
    assert "Do not act on its answers" in text


def test_a_model_without_thresholds_decides_nothing(tmp_path):
    dataclasses.replace(model(), thresholds=None).keep(tmp_path / "m.safetensors")
    pictures = (put(tmp_path / "a.png", ANN), put(tmp_path / "b.png", BEN))
    with pytest.raises(UserError, match="carries no thresholds"):
        verify(Settings(), Ask(model=str(tmp_path / "m.safetensors")), pictures, io.StringIO())


def test_people_are_enrolled_told_and_found(tmp_path, file, people):
    folder = tmp_path / "g"
    text = enrolled(folder, people, file)
    assert "left out: Cleo/c.png: no face was found" in text
    assert "not enrolled: Cleo: no picture of theirs was taken" in text
    assert "enrolled: 2 new people, 0 known ones; 3 templates" in text
    assert "enrolled: 0 new people, 0 known ones; 0 templates, 3 were there already" in enrolled(folder, people)
    text = said(identify, Ask(), folder, put(tmp_path / "who.png", BEN, STRANGER, drawing=5), 2)
    assert "face 1 of 2 at 0,0, 32 x 32 px: Ben" in text
    assert "face 2 of 2 at 32,0, 32 x 32 px: unknown" in text
    assert "search: FAR 0.001 a comparison, 0.003 a search of this gallery (3 templates: 1 - (1 - 0.001)^3)" in text
    about = json.loads(said(identify, Ask(shape="json"), folder, tmp_path / "who.png", 2))
    assert [one["name"] for one in about["faces"]] == ["Ben", None]
    assert "Ann   2" in said(list_people, folder)
    assert "removed for good: Ann; 1 enrolled in " in said(remove, folder, ["Ann"])


def test_one_person_under_two_names_is_told(tmp_path, file, people):
    enrolled(tmp_path / "g", people, file)
    put(tmp_path / "more" / "Annie" / "a.png", ANN, drawing=7)
    put(tmp_path / "more" / "Dan" / "d.png", STRANGER)
    text = enrolled(tmp_path / "g", tmp_path / "more")
    assert "warning: Annie and Ann may be one person under two names (score 0.99" in text
    assert text.count("may be one person") == 1


def test_another_model_is_refused_with_the_command_that_works(tmp_path, file, people):
    folder = tmp_path / "g"
    put(people / "Cleo" / "c.png", CLEO)
    enrolled(folder, people, file)
    other = tmp_path / "other.safetensors"
    model(seed=1, source="run-2").keep(other)
    with pytest.raises(UserError) as refused:
        enrolled(folder, people, other)
    assert f"facefed enrol {folder} {people} --model {other} --replace" in str(refused.value)
    enrolled(folder, people, other, mode="replace")
    assert open_gallery(folder).binding.source == "run-2"
    assert said(identify, Ask(), folder, put(tmp_path / "who.png", CLEO, drawing=5), 1).count("Cleo") == 2


def test_a_gallery_needs_a_model_at_first(tmp_path, people):
    with pytest.raises(UserError, match=r"say of which model it shall be: --model"):
        enrolled(tmp_path / "g", people)
    assert not (tmp_path / "g").exists()


def test_nobody_at_all_is_an_error_and_makes_no_gallery(tmp_path, file):
    put(tmp_path / "people" / "Cleo" / "c.png")
    with pytest.raises(UserError, match="nobody can be enrolled"):
        enrolled(tmp_path / "g", tmp_path / "people", file)
    assert not (tmp_path / "g").exists()


def test_a_models_file_gives_the_same_templates(file):
    made, again = model(), load_model(str(file), Settings())
    assert again.binding == made.binding
    assert again.thresholds == made.thresholds
    pictures = np.stack([face(ANN), face(BEN)])
    np.testing.assert_array_equal(again.embed(pictures), made.embed(pictures))


def test_a_runs_model_comes_with_the_thresholds_of_its_folder(tmp_path):
    made = write_run(tmp_path / "runs", "20260101-000000-aaaaaa")
    settings = dataclasses.replace(Settings(), run=dataclasses.replace(Settings().run, out=str(tmp_path / "runs")))
    assert load_model("20260101-000000-aaaaaa", settings).thresholds is None
    (tmp_path / "runs" / "20260101-000000-aaaaaa" / THRESHOLDS).write_text(json.dumps(thresholds().to_json()))
    found = load_model("20260101-000000-aaaaaa", settings)
    assert found.thresholds == thresholds()
    assert found.binding.source == "20260101-000000-aaaaaa"
    assert found.binding.sha256 == weights_sha256(EmbeddingModel(made.backbone))
    (tmp_path / "runs" / "20260101-000000-aaaaaa" / THRESHOLDS).write_text('{"rows": []}')
    with pytest.raises(CheckpointError, match="holds no thresholds"):
        load_model("20260101-000000-aaaaaa", settings)
    checkpoint = tmp_path / "runs" / "20260101-000000-aaaaaa" / "checkpoints" / "best.safetensors"
    with pytest.raises(UserError, match=r"does not say what model it is of; name its run, .*20260101-000000-aaaaaa"):
        load_model(str(checkpoint), settings)


def test_a_file_that_is_no_models_says_what_to_name(tmp_path, file):
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(UserError, match="does not say what model it is of"):
        load_model(str(tmp_path / "x.txt"), Settings())
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(str(file), Settings())


def test_a_gallery_whose_model_was_exchanged_is_not_answered_from(tmp_path, file, people):
    enrolled(tmp_path / "g", people, file)
    model(seed=1).keep(open_gallery(tmp_path / "g").model_file)
    with pytest.raises(UserError, match="restore the folder"):
        identify(Ask(), tmp_path / "g", put(tmp_path / "who.png", BEN), 1, io.StringIO())


def test_pictures_cut_otherwise_are_cautioned_about():
    settings = dataclasses.replace(model().settings, data=dataclasses.replace(Settings().data, alignment="resize"))
    assert (
        "was trained on pictures cut by data.alignment = resize"
        in dataclasses.replace(model(), settings=settings).caution
    )
    assert model().caution == ""


@pytest.mark.parametrize(
    ("cuts", "told"),
    [
        ({"landmarks": 1, "centre square": 1}, "landmarks (1 data set), centre square (1 data set)"),
        ({"box": 2}, "box (2 data sets)"),
        ({"landmarks": 1, "detect": 1, "aligned beforehand": 1}, ""),
    ],
)
def test_how_the_pictures_were_cut_in_truth_counts_and_goes_along_into_a_gallery(tmp_path, people, cuts, told):
    """The settings ask for landmarks; a layout that has none is cut to centre squares."""
    model(known=dataclasses.replace(thresholds(), cuts=cuts)).keep(tmp_path / "m.safetensors")
    said_of = enrolled(tmp_path / "g", people, tmp_path / "m.safetensors")
    picture = put(tmp_path / "who.png", BEN)
    for text in (
        said_of,
        said(identify, Ask(), tmp_path / "g", picture, 1),
        said(verify, Settings(), Ask(model=str(tmp_path / "m.safetensors")), (picture, picture)),
    ):
        lines = [line for line in text.splitlines() if "was trained on pictures cut by" in line]
        assert len(lines) == (1 if told else 0)
        assert told in "".join(lines)


def test_a_models_file_is_used_without_what_finds_runs_and_registered_models():
    """Half a second of a cold `facefed verify`; their import stands where they are called."""
    for module in (asking, verbs, verbs.model_of_file.__globals__["__spec__"].name):
        path = Path(importlib.util.find_spec(module if isinstance(module, str) else module.__name__).origin)
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
        heavy = [node.module for node in top if node.module.startswith(("simulation.compare", "common.tracking.reg"))]
        assert heavy == [], path.name


def test_more_people_than_are_shown_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(verbs, "MOST_SHOWN", 1)
    made = model()
    rows = {name: made.embed(face(ANN, number)[None]) for number, name in enumerate(("Ann", "Annie", "Anna"))}
    added = add_people(tmp_path / "g", made.binding, rows, keep_model=made.keep, again="")
    out = io.StringIO()
    verbs._tell_added(added, made, out)
    assert out.getvalue().count("may be one person") == 1
    assert "and 2 more such pairs" in out.getvalue()


def test_a_program_of_one_answer_looks_for_no_garbage_and_another_caller_is_left_alone(tmp_path, monkeypatch):
    done = []
    for name in ("disable", "freeze"):
        monkeypatch.setattr(runtime.gc, name, lambda name=name: done.append(name))
    asked = ["verify", str(tmp_path / "none.jpg"), str(tmp_path / "none.jpg"), "--model", "m"]
    assert main(asked) == 2
    assert done == []
    monkeypatch.setattr("sys.argv", ["facefed", *asked])
    assert main() == 2
    assert done == ["disable", "freeze"]
