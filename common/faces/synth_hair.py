"""Hair and beard: a person's own style, in another state in each picture."""

import numpy as np

from common.faces.synth_canvas import (
    Points,
    Sketch,
    at_depth,
    curve,
    loop,
    mix,
    on_face,
    points,
    shade,
)
from common.faces.synth_features import mouth_corner, mouth_y

_CROWN = -1.22  # top of the skull


def _dome(sketch: Sketch, spread: float, top: float, num: int = 13) -> Points:
    """[num, 2]: an arc over the skull from the left ear to the right, `spread` wider and `top` higher than it.

    The hair is combed over from the parting, so it stands higher on the other side.
    """
    angle = np.linspace(-1.75, 1.75, num)
    part = sketch.traits["parting"] + sketch.view.hair_shift
    lift = top * (1.0 - 0.4 * np.sin(angle) * np.sign(part) * min(1.0, 2 * abs(part)))
    x = np.sign(angle) * np.abs(np.sin(angle)) ** 0.85 * (sketch.traits["face_width"] * 0.97 + spread)
    up = np.sign(np.cos(angle)) * np.abs(np.cos(angle)) ** 0.8
    return np.column_stack([x, -0.15 - up * (-0.15 - _CROWN + lift)])


def _volume(sketch: Sketch) -> tuple[float, float]:
    view, traits = sketch.view, sketch.traits
    return traits["hair_side"] * view.hair_volume, traits["hair_top"] * view.hair_volume


def _wavy(sketch: Sketch, flat: Points, amount: float) -> Points:
    """The outline with curls: a person's wave, in another phase in each picture."""
    phase = sketch.rng.uniform(0, 6.28)
    steps = np.arange(len(flat))
    swing = amount * (0.3 + sketch.traits["hair_wave"])
    curls = np.column_stack([np.sin(1.9 * steps + phase), np.cos(2.3 * steps + phase)])
    waved: Points = flat + swing * curls
    return waved


def draw_back_hair(sketch: Sketch) -> None:
    """The hair behind the face and neck."""
    traits = sketch.traits
    side, top = _volume(sketch)
    dome = _wavy(sketch, _dome(sketch, side, top), 0.02)
    length = traits["hair_length"] + sketch.view.hair_length
    dark = shade(sketch.hair, 0.68)
    if length < 0.28:
        nape = points((0.75, 0.5, -0.4), (-0.75, 0.5, -0.4))
        sketch.fill(np.vstack([sketch.silhouette(curve(dome), 1.0, both_sides=True), nape]), dark)
        return
    end = 0.1 + 2.2 * length
    flare = traits["face_width"] + side + 0.16 * length
    right = _wavy(
        sketch, points((flare, 0.35), (flare + 0.03, 0.6 * end), (0.95 * flare, end), (0.55 * flare, end + 0.1)), 0.035
    )
    left = _wavy(
        sketch,
        points((-0.55 * flare, end + 0.1), (-0.95 * flare, end), (-flare - 0.03, 0.6 * end), (-flare, 0.35)),
        0.035,
    )
    sketch.fill(at_depth(loop(np.vstack([dome, right, left])), -0.25), dark)


def _hairline(sketch: Sketch, num: int = 9) -> Points:
    """[num, 2] from the right temple to the left: the hair's edge on the forehead, with fringe and parting."""
    traits = sketch.traits
    across = np.linspace(1.0, -1.0, num)
    part = traits["parting"] + sketch.view.hair_shift
    fringe = max(0.0, 1.5 * traits["fringe"] - 0.5)
    ends = -0.36 - 0.12 * traits["masculine"] + 0.8 * min(0.3, traits["hair_length"])  # sideburns
    y = traits["hairline"] + (ends - traits["hairline"]) * np.abs(across) ** 3.2
    drape = np.clip(np.abs(across - part) * 1.1, 0.0, 1.0) * (1.0 - np.abs(across) ** 4)
    y = y + fringe * 0.52 * drape - 0.05 * np.exp(-(((across - part) / 0.12) ** 2))
    y[1:-1] += sketch.rng.normal(0.0, 0.02 + 0.03 * traits["hair_wave"] * fringe, num - 2)
    x = across * traits["face_width"] * (0.98 - 0.1 * (1 - across**2))
    return np.column_stack([x, np.minimum(y, -0.12)])


def draw_front_hair(sketch: Sketch) -> None:
    """The hair over the skull and forehead, with strands."""
    side, top = _volume(sketch)
    outer = curve(_wavy(sketch, _dome(sketch, 0.85 * side, top), 0.02), 3)
    inner = curve(_hairline(sketch), 5)
    outer3, inner3 = sketch.silhouette(outer, 1.0, both_sides=True), on_face(inner, 0.03)
    sketch.fill(np.vstack([outer3, inner3]), sketch.hair)
    sketch.mark_solid(outer3)
    sketch.model(np.vstack([inner3, inner3[::-1] + np.array([0.0, 0.09, 0.0])]), 92)
    _draw_strands(sketch, outer3, inner3[::-1])


def _draw_strands(sketch: Sketch, outer: Points, inner: Points) -> None:
    """Fine lines from the parting outwards; waves make them swing and cross the edges."""
    num, wave = 42, sketch.traits["hair_wave"]
    where = sketch.rng.uniform(0.06, 0.94, num)
    bend = 0.5 + 0.5 * sketch.traits["parting"]
    root = where + 0.35 * (bend - where)
    first = inner[(where * (len(inner) - 1)).astype(int)]
    last = outer[(root * (len(outer) - 1)).astype(int)]
    share = np.linspace(-0.06, 0.98, 7)[None, :, None]
    lines = first[:, None] + (last - first)[:, None] * share
    swing = np.sin(np.linspace(0, 9, 7)[None, :] + sketch.rng.uniform(0, 6.28, (num, 1)))
    lines[:, :, 0] += 0.05 * wave * swing + (0.3 * (where - bend))[:, None] * share[:, :, 0] * (1 - share[:, :, 0])
    lines[:, :, 2] += 0.15 * share[:, :, 0] * (1 - share[:, :, 0])
    tones = [shade(sketch.hair, tone) for tone in (0.70, 0.80, 0.90, 1.12, 1.24, 1.34)]
    sketch.hatch(lines, [tones[k] for k in sketch.rng.integers(0, len(tones), num).tolist()], 0.018)


def draw_beard(sketch: Sketch) -> None:
    """Beard and moustache of those who wear one."""
    traits, y = sketch.traits, mouth_y(sketch)
    colour = mix(sketch.skin, shade(sketch.hair, 0.8), 0.25 + 0.7 * min(1.0, traits["beard"]))
    if traits["beard"] > 0.02:
        chin = traits["chin_y"] + 0.22 * sketch.view.mouth_opening
        w, jaw = traits["face_width"], traits["jaw"] * traits["face_width"]
        outer = points(
            (0.90 * w, 0.50),
            (0.92 * jaw + 0.02, 1.02),
            (0.62 * jaw, chin - 0.12),
            (0.0, chin + 0.01),
            (-0.62 * jaw, chin - 0.12),
            (-0.92 * jaw - 0.02, 1.02),
            (-0.90 * w, 0.50),
        )
        inner = points(
            (-0.86 * w, 0.50),
            (-0.66 * w, 1.02),
            (-0.32, y + 0.24),
            (0.0, y + 0.22),
            (0.32, y + 0.24),
            (0.66 * w, 1.02),
            (0.86 * w, 0.50),
        )
        sketch.fill(on_face(np.vstack([curve(outer), curve(inner)]), -0.04), colour)
    if traits["moustache"] > 0.02:
        colour = mix(sketch.skin, shade(sketch.hair, 0.8), 0.3 + 0.6 * min(1.0, traits["moustache"]))
        right, left = mouth_corner(sketch, 1.0)[0, :2], mouth_corner(sketch, -1.0)[0, :2]
        top = sketch.traits["nose_length"] + 0.17
        lip = y - traits["upper_lip"] - 0.05 * sketch.view.mouth_opening
        shape = points(
            (right[0] + 0.02, right[1] + 0.02),
            (0.5 * right[0], lip - 0.015),
            (0.0, lip - 0.02),
            (0.5 * left[0], lip - 0.015),
            (left[0] - 0.02, left[1] + 0.02),
            (0.6 * left[0], 0.5 * (top + lip)),
            (0.0, top),
            (0.6 * right[0], 0.5 * (top + lip)),
        )
        sketch.fill(on_face(loop(shape), 0.08), colour)
