"""How a made-up person is photographed: the view of one picture, the camera style of one data set, the darkroom.

Everything in this file is nuisance: none of it may say who the person is. Last the drawing board: head geometry under a
pose, smooth curves, colours, and the two images a face is drawn on. Its points are head units (TRAITS): x to the
picture's right, y down, z towards the camera, the eyes near y = 0.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter

from simulation.data.synth_people import Traits

Colour = tuple[int, int, int]
Picture = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Style:
    """One data set's camera and habits; angles in radians, sizes in px, colours as gains around 1."""

    cast: tuple[float, float, float]
    cast_spread: float
    exposure: tuple[float, float]
    contrast: tuple[float, float]
    saturation: float
    blur_px: tuple[float, float]
    noise: tuple[float, float]  # standard deviation, grey levels
    jpeg_quality: tuple[int, int]
    yaw: float  # standard deviation, as pitch and roll
    pitch: float
    roll: float
    eye_distance: tuple[float, float]  # as a fraction of the picture's width
    eye_height: tuple[float, float]  # where between the eyes stands, as a fraction of the picture's height
    sideways: float  # standard deviation of the same point, as a fraction of the width
    backdrop: str
    ambient: tuple[float, float]
    width_px: tuple[int, int]
    height_ratio: tuple[float, float]


# Press pictures: flash and stage light, warm, contrasty, eyes brought to one place, a wall of shapes behind.
PRESS_PICTURES = Style(
    cast=(1.05, 0.99, 0.92), cast_spread=0.10, exposure=(0.72, 1.15), contrast=(0.95, 1.30), saturation=1.04,
    blur_px=(0.0, 0.9), noise=(1.0, 5.0), jpeg_quality=(82, 95), yaw=0.30, pitch=0.17, roll=0.04,
    eye_distance=(0.205, 0.225), eye_height=(0.505, 0.525), sideways=0.008, backdrop="stage",
    ambient=(0.35, 0.85), width_px=(178, 178), height_ratio=(218 / 178, 218 / 178),
)  # fmt: skip
# Found pictures: many cameras, cooler and flatter, softer, tilted heads, any framing, rooms and trees behind.
FOUND_PICTURES = Style(
    cast=(0.97, 1.0, 1.03), cast_spread=0.11, exposure=(0.75, 1.30), contrast=(0.75, 1.08), saturation=0.88,
    blur_px=(0.2, 1.2), noise=(2.0, 7.0), jpeg_quality=(60, 85), yaw=0.33, pitch=0.20, roll=0.17,
    eye_distance=(0.17, 0.27), eye_height=(0.40, 0.50), sideways=0.045, backdrop="place",
    ambient=(0.35, 0.85), width_px=(160, 232), height_ratio=(1.0, 1.2),
)  # fmt: skip
# Portraits of a study: square and filled by the face, since nobody aligns them; indoors and outdoors, on many days.
STUDY_PORTRAITS = Style(
    cast=(1.0, 1.0, 0.98), cast_spread=0.08, exposure=(0.78, 1.22), contrast=(0.85, 1.20), saturation=0.96,
    blur_px=(0.0, 0.8), noise=(1.0, 5.0), jpeg_quality=(80, 95), yaw=0.26, pitch=0.14, roll=0.05,
    eye_distance=(0.245, 0.275), eye_height=(0.425, 0.465), sideways=0.012, backdrop="place",
    ambient=(0.40, 0.90), width_px=(160, 160), height_ratio=(1.0, 1.0),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class View:
    """One picture's circumstances.  Angles in radians, lengths in head units unless the name says otherwise."""

    yaw_rad: float
    pitch_rad: float
    roll_rad: float
    eye_distance: float  # fraction of the width
    centre: tuple[float, float]  # of the point between the eyes, fractions of width and height
    light: tuple[float, float, float]  # unit vector towards the light
    ambient: float
    exposure: float
    cast: tuple[float, float, float]
    contrast: float
    blur_px: float
    noise: float
    smile: float  # -0.3 .. 1
    mouth_opening: float  # 0 .. 1
    brow_raise: float  # -1 .. 1
    eye_closing: float  # 0 .. 1
    gaze: tuple[float, float]
    extras: frozenset[str]  # of EXTRAS
    hair_length: float  # added to the person's
    hair_volume: float  # factor
    hair_shift: float  # of the parting
    colours: tuple[Colour, ...]  # clothes, backdrop, hat, ...
    seed: int  # of the small random marks: strands, backdrop shapes, noise


EXTRAS: dict[str, float] = {
    "glasses": 0.13, "sunglasses": 0.05, "cap": 0.06, "hat": 0.04, "hand": 0.05, "bar": 0.04,
}  # fmt: skip
NUM_COLOURS = 8
_TILE_SIDE, _TILE_SPREAD = 600, 30.0
_TILE = Image.fromarray(
    np.clip(
        np.random.Generator(np.random.PCG64(11)).normal(128, _TILE_SPREAD, (_TILE_SIDE, _TILE_SIDE)), 0, 255
    ).astype(np.uint8)
)
_HEADROOM = 0.6  # light up to 1 / 0.6 of white is kept until the tone curve bends it


def _pick(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return float(rng.uniform(*bounds))


def _bent(rng: np.random.Generator, spread: float) -> float:
    """A normal angle, cut where the drawing would no longer hold (1.6 spreads)."""
    return float(np.clip(rng.normal(0.0, spread), -1.6 * spread, 1.6 * spread))


def _any_colour(rng: np.random.Generator) -> Colour:
    """A colour of clothes and walls: mostly muted, of any brightness."""
    strength, light = rng.beta(1.3, 2.2), rng.uniform(25, 225)
    r, g, b = np.clip(light * (1.0 + strength * rng.uniform(-1.0, 1.0, 3)), 0, 255).astype(int).tolist()
    return r, g, b


def _extras(rng: np.random.Generator) -> frozenset[str]:
    worn = {name for name, chance in EXTRAS.items() if rng.random() < chance}
    if "sunglasses" in worn:
        worn -= {"glasses", "hand", "bar"}
    if "cap" in worn:
        worn -= {"hat"}
    if "hand" in worn:
        worn -= {"bar"}
    return frozenset(worn)


def sample_view(rng: np.random.Generator, style: Style) -> View:
    """Circumstances of one picture, drawn from a style."""
    azimuth, elevation = rng.uniform(-1.3, 1.3), rng.uniform(-0.4, 1.0)
    light = (np.sin(azimuth) * np.cos(elevation), -np.sin(elevation), np.cos(azimuth) * np.cos(elevation))
    # Light bulbs differ mostly between yellow and blue, and a little between green and magenta.
    warm, tint = rng.normal(0.0, style.cast_spread), rng.normal(0.0, 0.3 * style.cast_spread)
    cast = np.array(style.cast) * np.exp([warm, -tint, -warm])
    return View(
        yaw_rad=_bent(rng, style.yaw),
        pitch_rad=_bent(rng, style.pitch),
        roll_rad=_bent(rng, style.roll),
        eye_distance=_pick(rng, style.eye_distance),
        centre=(0.5 + _bent(rng, style.sideways), _pick(rng, style.eye_height)),
        light=(float(light[0]), float(light[1]), float(light[2])),
        ambient=_pick(rng, style.ambient),
        exposure=_pick(rng, style.exposure),
        cast=(float(cast[0]), float(cast[1]), float(cast[2])),
        contrast=_pick(rng, style.contrast),
        blur_px=_pick(rng, style.blur_px) if rng.random() < 0.5 else style.blur_px[0],
        noise=_pick(rng, style.noise),
        smile=float(np.clip(rng.normal(0.35, 0.4), -0.3, 1.0)),
        mouth_opening=float(rng.uniform(0.1, 0.9)) if rng.random() < 0.4 else 0.0,
        brow_raise=float(np.clip(rng.normal(0.0, 0.4), -1.0, 1.0)),
        eye_closing=float(rng.uniform(0.5, 1.0)) if rng.random() < 0.08 else float(rng.uniform(0.0, 0.35)),
        gaze=(float(rng.uniform(-0.5, 0.5)), float(rng.uniform(-0.2, 0.3))),
        extras=_extras(rng),
        hair_length=float(rng.normal(0.0, 0.08)),
        hair_volume=float(rng.uniform(0.75, 1.3)),
        hair_shift=float(rng.normal(0.0, 0.08)),
        colours=tuple(_any_colour(rng) for _ in range(NUM_COLOURS)),
        seed=int(rng.integers(2**31)),
    )


def sample_size(rng: np.random.Generator, style: Style) -> tuple[int, int]:
    """(width, height) in px of one picture of this style."""
    width = int(rng.integers(style.width_px[0], style.width_px[1] + 1))
    return width, round(width * _pick(rng, style.height_ratio))


def sample_quality(rng: np.random.Generator, style: Style) -> int:
    """JPEG quality of one picture of this style."""
    return int(rng.integers(style.jpeg_quality[0], style.jpeg_quality[1] + 1))


def _tone_curve(contrast: float) -> list[int]:
    """A table from light to grey level, 256 entries a channel: an S around middle grey that never clips hard."""
    level = np.arange(256) / 255.0 / _HEADROOM
    curve = 0.46 + (level - 0.46) * contrast
    shoulder = np.where(curve > 0.72, 0.72 + 0.28 * (1.0 - np.exp(-(curve - 0.72) / 0.28)), curve)
    toe = np.where(shoulder < 0.12, 0.12 * np.exp((shoulder - 0.12) / 0.12), shoulder)
    table: list[int] = np.rint(255 * np.clip(toe, 0, 1)).astype(int).tolist()
    return table * 3


def _grain(size: tuple[int, int], view: View) -> Image.Image:
    """Noise around 128, cut from one large tile at another place for each channel and picture."""
    width, height = size
    rng = np.random.Generator(np.random.PCG64(view.seed + 1))
    corners = rng.integers(0, (_TILE_SIDE - width + 1, _TILE_SIDE - height + 1), (3, 2)).tolist()
    tiles = [_TILE.crop((left, top, left + width, top + height)) for left, top in corners]
    return Image.blend(Image.new("RGB", size, (128, 128, 128)), Image.merge("RGB", tiles), view.noise / _TILE_SPREAD)


def develop(picture: Image.Image, gain: NDArray[np.float32], view: View, style: Style) -> Picture:
    """Light, colour, contrast, blur and noise on a drawn picture.

    picture: RGB, W x H.  gain: [H, W] light on each pixel, 1 = as drawn.  Returns uint8 [H, W, 3].
    """
    light = gain * np.float32(255 * view.exposure * _HEADROOM)
    channels = [Image.fromarray(np.minimum(light * np.float32(tint), 255).astype(np.uint8)) for tint in view.cast]
    drawn = ImageEnhance.Color(picture).enhance(style.saturation)
    exposed = ImageChops.multiply(drawn, Image.merge("RGB", channels)).point(_tone_curve(view.contrast))
    if view.blur_px > 0.05:
        exposed = exposed.filter(ImageFilter.GaussianBlur(view.blur_px))
    return np.asarray(ImageChops.add(exposed, _grain(picture.size, view), 1.0, -128))


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
