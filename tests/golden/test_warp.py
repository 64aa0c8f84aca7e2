"""The warp of real faces against the one before it (PIL's filter and bicubic transform) and against an ideal one."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from common.faces.align import landmark_maps
from common.faces.decode import decode_aligned
from common.faces.index import read_index

SIDE = 112


def inverse_of(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Output px -> picture px, both between continuous coordinates (the corner is 0).  [2, 3]."""
    linear = affine[:, :2]
    shift = affine[:, 2] + 0.5 - linear @ np.array([0.5, 0.5])
    inverse = np.linalg.inv(linear)
    return np.column_stack([inverse, -inverse @ shift])


def by_pil(picture: Image.Image, affine: NDArray[np.float64]) -> NDArray[np.uint8]:
    """As it was until packs of format 2: shrunk to the output's scale with a filter, then PIL's bicubic transform."""
    scale = math.hypot(affine[0, 0], affine[1, 0])
    factor = scale if scale < 0.9 else 1.0
    size = (round(picture.width * factor), round(picture.height * factor))
    shrunk = picture.resize(size, Image.Resampling.BICUBIC)
    back = inverse_of(affine) * np.array([[size[0] / picture.width], [size[1] / picture.height]])
    moved = shrunk.transform((SIDE, SIDE), Image.Transform.AFFINE, tuple(back.ravel()), Image.Resampling.BICUBIC)
    return np.asarray(moved)


def ideal(picture: Image.Image, affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Splines of fifth order, sampled four times as densely each way, and Lanczos' filter from there."""
    centres = (np.arange(SIDE * 4) + 0.5) / 4
    back = inverse_of(affine)
    x, y = (row[0] * centres + (row[1] * centres)[:, None] + row[2] - 0.5 for row in back)
    dense = (
        ndimage.map_coordinates(plane, [y, x], order=5, mode="nearest")
        for plane in np.asarray(picture, dtype=np.float64).transpose(2, 0, 1)
    )
    planes = [Image.fromarray(one.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.LANCZOS) for one in dense]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1).clip(0, 255)


@pytest.mark.shared
def test_within_one_grey_level_of_the_former_warp_and_nearer_to_the_ideal(shared_faces: Path) -> None:
    root = shared_faces / "vggface2"
    index = read_index("vggface2", root)
    rows = list(range(0, len(index), 60))
    assert index.landmarks is not None
    maps = landmark_maps(index.landmarks[rows], SIDE)
    apart, ours, theirs = [], [], []
    for row, affine in zip(rows, maps, strict=True):
        payload = (root / index.paths[row]).read_bytes()
        picture = Image.open(io.BytesIO(payload)).convert("RGB")
        new, old, best = decode_aligned(payload, affine, SIDE), by_pil(picture, affine), ideal(picture, affine)
        apart.append(np.abs(new.astype(int) - old).mean())
        inner = slice(8, -8)
        ours.append(float(((new - best)[inner, inner] ** 2).mean()) ** 0.5)
        theirs.append(float(((old - best)[inner, inner] ** 2).mean()) ** 0.5)
    assert np.mean(apart) < 1.0  # grey levels of 255; 0.92 on all
    assert np.mean(ours) < 0.9  # 0.69 on 60 others
    assert np.mean(theirs) > 1.1, "the former one is no nearer: 1.28"
