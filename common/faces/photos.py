"""One photograph of any kind: opened upright, and its faces brought to the picture that a model takes.

What `decode` does for the pictures of a data set with known landmarks, for a photograph of which nothing is known.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.faces.decode import UnusablePicture, open_upright, read_picture, warped
from common.faces.detect import Face, landmark_map


def open_photo(source: Path | str | bytes) -> NDArray[np.uint8]:
    """A photograph as uint8 RGB [H, W, 3], upright by its EXIF flag.

    source: a file, or what is in one.  Any mode (grey, palette, CMYK, 16-bit) and kind that `decode` reads.
    Raises DataError, one line with the reason: no such file, no picture, damaged, empty, without contrast, too many
    bytes or pixels (found before they are unpacked).
    """
    named = "the picture" if isinstance(source, bytes) else str(source)
    try:
        payload = source if isinstance(source, bytes) else read_picture(Path(source))
        return open_upright(payload)[0]
    except UnusablePicture as error:
        raise DataError(f"{named}: {error}; give another picture.") from None


def aligned(image: NDArray[np.uint8], face: Face, size: int = 112) -> NDArray[np.uint8]:
    """The face as a model takes it: landmarks on the ArcFace template, uint8 RGB [size, size, 3].

    image: uint8 RGB [H, W, 3], the one that the face was found in.  What lies outside it is black.
    """
    return warped(image, landmark_map(face, size), size)
