"""A trained model in use: photographs or aligned faces -> embeddings, and how alike two of them are."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from simulation.recognition.model import FaceModel
    from simulation.recognition.photographs import Photographs

Float32 = NDArray[np.float32]
Photograph = str | Path | bytes


@dataclass(frozen=True, kw_only=True)
class Model:
    """source: models:/NAME/VERSION or the run's id.  image_size: side of the faces that it takes, px.

    alignment: how the faces of its training were cut out (data.alignment).
    """

    source: str
    image_size: int
    alignment: str
    ready: "FaceModel" = field(repr=False)  # for FaceFed's own use

    def embed(self, pictures: NDArray[np.uint8] | Sequence[Photograph]) -> Float32:
        """Embeddings, float32 [N, D] of length 1.

        pictures: aligned faces, uint8 RGB [N, S, S, 3] with S = image_size; or photographs, as files or as what is in
        them: of each the largest face is found and aligned by its eyes, nose and mouth.
        Raises DataError for a photograph that cannot be read or shows no face, UserError for faces of another size or
        none, CheckpointError for a model whose numbers are not finite.
        """
        from common.errors import UserError

        if not len(pictures):
            raise UserError("no picture to embed: give one or more.")
        faces = pictures if isinstance(pictures, np.ndarray) else self.align(pictures)
        wanted = (self.image_size, self.image_size, 3)
        if faces.dtype != np.uint8 or faces.shape[1:] != wanted:
            raise UserError(
                f"faces are {faces.dtype} {list(faces.shape)}, this model takes uint8 [N, {wanted[0]}, {wanted[1]}, 3];"
                " give photographs, or open the data set with data.image_size of the model."
            )
        return self.ready.embed(faces)

    def align(self, photographs: Sequence[Photograph]) -> NDArray[np.uint8]:
        """The largest face of each photograph, as the model takes it: uint8 RGB [N, S, S, 3].  Raises DataError."""
        sources = [given if isinstance(given, bytes) else Path(given).expanduser() for given in photographs]
        return np.stack([self._photographs.faces(source)[0].picture for source in sources])

    @cached_property
    def _photographs(self) -> "Photographs":
        from simulation.recognition.photographs import Photographs

        return Photographs(self.image_size)


def load_model(model: str | Path, *, tracking_uri: str = "", runs: str | Path = "runs") -> Model:
    """A trained model.

    model: models:/NAME@champion or models:/NAME/VERSION, a finished run's id or folder, or a gallery's model file.
    tracking_uri: where the registry is; "": MLFLOW_TRACKING_URI, else sqlite:///mlflow.db here.  runs: where ids are.
    Raises UserError, CheckpointError, TrackingError.
    """
    from common import config
    from common.settings import Settings
    from common.system.runtime import go_silent, tracking_uri_of_environment
    from common.tracking.address import with_absolute_tracking

    go_silent()
    from simulation.recognition.model import load_model as load

    settings = config.with_value(Settings(), "run", "out", str(runs))
    given = tracking_uri or tracking_uri_of_environment() or settings.tracking.uri
    settings, address = with_absolute_tracking(settings, given, Path.cwd())
    ready = load(str(model), settings, address, named=str(model))
    data = ready.settings.data
    return Model(source=ready.binding.source, image_size=data.image_size, alignment=data.alignment, ready=ready)


def compare(first: Float32, second: Float32) -> float | Float32:
    """Cosine similarity in [-1, 1], the higher the more alike.

    first, second: embeddings of length 1, [D] each: a number; or [N, D] and [M, D]: float32 [N, M].
    """
    scores = np.asarray(first) @ np.asarray(second).T
    return float(scores) if scores.ndim == 0 else scores.astype(np.float32)
