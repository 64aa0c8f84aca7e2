"""One picture of one made-up person: `render_face` turns plain numbers into pixels and landmarks.

Clothes, and what people put on or hold before the face, say nothing about who they are.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from simulation.data.synth_camera import (
    OVERSAMPLING,
    Colour,
    Points,
    Pose,
    Sketch,
    Style,
    View,
    at_depth,
    blank_relief,
    curve,
    develop,
    loop,
    mirrored,
    mix,
    on_face,
    points,
    ramp,
    relief_gain,
    shade,
)
from simulation.data.synth_face import (
    draw_back_hair,
    draw_beard,
    draw_brows,
    draw_eyes,
    draw_front_hair,
    draw_marks,
    draw_mouth,
    draw_nose,
    eye_centre,
    mouth_corner,
)
from simulation.data.synth_people import Traits, read_traits


def draw_body(sketch: Sketch) -> None:
    """Neck and clothes; the clothes' colours are another day's."""
    traits, cloth, second = sketch.traits, sketch.view.colours[0], sketch.view.colours[1]
    w = 0.62 * traits["face_width"] * (0.85 + 0.25 * traits["masculine"])
    neck = points((w, 0.9), (w * 0.96, 1.9), (w * 1.5, 2.4), (-w * 1.5, 2.4), (-w * 0.96, 1.9), (-w, 0.9))
    torso = points(
        (-0.75, 2.12), (-1.75, 2.42), (-2.35, 3.0), (-2.6, 6.0), (2.6, 6.0), (2.35, 3.0), (1.75, 2.42), (0.75, 2.12)
    )
    sketch.fill(at_depth(torso, -0.35), cloth)
    sketch.fill(at_depth(neck, -0.3), shade(sketch.skin, 0.84))
    _NECKLINES[sketch.view.seed % len(_NECKLINES)](sketch, cloth, second)
    sketch.model(at_depth(points((-w, 1.3), (w, 1.3), (0.9 * w, 1.95), (-0.9 * w, 1.95)), -0.25), 84)


def _shirt_and_collar(sketch: Sketch, cloth: Colour, second: Colour) -> None:
    sketch.fill(at_depth(points((-0.72, 2.18), (0.0, 3.1), (0.72, 2.18), (0.0, 2.5)), -0.25), second)
    collar = points((-0.72, 2.0), (-0.98, 2.30), (-0.22, 3.0), (0.0, 2.75))
    for side in (collar, mirrored(collar)):
        sketch.fill(at_depth(side, -0.2), shade(cloth, 0.82))


def _suit_and_tie(sketch: Sketch, cloth: Colour, second: Colour) -> None:
    shirt = points((-0.68, 2.02), (-0.6, 4.0), (0.6, 4.0), (0.68, 2.02), (0.0, 2.55))
    sketch.fill(at_depth(shirt, -0.25), mix(second, (238, 238, 240), 0.8))
    sketch.fill(at_depth(points((-0.14, 2.5), (0.14, 2.5), (0.26, 4.2), (-0.26, 4.2)), -0.2), sketch.view.colours[2])
    lapel = points((-0.74, 2.05), (-1.05, 2.45), (-0.5, 4.2), (-0.1, 4.2), (-0.45, 3.0))
    for side in (lapel, mirrored(lapel)):
        sketch.fill(at_depth(side, -0.15), shade(cloth, 0.75))


def _round_neck(sketch: Sketch, cloth: Colour, second: Colour) -> None:
    hem = curve(points((-0.85, 2.12), (-0.55, 2.42), (0.0, 2.56), (0.55, 2.42), (0.85, 2.12)))
    below = np.vstack([hem, points((1.3, 2.6), (-1.3, 2.6))])
    sketch.fill(at_depth(below, -0.2), cloth)
    sketch.stroke(at_depth(hem, -0.2), mix(cloth, second, 0.4), 0.1)


_NECKLINES = (_shirt_and_collar, _suit_and_tie, _round_neck)


def draw_extras(sketch: Sketch) -> None:
    """Glasses, hat or cap, hand or bar, as the view says."""
    table = {
        "cap": _draw_cap,
        "hat": _draw_hat,
        "glasses": _draw_glasses,
        "sunglasses": _draw_sunglasses,
        "hand": _draw_hand,
        "bar": _draw_bar,
    }
    for name, draw in table.items():
        if name in sketch.view.extras:
            draw(sketch)


def _glass(sketch: Sketch, side: float) -> Points:
    centre = eye_centre(sketch, side)[0]
    wide, high = 0.30 + 0.04 * (sketch.view.seed % 5) / 4, 0.19 + 0.07 * (sketch.view.seed % 7) / 6
    flat = points(
        (-wide, -high),
        (0.0, -1.12 * high),
        (wide, -high),
        (1.08 * wide, 0.0),
        (0.8 * wide, high),
        (0.0, 1.15 * high),
        (-0.8 * wide, high),
        (-1.08 * wide, 0.0),
    )
    return at_depth(loop(flat + centre[:2] + np.array([0.0, 0.02])), 1.0)


def _frame(sketch: Sketch, colour: Colour, width: float) -> None:
    x = sketch.traits["eye_spacing"]
    for side in (-1.0, 1.0):
        ring = _glass(sketch, side)
        sketch.stroke(np.vstack([ring, ring[:2]]), colour, width)
        sketch.stroke(
            points((side * (x + 0.30), -0.03, 1.0), (side * 1.02 * sketch.traits["face_width"], -0.05, 0.0)),
            colour,
            width,
        )
    sketch.stroke(points((-x + 0.28, -0.03, 1.0), (0.0, -0.06, 1.1), (x - 0.28, -0.03, 1.0)), colour, width)


def _draw_glasses(sketch: Sketch) -> None:
    _frame(sketch, shade(sketch.view.colours[2], 0.45), 0.03 + 0.03 * (sketch.view.seed % 3) / 2)


def _draw_sunglasses(sketch: Sketch) -> None:
    for side in (-1.0, 1.0):
        sketch.fill(_glass(sketch, side), shade(sketch.view.colours[2], 0.22))
    _frame(sketch, shade(sketch.view.colours[3], 0.3), 0.05)


def _cap_body(sketch: Sketch, colour: Colour, brow: float, top: float, kind: Literal["round", "flat"]) -> None:
    w = sketch.traits["face_width"] + 0.12
    if kind == "round":
        crown = np.column_stack(
            [np.sin(np.linspace(-1.57, 1.57, 11)) * w, brow - np.cos(np.linspace(-1.57, 1.57, 11)) * (brow - top)]
        )
    else:
        crown = points(
            (-w, brow),
            (-0.92 * w, 0.6 * brow + 0.4 * top),
            (-0.86 * w, top),
            (0.0, top + 0.05),
            (0.86 * w, top),
            (0.92 * w, 0.6 * brow + 0.4 * top),
            (w, brow),
        )
    edge = points(
        (w, brow, 0.1),
        (0.6 * w, brow + 0.02, 0.72),
        (0.0, brow + 0.03, 0.95),
        (-0.6 * w, brow + 0.02, 0.72),
        (-w, brow, 0.1),
    )
    whole = np.vstack([at_depth(curve(crown), 0.1), curve(edge)])
    sketch.fill(whole, colour)
    sketch.mark_solid(whole)


def _draw_cap(sketch: Sketch) -> None:
    colour, brow = sketch.view.colours[4], -0.72
    _cap_body(sketch, colour, brow, -1.72, "round")
    brim = points(
        (-0.85, brow - 0.06, 0.6),
        (-0.72, brow + 0.16, 1.45),
        (0.0, brow + 0.24, 1.75),
        (0.72, brow + 0.16, 1.45),
        (0.85, brow - 0.06, 0.6),
        (0.0, brow - 0.10, 0.95),
    )
    sketch.fill(loop(brim), shade(colour, 0.72))
    sketch.mark_solid(loop(brim))
    sketch.model(on_face(points((-0.9, -0.6), (0.9, -0.6), (0.7, -0.12), (-0.7, -0.12))), 88)


def _draw_hat(sketch: Sketch) -> None:
    colour, brow = sketch.view.colours[5], -0.78
    brim = np.column_stack(
        [1.55 * np.cos(np.linspace(0, 6.28, 16)), np.full(16, brow), 1.35 * np.sin(np.linspace(0, 6.28, 16))]
    )
    sketch.fill(brim, shade(colour, 0.8))
    sketch.mark_solid(brim)
    _cap_body(sketch, colour, brow - 0.03, -1.85, "flat")
    _cap_body(sketch, shade(sketch.view.colours[6], 0.6), brow - 0.03, brow - 0.2, "flat")
    sketch.model(on_face(points((-0.9, -0.65), (0.9, -0.65), (0.7, -0.2), (-0.7, -0.2))), 84)


def _draw_hand(sketch: Sketch) -> None:
    """A hand before the cheek or chin."""
    side = 1.0 if sketch.view.seed % 2 else -1.0
    x, y = 0.35 + 0.4 * (sketch.view.seed % 11) / 10, 1.05 + 0.3 * (sketch.view.seed % 13) / 12
    skin = shade(sketch.skin, 0.93)
    wrist = points(
        (side * (x + 0.1), y + 0.25),
        (side * (x + 0.75), y + 0.15),
        (side * (x + 1.0), y + 2.6),
        (side * (x + 0.3), y + 2.6),
    )
    sketch.fill(at_depth(wrist, 1.0), shade(skin, 0.9))
    for finger in range(4):
        tip = points(
            (side * (x + 0.05 + 0.19 * finger), y - 0.42 + 0.06 * abs(finger - 1)),
            (side * (x + 0.10 + 0.19 * finger), y + 0.45),
        )
        sketch.stroke(at_depth(tip, 1.1), shade(skin, 0.55), 0.22)
        sketch.disc(at_depth(tip[:1], 1.1), 0.105, shade(skin, 0.55))
        sketch.stroke(at_depth(tip, 1.1), skin, 0.18)
        sketch.disc(at_depth(tip[:1], 1.1), 0.088, skin)


def _draw_bar(sketch: Sketch) -> None:
    """A straight thing, out of focus, between camera and face: a microphone stand, a pole, a neighbour's arm."""
    width, height = sketch.image.size
    lean, where = sketch.rng.uniform(-0.5, 0.5), sketch.rng.uniform(0.1, 0.9) * width
    thick = sketch.pose.unit_px * OVERSAMPLING * sketch.rng.uniform(0.12, 0.3)
    line = (where - lean * height / 2, -20, where + lean * height / 2, height + 20)
    sketch.brush.line(line, fill=sketch.view.colours[7], width=round(thick))
    ImageDraw.Draw(sketch.solid).line(line, fill=0, width=round(thick))


_SKIN = ((92, 60, 46), (150, 102, 76), (198, 148, 118), (222, 174, 146), (234, 194, 172))
_HAIR = ((26, 22, 22), (62, 42, 30), (104, 66, 40), (150, 84, 44), (206, 166, 104))
SMALLEST_PX, LARGEST_PX = 32, 512
_GREY = (168, 166, 164)


@dataclass(frozen=True, kw_only=True)
class Portrait:
    """A finished picture, uint8 RGB [H, W, 3], and where the face is in it, in px of the picture.

    landmarks: float64 [5, 2]: left eye, right eye, nose, left and right corner of the mouth, left as one looks at it.
    box: (x, y, width, height) around the face from hairline to chin.
    """

    picture: NDArray[np.uint8]
    landmarks: Points
    box: tuple[int, int, int, int]


def render_face(latent: NDArray[np.float64], view: View, style: Style, size: tuple[int, int]) -> Portrait:
    """Draw a person under a view.  The same arguments give the same bytes.

    latent: float64 [LATENT_SIZE].  size: (width, height), px.
    Raises ValueError for a latent of another length or a size out of range.
    """
    if min(size) < SMALLEST_PX or max(size) > LARGEST_PX:
        raise ValueError(f"a side of a portrait is {SMALLEST_PX} to {LARGEST_PX} px, not {size[0]} x {size[1]}")
    traits = read_traits(latent)
    rng = np.random.Generator(np.random.PCG64(view.seed))
    board = _backdrop(view, style, size, rng)
    sketch = Sketch(
        traits=traits,
        view=view,
        pose=Pose(view, size),
        skin=_skin_colour(traits),
        hair=_hair_colour(traits),
        rng=rng,
        image=board,
        relief=blank_relief(size),
        solid=Image.new("L", board.size),
        brush=ImageDraw.Draw(board),
    )
    draw_back_hair(sketch)
    draw_body(sketch)
    outline = _draw_head(sketch)
    bare, room = board.copy(), ImageChops.invert(sketch.solid)
    draw_marks(sketch)
    draw_beard(sketch)
    draw_nose(sketch)
    draw_mouth(sketch)
    draw_eyes(sketch)
    draw_brows(sketch)
    board.paste(bare, mask=room)  # whatever a turned head would hide stays inside its outline
    draw_front_hair(sketch)
    draw_extras(sketch)
    gain = _light_gain(sketch, size) * relief_gain(sketch.relief, size, 0.085 * sketch.pose.unit_px)
    picture = develop(sketch.image.reduce(OVERSAMPLING), gain, view, style)
    return Portrait(picture=picture, landmarks=_landmarks(sketch), box=_box(sketch.pose.project(outline), size))


def _skin_colour(traits: Traits) -> tuple[int, int, int]:
    r, g, b = ramp(_SKIN, traits["skin_tone"])
    warm = traits["skin_warmth"]
    return min(255, round(r + 7 * warm)), g, max(0, round(b - 16 * warm))


def _hair_colour(traits: Traits) -> tuple[int, int, int]:
    return mix(ramp(_HAIR, traits["hair_tone"]), _GREY, max(0.0, min(0.9, 3.5 * (traits["age"] - 0.72))))


def _head_outline(sketch: Sketch) -> Points:
    """[M, 3]: the face's edge, clockwise from the crown; the chin comes forward and drops with the jaw."""
    traits = sketch.traits
    w = traits["face_width"]
    drop = 0.22 * sketch.view.mouth_opening
    chin, jaw = traits["chin_y"] + drop, traits["jaw"] * w
    half = points(
        (0.0, -1.24, 0.1),
        (0.55 * w, -1.10, 0.1),
        (traits["forehead"] * w, -0.62, 0.12),
        (w, 0.0, 0.1),
        (0.98 * w, 0.45, 0.1),
        (jaw, 1.02 + 0.4 * drop, 0.22),
        (0.5 * (jaw + traits["chin_width"]) * 0.93, chin - 0.22, 0.42),
        (traits["chin_width"] * 0.72, chin - 0.03, 0.56),
        (0.0, chin, 0.6),
    )
    edge = loop(np.vstack([half, mirrored(half[-2:0:-1])]), 4)
    seen = sketch.silhouette(edge[:, :2], 1.0, both_sides=False)
    seen[:, 2] = np.where(np.abs(edge[:, 0]) < 0.45, edge[:, 2], np.maximum(seen[:, 2], edge[:, 2]))
    return seen


def _draw_head(sketch: Sketch) -> Points:
    """Ears, face and the broad forms on it; returns the outline."""
    traits, skin = sketch.traits, sketch.skin
    w, high, out = traits["face_width"], traits["ear_size"], traits["ear_angle"]
    ear = points(
        (0.92 * w, -0.10),
        (w + 0.06 + out, -0.16),
        (w + 0.09 + out, 0.05),
        (w + 0.05 + 0.6 * out, high + 0.08),
        (0.93 * w, high + 0.22),
    )
    for side in (ear, mirrored(ear)):
        sketch.fill(at_depth(loop(side), -0.05), shade(skin, 0.9))
        sketch.fill(at_depth(loop(side * np.array([0.985, 0.75]) + np.array([0.0, 0.02])), -0.05), shade(skin, 0.76))
    outline = _head_outline(sketch)
    sketch.fill(outline, skin)
    sketch.mark_solid(outline)
    blush = mix(skin, (196, 92, 84), 0.05 + 0.35 * traits["cheek_colour"])
    cheek = points((0.30, 0.42), (0.55, 0.32), (0.78, 0.42), (0.74, 0.66), (0.50, 0.74), (0.33, 0.62))
    socket = points((0.14, -0.12), (0.5, -0.2), (0.82, -0.06), (0.74, 0.10), (0.44, 0.16), (0.18, 0.10))
    hollow = points((0.86, 0.6), (0.55, 0.85), (0.62, 1.15), (0.85, 0.95))
    for flip in (1.0, -1.0):
        sign = np.array([flip, 1.0])
        sketch.fill(on_face(loop(cheek * sign)), mix(skin, blush, 0.5))
        sketch.fill(on_face(loop((cheek - np.array([0.54, 0.52])) * 0.6 * sign + np.array([0.54 * flip, 0.52]))), blush)
        sketch.model(on_face(loop(cheek * sign)), 140)
        sketch.model(on_face(loop(socket * sign)), 108)
        sketch.model(on_face(loop(hollow * sign)), 112)
    sketch.model(on_face(points((-0.45, -0.75), (0.45, -0.75), (0.35, -0.4), (-0.35, -0.4))), 140)
    chin = traits["chin_y"]
    sketch.model(on_face(points((-0.16, chin - 0.26), (0.16, chin - 0.26), (0.1, chin - 0.1), (-0.1, chin - 0.1))), 142)
    if traits["age"] > 0.7:
        for y in (-0.62, -0.50):
            line = curve(points((-0.4, y + 0.03), (0.0, y), (0.4, y + 0.03)))
            sketch.stroke(on_face(line), shade(skin, 1.18 - 0.36 * traits["age"]), 0.02)
    return outline


def _light_gain(sketch: Sketch, size: tuple[int, int]) -> NDArray[np.float32]:
    """Light on an egg-shaped head (Lambert) and an even light on everything else: float32 [H, W]."""
    shrink = 4
    width, height = size[0] // shrink, size[1] // shrink
    view, pose = sketch.view, sketch.pose
    centre = pose.project(points((0.0, 0.1, 0.0)))[0]
    column = ((np.arange(width) + 0.5) * shrink - centre[0]) / pose.unit_px
    row = ((np.arange(height) + 0.5) * shrink - centre[1]) / pose.unit_px
    cos, sin = np.cos(view.roll_rad), np.sin(view.roll_rad)
    x = (column[None, :] * cos + row[:, None] * sin) / 1.15
    y = (row[:, None] * cos - column[None, :] * sin) / 1.65
    radius = x * x + y * y
    depth = np.sqrt(np.maximum(1.0 - radius, 0.04))
    lambert = np.maximum(0.0, x * view.light[0] + y * view.light[1] + depth * view.light[2])
    head = (view.ambient + (1.1 - 0.55 * view.ambient) * lambert).astype(np.float32)
    rest = np.float32(0.5 + 0.45 * view.ambient)
    whole = np.asarray(Image.fromarray(head - rest).resize(size, Image.Resampling.BILINEAR))
    solid = np.asarray(sketch.solid.reduce(OVERSAMPLING), dtype=np.float32)
    gain: NDArray[np.float32] = rest + whole * (solid / np.float32(255.0))
    return gain


def _landmarks(sketch: Sketch) -> Points:
    tip = points((0.0, sketch.traits["nose_length"], 1.2))
    corners = [mouth_corner(sketch, -1.0), mouth_corner(sketch, 1.0)]
    return sketch.pose.project(np.vstack([eye_centre(sketch, -1.0), eye_centre(sketch, 1.0), tip, *corners]))


def _box(outline: Points, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The smallest box of whole px around the outline, cut at the picture's edges."""
    low = np.clip(np.floor(outline.min(axis=0)), 0, np.array(size) - 1).astype(int)
    width, height = (np.clip(np.ceil(outline.max(axis=0)), 1, size).astype(int) - low).tolist()
    return int(low[0]), int(low[1]), width, height


def _backdrop(view: View, style: Style, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """What is behind: a wall of signs ("stage") or a blurred room or garden ("place"); RGB, board size."""
    small = (max(8, size[0] // 4), max(8, size[1] // 4))
    first, second = view.colours[6], view.colours[7]
    image = Image.new("RGB", small, first)
    draw = ImageDraw.Draw(image)
    height = small[1]
    if style.backdrop == "stage":
        step = int(rng.integers(7, 14))
        for top in range(0, height, step):
            left = (top // step % 2) * step
            draw.rectangle((left, top, left + step, top + step // 2), fill=mix(first, second, 0.6))
            draw.rectangle((left + 2 * step, top, left + 3 * step, top + step // 2), fill=mix(first, second, 0.35))
        soft = rng.uniform(0.3, 1.5)
    else:
        for corner in rng.uniform(-0.2, 1.0, (9, 2)) * small:
            reach = rng.uniform(0.1, 0.6, 2) * small
            tint = mix(first, view.colours[int(rng.integers(0, 8))], 0.7)
            frame = (float(corner[0]), float(corner[1]), float(corner[0] + reach[0]), float(corner[1] + reach[1]))
            (draw.rectangle if rng.random() < 0.5 else draw.ellipse)(frame, fill=tint)
        soft = rng.uniform(1.0, 3.5)
    image = image.filter(ImageFilter.GaussianBlur(soft))
    # Smooth up to the picture's size; the board's extra pixels need no more than copies.
    board = (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING)
    return image.resize(size, Image.Resampling.BILINEAR).resize(board, Image.Resampling.NEAREST)
