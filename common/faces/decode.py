"""One picture file -> one aligned uint8 picture, or the reason why not.  This runs in the packing processes."""

import hashlib
import io
import math
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from common.faces.align import box_maps, centre_map, landmark_maps

MAX_FILE_BYTES = 128 * 2**20
MAX_PIXELS = 50_000_000  # 150 MB as RGB; a file that claims more is a mistake or an attack
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # nothing that starts another program, as EPS does
_LARGEST_SHRINK = 0.9  # below this scale a picture is shrunk with a filter first, for bicubic sampling would alias


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How pictures are aligned.  alignment: landmarks, box or resize.  image_size: px.  box_margin: see box_maps."""

    alignment: str
    image_size: int
    box_margin: float


@dataclass(frozen=True, kw_only=True)
class Job:
    """A few pictures for one process.  points: landmarks [M, 5, 2], boxes [M, 4], or None, as the recipe needs."""

    root: Path
    paths: tuple[str, ...]
    points: NDArray[np.float32] | None
    recipe: Recipe


@dataclass(frozen=True, kw_only=True)
class Done:
    """What became of a job's pictures.

    pictures: uint8 RGB [K, S, S, 3], the K usable ones in order.  reasons: one for each of M pictures, "" where usable;
    the text before a colon is the kind.  digests: SHA-256 of each file, b"" where there was nothing to read.
    """

    pictures: NDArray[np.uint8]
    reasons: tuple[str, ...]
    digests: tuple[bytes, ...]


class _Unusable(Exception):
    """Why a picture is left out."""


def decode_job(job: Job) -> Done:
    """Read, decode and align every picture of a job; no picture can make it fail."""
    size = job.recipe.image_size
    maps = _maps(job)
    pictures, reasons, digests = [], [], []
    for row, path in enumerate(job.paths):
        digest, reason = b"", ""
        try:
            payload = _read(job.root / path)
            digest = hashlib.sha256(payload).digest()
            pictures.append(decode_aligned(payload, None if maps is None else maps[row], size))
        except _Unusable as error:
            reason = str(error)
        except Exception as error:  # a decoder may raise anything for a broken file
            reason = f"unreadable: {' '.join(str(error).split()) or type(error).__name__}"
        reasons.append(reason)
        digests.append(digest)
    stacked = np.stack(pictures) if pictures else np.zeros((0, size, size, 3), dtype=np.uint8)
    return Done(pictures=stacked, reasons=tuple(reasons), digests=tuple(digests))


def _maps(job: Job) -> NDArray[np.float64] | None:
    if job.points is None:
        return None
    if job.recipe.alignment == "landmarks":
        return landmark_maps(job.points, job.recipe.image_size)
    return box_maps(job.points, job.recipe.box_margin, job.recipe.image_size)


def _read(path: Path) -> bytes:
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise _Unusable("not a file")
        if about.st_size == 0:
            raise _Unusable("empty file")
        if about.st_size > MAX_FILE_BYTES:
            raise _Unusable(f"file too large: {about.st_size} bytes")
        return path.read_bytes()
    except FileNotFoundError:
        raise _Unusable("missing") from None
    except OSError as error:
        raise _Unusable(f"unreadable: {error.strerror}") from None


def decode_aligned(payload: bytes, affine: NDArray[np.float64] | None, image_size: int) -> NDArray[np.uint8]:
    """The bytes of a picture file -> uint8 RGB [image_size, image_size, 3].

    affine: [2, 3], upright picture px -> output px as in `align`; None: the centre square.  The camera's orientation
    flag is applied first.  Raises an exception that says why where the picture is unusable.
    """
    if affine is not None and not np.isfinite(affine).all():
        raise _Unusable("no landmarks or box")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            opened = Image.open(io.BytesIO(payload), formats=FORMATS)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise _Unusable("too many pixels: more than any photograph has") from None
        except UnidentifiedImageError:
            raise _Unusable("unreadable: not a JPEG, PNG, WebP or BMP picture") from None
        with opened as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise _Unusable(f"too many pixels: {width} x {height}")
            if affine is None:
                upright_size = (height, width) if _is_turned(picture) else (width, height)
                affine = centre_map(*upright_size, image_size)
            scale = math.hypot(affine[0, 0], affine[1, 0])
            shrunk = _draft(picture, scale)
            ImageOps.exif_transpose(picture, in_place=True)
            upright = _rgb(picture)
    return _warp(upright, _in_shrunk(affine, shrunk), image_size)


def _is_turned(picture: Image.Image) -> bool:
    return picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # the Orientation values that swap width and height


def _draft(picture: Image.Image, scale: float) -> int:
    """Let the JPEG decoder shrink by 2, 4 or 8 where the output is that much smaller.  Returns the factor."""
    width, height = picture.size
    factor = next((factor for factor in (8, 4, 2) if scale * factor <= 1.0), 1)
    if factor == 1:
        return 1
    picture.draft(None, (math.ceil(width / factor), math.ceil(height / factor)))
    return round(width / picture.size[0])


def _rgb(picture: Image.Image) -> Image.Image:
    """Any mode -> RGB; 16-bit grey keeps its high byte, transparency is dropped."""
    if picture.mode.startswith("I"):
        return Image.fromarray((np.asarray(picture, dtype=np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode == "P":
        picture = picture.convert("RGBA")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _in_shrunk(affine: NDArray[np.float64], factor: int) -> NDArray[np.float64]:
    """The same map for a picture shrunk by `factor`, between continuous coordinates (the corner is 0, not -0.5)."""
    linear = affine[:, :2]
    shift = affine[:, 2] + 0.5 - linear @ np.array([0.5, 0.5])
    return np.column_stack([linear * factor, shift])


def _warp(picture: Image.Image, affine: NDArray[np.float64], image_size: int) -> NDArray[np.uint8]:
    """Sample the output through a map between continuous coordinates; what lies outside the picture is black."""
    inverse = np.linalg.inv(affine[:, :2])
    corners = (np.array([[0, 0], [0, 1], [1, 0], [1, 1]]) * image_size - affine[:, 2]) @ inverse.T
    low, high = corners.min(axis=0), corners.max(axis=0)
    middle = (low + high) / 2
    if not (0 <= middle[0] <= picture.width and 0 <= middle[1] <= picture.height):
        raise _Unusable("face outside the picture")
    whole = 1e-6
    inside = (low >= -whole).all() and (high <= np.array(picture.size) + whole).all()
    if affine[0, 1] == 0.0 and affine[1, 0] == 0.0 and inside:
        box = (max(low[0], 0.0), max(low[1], 0.0), min(high[0], picture.width), min(high[1], picture.height))
        return np.asarray(picture.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box))
    scale = math.sqrt(abs(float(np.linalg.det(affine[:, :2]))))
    if scale < _LARGEST_SHRINK:
        picture, affine = _filtered(picture, affine, low, high, scale)
        inverse = np.linalg.inv(affine[:, :2])
    shift = -inverse @ affine[:, 2]
    data = (inverse[0, 0], inverse[0, 1], shift[0], inverse[1, 0], inverse[1, 1], shift[1])
    size = (image_size, image_size)
    return np.asarray(picture.transform(size, Image.Transform.AFFINE, data, Image.Resampling.BICUBIC))


def _filtered(
    picture: Image.Image, affine: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64], scale: float
) -> tuple[Image.Image, NDArray[np.float64]]:
    """The part of the picture that is needed, shrunk to the output's scale with a filter, and the map from there."""
    rim = 3.0 / scale  # px: what bicubic sampling reaches beyond the window
    left, top = np.maximum(np.floor(low - rim), 0.0)
    right, bottom = np.minimum(np.ceil(high + rim), np.array(picture.size, dtype=np.float64))
    width, height = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
    shrunk = picture.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    stretch = np.array([(right - left) / width, (bottom - top) / height])
    linear = affine[:, :2] * stretch
    shift = affine[:, 2] + affine[:, :2] @ np.array([left, top])
    return shrunk, np.column_stack([linear, shift])
