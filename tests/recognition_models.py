"""A small model of drawn faces, and what finds those in pictures made here: nothing is trained, and no detector runs.

A face is 32 x 32 px of 16 coloured squares; a picture of k faces has them side by side, and a black one has none.  Two
drawings of one person score at least 0.99 with this model, those of two people less.
"""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import config
from common.errors import DataError
from common.faces.detect import Quality
from common.metrics.thresholds import thresholds_from
from common.models.recogniser import EmbeddingModel, build_backbone
from simulation.recognition.gallery import Binding
from simulation.recognition.model import FaceModel, weights_sha256
from simulation.recognition.photographs import Seen

SIDE = 32
SETTINGS = config.from_mapping(
    {
        "model": {"backbone": "cnn", "embedding_size": 16, "width": 0.25},
        "data": {"image_size": SIDE, "alignment": "landmarks"},
    }
)


def thresholds(*, same_below=0, other_above=0):
    """Made of a histogram with genuine pairs at 0.995 and impostor pairs at 0.987, between which the threshold is.

    same_below: genuine pairs at 0.97.  other_above: impostor pairs at 0.997.
    """
    pairs = np.zeros((2, 8192), dtype=np.int64)
    bins = {cosine: int((cosine + 1) * 4096) for cosine in (0.97, 0.987, 0.995, 0.997)}
    pairs[0, bins[0.995]], pairs[0, bins[0.97]] = 300 - same_below, same_below
    pairs[1, bins[0.987]], pairs[1, bins[0.997]] = 20_000 - other_above, other_above
    return thresholds_from([pairs])


def model(seed=0, known=None, source="run-1"):
    """Untrained weights of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embedder = EmbeddingModel(build_backbone(SETTINGS.model, SIDE))
    binding = Binding(sha256=weights_sha256(embedder), source=source)
    known = thresholds() if known is None else known
    return FaceModel(binding=binding, settings=SETTINGS, embedder=embedder, thresholds=known)


def face(person, drawing=0):
    """uint8 [32, 32, 3]: the drawings of one person differ by noise."""
    squares = np.random.default_rng(1000 + person).integers(30, 226, (4, 4, 3))
    noise = np.random.default_rng([person, drawing]).integers(-10, 11, (SIDE, SIDE, 3))
    return (np.kron(squares, np.ones((8, 8, 1))) + noise).clip(0, 255).astype(np.uint8)


def photograph(*people, drawing=0):
    """The bytes of a PNG with these people; without any: black."""
    faces = [face(person, drawing) for person in people] or [np.zeros((SIDE, SIDE, 3), dtype=np.uint8)]
    content = io.BytesIO()
    Image.fromarray(np.concatenate(faces, axis=1)).save(content, "PNG")
    return content.getvalue()


def put(path: Path, *people, drawing=0) -> Path:
    """A photograph in a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(photograph(*people, drawing=drawing))
    return path


class DrawnFaces:
    """In the place of `Photographs`.  size_px: of each face, as its quality says."""

    def __init__(self, size_px=100.0):
        self.size_px = size_px

    def faces(self, source):
        payload = source if isinstance(source, bytes) else source.read_bytes()
        named = "the picture" if isinstance(source, bytes) else str(source)
        try:
            pixels = np.asarray(Image.open(io.BytesIO(payload)).convert("RGB"))
        except OSError:
            raise DataError(f"{named}: unreadable: not a JPEG, PNG, WebP or BMP picture; give another.") from None
        if not pixels.any():
            raise DataError(f"{named}: no face was found; give a photograph in which a face can be seen.")
        quality = Quality(size_px=self.size_px, blur=0.2, yaw_deg=0.0, pitch_deg=0.0, roll_deg=0.0)
        return [
            Seen(picture=pixels[:, x : x + SIDE], box=(float(x), 0.0, float(SIDE), float(SIDE)), quality=quality)
            for x in range(0, pixels.shape[1], SIDE)
        ]
