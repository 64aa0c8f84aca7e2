"""What tells made-up people apart: eyes, brows, nose, mouth and skin marks, under expression and pose; hair and beard.

Hair and beard are of the person's own style, in another state in each picture.
"""

import numpy as np
from PIL import Image, ImageDraw

from simulation.data.synth_camera import (
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
    ramp,
    shade,
)

_IRIS = ((58, 34, 20), (112, 72, 34), (104, 112, 58), (70, 120, 160), (130, 146, 156))
_SIDES = (-1.0, 1.0)
_FRECKLES = np.random.Generator(np.random.PCG64(5)).uniform((-0.72, 0.15), (0.72, 0.62), (63, 2))


def _sided(flat: Points, side: float) -> Points:
    return mirrored(flat) if side < 0 else flat


def eye_centre(sketch: Sketch, side: float) -> Points:
    """[1, 3]: the middle of an eye, side -1 is the picture's left."""
    return on_face(points((side * sketch.traits["eye_spacing"], 0.0)))


def draw_eyes(sketch: Sketch) -> None:
    """Both eyes: white, iris, pupil, glint, lid fold, lashes."""
    traits, view = sketch.traits, sketch.view
    half, tilt = traits["eye_size"], traits["eye_tilt"]
    lift = traits["eye_opening"] * (1.0 - 0.92 * view.eye_closing) * (1.0 + 0.25 * view.brow_raise)
    low = 0.55 * traits["eye_opening"] * (1.0 - 0.5 * view.eye_closing) * (1.0 - 0.45 * max(0.0, view.smile))
    drop = 0.5 * traits["eye_opening"] * view.eye_closing
    for side in _SIDES:
        x = traits["eye_spacing"]
        inner, outer = (x - half, 0.5 * tilt + 0.01), (x + half, -tilt)
        upper = points(
            inner,
            (x - 0.45 * half, drop - 0.85 * lift),
            (x + 0.25 * half, drop - lift - 0.3 * tilt),
            (x + 0.75 * half, 0.7 * drop - 0.55 * lift - 0.7 * tilt),
            outer,
        )
        lower = points(
            outer, (x + 0.35 * half, low + drop * 0.6 - 0.4 * tilt), (x - 0.35 * half, low + drop * 0.6), inner
        )
        lid = on_face(_sided(curve(upper), side))
        rim = on_face(_sided(curve(lower), side))
        _draw_eyeball(sketch, np.vstack([lid, rim]), side)
        lash = shade(mix(sketch.hair, (30, 20, 16), 0.7), 0.8)
        sketch.stroke(lid, lash, 0.022 + 0.022 * (1 - traits["masculine"]))
        sketch.stroke(rim, shade(sketch.skin, 0.62), 0.012)
        fold = upper[1:] - np.array([0.0, 0.035 + 0.05 * traits["eye_fold"]])
        sketch.stroke(on_face(_sided(curve(fold), side)), shade(sketch.skin, 0.66), 0.016)
        if traits["age"] > 0.45:
            bag = points((x - 0.8 * half, 0.13), (x, 0.17 + low), (x + 0.8 * half, 0.11))
            sketch.stroke(on_face(_sided(curve(bag), side)), shade(sketch.skin, 1.05 - 0.3 * traits["age"]), 0.02)


def _draw_eyeball(sketch: Sketch, outline: Points, side: float) -> None:
    """The eye's inside, clipped to the lids."""
    board = np.asarray(sketch.on_board(outline)).reshape(-1, 2)
    corner = np.floor(board.min(axis=0)).astype(int) - 1
    width, height = (np.ceil(board.max(axis=0)).astype(int) + 2 - corner).tolist()
    patch = Image.new("RGB", (width, height), (226, 222, 218))
    draw = ImageDraw.Draw(patch)
    gaze = sketch.view.gaze
    middle = eye_centre(sketch, side) + points((0.13 * gaze[0], -0.015 + 0.06 * gaze[1], 0.02))
    x, y = np.asarray(sketch.on_board(middle)) - corner
    unit = sketch.pose.unit_px * OVERSAMPLING
    squeeze = float(np.cos(sketch.view.yaw_rad))
    colour = ramp(_IRIS, sketch.traits["iris"])
    for radius, tint in ((0.112, shade(colour, 0.55)), (0.097, colour), (0.045, (12, 10, 10))):
        reach = radius * unit
        draw.ellipse((x - reach * squeeze, y - reach, x + reach * squeeze, y + reach), fill=tint)
    spark = 0.024 * unit
    gx, gy = x + 0.04 * unit * np.sign(sketch.view.light[0]), y - 0.04 * unit
    draw.ellipse((gx - spark, gy - spark, gx + spark, gy + spark), fill=(250, 250, 250))
    mask = Image.new("L", (width, height), 0)
    ImageDraw.Draw(mask).polygon((board - corner).ravel().tolist(), fill=255)
    sketch.image.paste(patch, (int(corner[0]), int(corner[1])), mask)


def draw_brows(sketch: Sketch) -> None:
    """Both brows, thick inside, thin outside."""
    traits, view = sketch.traits, sketch.view
    y = -traits["brow_height"] - 0.07 * view.brow_raise
    start, end = traits["brow_gap"], traits["eye_spacing"] + traits["eye_size"] + 0.07
    arch, tilt, thick = traits["brow_arch"], traits["brow_tilt"], traits["brow_thickness"]
    peak = start + 0.62 * (end - start)
    top = points(
        (start, y + tilt - 0.5 * thick),
        (0.5 * (start + peak), y + 0.4 * tilt - 0.6 * arch - 0.95 * thick),
        (peak, y - 0.4 * tilt - arch - 0.75 * thick),
        (end, y - tilt + 0.3 * arch),
    )
    bottom = points(
        (end, y - tilt + 0.3 * arch + 0.012),
        (peak, y - 0.4 * tilt - arch + 0.25 * thick),
        (0.5 * (start + peak), y + 0.4 * tilt - 0.6 * arch + 0.45 * thick),
        (start + 0.01, y + tilt + 0.6 * thick),
    )
    shape = np.vstack([curve(top), curve(bottom)])
    colour = mix(shade(sketch.hair, 0.72), sketch.skin, 0.28 - 0.2 * min(1.0, 10 * thick))
    for side in _SIDES:
        sketch.fill(on_face(_sided(shape, side), 0.03), colour)


def draw_nose(sketch: Sketch) -> None:
    """Bridge and tip by light and shadow, wings and nostrils by line."""
    traits, skin = sketch.traits, sketch.skin
    tip_y, wing, bridge, up = (traits[k] for k in ("nose_length", "nose_width", "nose_bridge", "nose_upturn"))
    base_y = tip_y + 0.10 - 0.07 * up
    lit = np.sign(sketch.view.light[0]) or 1.0
    for side in _SIDES:
        flank = points(
            (side * bridge, 0.0, 0.86),
            (side * bridge * 0.9, 0.45 * tip_y, 1.02),
            (side * 0.5 * wing, tip_y, 1.18),
            (side * wing, tip_y + 0.02, 0.95),
            (side * (bridge + 0.13), 0.25 * tip_y, 0.84),
        )
        sketch.model(flank, 141 if side == lit else 92)
        rim = points(
            (side * wing * 0.82, tip_y - 0.10, 0.98),
            (side * wing, tip_y + 0.01, 0.97),
            (side * wing * 0.8, base_y, 1.0),
            (side * wing * 0.45, base_y + 0.005, 1.06),
        )
        sketch.stroke(curve(rim), shade(skin, 0.6), 0.026)
        nostril = points(
            (side * wing * 0.75, base_y - 0.01),
            (side * wing * 0.5, base_y - 0.035 - 0.03 * up),
            (side * wing * 0.22, base_y),
            (side * wing * 0.5, base_y + 0.012),
        )
        sketch.fill(at_depth(loop(nostril), 1.04), shade(skin, 0.33))
    septum = points(
        (-0.35 * wing, base_y + 0.005, 1.07), (0.0, base_y + 0.03, 1.1), (0.35 * wing, base_y + 0.005, 1.07)
    )
    sketch.stroke(curve(septum), shade(skin, 0.62), 0.024)
    ridge = points(
        (-0.45 * bridge, 0.05, 0.92),
        (0.45 * bridge, 0.05, 0.92),
        (0.055, tip_y - 0.02, 1.25),
        (-0.055, tip_y - 0.02, 1.25),
    )
    sketch.model(ridge, 170)
    under = points(
        (-wing, base_y + 0.02, 0.95),
        (wing, base_y + 0.02, 0.95),
        (0.5 * wing, base_y + 0.10, 0.95),
        (-0.5 * wing, base_y + 0.10, 0.95),
    )
    sketch.model(under, 98)


def mouth_y(sketch: Sketch) -> float:
    """Where the line of the closed mouth stands."""
    return sketch.traits["nose_length"] + sketch.traits["mouth_drop"]


def mouth_corner(sketch: Sketch, side: float) -> Points:
    """[1, 3]: a corner of the mouth under the present smile."""
    smile = sketch.view.smile
    width = sketch.traits["mouth_width"] * (1.0 + 0.20 * smile - 0.12 * sketch.view.mouth_opening)
    return on_face(points((side * width, mouth_y(sketch) - 0.09 * smile - sketch.traits["mouth_curve"])))


def draw_mouth(sketch: Sketch) -> None:
    """Lips, and teeth and dark between them when the mouth is open."""
    traits, view = sketch.traits, sketch.view
    y, smile = mouth_y(sketch), max(0.0, view.smile)
    gap = 0.30 * view.mouth_opening + (0.07 * smile if smile > 0.5 else 0.0)
    right, left = mouth_corner(sketch, 1.0)[0], mouth_corner(sketch, -1.0)[0]
    w, upper, lower = right[0], traits["upper_lip"] * (1 - 0.3 * smile), traits["lower_lip"] * (1 - 0.2 * smile)
    y0 = y - 0.2 * gap
    bow = traits["lip_bow"]
    top = [
        (-0.5 * w, y0 - 0.72 * upper),
        (-0.16 * w, y0 - upper - 0.5 * bow),
        (0.0, y0 - upper + 0.5 * bow),
        (0.16 * w, y0 - upper - 0.5 * bow),
        (0.5 * w, y0 - 0.72 * upper),
    ]
    inner_top = [(0.5 * w, y0), (0.0, y0 + 0.012), (-0.5 * w, y0)]
    inner_low = [(0.55 * w, y0 + 0.75 * gap), (0.0, y0 + gap + 0.012), (-0.55 * w, y0 + 0.75 * gap)]
    low = [(-0.55 * w, y0 + gap * 0.9 + 0.7 * lower), (0.0, y0 + gap + lower), (0.55 * w, y0 + gap * 0.9 + 0.7 * lower)]
    ends = (tuple(right[:2]), tuple(left[:2]))
    lip = mix(
        mix(sketch.skin, (150, 62, 62), 0.45),
        (188, 38, 58),
        0.55 * traits["lip_colour"] * (1 - 0.8 * traits["masculine"]),
    )
    cavity = np.vstack([curve(points(ends[0], *inner_top, ends[1])), curve(points(ends[1], *inner_low[::-1], ends[0]))])
    sketch.fill(on_face(cavity, 0.06), (58, 18, 20))
    if gap > 0.04:
        teeth = points(
            (0.62 * w, y0 - 0.01),
            (-0.62 * w, y0 - 0.01),
            (-0.5 * w, y0 + 0.62 * min(gap, 0.14)),
            (0.0, y0 + 0.8 * min(gap, 0.14)),
            (0.5 * w, y0 + 0.62 * min(gap, 0.14)),
        )
        sketch.fill(on_face(teeth, 0.06), (228, 222, 210))
    sketch.fill(
        on_face(np.vstack([curve(points(ends[1], *top, ends[0])), curve(points(ends[0], *inner_top, ends[1]))]), 0.08),
        shade(lip, 0.88),
    )
    sketch.fill(
        on_face(np.vstack([curve(points(ends[1], *low, ends[0])), curve(points(ends[0], *inner_low, ends[1]))]), 0.08),
        lip,
    )
    line = curve(points(ends[1], *inner_top[::-1], ends[0]))
    sketch.stroke(on_face(line, 0.07), shade(lip, 0.45), 0.022)
    sketch.model(
        on_face(
            points(
                (-0.5 * w, y + gap + lower + 0.03),
                (0.5 * w, y + gap + lower + 0.03),
                (0.3 * w, y + gap + lower + 0.13),
                (-0.3 * w, y + gap + lower + 0.13),
            )
        ),
        104,
    )
    _draw_folds(sketch, right, left, smile)


def _draw_folds(sketch: Sketch, right: Points, left: Points, smile: float) -> None:
    """Lines from the nose to the mouth: deeper with age and in a smile."""
    depth = 0.10 * smile + 0.22 * max(0.0, sketch.traits["age"] - 0.3)
    if depth < 0.05:
        return
    x, y = 1.1 * sketch.traits["nose_width"], sketch.traits["nose_length"]
    for side, corner in ((1.0, right), (-1.0, left)):
        fold = points(
            (side * x, y),
            (side * (abs(corner[0]) + 0.08), 0.5 * (y + corner[1])),
            (side * (abs(corner[0]) + 0.10), corner[1] + 0.05),
        )
        sketch.stroke(on_face(curve(fold)), shade(sketch.skin, 1.0 - depth), 0.024)


def draw_marks(sketch: Sketch) -> None:
    """Freckles and a mole: the same places in every picture of a person."""
    traits = sketch.traits
    if traits["freckles"] > 0.6:
        spots = _FRECKLES[: int(140 * (traits["freckles"] - 0.55))] + np.array([0.1 * traits["mole_x"], 0.0])
        sketch.disc(on_face(spots), 0.016, mix(sketch.skin, (120, 62, 30), 0.45))
    if traits["mole_size"] > 0.015:
        spot = on_face(points((traits["mole_x"], traits["mole_y"])))
        sketch.disc(spot, traits["mole_size"], mix(sketch.skin, (48, 26, 20), 0.8))


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
