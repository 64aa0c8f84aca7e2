"""Made-up people: a latent vector of plain floats, and the visible traits it stands for.

Each entry of the latent is an independent standard normal number, so people can be mixed, moved or nearly copied
with ordinary arithmetic. `read_traits` spreads every entry evenly over the range of its trait.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Traits = Mapping[str, float]

# Lengths in head units: half the width of an average face is 1, the eyes stand at y = 0, y points down.
TRAITS: dict[str, tuple[float, float]] = {
    "masculine": (0.0, 1.0),  # bends hair, beard, brows, jaw and lips together
    "age": (0.0, 1.0),  # lines and grey hair
    "face_width": (0.86, 1.10),
    "forehead": (0.82, 1.0),  # as a fraction of the face's width, like jaw and chin
    "jaw": (0.62, 0.96),
    "chin_width": (0.20, 0.52),
    "chin_y": (1.40, 1.74),
    "skin_tone": (0.0, 1.0),  # dark to light
    "skin_warmth": (-1.0, 1.0),
    "cheek_colour": (0.0, 1.0),
    "eye_spacing": (0.38, 0.54),
    "eye_size": (0.18, 0.28),
    "eye_opening": (0.07, 0.165),
    "eye_tilt": (-0.07, 0.08),
    "eye_fold": (0.0, 1.0),
    "iris": (0.0, 1.0),  # brown, hazel, green, blue, grey
    "brow_height": (0.18, 0.36),
    "brow_thickness": (0.022, 0.085),
    "brow_arch": (0.0, 0.13),
    "brow_tilt": (-0.10, 0.06),
    "brow_gap": (0.10, 0.25),
    "nose_length": (0.44, 0.74),
    "nose_width": (0.13, 0.29),
    "nose_bridge": (0.03, 0.16),
    "nose_upturn": (0.0, 1.0),
    "mouth_drop": (0.34, 0.52),  # from the tip of the nose to the mouth
    "mouth_width": (0.24, 0.43),
    "upper_lip": (0.03, 0.12),
    "lower_lip": (0.05, 0.15),
    "lip_bow": (0.0, 0.05),
    "lip_colour": (0.0, 1.0),
    "mouth_curve": (-0.05, 0.05),
    "hair_tone": (0.0, 1.0),  # black, brown, chestnut, red, blond
    "hair_top": (0.05, 0.30),
    "hair_side": (0.02, 0.22),
    "hair_length": (0.0, 1.0),
    "hair_wave": (0.0, 1.0),
    "hairline": (-1.02, -0.74),
    "fringe": (0.0, 1.0),
    "parting": (-0.75, 0.75),
    "ear_size": (0.16, 0.34),
    "ear_angle": (0.0, 0.13),
    "freckles": (0.0, 1.0),
    "mole_x": (-0.72, 0.72),
    "mole_y": (0.25, 1.30),
    "mole_size": (-0.02, 0.05),
    "beard": (0.0, 1.0),
    "moustache": (0.0, 1.0),
}
LATENT_SIZE = len(TRAITS)

_PERSON, _PICTURE, _ORDER, _FAMILY = 1, 2, 3, 4


def _generator(seed: int, stream: int, *path: int) -> np.random.Generator:
    """stream: of the layout, so that the same seed never makes the same person in two of them."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, stream, *path])))


def person_latent(seed: int, stream: int, person: int) -> NDArray[np.float64]:
    """The latent of one person: float64 [LATENT_SIZE], standard normal."""
    return _generator(seed, stream, _PERSON, person).standard_normal(LATENT_SIZE)


def family_latent(seed: int, stream: int, family: int) -> NDArray[np.float64]:
    """What the members of one family have in common: float64 [LATENT_SIZE], standard normal."""
    return _generator(seed, stream, _FAMILY, family).standard_normal(LATENT_SIZE)


def picture_generator(seed: int, stream: int, person: int, picture: int) -> np.random.Generator:
    """The random numbers of one picture, whichever process draws it and in whatever order."""
    return _generator(seed, stream, _PICTURE, person, picture)


def order_generator(seed: int, stream: int) -> np.random.Generator:
    """The random numbers that shuffle people and pictures over names."""
    return _generator(seed, stream, _ORDER)


def read_traits(latent: NDArray[np.float64]) -> dict[str, float]:
    """The traits of a latent, float [LATENT_SIZE]: each normal number becomes an even spread over its trait's range.

    Raises ValueError when the latent has another length or a number that is not finite.
    """
    if latent.shape != (LATENT_SIZE,) or not np.isfinite(latent).all():
        raise ValueError(f"a latent is {LATENT_SIZE} finite numbers, not an array of shape {latent.shape}")
    traits = {}
    for (name, (low, high)), value in zip(TRAITS.items(), latent.tolist(), strict=True):
        traits[name] = low + (high - low) * 0.5 * (1.0 + math.erf(value / math.sqrt(2.0)))
    male = traits["masculine"]
    traits["jaw"] += 0.05 * (male - 0.5)
    traits["brow_thickness"] += 0.022 * (male - 0.5)
    traits["upper_lip"] -= 0.025 * (male - 0.5)
    # Men mostly wear it short, women mostly long; the steep middle leaves few in between.
    traits["hair_length"] = traits["hair_length"] * (0.25 if male > 0.5 else 0.8) + (0.0 if male > 0.5 else 0.2)
    traits["hairline"] -= 0.25 * max(0.0, traits["age"] - 0.6) * (male > 0.5)
    traits["beard"] = max(0.0, traits["beard"] * 1.5 - 0.75) * (male > 0.5)
    traits["moustache"] = max(0.0, traits["moustache"] * 1.5 - 0.75) * (male > 0.5)
    return traits
