"""Where each pixel of the training picture comes from: five landmarks, a box, or the centre square.  Pure maths.

Every function returns affine maps [.., 2, 3] float64 from picture to output coordinates, in px from the centre of the
top left pixel, as OpenCV and the ArcFace template have them.
"""

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

# ArcFace (arXiv:1801.07698), 112 x 112: left eye, right eye, nose, left and right mouth corner as seen in the picture.
TEMPLATE_112_PX: Float64 = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]],
    dtype=np.float64,
)


def template(image_size: int) -> Float64:
    """The five template points [5, 2] for a square output of `image_size` px."""
    return TEMPLATE_112_PX * (image_size / 112.0)


def similarity(source: NDArray[np.floating], target: NDArray[np.floating]) -> Float64:
    """The least-squares rotation, scale and shift that takes source to target (Umeyama, IEEE PAMI 13(4), 1991).

    In the plane it has a closed form: with points as complex numbers z -> w, w = a z + b is a linear regression, and a
    complex factor can turn and scale but never mirror.  source: [.., K, 2].  target: [K, 2] or [.., K, 2].
    Returns [.., 2, 3]; rows whose source points coincide, or hold a NaN, are NaN.
    """
    z = np.asarray(source, dtype=np.float64) @ np.array([1.0, 1.0j])
    w = np.asarray(target, dtype=np.float64) @ np.array([1.0, 1.0j])
    z_mean, w_mean = z.mean(axis=-1), w.mean(axis=-1)
    centred = z - z_mean[..., None]
    spread = (np.abs(centred) ** 2).sum(axis=-1)
    spread = np.where(spread > 0.0, spread, np.nan)
    with np.errstate(invalid="ignore"):
        a = (np.conj(centred) * (w - w_mean[..., None])).sum(axis=-1) / spread
    b = w_mean - a * z_mean
    rows = [np.stack([a.real, -a.imag, b.real], axis=-1), np.stack([a.imag, a.real, b.imag], axis=-1)]
    return np.stack(rows, axis=-2)


def landmark_maps(landmarks: NDArray[np.floating], image_size: int) -> Float64:
    """Maps that bring landmarks [N, 5, 2] px to the template.  Returns [N, 2, 3]; NaN where landmarks are unusable."""
    return similarity(landmarks, template(image_size))


def box_maps(boxes: NDArray[np.floating], margin: float, image_size: int) -> Float64:
    """Maps that bring a square around each box to the output.

    boxes: [N, 4] px x, y, width, height.  margin: the square's side is (1 + margin) times the box's longer side, as
    VGGFace2 (arXiv:1710.08092) extends its boxes.  Returns [N, 2, 3]; NaN where the box is absent or empty.
    """
    x, y, width, height = np.moveaxis(np.asarray(boxes, dtype=np.float64), -1, 0)
    with np.errstate(invalid="ignore"):
        side = np.where((width > 0) & (height > 0), np.maximum(width, height) * (1.0 + margin), np.nan)
    return _window_maps(x + width / 2 - side / 2, y + height / 2 - side / 2, side, image_size)


def centre_map(width: int, height: int, image_size: int) -> Float64:
    """The map that brings the largest centred square of a picture to the output.  Returns [2, 3]."""
    side = float(min(width, height))
    window = np.array([[(width - side) / 2, (height - side) / 2, side]])
    return np.asarray(_window_maps(window[:, 0], window[:, 1], window[:, 2], image_size)[0])


def _window_maps(left: Float64, top: Float64, side: Float64, image_size: int) -> Float64:
    """Square windows given by their edges [N] px -> maps [N, 2, 3] between pixel centres (an edge is half a px off)."""
    scale = image_size / side
    zero = np.zeros_like(scale)
    across = np.stack([scale, zero, scale * (0.5 - left) - 0.5], axis=-1)
    down = np.stack([zero, scale, scale * (0.5 - top) - 0.5], axis=-1)
    return np.stack([across, down], axis=-2)
