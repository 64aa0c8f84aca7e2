"""A model as ONNX: compared with itself before there is a file, for any batch, with what its user must know."""

import dataclasses
import functools
import io
import sys

import numpy as np
import pytest
import torch

from common.errors import CheckpointError, UserError
from common.models.recogniser import EmbeddingModel, build_backbone
from common.models.table import BACKBONES
from simulation.cli import main
from simulation.recognition import export as module
from simulation.recognition.export import INPUT, OUTPUT, check_output, drawn_faces, export
from simulation.recognition.model import load_model
from tests.comparable_models import write_run
from tests.tiny_federation import settings_with

pytestmark = pytest.mark.usefixtures("one_thread")
VIT = {
    "model__backbone": "vit_tiny", "model__width": 0.125, "model__depth": 2, "model__patch_size": 8,
    "model__attention": "dcal", "model__inference": "both", "model__glca_fraction": 0.25,
}  # fmt: skip
MODELS = {
    "cnn": {"model__width": 0.25},
    "resnet18": {"model__backbone": "resnet18", "model__width": 0.125},
    "groups": {"model__width": 0.25, "model__norm": "group"},
    "vit": VIT,
}


@pytest.fixture(autouse=True, scope="module")
def _drawn_once():
    """The same faces for every model here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "drawn_faces", functools.cache(drawn_faces))
        yield


def made(values):
    settings = settings_with(**values)
    torch.manual_seed(0)
    backbone = build_backbone(settings.model, settings.data.image_size).train()
    with torch.no_grad():  # a training's running statistics are not those of the start
        backbone(torch.rand(8, 3, settings.data.image_size, settings.data.image_size) * 2 - 1)
    return EmbeddingModel(backbone), settings


@pytest.mark.parametrize("name", MODELS)
def test_onnxruntime_gives_the_models_embeddings_for_any_batch(name, tmp_path):
    """On pictures other than those that the export compared."""
    onnxruntime = pytest.importorskip("onnxruntime")
    embedder, settings = made(MODELS[name])
    size, out = settings.data.image_size, io.StringIO()
    parity = export(embedder, settings, "models:/m/1", tmp_path / "model.onnx", out)
    assert (parity.num_pictures, parity.most_apart <= 1e-4) == (100, True)
    assert "100 drawn faces by onnxruntime" in out.getvalue()
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for num in (1, 3, 16):
        pictures = torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(num)) * 2 - 1
        [embeddings] = session.run([OUTPUT], {INPUT: pictures.numpy()})
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1.0, atol=1e-5)
        with torch.inference_mode():
            np.testing.assert_allclose(embeddings, embedder(pictures).numpy(), atol=1e-4)
    told = session.get_modelmeta().custom_metadata_map
    assert told["facefed.source"] == "models:/m/1"
    assert told["facefed.image_size_px"] == str(size)
    assert told["facefed.backbone"] in BACKBONES
    assert "v / 127.5 - 1" in told["facefed.input"]
    assert not [path for path in tmp_path.iterdir() if path.name != "model.onnx"]


def test_a_file_that_answers_otherwise_is_not_written(tmp_path, monkeypatch):
    """Whatever the exporter did wrong: here the graph is another model's."""
    embedder, settings = made(MODELS["cnn"])
    torch.manual_seed(9)
    other = EmbeddingModel(build_backbone(settings.model, settings.data.image_size))
    real = module.to_onnx
    monkeypatch.setattr(module, "to_onnx", lambda _model, size: real(other, size))
    (tmp_path / "model.onnx").write_bytes(b"an earlier one")
    with pytest.raises(CheckpointError, match=r"gives other embeddings \(1 - cosine up to .* was not written") as seen:
        export(embedder, settings, "models:/m/1", tmp_path / "model.onnx", io.StringIO())
    assert "\n" not in str(seen.value)
    assert (tmp_path / "model.onnx").read_bytes() == b"an earlier one"


def test_a_model_of_no_numbers_is_refused(tmp_path):
    embedder, settings = made(MODELS["cnn"])
    with torch.no_grad():
        next(embedder.parameters()).fill_(float("nan"))
    with pytest.raises(CheckpointError, match="gives other embeddings"):
        export(embedder, settings, "x", tmp_path / "model.onnx", io.StringIO())
    assert not list(tmp_path.iterdir())


def test_without_onnxruntime_onnx_itself_compares_as_many(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    embedder, settings = made(MODELS["cnn"])
    out = io.StringIO()
    assert export(embedder, settings, "x", tmp_path / "model.onnx", out).num_pictures == 100
    assert "100 drawn faces by ONNX's reference evaluator" in out.getvalue()
    assert (tmp_path / "model.onnx").exists()


def test_the_faces_are_of_different_people_and_the_same_each_time():
    faces = drawn_faces(4, 32)
    assert (faces.shape, faces.dtype) == ((4, 3, 32, 32), np.float32)
    assert (faces.min() >= -1, faces.max() <= 1, faces.std() > 0.2) == (True, True, True)
    np.testing.assert_array_equal(faces, drawn_faces(4, 32))
    assert all(np.abs(faces[0] - other).mean() > 0.05 for other in faces[1:])


@pytest.mark.parametrize(("name", "told"), [("m.pt", "must end in .onnx"), ("no/m.onnx", "there is no folder")])
def test_where_it_cannot_be_written(tmp_path, name, told):
    with pytest.raises(UserError, match=told):
        check_output(tmp_path / name)
    (tmp_path / "d.onnx").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        check_output(tmp_path / "d.onnx")


def test_the_program_exports_a_run_and_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, "made")
    assert main(["export", "made", "model.onnx", "--out", str(tmp_path)]) == 0
    assert "compared with made: 100 drawn faces" in capsys.readouterr().out
    assert (tmp_path / "model.onnx").stat().st_size > 1000
    load_model("made", settings_with(run__out=str(tmp_path))).keep(tmp_path / "model.safetensors")
    assert main(["export", "model.safetensors", "again.onnx"]) == 0
    capsys.readouterr()
    assert main(["export", "nowhere", "other.onnx"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("facefed: nowhere: there is no such run")
    assert not (tmp_path / "other.onnx").exists()


def test_the_settings_that_are_told_are_the_models_own():
    settings = settings_with()
    told = module.metadata(dataclasses.replace(settings, data=dataclasses.replace(settings.data, image_size=48)), "x")
    assert "[B, 3, 48, 48]" in told["facefed.input"]
