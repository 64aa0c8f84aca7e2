"""`facefed` from Python: what it opens, runs, loads and compares, and its errors."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import facefed
from common.errors import DataError, FaceFedError, UserError
from common.faces.photos import aligned
from facefed import federation
from tests.comparable_models import write_run
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = {"data.image_size": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight people of four pictures each, and a file that is no picture."""
    root = tmp_path_factory.mktemp("faces")
    random = np.random.default_rng(0)
    for person in range(8):
        (root / f"p{person}").mkdir()
        for number in range(4):
            picture = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(picture).save(root / f"p{person}" / f"{number}.png")
    (root / "p0" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return root


def test_a_data_set_is_opened(folder, tmp_path):
    data = facefed.open_data(folder, settings=SIZE, cache_dir=tmp_path / "packs")
    assert (len(data.people), data.num_pictures, data.image_size) == (8, 32, 32)
    assert [path for path, _ in data.left_out] == ["p0/broken.png"]
    faces, names = data.faces()
    assert (faces.shape, faces.dtype, len(names)) == ((32, 32, 32, 3), np.uint8, 32)
    unseen = {name for part in ("validation", "test") for name in data.faces(part)[1]}
    assert unseen
    assert not unseen & set(data.faces("training")[1])
    assert len(data.faces("training", most=2)[0]) == 2


def test_what_cannot_be_opened_is_said(tmp_path):
    with pytest.raises(UserError, match="dataset = 'celebra' is unknown; did you mean 'celeba'"):
        facefed.open_data(tmp_path, "celebra")
    with pytest.raises(DataError):
        facefed.open_data(tmp_path / "nowhere", cache_dir=tmp_path / "packs")


def test_a_model_is_loaded_embeds_and_compares(folder, tmp_path):
    write_run(tmp_path, "made")
    model = facefed.load_model("made", runs=tmp_path)
    assert (model.source, model.image_size) == ("made", 32)
    faces, _ = facefed.open_data(folder, settings=SIZE, cache_dir=tmp_path / "packs").faces(most=5)
    embeddings = model.embed(faces)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1.0, atol=1e-5)
    assert facefed.compare(embeddings[0], embeddings[0]) == pytest.approx(1.0, abs=1e-5)
    scores = facefed.compare(embeddings[:2], embeddings)
    assert scores.shape == (2, 5)
    assert scores[1, 0] == pytest.approx(facefed.compare(embeddings[1], embeddings[0]), abs=1e-6)
    with pytest.raises(UserError, match="no picture to embed"):
        model.embed([])
    with pytest.raises(UserError, match=r"faces are uint8 \[5, 16, 16, 3\], this model takes uint8 \[N, 32, 32, 3\]"):
        model.embed(faces[:, :16, :16])


def test_of_a_photograph_the_largest_face_is_taken(tmp_path, monkeypatch):
    """Finding faces has tests of its own; here one detector stands for another."""
    from common.faces import detect

    write_run(tmp_path, "made")
    photograph = np.random.default_rng(1).integers(0, 256, (80, 90, 3), dtype=np.uint8)
    Image.fromarray(photograph).save(tmp_path / "a.png")
    points = np.array([[30.0, 30], [50, 30], [40, 40], [32, 52], [48, 52]])
    quality = detect.Quality(size_px=40.0, blur=0.1, yaw_deg=0.0, pitch_deg=0.0, roll_deg=0.0)
    large = detect.Face(box=np.array([20.0, 15, 40, 50]), landmarks=points, score=1.0, quality=quality)
    small = detect.Face(box=np.array([60.0, 5, 20, 25]), landmarks=points / 2 + 40, score=1.0, quality=quality)
    found = [large, small]
    monkeypatch.setattr(detect.FaceDetector, "detect", lambda *_: found)
    model = facefed.load_model("made", runs=tmp_path)
    [face] = model.align([tmp_path / "a.png"])
    np.testing.assert_array_equal(face, aligned(photograph, large, 32))
    assert not np.array_equal(face, aligned(photograph, small, 32))
    np.testing.assert_allclose(model.embed([tmp_path / "a.png"]), model.embed(face[None]), atol=1e-6)
    found.clear()
    with pytest.raises(DataError, match=r"a\.png: no face was found"):
        model.align([tmp_path / "a.png"])


def test_a_federation_is_asked_for_as_the_program_would(tmp_path, monkeypatch):
    """The run itself is the program's, and tested there."""
    import simulation.commands

    asked = {}

    def run(settings, clients, *, begun, **how):
        asked.update(settings=settings, clients=clients, **how)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.json").write_text('{"best_round": 2}')
        begun(tmp_path / "run")
        return 0

    monkeypatch.setattr(simulation.commands, "federate_here", run)
    settings = {"federation.rounds": 3, "tracking.uri": "sqlite:///mine.db"}
    ended = facefed.simulate({"celeba": "a", "north": "b", "south:celeba": "c"}, settings=settings, out=io.StringIO())
    assert asked["clients"] == ["celeba=a", "north:folder=b", "south:celeba=c"]
    assert (asked["settings"].federation.rounds, asked["address"]) == (3, "sqlite:///mine.db")
    assert (ended.run_id, ended.metrics["best_round"]) == ("run", 2)


@pytest.mark.parametrize(("code", "error"), [(1, FaceFedError), (130, KeyboardInterrupt)])
def test_a_federation_that_fails_raises_its_line(monkeypatch, code, error):
    import simulation.commands

    def run(*_, err, **__):
        err.write("flower-simulation: the loss is not finite.\n")
        return code

    monkeypatch.setattr(simulation.commands, "federate_here", run)
    with pytest.raises(error, match="^the loss is not finite" if code == 1 else None):
        facefed.simulate({"north": "b"})


def test_every_public_name_is_there_and_described():
    assert set(facefed.__all__) <= set(vars(facefed))
    assert all(getattr(facefed, name).__doc__ for name in facefed.__all__)
    page = (ROOT / "docs" / "API.md").read_text(encoding="utf-8")
    assert [name for name in facefed.__all__ if f"`{name}" not in page] == []
    assert federation.CONFIG in page


def test_importing_it_is_light():
    code = "import sys, facefed; print({'torch', 'mlflow', 'ray', 'flwr'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
