"""`facefed attention`: where a trained ViT looks in given pictures, and of two whether it takes them for one person."""

import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import CheckpointError, UserError
from common.faces.batches import evaluation_batches
from common.faces.decode import central_pictures
from common.models.dcal import AttentionMaps, VitBackbone, attention_of, joined
from common.models.recogniser import EmbeddingModel
from common.models.table import BACKBONES, VITS
from common.plots.attention import MOST_PICTURES, attention_maps
from common.plots.style import shorten
from common.settings import Settings
from common.system.files import read_json, write_bytes
from common.tracking.address import with_absolute_tracking
from simulation.compare.model_loading import ModelFiles
from simulation.compare.model_lookup import FoundModel, find_model

FORMATS: Final = ("png", "pdf", "svg", "jpg", "jpeg", "tif", "tiff", "webp")  # by suffix; matplotlib writes them all

_TITLE: Final = 70  # characters of the model in the title


@dataclass(frozen=True, kw_only=True)
class AttentionRequest:
    """The flags of `facefed attention` that are no run settings."""

    model: str  # models:/..., a run's id or its folder
    pictures: Sequence[str]
    output: Path
    crop: float  # fraction of the shorter side
    address: str = field(default="", repr=False)  # of the tracking, with its password; "": the settings' own is whole


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Two pictures as the model compares them."""

    cosine: float
    threshold: float | None  # from validation; None: the run knows none

    @property
    def line(self) -> str:
        """Cosine and decision in words."""
        text = f"cosine similarity {self.cosine:.3f}"
        if self.threshold is None:
            return f"{text}; no decision: the run has no threshold from validation"
        decided = "the same person" if self.cosine >= self.threshold else "two people"
        return f"{text}: {decided} (threshold {self.threshold:.3f}, from validation)"


def show_attention(settings: Settings, request: AttentionRequest, out: TextIO) -> int:
    """`facefed attention`: nothing is written unless everything asked for is there."""
    _check(request)
    settings, address = with_absolute_tracking(settings, request.address or settings.tracking.uri, Path.cwd())
    found = find_model(settings, request.model, f"--model {request.model}", address)
    model = found.settings.model
    if not BACKBONES[model.backbone].is_vit:
        raise UserError(
            f"--model {request.model}: {model.backbone} has no attention to show; name a model of {', '.join(VITS)}."
        )
    pictures = central_pictures(
        request.pictures,
        Path(),
        image_size=found.settings.data.image_size,
        crop=request.crop,
        advice="name a JPEG, PNG, WebP or BMP file.",
    )
    maps, embeddings = _seen(found, pictures)
    verdict = None
    if len(pictures) == 2:
        verdict = Verdict(cosine=float(embeddings[0] @ embeddings[1]), threshold=threshold_of(_metrics(found)))
    branches = "" if model.attention == "sa" else f", {model.attention}, embeds with {model.inference}"
    about = f"{found.source} ({model.backbone}{branches})"
    title = f"Where the model looked: {shorten(about, _TITLE)}" + (f"\n{verdict.line}" if verdict else "")
    _write(attention_maps(pictures, maps, _names(request.pictures), title=title), request.output)
    out.write(f"model: {about}, {found.settings.data.image_size} px in patches of {model.patch_size} px\n")
    if verdict:
        out.write(f"{verdict.line}\n")
    out.write(f"maps: {request.output}\n")
    return 0


def _check(request: AttentionRequest) -> None:
    """What can be known before anything is loaded.  Raises UserError."""
    if not request.pictures:
        raise UserError("no picture: name at least one, for example facefed attention --model RUN -o maps.png A.jpg.")
    if len(request.pictures) > MOST_PICTURES:
        raise UserError(f"{len(request.pictures)} pictures: one page shows at most {MOST_PICTURES}; name fewer.")
    if not 0.1 <= request.crop <= 1.0:
        raise UserError(f"--crop {request.crop}: not in [0.1, 1]; it is the part of the shorter side that is used.")
    path = request.output
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        known = ", ".join(f".{name}" for name in FORMATS)
        raise UserError(f"-o {path}: {path.suffix or 'no suffix'} is no picture that can be written; use {known}.")
    if not path.parent.is_dir():
        raise UserError(f"-o {path}: there is no folder {path.parent}; make it, or name another file.")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"-o {path}: cannot be written; name another file.")


def _seen(found: FoundModel, pictures: NDArray[np.uint8]) -> tuple[AttentionMaps, Tensor]:
    """The maps of all pictures, and their embeddings of length 1, [B, D].  Raises CheckpointError."""
    backbone = ModelFiles(found).backbone()
    if not isinstance(backbone, VitBackbone):
        raise TypeError(f"{found.settings.model.backbone} is no ViT")
    embedder = EmbeddingModel(backbone)
    parts, embeddings = [], []
    with torch.no_grad():
        # One at a time: all maps of a large ViT take hundreds of megabytes a picture.
        for one in evaluation_batches(pictures, np.arange(len(pictures)), batch_size=1, device="cpu"):
            parts.append(attention_of(backbone, one))
            embeddings.append(embedder(one))
    maps, together = joined(parts), torch.cat(embeddings)
    if not (bool(torch.isfinite(maps.rollout).all()) and bool(torch.isfinite(together).all())):
        raise CheckpointError(f"{found.source} gives numbers that are not finite; name a run whose training went well.")
    return maps, together


def _metrics(found: FoundModel) -> Mapping[str, Any]:
    """The run's metrics.json."""
    if found.registered is not None:
        return found.registered.metrics
    return {} if found.folder is None else read_json(found.folder / "metrics.json")


def threshold_of(metrics: Mapping[str, Any]) -> float | None:
    """The cosine from which on a run takes two pictures for one person, chosen in validation; None: it has none.

    metrics: of metrics.json, in which it is `threshold`; of older runs on twins `twins.threshold`.
    """
    twins = metrics.get("twins")
    threshold = metrics.get("threshold", twins.get("threshold") if isinstance(twins, Mapping) else None)
    if not isinstance(threshold, int | float) or isinstance(threshold, bool) or not math.isfinite(threshold):
        return None
    return float(threshold)


def _names(paths: Sequence[str]) -> list[str]:
    """The files' names; their paths where two have one name."""
    names = [Path(path).name for path in paths]
    return [path if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]


def _write(figure: "Any", path: Path) -> None:  # noqa: ANN401 - matplotlib stays in the plots
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.lower().removeprefix("."))
    try:
        write_bytes(path, content.getvalue())
    except OSError as error:
        raise UserError(f"-o {path}: cannot be written: {error.strerror}; name another file.") from None
