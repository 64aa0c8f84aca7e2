"""A trained model in use: aligned faces -> templates, with the thresholds that its validation people gave.

It comes from a run's folder, from MLflow's registry, or from a file that `FaceModel.keep` wrote, as every gallery has
one: that file needs neither the run nor the registry.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from common import config
from common.cuts import BY_LANDMARKS, cut_words
from common.errors import CheckpointError, UserError
from common.faces.batches import evaluation_batches
from common.metrics.thresholds import Thresholds
from common.models.recogniser import EmbeddingModel, build_backbone, named_state, shared_names
from common.protocol.parameters import buffer_sha256, flatten, manifest_of
from common.settings import Settings
from common.system.checkpoints import read_sealed, read_tensors, write_sealed
from common.system.events import RUN_FILE
from common.system.files import read_json
from simulation.recognition.gallery import Binding
from simulation.recognition.search import Float32

if TYPE_CHECKING:
    from simulation.compare.model_lookup import FoundModel

_ABOUT: Final = "facefed.model"
_ABOUT_FORMAT: Final = "facefed.format"
_FORMAT: Final = 1
_BATCH: Final = 32


@dataclass(frozen=True, kw_only=True)
class FaceModel:
    """A model that is ready to be asked."""

    binding: Binding
    settings: Settings
    embedder: EmbeddingModel
    thresholds: Thresholds | None  # None: nobody validated it on people it did not see

    @property
    def image_size(self) -> int:
        """Side of the faces that it takes, px."""
        return self.settings.data.image_size

    @property
    def caution(self) -> str:
        """What to know of its figures; "" where nothing is special."""
        written = {} if self.thresholds is None else self.thresholds.cuts
        asked = self.settings.data.alignment
        if BY_LANDMARKS.issuperset(written or (asked,)):
            return ""
        how = cut_words(written) if written else f"data.alignment = {asked}"  # nobody wrote down what was done
        return (
            f"warning: {self.binding.source} was trained on pictures cut by {how}, not on faces aligned by their"
            " landmarks alone, as they are here: its thresholds need not hold."
        )

    def embed(self, faces: NDArray[np.uint8]) -> Float32:
        """Aligned faces uint8 RGB [N, S, S, 3] -> templates [N, D] float32 of length 1.

        Raises CheckpointError for a model whose numbers are not finite.
        """
        with torch.inference_mode():
            batches = evaluation_batches(faces, np.arange(len(faces)), batch_size=_BATCH, device="cpu")
            parts = [self.embedder(batch).numpy() for batch in batches]
        templates = np.concatenate(parts).astype(np.float32)
        if not (np.abs(np.linalg.norm(templates, axis=1) - 1.0) < 1e-3).all():
            raise CheckpointError(
                f"{self.binding.source} gives numbers that are not finite, or nothing but zeros; name a run whose"
                " training went well."
            )
        return templates

    def keep(self, path: Path) -> None:
        """Write it into a file that `load_model` takes."""
        about = {
            "source": self.binding.source,
            "settings": _kept(self.settings),
            "thresholds": None if self.thresholds is None else self.thresholds.to_json(),
        }
        notes = {_ABOUT: json.dumps(about, sort_keys=True), _ABOUT_FORMAT: str(_FORMAT)}
        write_sealed(path, dict(self.embedder.state_dict()), notes)


def load_model(reference: str, settings: Settings, address: str = "", named: str = "") -> FaceModel:
    """The model that models:/NAME@ALIAS, a run's id or folder, or a file of `FaceModel.keep` names.

    settings: of the command: where runs are kept, the tracking.  address: of the tracking, with its password.
    named: what the user wrote, for the line of an error; "": --model REFERENCE.
    Raises UserError, CheckpointError, TrackingError.
    """
    path = Path(reference).expanduser()
    if path.is_file():
        return model_of_file(path)
    from simulation.compare.model_loading import ModelFiles  # what looks for a model takes a while to load
    from simulation.compare.model_lookup import find_model

    found = find_model(settings, reference, named or f"--model {reference}", address)
    backbone = ModelFiles(found).backbone()
    return _ready(found.source, found.settings, EmbeddingModel(backbone), _thresholds_of(found))


def model_of_file(path: Path) -> FaceModel:
    """That of a file of `FaceModel.keep`.  Raises UserError for another file, CheckpointError for a damaged one."""
    notes = read_tensors(path)[1] if path.suffix == ".safetensors" else {}
    if notes.get(_ABOUT_FORMAT) != str(_FORMAT):
        run = path.parent.parent
        hint = f"name its run, {run}" if (run / RUN_FILE).is_file() else "name a run's folder, or models:/NAME@champion"
        raise UserError(f"--model {path}: the file does not say what model it is of; {hint}.")
    tensors, notes = read_sealed(path)
    try:
        about = json.loads(notes[_ABOUT])
        thresholds = None if about["thresholds"] is None else Thresholds.from_json(about["thresholds"])
        source, mapping = str(about["source"]), about["settings"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} says nothing that can be read of its model ({error}).") from None
    settings = config.from_mapping(config.without_gone(mapping), str(path))
    embedder = EmbeddingModel(build_backbone(settings.model, settings.data.image_size))
    needed = {name for name, tensor in embedder.state_dict().items() if tensor.is_floating_point()}
    try:
        absent = needed.intersection(embedder.load_state_dict(tensors, strict=False).missing_keys)
    except RuntimeError:  # of another shape
        absent = needed
    if absent:
        raise CheckpointError(f"{path} is no {settings.model.backbone}: {min(absent)} is missing or of another shape.")
    return _ready(source, settings, embedder, thresholds)


def _ready(source: str, settings: Settings, embedder: EmbeddingModel, thresholds: Thresholds | None) -> FaceModel:
    return FaceModel(
        binding=Binding(sha256=weights_sha256(embedder), source=source),
        settings=config.from_mapping(_kept(settings)),
        embedder=embedder,
        thresholds=thresholds,
    )


def _kept(settings: Settings) -> dict[str, dict[str, Any]]:
    """What of a run's settings decides its model's answers; the rest (paths, addresses) is nobody else's business."""
    data = {"image_size": settings.data.image_size, "alignment": settings.data.alignment}
    return {"model": dataclasses.asdict(dataclasses.replace(settings.model, pretrained="none")), "data": data}


def _thresholds_of(found: "FoundModel") -> Thresholds | None:
    """What the model's validation people say of its scores; None where nobody wrote it down.

    Raises TrackingError and CheckpointError where what was written is damaged.
    """
    from common.tracking.registry import THRESHOLDS, thresholds_of

    if found.registered is not None:
        return thresholds_of(found.registered.uri, found.registered.address)
    if found.folder is None:
        return None
    written = found.folder / THRESHOLDS
    if not written.is_file():
        return None
    try:
        return Thresholds.from_json(read_json(written))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{written} holds no thresholds ({error}); restore it, or train again.") from None


def weights_sha256(embedder: EmbeddingModel) -> str:
    """SHA-256 of what the model computes with, as a run prints it of the same weights."""
    backbone = embedder.backbone
    state = named_state(backbone)
    names = shared_names(backbone, "shared")
    return buffer_sha256(flatten(state, manifest_of({name: state[name] for name in names})))
