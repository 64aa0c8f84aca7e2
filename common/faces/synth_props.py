"""Clothes, and what people put on or hold before the face: nothing here says who they are."""

from typing import Literal

import numpy as np
from PIL import ImageDraw

from common.faces.synth_camera import Colour
from common.faces.synth_canvas import (
    OVERSAMPLING,
    Points,
    Sketch,
    at_depth,
    curve,
    loop,
    mirrored,
    mix,
    on_face,
    points,
    shade,
)
from common.faces.synth_features import eye_centre


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
