"""The drawing board: head geometry under a pose, smooth curves, colours, and the two images a face is drawn on.

Points are head units (TRAITS): x to the picture's right, y down, z towards the camera, the eyes near y = 0.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from common.faces.synth_camera import Colour, View
from common.faces.synth_people import Traits

OVERSAMPLING = 2  # the board is drawn this much larger than the picture, and reduced: smooth edges
_RELIEF_SHRINK = 4  # soft shadows are drawn this much smaller than the board
_HALF_EYES = 0.46  # half the distance between the eyes of an average head
_EYE_DEPTH = 0.85
_NEAR = 0.07  # strength of perspective: a point one unit nearer is this fraction larger

Points = NDArray[np.float64]


def _spline_basis(steps: int) -> Points:
    """[steps, 4] weights of a uniform Catmull-Rom segment on its four neighbouring points."""
    t = np.arange(steps) / steps
    basis = np.stack([-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2], 1)
    return 0.5 * basis


@lru_cache(maxsize=64)
def _open_weights(num: int, steps: int) -> Points:
    weights = np.zeros(((num - 1) * steps + 1, num))
    for segment in range(num - 1):
        for offset in range(4):
            neighbour = min(max(segment + offset - 1, 0), num - 1)
            weights[segment * steps : (segment + 1) * steps, neighbour] += _spline_basis(steps)[:, offset]
    weights[-1, -1] = 1.0
    return weights


@lru_cache(maxsize=64)
def _closed_weights(num: int, steps: int) -> Points:
    weights = np.zeros((num * steps, num))
    for segment in range(num):
        for offset in range(4):
            neighbour = (segment + offset - 1) % num
            weights[segment * steps : (segment + 1) * steps, neighbour] += _spline_basis(steps)[:, offset]
    return weights


def curve(points: Points, steps: int = 5) -> Points:
    """A smooth open curve through points [N, D]; returns [(N - 1) * steps + 1, D]."""
    return _open_weights(len(points), steps) @ points


def loop(points: Points, steps: int = 5) -> Points:
    """A smooth closed curve through points [N, D]; returns [N * steps, D]."""
    return _closed_weights(len(points), steps) @ points


def points(*rows: tuple[float, ...]) -> Points:
    """float64 [N, D] from rows."""
    return np.array(rows, dtype=np.float64)


def on_face(flat: Points, raised: float = 0.0) -> Points:
    """Lift [N, 2] points onto the face's surface, `raised` above it; returns [N, 3]."""
    x, y = flat[:, 0], flat[:, 1]
    half = 1.09 - 0.25 * np.minimum(np.maximum(y - 0.4, 0.0), 1.0)
    inside = 1.0 - (x / half) ** 2 - ((y - 0.2) / 1.75) ** 2
    lifted = np.empty((len(flat), 3))
    lifted[:, :2] = flat
    lifted[:, 2] = 0.92 * np.sqrt(np.maximum(inside, 0.03)) + raised
    return lifted


def at_depth(flat: Points, depth: float) -> Points:
    """[N, 2] points at one depth; returns [N, 3]."""
    placed = np.full((len(flat), 3), depth)
    placed[:, :2] = flat
    return placed


def mirrored(flat: Points) -> Points:
    """The same points on the head's other side."""
    other: Points = flat * np.array([-1.0] + [1.0] * (flat.shape[1] - 1))
    return other


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """`share` of the second colour in the first."""
    r, g, b = (round(a + (z - a) * share) for a, z in zip(first, second, strict=True))
    return r, g, b


def shade(colour: Colour, factor: float) -> Colour:
    """A colour made darker or lighter by a factor."""
    r, g, b = colour
    return min(255, round(r * factor)), min(255, round(g * factor)), min(255, round(b * factor))


def ramp(palette: tuple[Colour, ...], where: float) -> Colour:
    """A palette read at `where` in [0, 1]."""
    place = min(max(where, 0.0), 1.0) * (len(palette) - 1)
    index = min(int(place), len(palette) - 2)
    return mix(palette[index], palette[index + 1], place - index)


def _rotation(view: View) -> Points:
    """Roll after pitch after yaw: positive yaw looks to the picture's right, positive pitch down."""
    (sy, cy), (sp, cp), (sr, cr) = (
        (np.sin(angle), np.cos(angle)) for angle in (view.yaw_rad, view.pitch_rad, view.roll_rad)
    )
    yaw = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    pitch = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
    roll = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return np.asarray(roll @ pitch @ yaw)


class Pose:
    """Where a point of the head falls in the picture, in px of the finished picture."""

    def __init__(self, view: View, size: tuple[int, int]) -> None:
        """size: (width, height) of the finished picture, px."""
        self.unit_px = view.eye_distance * size[0] / (2 * _HALF_EYES)
        self.rotation = _rotation(view)
        self.origin = np.zeros(2)
        middle = self.project(points((0.0, 0.0, _EYE_DEPTH)))[0]
        self.origin = np.array([view.centre[0] * size[0], view.centre[1] * size[1]]) - middle

    def project(self, solid: Points) -> Points:
        """[N, 3] head points -> [N, 2] px."""
        turned = solid @ self.rotation.T
        seen: Points = self.origin + self.unit_px * turned[:, :2] / (1.0 - _NEAR * (turned[:, 2:] - _EYE_DEPTH))
        return seen


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """One face being drawn: who, how, and the images drawn on."""

    traits: Traits
    view: View
    pose: Pose
    skin: Colour
    hair: Colour
    rng: np.random.Generator
    image: Image.Image  # RGB, OVERSAMPLING x the picture
    relief: Image.Image  # L, soft light and shadow: 128 leaves the picture as it is
    solid: Image.Image  # L, size of the board, 255 where the head is: there the light models it
    brush: ImageDraw.ImageDraw  # on image

    def fill(self, solid: Points, colour: Colour) -> None:
        """Paint the polygon through [N, 3] head points."""
        self.brush.polygon(self.on_board(solid), fill=colour)

    def hatch(self, lines: Points, colours: list[Colour], width: float) -> None:
        """Paint many lines at once: [L, N, 3] head points, one colour each; width in head units."""
        board = (self.pose.project(lines.reshape(-1, 3)) * OVERSAMPLING).reshape(len(lines), -1).tolist()
        pixels = max(1, round(width * self.pose.unit_px * OVERSAMPLING))
        for line, colour in zip(board, colours, strict=True):
            self.brush.line(line, fill=colour, width=pixels)

    def stroke(self, solid: Points, colour: Colour, width: float) -> None:
        """Paint a line through [N, 3] head points; width in head units."""
        pixels = max(1, round(width * self.pose.unit_px * OVERSAMPLING))
        self.brush.line(self.on_board(solid), fill=colour, width=pixels, joint="curve")

    def disc(self, solid: Points, radius: float, colour: Colour) -> None:
        """Paint a disc at each of [N, 3] head points; radius in head units."""
        reach = max(radius * self.pose.unit_px * OVERSAMPLING, 0.7)
        flat = self.on_board(solid)
        for x, y in zip(flat[::2], flat[1::2], strict=True):
            self.brush.ellipse((x - reach, y - reach, x + reach, y + reach), fill=colour)

    def model(self, solid: Points, level: int) -> None:
        """Light (level > 128) or shadow (< 128), later blurred, on the polygon through [N, 3] head points."""
        board = np.asarray(self.on_board(solid)) / _RELIEF_SHRINK
        ImageDraw.Draw(self.relief).polygon(board.tolist(), fill=level)

    def mark_solid(self, solid: Points, level: int = 255) -> None:
        """Say that the polygon through [N, 3] head points is lit as the head is (0: as the room is)."""
        ImageDraw.Draw(self.solid).polygon(self.on_board(solid), fill=level)

    def silhouette(self, flat: Points, depth: float, *, both_sides: bool) -> Points:
        """The outline of a rounded form as seen from the camera: where an ellipse of that depth turns away.

        flat: [N, 2], the form's edge seen from the front.  depth: half the form's depth at y = 0.
        With both_sides=False only the side turned away is moved.  Returns [N, 3].
        """
        sin, cos = float(np.sin(self.view.yaw_rad)), float(np.cos(self.view.yaw_rad))
        x, y = flat[:, 0], flat[:, 1]
        deep = depth * np.sqrt(np.maximum(1.0 - ((y - 0.2) / 1.85) ** 2, 0.1))
        reach = np.sqrt((x * cos) ** 2 + (deep * sin) ** 2) + 1e-9
        turned = np.column_stack([x * np.abs(x) * cos / reach, y, np.sign(x) * deep * deep * sin / reach])
        still = np.column_stack([x, y, np.full(len(x), 0.1)])
        # The fade at x = 0 keeps crown and chin, which turn as points do.
        share = np.clip(np.abs(x) / 0.45, 0.0, 1.0) * (1.0 if both_sides else x * sin > 0)
        placed: Points = still + (turned - still) * share[:, None]
        return placed

    def on_board(self, solid: Points) -> list[float]:
        """Head points [N, 3] as x, y, x, y, ... in px of the board."""
        flat: list[float] = (self.pose.project(solid) * OVERSAMPLING).ravel().tolist()
        return flat


def blank_relief(size: tuple[int, int]) -> Image.Image:
    """An even relief for a picture of `size` px."""
    shrink = OVERSAMPLING / _RELIEF_SHRINK
    return Image.new("L", (max(8, round(size[0] * shrink)), max(8, round(size[1] * shrink))), 128)


def relief_gain(relief: Image.Image, size: tuple[int, int], softness_px: float) -> NDArray[np.float32]:
    """A drawn relief as gain per pixel, float32 [H, W] in about [0.3, 1.7], blurred by `softness_px` of the picture."""
    soft = relief.filter(ImageFilter.GaussianBlur(softness_px * OVERSAMPLING / _RELIEF_SHRINK))
    level = np.asarray(soft.resize(size, Image.Resampling.BILINEAR), dtype=np.float32)
    return 1.0 + (level - 128.0) / np.float32(180.0)
