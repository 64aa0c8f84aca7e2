"""A trained model in use: photographs or aligned faces -> embeddings, and how alike two of them are."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from common.faces.detect import FaceDetector
    from common.models.recogniser import EmbeddingModel

Float32 = NDArray[np.float32]
Photograph = str | Path | bytes

_BATCH: Final = 32


@dataclass(frozen=True, kw_only=True)
class Model:
    """source: models:/NAME/VERSION or the run's id.  image_size: side of the faces that it takes, px.

    alignment: how the faces of its training were cut out (data.alignment).
    """

    source: str
    image_size: int
    alignment: str
    embedder: "EmbeddingModel" = field(repr=False)  # the torch module, float32 [B, 3, S, S] in [-1, 1] -> [B, D]

    def embed(self, pictures: NDArray[np.uint8] | Sequence[Photograph]) -> Float32:
        """Embeddings, float32 [N, D] of length 1.

        pictures: aligned faces, uint8 RGB [N, S, S, 3] with S = image_size; or photographs, as files or as what is in
        them: of each the largest face is found and aligned by its eyes, nose and mouth.
        Raises DataError for a photograph that cannot be read or shows no face, UserError for faces of another size,
        CheckpointError for a model whose numbers are not finite.
        """
        faces = pictures if isinstance(pictures, np.ndarray) else self.align(pictures)
        return self._embedded(faces)

    def align(self, photographs: Sequence[Photograph]) -> NDArray[np.uint8]:
        """The largest face of each photograph, as the model takes it: uint8 RGB [N, S, S, 3].  Raises DataError."""
        from common.errors import DataError
        from common.faces.photos import aligned, open_photo

        faces = []
        for photograph in photographs:
            image = open_photo(photograph)
            found = self._detector.detect(image)
            if not found:
                named = "a picture" if isinstance(photograph, bytes) else str(photograph)
                raise DataError(f"{named}: no face was found; give a photograph in which a face can be seen.")
            faces.append(aligned(image, found[0], self.image_size))
        return np.stack(faces) if faces else np.empty((0, self.image_size, self.image_size, 3), np.uint8)

    def _embedded(self, faces: NDArray[np.uint8]) -> Float32:
        import torch

        from common.errors import CheckpointError, UserError
        from common.faces.batches import evaluation_batches

        wanted = (self.image_size, self.image_size, 3)
        if faces.dtype != np.uint8 or faces.shape[1:] != wanted:
            raise UserError(
                f"faces are {faces.dtype} {list(faces.shape)}, this model takes uint8 [N, {wanted[0]}, {wanted[1]}, 3];"
                " give photographs, or open the data set with data.image_size of the model."
            )
        with torch.inference_mode():
            batches = evaluation_batches(faces, np.arange(len(faces)), batch_size=_BATCH, device="cpu")
            parts = [self.embedder(batch).numpy() for batch in batches]
        embeddings: Float32 = np.concatenate(parts) if parts else np.empty((0, 0), np.float32)
        if not np.isfinite(embeddings).all():
            raise CheckpointError(
                f"{self.source} gives numbers that are not finite; name a run whose training went well."
            )
        return embeddings

    @cached_property
    def _detector(self) -> "FaceDetector":
        from common.faces.detect import FaceDetector

        return FaceDetector()


def load_model(model: str | Path, *, tracking_uri: str = "", runs: str | Path = "runs") -> Model:
    """A trained model.

    model: models:/NAME@champion or models:/NAME/VERSION, a finished run's id, or its folder.
    tracking_uri: where the registry is; "": MLFLOW_TRACKING_URI, else sqlite:///mlflow.db here.  runs: where ids are.
    Raises UserError, CheckpointError, TrackingError.
    """
    from common import config
    from common.settings import Settings
    from common.system.runtime import go_silent, tracking_uri_of_environment
    from common.tracking.address import with_absolute_tracking

    go_silent()
    from common.models.recogniser import EmbeddingModel
    from simulation.compare.model_loading import ModelFiles
    from simulation.compare.model_lookup import find_model

    settings = config.with_value(Settings(), "run", "out", str(runs))
    given = tracking_uri or tracking_uri_of_environment() or settings.tracking.uri
    settings, address = with_absolute_tracking(settings, given, Path.cwd())
    found = find_model(settings, str(model), str(model), address)
    data = found.settings.data
    embedder = EmbeddingModel(ModelFiles(found).backbone())
    return Model(source=found.source, image_size=data.image_size, alignment=data.alignment, embedder=embedder)


def compare(first: Float32, second: Float32) -> float | Float32:
    """Cosine similarity in [-1, 1], the higher the more alike.

    first, second: embeddings of length 1, [D] each: a number; or [N, D] and [M, D]: float32 [N, M].
    """
    scores = np.asarray(first) @ np.asarray(second).T
    return float(scores) if scores.ndim == 0 else scores.astype(np.float32)
