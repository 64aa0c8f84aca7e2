"""Picture files -> aligned uint8 pictures, and what must be left out, with the reason why.

First one file, which is what the packing processes do; then every picture of an index, in order, in this process or
several; last the central square of any few pictures.
"""

import functools
import hashlib
import importlib
import io
import logging
import math
import multiprocessing
import os
import signal
import stat
import struct
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from common.cuts import BEFOREHAND, CENTRE
from common.errors import DataError, FaceFedError
from common.faces.account import DATA, heif_plug_in
from common.faces.align import box_maps, centre_map, landmark_maps
from common.faces.datasets import DATASETS
from common.faces.index import FaceIndex
from common.settings import DataSettings
from common.system.runtime import num_cores

if TYPE_CHECKING:
    from common.faces.detect import FaceDetector

MAX_FILE_BYTES = 128 * 2**20
MAX_PIXELS = 50_000_000  # 150 MB as RGB; a file that claims more is a mistake or an attack
# Nothing that starts another program, as EPS does, nor without a mark of its kind, as TGA: any bytes would pass.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "AVIF", "JPEG2000", "QOI", "PSD", "SUN")
SMALLEST_PX = 8  # the shorter side; below it there is no face to see
LEAST_CONTRAST = 8  # of 255, between the darkest and the brightest value; below it nobody sees anything
DEEP_BITS = 14  # a 16-bit file whose values need at most so many is a camera's of fewer bits, and is scaled
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF's Orientation -> what makes the picture upright
_SWAPPING = tuple(_TURNS[flag] for flag in (5, 6, 7, 8))  # these swap width and height
_PNG_MARK, _PNG_TEXT = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt")
_LARGEST_SHRINK = 0.6  # below this scale a picture is shrunk with a filter first, for bicubic sampling would alias
_RIM = 3.0  # px of the picture beyond the window: what bicubic sampling reaches
_LOOKED_AT = (32, 32)  # so many pixels of a picture mostly show that it has contrast
DETECT = "detect"  # an alignment, see `Recipe`
ALIGNED = "aligned.jsonl"  # in a folder whose pictures `facefed data align` made
RAW, JPEG, NO_PICTURES = "raw", "jpeg", "none"  # what a job gives back of its pictures
JPEG_QUALITY = 95
JPEG_BYTES_PER_PIXEL = 0.75  # of aligned faces at this quality: 0.52 measured at 112 px; with room


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How pictures are aligned and kept.

    alignment: landmarks, box, resize, or DETECT: by the landmarks that are found in each picture.  image_size: px.
    box_margin: see box_maps.  coding: RAW, JPEG or NO_PICTURES.
    """

    alignment: str
    image_size: int
    box_margin: float
    coding: str = RAW


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

    pictures: the K usable ones in order, as the recipe's coding has it: uint8 RGB [S, S, 3], row by row, or a JPEG file
    each; none with NO_PICTURES.  reasons: one for each of M pictures, "" where usable; the text before a colon is the
    kind.  digests: SHA-256 of each file, b"" where there was nothing to read.
    """

    pictures: tuple[bytes, ...]
    reasons: tuple[str, ...]
    digests: tuple[bytes, ...]
    notes: tuple[str, ...] = ()  # one for each of M pictures, "" for most: what was done to a usable one


class UnusablePicture(Exception):
    """Why a picture is left out; the text before a colon is the kind."""


def decode_job(job: Job) -> Done:
    """Read, decode and align every picture of a job; no picture can make it fail."""
    size = job.recipe.image_size
    maps = _maps(job)
    pictures: list[bytes] = []
    reasons, digests, notes = [], [], []
    for row, path in enumerate(job.paths):
        digest, reason, note = b"", "", ""
        try:
            payload = read_picture(job.root / path)
            digest = hashlib.sha256(payload).digest()
            if job.recipe.alignment == DETECT:
                picture, note = _detected(payload, size)
            else:
                picture, note = _decode(payload, None if maps is None else maps[row], size)
            if job.recipe.coding != NO_PICTURES:
                pictures.append(_coded(picture, job.recipe.coding))
        except UnusablePicture as error:
            reason = str(error)
        except Exception as error:  # a decoder may raise anything for a broken file
            reason = _unreadable(error)
        reasons.append(reason)
        digests.append(digest)
        notes.append(note)
    return Done(pictures=tuple(pictures), reasons=tuple(reasons), digests=tuple(digests), notes=tuple(notes))


def _coded(picture: NDArray[np.uint8], coding: str) -> bytes:
    return picture.tobytes() if coding == RAW else coded_jpeg(picture)


def coded_jpeg(picture: NDArray[np.uint8]) -> bytes:
    """A picture uint8 RGB [H, W, 3] as a JPEG file of JPEG_QUALITY."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _maps(job: Job) -> NDArray[np.float64] | None:
    if job.points is None:
        return None
    if job.recipe.alignment == "landmarks":
        return landmark_maps(job.points, job.recipe.image_size)
    return box_maps(job.points, job.recipe.box_margin, job.recipe.image_size)


def read_picture(path: Path) -> bytes:
    """The bytes of a picture file.  Raises UnusablePicture, with the reason."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise UnusablePicture("not a file")
        if about.st_size == 0:
            raise UnusablePicture("empty file")
        if about.st_size > MAX_FILE_BYTES:
            raise UnusablePicture(f"file too large: {about.st_size} bytes")
        return path.read_bytes()
    except FileNotFoundError:
        raise UnusablePicture("missing") from None
    except OSError as error:
        raise UnusablePicture(f"unreadable: {error.strerror}") from None


def decode_aligned(payload: bytes, affine: NDArray[np.float64] | None, image_size: int) -> NDArray[np.uint8]:
    """The bytes of a picture file -> uint8 RGB [image_size, image_size, 3].

    affine: [2, 3], upright picture px -> output px as in `align`; None: the centre square.  The camera's orientation
    flag is applied first.  Raises an exception that says why where the picture is unusable.
    """
    return _decode(payload, affine, image_size)[0]


def _decode(payload: bytes, affine: NDArray[np.float64] | None, image_size: int) -> tuple[NDArray[np.uint8], str]:
    """As `decode_aligned`, with what was done to the values, "" for most pictures."""
    if affine is not None and not np.isfinite(affine).all():
        raise UnusablePicture("no landmarks or box")

    def affine_of(width: int, height: int) -> NDArray[np.float64]:
        return centre_map(width, height, image_size) if affine is None else affine

    upright, from_upright, note = _upright(payload, affine_of)
    aligned = _warp(upright, from_upright, image_size)
    if aligned.max() < LEAST_CONTRAST:
        raise UnusablePicture("black where the face should be")
    return aligned, note


def open_upright(payload: bytes) -> tuple[NDArray[np.uint8], str]:
    """The whole of a picture file, upright: uint8 RGB [H, W, 3]; and what was done to its values, "" for most.

    Raises UnusablePicture, with the reason.
    """
    try:
        upright, _, note = _upright(payload, lambda _width, _height: np.eye(2, 3))
    except UnusablePicture:
        raise
    except Exception as error:  # a decoder may raise anything for a broken file
        raise UnusablePicture(_unreadable(error)) from None
    return np.asarray(upright), note


def _detected(payload: bytes, image_size: int) -> tuple[NDArray[np.uint8], str]:
    """The face that a picture file is of, found and aligned; and what was done to the values, "" for most pictures."""
    from common.faces.detect import landmark_map, subject

    image, note = open_upright(payload)
    face = subject(detector().detect(image), image.shape[1], image.shape[0])
    if face is None:
        raise UnusablePicture("no face found")
    return warped(image, landmark_map(face, image_size), image_size), note


@functools.cache
def detector() -> "FaceDetector":
    """The detector of this process, on the CPU; of several processes each has one core."""
    import torch

    from common.faces.detect import FaceDetector

    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)
    return FaceDetector()


def warped(picture: NDArray[np.uint8], affine: NDArray[np.float64], image_size: int) -> NDArray[np.uint8]:
    """The part of an upright picture [H, W, 3] that `affine` brings to the output, as `decode_aligned` has it.

    Raises UnusablePicture where the middle of the output lies outside the picture.
    """
    return _warp(Image.fromarray(picture), _in_shrunk(affine, 1), image_size)


def _unreadable(error: Exception) -> str:
    return f"unreadable: {' '.join(str(error).split()) or type(error).__name__}"


_AffineOf = Callable[[int, int], NDArray[np.float64]]  # (width, height) of the upright picture -> map [2, 3]


def _upright(payload: bytes, affine_of: _AffineOf) -> tuple[Image.Image, NDArray[np.float64], str]:
    """The picture upright as RGB; the map from it, between continuous coordinates; what was done to its values.

    Where the output is much smaller the picture may be shrunk already; the map is the one from what is returned.
    """
    try:
        return _upright_as_it_is(payload, affine_of)
    except UnusablePicture:
        raise
    except Exception:
        bare = _without_text(payload)  # a comment that is too long or damaged says nothing about the pixels
        if bare == payload:
            raise
        return _upright_as_it_is(bare, affine_of)


def _upright_as_it_is(payload: bytes, affine_of: _AffineOf) -> tuple[Image.Image, NDArray[np.float64], str]:
    _register_heif()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            opened = Image.open(io.BytesIO(payload), formats=_formats())
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise UnusablePicture("too many pixels: more than any photograph has") from None
        except UnidentifiedImageError:
            if _without_text(payload) != payload:
                raise
            raise UnusablePicture("unreadable: not a JPEG, PNG, WebP or BMP picture") from None
        with opened as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise UnusablePicture(f"too many pixels: {width} x {height}")
            if min(width, height) < SMALLEST_PX:
                raise UnusablePicture(f"too small: {width} x {height} px")
            if picture.format not in ("JPEG", "MPO"):  # a JPEG may be shrunk while it is read; others know more after
                picture.load()
                width, height = picture.size
            turn = _turn(picture)
            affine = affine_of(*((height, width) if turn in _SWAPPING else (width, height)))
            shrunk = _draft(picture, math.hypot(affine[0, 0], affine[1, 0]))
            picture.load()
            upright, note = _rgb(picture if turn is None else picture.transpose(turn))
    span = _span(upright.resize(_LOOKED_AT, Image.Resampling.NEAREST))  # of some of its pixels
    if span < LEAST_CONTRAST and (span := _span(upright)) < LEAST_CONTRAST:
        raise UnusablePicture(f"no contrast: all values within {span:g} of 255")
    return upright, _in_shrunk(affine, shrunk), note


def _span(picture: Image.Image) -> float:
    """The largest difference between two values of one channel."""
    return float(max(high - low for low, high in np.asarray(picture.getextrema()).tolist()))


@functools.cache
def _register_heif() -> None:
    if heif_plug_in():
        importlib.import_module(heif_plug_in()).register_heif_opener()


@functools.cache
def _formats() -> tuple[str, ...]:
    return (*FORMATS, "HEIF") if heif_plug_in() else FORMATS


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """What makes the picture upright, by the orientation flag alone; None where it is so already, or says nothing."""
    try:
        return _TURNS.get(picture.getexif().get(0x0112, 1))
    except Exception:  # whatever else the EXIF holds says nothing about the pixels
        return None


def _without_text(payload: bytes) -> bytes:
    """A PNG without its text chunks; anything else as it is."""
    if not payload.startswith(_PNG_MARK) or not any(name in payload for name in _PNG_TEXT):
        return payload
    kept, at = [_PNG_MARK], len(_PNG_MARK)
    while at + 8 <= len(payload):
        length, name = struct.unpack_from(">I4s", payload, at)
        end = at + 12 + length
        if name not in _PNG_TEXT:
            kept.append(payload[at:end])
        at = end
    return b"".join(kept)


def _draft(picture: Image.Image, scale: float) -> int:
    """Let the JPEG decoder shrink by 2, 4 or 8 where the output is that much smaller.  Returns the factor."""
    width, height = picture.size
    factor = next((factor for factor in (8, 4, 2) if scale * factor <= 1.0), 1)
    if factor == 1:
        return 1
    picture.draft(None, (math.ceil(width / factor), math.ceil(height / factor)))
    return round(width / picture.size[0])


def _rgb(picture: Image.Image) -> tuple[Image.Image, str]:
    """Any mode -> RGB, and what was done to its values; transparency is dropped.

    16-bit grey keeps its high byte. Where no value needs more than DEEP_BITS bits, as cameras of 12 bits and programs
    that copy 8 write them, the values that there are become the whole range. So do real numbers.
    """
    note = ""
    if picture.mode.startswith("I"):
        values = np.asarray(picture, dtype=np.int64)
        bits = max(8, int(values.max()).bit_length())
        if bits <= DEEP_BITS:
            note = f"16-bit file with values of {bits} bits, scaled"
        shift = bits - 8 if bits <= DEEP_BITS else 8
        picture = Image.fromarray((values >> shift).clip(0, 255).astype(np.uint8))
    elif picture.mode == "F":
        real = np.nan_to_num(np.asarray(picture, dtype=np.float64), posinf=0.0, neginf=0.0)
        highest = float(real.max())
        scale = 255.0 / highest if 0 < highest <= 1.0 or highest > 255.0 else 1.0
        note = "" if scale == 1.0 else f"real numbers up to {highest:g}, scaled"
        picture = Image.fromarray((real * scale).clip(0, 255).astype(np.uint8))
    if picture.mode == "P":
        picture = picture.convert("RGBA")
    return (picture if picture.mode == "RGB" else picture.convert("RGB")), note


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
        raise UnusablePicture("face outside the picture")
    whole = 1e-6
    inside = (low >= -whole).all() and (high <= np.array(picture.size) + whole).all()
    if affine[0, 1] == 0.0 and affine[1, 0] == 0.0 and inside:
        box = (max(low[0], 0.0), max(low[1], 0.0), min(high[0], picture.width), min(high[1], picture.height))
        return np.asarray(picture.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box))
    scale = math.sqrt(abs(float(np.linalg.det(affine[:, :2]))))
    if scale < _LARGEST_SHRINK:
        picture, affine = _filtered(picture, affine, low, high, scale)
    else:
        left, top = np.maximum(np.floor(low - _RIM), 0.0)
        right, bottom = np.minimum(np.ceil(high + _RIM), np.array(picture.size, dtype=np.float64))
        picture = picture.crop((int(left), int(top), int(right), int(bottom)))
        affine = np.column_stack([affine[:, :2], affine[:, 2] + affine[:, :2] @ np.array([left, top])])
    aligned, grid = _sampled(picture, affine, image_size)
    if not inside:
        aligned[(np.abs(grid) > 1.0).any(axis=0)] = 0
    return aligned


def _sampled(
    picture: Image.Image, affine: NDArray[np.float64], image_size: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Bicubic samples at the output's pixel centres (Keys' kernel, a = -0.75, IEEE TASSP 29(6), 1981).

    affine: between continuous coordinates.  Returns the samples [S, S, 3], and where they were taken [2, S, S], x and y
    in [-1, 1] inside the picture; outside, its edge goes on.  Nearer to the ideal (spline samples, four times as dense,
    filtered) than PIL's kernel of a = -1 with a filter before it, in two thirds of its time.
    """
    import torch  # pictures that are only cut and resized do without
    from torch.nn.functional import grid_sample

    width, height = picture.size
    inverse = np.linalg.inv(affine[:, :2])
    start = -inverse @ affine[:, 2]
    centres = np.arange(image_size) + 0.5
    grid = np.empty((2, image_size, image_size), dtype=np.float32)
    for axis, side in enumerate((width, height)):
        across, down = inverse[axis] * (2.0 / side)
        np.add(across * centres, (down * centres + (start[axis] * (2.0 / side) - 1.0))[:, None], out=grid[axis])
    planes = torch.from_numpy(np.asarray(picture).astype(np.float32)).permute(2, 0, 1)[None]
    points = torch.from_numpy(grid).permute(1, 2, 0)[None]
    sampled = grid_sample(planes, points, mode="bicubic", padding_mode="border", align_corners=False)[0].numpy()
    np.clip(np.rint(sampled, out=sampled), 0.0, 255.0, out=sampled)
    return np.ascontiguousarray(sampled.astype(np.uint8).transpose(1, 2, 0)), grid


def _filtered(
    picture: Image.Image, affine: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64], scale: float
) -> tuple[Image.Image, NDArray[np.float64]]:
    """The part of the picture that is needed, shrunk to the output's scale with a filter, and the map from there."""
    rim = _RIM / scale
    left, top = np.maximum(np.floor(low - rim), 0.0)
    right, bottom = np.minimum(np.ceil(high + rim), np.array(picture.size, dtype=np.float64))
    width, height = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
    shrunk = picture.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    stretch = np.array([(right - left) / width, (bottom - top) / height])
    linear = affine[:, :2] * stretch
    shift = affine[:, 2] + affine[:, :2] @ np.array([left, top])
    return shrunk, np.column_stack([linear, shift])


MOST_RAW_BYTES = 8_000_000_000  # `data.pack = "auto"`: more than this is kept as JPEG; CelebA at 112 px is 7.6e9
JOB_PICTURES = 32  # 1.2 MB of result at 112 px: small enough for a smooth progress bar and little memory
logger = logging.getLogger("facefed.faces")


def plan(index: FaceIndex, data: DataSettings) -> tuple[Recipe, NDArray[np.float32] | None]:
    """How the pictures of this data set are aligned, and the landmarks or boxes [N, ...] that takes.

    Where the layout has no such points (see DATASETS), or this copy lacks their file, pictures are cut to the centre
    square: the one is logged, the other stands in the account by `alignment_note`.  Of the square pictures of
    `facefed data align` that is the whole, and the line says so.
    """
    points = {"landmarks": index.landmarks, "box": index.boxes, "resize": None, DETECT: None}[data.alignment]
    alignment = data.alignment
    if points is None and alignment not in ("resize", DETECT):
        if (index.root / ALIGNED).is_file():
            logger.info("%s: its faces were aligned by `facefed data align` and are taken as they are", index.root)
        elif alignment not in DATASETS[index.dataset].points:
            logger.info("%s: this layout has no %s; pictures are cut to their centre square", index.root, alignment)
        alignment = "resize"
    coding = data.pack
    if coding == "auto":
        coding = RAW if len(index) * data.image_size**2 * 3 <= MOST_RAW_BYTES else JPEG
    recipe = Recipe(alignment=alignment, image_size=data.image_size, box_margin=data.box_margin, coding=coding)
    return recipe, points


def cut_of(index: FaceIndex, recipe: Recipe) -> str:
    """What `plan` comes to, of `cuts.CUTS`."""
    if recipe.alignment != "resize":
        return recipe.alignment
    return BEFOREHAND if (index.root / ALIGNED).is_file() else CENTRE


def alignment_note(index: FaceIndex, recipe: Recipe, data: DataSettings) -> tuple[str, ...]:
    """The line that says that pictures are cut to the centre square for want of a file, if that is so."""
    file = DATASETS[index.dataset].points.get(data.alignment)
    if recipe.alignment == data.alignment or file is None:
        return ()
    return (f"no {file} for these pictures: they are cut to their centre square, not aligned by {data.alignment}",)


def scan(
    index: FaceIndex,
    recipe: Recipe,
    points: NDArray[np.float32] | None,
    *,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
) -> Generator[Done, None, None]:
    """Decode all pictures, JOB_PICTURES at a time, results in the index's order whatever the number of workers.

    progress: called with (pictures done, pictures in all).
    """
    starts = range(0, len(index), JOB_PICTURES)
    jobs = (
        Job(
            root=index.root,
            paths=index.paths[start : start + JOB_PICTURES],
            points=None if points is None else points[start : start + JOB_PICTURES],
            recipe=recipe,
        )
        for start in starts
    )
    done = 0
    workers = min(workers, len(starts))
    for result in in_processes(decode_job, jobs, workers) if workers > 1 else map(decode_job, jobs):
        done += len(result.reasons)
        if progress is not None:
            progress(done, len(index))
        yield result


_J = TypeVar("_J")
_R = TypeVar("_R")


def in_processes(work: Callable[[_J], _R], jobs: Iterable[_J], workers: int) -> Iterator[_R]:
    """Results of `work`, a function of a module, in the jobs' order.

    Only a few jobs are ahead, so that memory stays bounded when whoever takes the results is slow.
    """
    # spawn: a fork of a process that runs threads (torch, gRPC) can deadlock
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        ahead: deque[Future[_R]] = deque()
        for job in jobs:
            ahead.append(pool.submit(work, job))
            if len(ahead) > 4 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except BrokenProcessPool:
        raise FaceFedError(
            "a process that decodes pictures was killed, perhaps for want of memory; use fewer workers."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it even when it is killed outright."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def same_files(digests: NDArray[np.uint8]) -> list[list[int]]:
    """The rows of files that are equal byte for byte, two or more each, ascending, in the order of the first.

    digests: uint8 [N, 32] SHA-256; a row of zeros was not read, and is like no other.
    """
    parts = digests.view(np.uint64)
    order = np.lexsort(parts.T)
    ordered = parts[order]
    same = (ordered[1:] == ordered[:-1]).all(axis=1) & ordered[1:].any(axis=1)
    groups: list[list[int]] = []
    last = -2
    for place in np.flatnonzero(same).tolist():
        if place != last + 1:
            groups.append([int(order[place])])
        groups[-1].append(int(order[place + 1]))
        last = place
    return sorted(sorted(group) for group in groups)


def with_duplicates(
    index: FaceIndex, split: NDArray[np.int8], reasons: Mapping[int, str], digests: NDArray[np.uint8]
) -> dict[int, str]:
    """The reasons (row -> reason) with those of exact duplicates (equal file bytes) added.

    Copies under one person: one stays, in the strictest split (test, validation, training), there the first by path.
    Under two people: none stays, for who is on it is not known.  digests: as `same_files` takes them.
    """
    found = dict(reasons)
    for group in same_files(digests):
        rows = [row for row in group if row not in reasons]
        if len(rows) < 2:
            continue
        if len({int(index.person[row]) for row in rows}) > 1:
            for row in rows:
                other = next(o for o in rows if index.person[o] != index.person[row])
                found[row] = f"one picture under two people: also {index.paths[other]}"
            continue
        kept = max(rows, key=lambda row: (split[row], -row))
        for row in rows:
            if row != kept:
                found[row] = f"duplicate: of {index.paths[kept]}"
    return found


def quarantine(index: FaceIndex, reasons: Mapping[int, str]) -> tuple[NDArray[np.bool_], tuple[tuple[str, str], ...]]:
    """Which pictures are kept, [N] bool, and (path, reason) of the others, by path.  reasons: row -> reason."""
    kept = np.ones(len(index), dtype=np.bool_)
    kept[list(reasons)] = False
    return kept, tuple((index.paths[row], reasons[row]) for row in sorted(reasons))


def check_quarantine(index: FaceIndex, quarantined: Sequence[tuple[str, str]], total: int, limit: float) -> None:
    """Raise DataError when more than `limit` of what looks like data is not used.

    quarantined: (path, reason) of pictures left out, of `total` that the settings use.  What the index's account passed
    over and looks like data counts with them.
    """
    account = index.account
    unused, of = len(quarantined) + account.num_unused_data, total + account.num_unused_data
    if unused <= limit * of:
        return
    kinds = Counter(reason.split(":")[0] for _, reason in quarantined)
    counts = ", ".join(f"{kind} {number}" for kind, number in kinds.most_common())
    passed = [one for one in account.passed_over if one.weight == DATA]
    also = account.words()
    first = ", ".join([path for path, _ in quarantined[:3]] or [one.first for one in passed[:3]])
    raise DataError(
        f"{index.root}: {unused} of {of} pictures cannot be used ("
        + "; passed over: ".join(filter(None, (counts, also)))
        + f"), more than data.max_quarantined_fraction = {limit:g} allows; the first: {first}; repair them, take them "
        "out of the folder, or raise the limit."
    )


_PICTURES_PER_JOB = 64


def central_pictures(
    paths: Sequence[str], root: Path, *, image_size: int, crop: float, advice: str
) -> NDArray[np.uint8]:
    """The central part of each picture, [N, image_size, image_size, 3] uint8 RGB.

    paths: relative to `root`, or absolute.  crop: fraction of the shorter side that is used. Each picture is resized so
    that this part is image_size px wide, then cut; the rim is a whole number of px, so the part used is exact to 1 px
    of the result.
    Raises DataError that names the first bad picture and ends with `advice`.
    """
    rim = round((image_size / crop - image_size) / 2)
    recipe = Recipe(alignment="resize", image_size=image_size + 2 * rim, box_margin=0.0)
    starts = range(0, len(paths), _PICTURES_PER_JOB)
    jobs = [
        Job(root=root, paths=tuple(paths[at : at + _PICTURES_PER_JOB]), points=None, recipe=recipe) for at in starts
    ]
    pictures = np.empty((len(paths), image_size, image_size, 3), dtype=np.uint8)
    with ThreadPoolExecutor(num_cores()) as threads:  # decoding and resizing leave Python's lock alone
        for at, job, done in zip(starts, jobs, threads.map(decode_job, jobs), strict=True):
            for path, reason in zip(job.paths, done.reasons, strict=True):
                if reason:
                    raise DataError(f"{root / path}: {reason}; {advice}")
            side = recipe.image_size
            whole = np.frombuffer(b"".join(done.pictures), dtype=np.uint8).reshape(-1, side, side, 3)
            pictures[at : at + len(job.paths)] = whole[:, rim : rim + image_size, rim : rim + image_size]
    return pictures
