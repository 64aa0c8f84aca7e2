"""How a made-up person is photographed: the view of one picture, the camera style of one data set, the darkroom.

Everything in this file is nuisance: none of it may say who the person is.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageEnhance, ImageFilter

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


STYLES: dict[str, Style] = {
    # Press pictures: flash and stage light, warm, contrasty, eyes brought to one place, a wall of shapes behind.
    "celeba": Style(
        cast=(1.05, 0.99, 0.92), cast_spread=0.10, exposure=(0.72, 1.15), contrast=(0.95, 1.30), saturation=1.04,
        blur_px=(0.0, 0.9), noise=(1.0, 5.0), jpeg_quality=(82, 95), yaw=0.30, pitch=0.17, roll=0.04,
        eye_distance=(0.205, 0.225), eye_height=(0.505, 0.525), sideways=0.008, backdrop="stage",
        ambient=(0.35, 0.85), width_px=(178, 178), height_ratio=(218 / 178, 218 / 178),
    ),
    # Found pictures: many cameras, cooler and flatter, softer, tilted heads, any framing, rooms and trees behind.
    "vggface2": Style(
        cast=(0.97, 1.0, 1.03), cast_spread=0.11, exposure=(0.75, 1.30), contrast=(0.75, 1.08), saturation=0.88,
        blur_px=(0.2, 1.2), noise=(2.0, 7.0), jpeg_quality=(60, 85), yaw=0.33, pitch=0.20, roll=0.17,
        eye_distance=(0.17, 0.27), eye_height=(0.40, 0.50), sideways=0.045, backdrop="place",
        ambient=(0.35, 0.85), width_px=(160, 232), height_ratio=(1.0, 1.2),
    ),
    # Portraits of a study: square and filled by the face, since nobody aligns them; indoors and outdoors, on many days.
    "twins": Style(
        cast=(1.0, 1.0, 0.98), cast_spread=0.08, exposure=(0.78, 1.22), contrast=(0.85, 1.20), saturation=0.96,
        blur_px=(0.0, 0.8), noise=(1.0, 5.0), jpeg_quality=(80, 95), yaw=0.26, pitch=0.14, roll=0.05,
        eye_distance=(0.245, 0.275), eye_height=(0.425, 0.465), sideways=0.012, backdrop="place",
        ambient=(0.40, 0.90), width_px=(160, 160), height_ratio=(1.0, 1.0),
    ),
}  # fmt: skip


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
