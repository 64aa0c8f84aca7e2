"""`facefed attention` on run folders and on a registered model: the page it draws, what it says, what it refuses."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import simulation.attention
from common import config
from common.faces.batches import to_float
from common.models.dcal import VitBackbone, attention_of
from common.models.recogniser import EmbeddingModel, Recogniser
from common.settings import TrackingSettings
from common.system.runtime import PATIENCE, SILENCE
from common.tracking.address import resolve_uri
from common.tracking.registry import register_model
from common.tracking.run import open_run
from simulation.attention import threshold_of
from simulation.cli import main
from tests.comparable_models import write_run
from tests.tiny_federation import SIDE, settings_with

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),  # MLflow's tables
    pytest.mark.usefixtures("tables_once"),
]

VIT = {
    "model__backbone": "vit_tiny", "model__width": 0.125, "model__depth": 2, "model__patch_size": 8,
    "model__attention": "dcal", "model__inference": "both", "model__glca_fraction": 0.25,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    """A program sets the environment, its logger and MLflow; one thread, for the machine's sake."""
    for name, value in {**SILENCE, **PATIENCE}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    logger, threads = logging.getLogger("facefed"), torch.get_num_threads()
    before = (logger.level, list(logger.handlers), logger.propagate)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    logger.setLevel(before[0])
    logger.handlers, logger.propagate = before[1], before[2]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with three pictures of several sizes and kinds."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for name, shape in (("a.jpg", (50, 40, 3)), ("b.png", (32, 90, 3)), ("c.webp", (64, 64, 3))):
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(name, quality=95)
    return tmp_path


@pytest.fixture
def drawn(monkeypatch):
    """What the command gives the page, as (pictures, maps, names, title)."""
    kept = []
    draw = simulation.attention.attention_maps

    def watched(pictures, maps, names, *, title):
        kept.append((pictures, maps, names, title))
        return draw(pictures, maps, names, title=title)

    monkeypatch.setattr(simulation.attention, "attention_maps", watched)
    return kept


def shaken(model: Recogniser, checkpoint: Path | None = None) -> Recogniser:
    """Uneven attention; saved where a checkpoint is named."""
    from common.system.checkpoints import write_tensors

    stream = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=stream))
    if checkpoint is not None:
        write_tensors(checkpoint, model.state_dict(), {"epoch": "2"})
    return model.eval()


def a_run(place: Path, run_id: str = "r1", **changes: object) -> Recogniser:
    """A finished run of a ViT in runs/, and its model."""
    model = write_run(place / "runs", run_id, **{**VIT, **changes})
    return shaken(model, place / "runs" / run_id / "checkpoints" / "best.safetensors")


def assert_maps_are_of(model: Recogniser, pictures, maps) -> None:
    assert isinstance(model.backbone, VitBackbone)
    expected = attention_of(model.backbone, to_float(torch.from_numpy(pictures)))
    for name in ("rollout", "last", "chosen", "glca"):
        torch.testing.assert_close(getattr(maps, name), getattr(expected, name), rtol=1e-4, atol=1e-6)


def cosine_of(model: Recogniser, pictures) -> float:
    one, other = EmbeddingModel(model.backbone)(to_float(torch.from_numpy(pictures)))
    return float(one @ other)


def refused(arguments, capsys) -> str:
    """The one line of a refusal."""
    capsys.readouterr()
    assert main(["attention", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("facefed: ")
    assert said.err.count("\n") == 1, said.err
    return said.err


def test_a_run_by_its_id_and_by_its_folder(place, drawn, capsys):
    model = a_run(place)
    for name in ("r1", "runs/r1", str(place / "runs/r1")):
        assert main(["attention", "--model", name, "a.jpg", "b.png", "c.webp", "-o", "maps.png"]) == 0
        said = capsys.readouterr().out
        assert "model: r1 (vit_tiny, dcal, embeds with both), 32 px in patches of 8 px\nmaps: maps.png" in said
        pictures, maps, names, title = drawn.pop()
        assert pictures.shape == (3, SIDE, SIDE, 3)
        assert names == ["a.jpg", "b.png", "c.webp"]
        assert title == "Where the model looked: r1 (vit_tiny, dcal, embeds with both)"
        assert_maps_are_of(model, pictures, maps)
    with Image.open("maps.png") as page:
        assert page.size[0] == 1200


def test_the_centre_square_is_seen_and_the_crop_cuts_it(place, drawn):
    a_run(place)
    pixels = np.zeros((64, 96, 3), dtype=np.uint8)
    pixels[16:48, 32:64] = 250  # the central half of the shorter side
    Image.fromarray(pixels).save("d.png")
    for crop, share in (((), 0.25), (("--crop", "0.5"), 1.0)):
        assert main(["attention", "--model", "r1", "d.png", "-o", "maps.png", *crop]) == 0
        assert (drawn.pop()[0] > 125).mean() == pytest.approx(share, abs=0.02)


def test_two_pictures_are_compared(place, drawn, capsys):
    model = a_run(place)
    asked = ["attention", "--model", "r1", "a.jpg", "b.png", "-o", "maps.png"]
    assert main(asked) == 0
    pictures, _, _, title = drawn.pop()
    cosine = cosine_of(model, pictures)
    line = f"cosine similarity {cosine:.3f}"
    assert f"{line}; no decision: the run has no threshold from validation\n" in capsys.readouterr().out
    assert line in title
    for threshold, decision in ((cosine - 0.01, "the same person"), (cosine + 0.01, "two people")):
        metrics = {"best_epoch": 2, "twins": {"threshold": threshold}}
        (place / "runs/r1/metrics.json").write_text(json.dumps(metrics))
        assert main(asked) == 0
        assert f"{line}: {decision} (threshold {threshold:.3f}, from validation)\n" in capsys.readouterr().out


def test_a_threshold_that_is_none():
    for metrics in (
        {},
        {"twins": None},
        {"twins": {}},
        {"twins": {"threshold": "0.5"}},
        {"twins": {"threshold": True}},
    ):
        assert threshold_of(metrics) is None
    assert threshold_of({"twins": {"threshold": float("nan")}}) is None
    assert threshold_of({"twins": {"threshold": 0}}) == 0.0


def test_the_global_model_of_a_federation(place, drawn):
    model = write_run(place / "runs", "f1", mode="federated", strategy="fedavg", clients=("alpha", "beta"), **VIT)
    assert main(["attention", "--model", "f1", "a.jpg", "-o", "maps.svg"]) == 0
    pictures, maps, *_ = drawn.pop()
    assert_maps_are_of(model.eval(), pictures, maps)
    assert Path("maps.svg").read_text().startswith("<?xml")


def test_a_plain_vit_has_no_glca(place, drawn, capsys):
    write_run(place / "runs", "sa", **{**VIT, "model__attention": "sa", "model__inference": "sa"})
    assert main(["attention", "--model", "sa", "a.jpg", "-o", "maps.png"]) == 0
    assert (drawn[0][1].glca, drawn[0][1].chosen) == (None, None)
    assert capsys.readouterr().out.startswith("model: sa (vit_tiny), 32 px")


def test_pictures_of_one_name_are_told_apart(place, drawn):
    a_run(place)
    Path("other").mkdir()
    shutil.copy("a.jpg", "other/a.jpg")
    assert main(["attention", "--model", "r1", "a.jpg", "other/a.jpg", "b.png", "-o", "maps.png"]) == 0
    assert drawn[0][2] == ["a.jpg", "other/a.jpg", "b.png"]


@pytest.mark.parametrize("inference", ["both", "sa"])  # with "sa", GLCA is in the export and has no part in it
def test_a_registered_model(inference, place, drawn, capsys):
    """Its architecture comes from its run's config.toml, its tensors from the exported program."""
    values = {**VIT, "model__inference": inference}
    uri = resolve_uri("sqlite:///elsewhere.db", place)
    model = shaken(write_run(place, "made", **values))
    run = open_run(TrackingSettings(), uri=uri, folder=place / "run", experiment="e", run_name="n", tags={}, params={})
    run.log_text(config.to_toml(settings_with(**values)), "config.toml")
    run.log_dict({"best_epoch": 7, "twins": {"threshold": 0.25}}, "metrics.json")
    register_model(
        run, EmbeddingModel(model.backbone), name="twins_vit_tiny_local", image_size=SIDE, step=7, role="best",
        val_auc=0.8, val_people="p", metrics={},
    )  # fmt: skip
    run.finish("FINISHED")
    asked = ["a.jpg", "b.png", "-o", "maps.png", "--tracking-uri", uri]
    for name in ("models:/twins_vit_tiny_local@champion", "models:/twins_vit_tiny_local/1"):
        assert main(["attention", "--model", name, *asked]) == 0
        pictures, maps, *_ = drawn.pop()
        assert_maps_are_of(model, pictures, maps)
        said = capsys.readouterr().out
        assert said.startswith(f"model: models:/twins_vit_tiny_local/1 (vit_tiny, dcal, embeds with {inference})")
        assert f"cosine similarity {cosine_of(model, pictures):.3f}: " in said
        assert "(threshold 0.250, from validation)" in said
    for name, fragment in (
        ("models:/twins_vit_tiny_local/9", "models:/twins_vit_tiny_local/9: not found at sqlite"),
        ("models:/nobody@champion", "models:/nobody@champion: not found at sqlite"),
        ("models:/nobody", "write models:/NAME/VERSION or models:/NAME@champion"),
    ):
        assert fragment in refused(["--model", name, *asked], capsys)
    assert "tracking is off" in refused(["--model", "models:/a/1", *asked, "--no-mlflow"], capsys)


def test_a_registered_model_whose_run_says_nothing(place, capsys):
    uri = resolve_uri("sqlite:///elsewhere.db", place)
    model = write_run(place, "made", **VIT)
    run = open_run(TrackingSettings(), uri=uri, folder=place / "run", experiment="e", run_name="n", tags={}, params={})
    register_model(
        run, EmbeddingModel(model.backbone), name="bare", image_size=SIDE, step=7, role="best", val_auc=0.8,
        val_people="p", metrics={},
    )  # fmt: skip
    run.finish("FINISHED")
    line = refused(["--model", "models:/bare/1", "a.jpg", "-o", "maps.png", "--tracking-uri", uri], capsys)
    assert "its run has no readable config.toml" in line
    assert line.endswith("so nobody knows how to build it; name a run's folder instead.\n")


def test_what_it_refuses_leaves_nothing(place, capsys):
    a_run(place)
    write_run(place / "runs", "cnn")
    write_run(
        place / "runs", "fedbn", mode="federated", strategy="fedavg", clients=("alpha",),
        **{**VIT, "model__normalisation": "private"},
    )  # fmt: skip
    (place / "runs" / "half").mkdir()
    for name in ("run.json", "config.toml"):
        shutil.copy(place / "runs/r1" / name, place / "runs/half")
    (place / "runs" / "table").mkdir()
    (place / "runs/table/run.json").write_text('{"mode": "evaluation"}')
    a_run(place, "cut")
    weights = place / "runs/cut/checkpoints/best.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    a_run(place, "other")
    shutil.copy(place / "runs/cnn/checkpoints/best.safetensors", place / "runs/other/checkpoints/best.safetensors")
    Path("bad.jpg").write_bytes(Path("a.jpg").read_bytes()[:200])
    Path("text.jpg").write_text("no picture")
    before = set(place.rglob("*"))
    page = ["-o", "maps.png"]
    for arguments, *fragments in (
        (["--model", "r1", *page], "no picture: name at least one"),
        (["--model", "r1", *["a.jpg"] * 25, *page], "25 pictures: one page shows at most 24"),
        (["--model", "r1", "none.jpg", *page], "none.jpg: missing; name a JPEG, PNG, WebP or BMP file."),
        (["--model", "r1", "bad.jpg", *page], "bad.jpg: unreadable: "),
        (["--model", "r1", "text.jpg", *page], "text.jpg: unreadable: not a JPEG, PNG, WebP or BMP picture"),
        (["--model", "r1", "runs", *page], "runs: not a file"),
        (["--model", "r2", "a.jpg", *page], "--model r2: there is no such run in runs"),
        (["--model", "r1", "--out", "none", "a.jpg", *page], "--model r1: there is no such run in none"),
        (["--model", "runs", "a.jpg", *page], "--model runs: runs has no run.json"),
        (["--model", "half", "a.jpg", *page], "--model half: the run has not finished"),
        (["--model", "table", "a.jpg", *page], "--model table: that run trained no model"),
        (["--model", "cut", "a.jpg", *page], "cut/checkpoints/best.safetensors is not a whole safetensors file"),
        (["--model", "other", "a.jpg", *page], "backbone.", " is missing", "it is of another model"),
        (["--model", "cnn", "a.jpg", *page], "--model cnn: cnn has no attention to show", "vit_tiny"),
        (["--model", "fedbn", "a.jpg", *page], "fedbn has private normalisation"),
        (["--model", "r1", "a.jpg", "-o", "none/maps.png"], "-o none/maps.png: there is no folder none"),
        (["--model", "r1", "a.jpg", "-o", "maps.gif"], "-o maps.gif: .gif is no picture that can be written", ".png"),
        (["--model", "r1", "a.jpg", "-o", "maps"], "-o maps: no suffix is no picture"),
        (["--model", "r1", "a.jpg", *page, "--crop", "0"], "--crop 0.0: not in [0.1, 1]"),
        (["--model", "r1", "a.jpg", *page, "--crop", "nan"], "--crop nan: not in"),
        (["--model", "models:/a/1", "a.jpg", *page], "models:/a/1: there is no registry at sqlite"),
    ):
        line = refused(arguments, capsys)
        for fragment in fragments:
            assert fragment in line
    assert set(place.rglob("*")) == before


def test_numbers_that_are_not_finite(place, capsys):
    from common.system.checkpoints import write_tensors

    model = a_run(place)
    with torch.no_grad():
        model.backbone.trunk.class_token.fill_(float("nan"))
    write_tensors(place / "runs/r1/checkpoints/best.safetensors", model.state_dict(), {"epoch": "2"})
    line = refused(["--model", "r1", "a.jpg", "-o", "maps.png"], capsys)
    assert "r1 gives numbers that are not finite" in line
    assert not Path("maps.png").exists()


def test_every_suffix_it_offers_can_be_written():
    from matplotlib.backend_bases import FigureCanvasBase

    assert set(simulation.attention.FORMATS) <= set(FigureCanvasBase.get_supported_filetypes())
