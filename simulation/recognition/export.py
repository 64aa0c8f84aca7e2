"""`facefed export`: a trained model as an ONNX file, compared with the model itself before the file is written.

Input `pictures` float32 [B, 3, S, S] in [-1, 1], RGB, any B; output `embeddings` float32 [B, D] of length 1.  What the
pictures must be stands in the file, under `METADATA`.
"""

import contextlib
import importlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import CheckpointError, UserError
from common.models.recogniser import EmbeddingModel
from common.settings import Settings
from common.system.files import write_bytes
from common.system.runtime import facefed_version
from common.tracking.address import with_absolute_tracking
from simulation.data.synth_camera import sample_view
from simulation.data.synth_people import person_latent, picture_generator
from simulation.data.synth_portrait import render_face
from simulation.data.synthetic import layout_of
from simulation.recognition.model import load_model

if TYPE_CHECKING:
    import onnx

OPSET: Final = 20  # onnxruntime takes it since 1.17 (January 2024); GELU is one operator from here on
INPUT: Final = "pictures"
OUTPUT: Final = "embeddings"
MOST_APART: Final = 1e-4  # 1 - cosine between the two embeddings of a picture
NUM_PICTURES: Final = 100  # compared at export

_BATCHES: Final = (1, 4, 5)  # in turn: any size must do
_SEED, _STREAM = 1, 77  # of the people who are drawn for the comparison, and of no data set

Pictures = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How alike the answers of the file and of the model are."""

    num_pictures: int
    most_apart: float  # the largest 1 - cosine of a picture
    evaluator: str  # what ran the file

    @property
    def line(self) -> str:
        """In words."""
        return (
            f"{self.num_pictures} drawn faces by {self.evaluator}, 1 - cosine at most {max(self.most_apart, 0.0):.1e}"
            f" (allowed: {MOST_APART:.0e})"
        )


def check_output(path: Path) -> None:
    """What can be known before a model is loaded.  Raises UserError."""
    if path.suffix.lower() != ".onnx":
        raise UserError(f"{path}: the file to write must end in .onnx; name it so.")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file to write.")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it, or name another file.")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: {path.parent} cannot be written; name another file.")


def export_model(settings: Settings, model: str, path: Path, out: TextIO, address: str = "") -> int:
    """`facefed export`: nothing is written unless the model is there and its file answers as it does.

    settings: of the command: --out, the tracking.  model: models:/..., a run's id or folder, a gallery's model file.
    address: of the tracking, with its password; "": the settings' own is whole.
    """
    check_output(path)
    settings, address = with_absolute_tracking(settings, address or settings.tracking.uri, Path.cwd())
    ready = load_model(model, settings, address, named=model)
    export(ready.embedder, ready.settings, ready.binding.source, path, out)
    return 0


def export(embedder: EmbeddingModel, settings: Settings, source: str, path: Path, out: TextIO) -> Parity:
    """Write the model as ONNX, if the file answers as the model does.

    embedder: in evaluation mode, on the CPU.  settings: of its training.  source: models:/NAME/VERSION or a run's id.
    Raises UserError, CheckpointError when the answers differ or are not finite; nothing is written then.
    """
    check_output(path)
    size = settings.data.image_size
    proto = to_onnx(embedder, size)
    for key, value in metadata(settings, source).items():
        proto.metadata_props.add(key=key, value=value)
    content = proto.SerializeToString()
    parity = compared(embedder, content, size)
    if not parity.most_apart <= MOST_APART:
        raise CheckpointError(
            f"{source}: its ONNX file gives other embeddings (1 - cosine up to {parity.most_apart:.1e}, allowed"
            f" {MOST_APART:.0e}), so {path} was not written; name another model, and report this one's settings."
        )
    write_bytes(path, content)
    width = proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    graph = f"{INPUT} [B, 3, {size}, {size}] -> {OUTPUT} [B, {width}]"
    out.write(f"{path}: {len(content) / 1e6:,.1f} MB, opset {OPSET}; {graph}\ncompared with {source}: {parity.line}\n")
    return parity


def to_onnx(embedder: EmbeddingModel, image_size: int) -> "onnx.ModelProto":
    """The graph, with any batch size.  image_size: S, px."""
    example = torch.zeros(2, 3, image_size, image_size)
    with _quiet():
        program = torch.onnx.export(
            embedder,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            external_data=False,
            verbose=False,
        )
    if program is None:
        raise TypeError("torch.onnx.export made no program")
    proto: onnx.ModelProto = program.model_proto
    return proto


def metadata(settings: Settings, source: str) -> dict[str, str]:
    """What whoever runs the file must know; all texts."""
    size = settings.data.image_size
    return {
        "facefed.version": facefed_version(),
        "facefed.source": source,
        "facefed.backbone": settings.model.backbone,
        "facefed.image_size_px": str(size),
        "facefed.alignment": settings.data.alignment,
        "facefed.input": (
            f"{INPUT}: float32 [B, 3, {size}, {size}], RGB, channels first, each value v / 127.5 - 1 of v in 0..255; a"
            " face aligned as in training: by data.alignment, for landmarks the ArcFace template of 112 px, scaled"
        ),
        "facefed.output": f"{OUTPUT}: float32 [B, D], of length 1; the dot product of two is their cosine similarity",
    }


def compared(embedder: EmbeddingModel, content: bytes, image_size: int) -> Parity:
    """Run the file and the model on the same pictures, in batches of several sizes.  content: the file's."""
    name, run = _evaluator(content)
    pictures = drawn_faces(NUM_PICTURES, image_size)
    most, start, turn = 0.0, 0, 0
    while start < NUM_PICTURES:
        part = pictures[start : start + _BATCHES[turn % len(_BATCHES)]]
        start, turn = start + len(part), turn + 1
        with torch.inference_mode():
            own = embedder(torch.from_numpy(part)).numpy()
        cosine = (own.astype(np.float64) * run(part)).sum(axis=1)
        # Written so that a number that is no number counts as apart.
        most = max(most, float(np.where(np.isfinite(cosine), 1.0 - cosine, np.inf).max()))
    return Parity(num_pictures=NUM_PICTURES, most_apart=most, evaluator=name)


def _evaluator(content: bytes) -> tuple[str, Callable[[Pictures], Pictures]]:
    """What runs the file: its name, and a function."""
    try:
        onnxruntime = importlib.import_module("onnxruntime")  # by name: it is used where it is, and needed nowhere
    except ImportError:
        from onnx import load_from_string
        from onnx.reference import ReferenceEvaluator

        evaluator: Any = ReferenceEvaluator(load_from_string(content))
        name = "ONNX's reference evaluator"
    else:
        evaluator = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        name = f"onnxruntime {onnxruntime.__version__}"

    def run(pictures: Pictures) -> Pictures:
        embeddings: Pictures = evaluator.run([OUTPUT], {INPUT: pictures})[0]
        return embeddings

    return name, run


def drawn_faces(num_pictures: int, image_size: int) -> Pictures:
    """Faces of as many people who do not exist, float32 [N, 3, S, S] in [-1, 1], the same at each call."""
    style = layout_of("celeba").style
    faces = []
    for person in range(num_pictures):
        view = sample_view(picture_generator(_SEED, _STREAM, person, 0), style)
        face = render_face(person_latent(_SEED, _STREAM, person), view, style, (image_size, image_size))
        faces.append(face.picture)
    chosen = np.stack(faces).transpose(0, 3, 1, 2).astype(np.float32)
    return np.ascontiguousarray(chosen / 127.5 - 1.0, dtype=np.float32)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter and onnxscript print and warn of: it is about their own inside."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
