"""A photograph -> the faces in it as a model takes them, and whether they can be seen well enough to enrol somebody."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.faces.decode import UnusablePicture
from common.faces.detect import Face, FaceDetector, Quality
from common.faces.photos import aligned, open_photo

# Below and above these a picture is refused for enrolment: a poor template is compared with everybody from then on.
LEAST_SIZE_PX: Final = 40.0
MOST_BLUR: Final = 0.85
MOST_YAW_DEG: Final = 50.0
MOST_PITCH_DEG: Final = 40.0
LEAST_AREA_RATIO: Final = 3.0  # of two faces in a picture, the larger is the person's where it is so much larger
MOST_FACES: Final = 100  # of one photograph

_SIDE: Final = 112  # px, where no model says another


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One face of a photograph."""

    picture: NDArray[np.uint8]  # [S, S, 3], aligned
    box: tuple[float, float, float, float]  # px in the upright photograph: x, y, width, height
    quality: Quality

    @property
    def faults(self) -> str:
        """Why it cannot be seen well enough to be enrolled, in words; "" where it can."""
        quality = self.quality
        found = []
        if quality.size_px < LEAST_SIZE_PX:
            found.append(f"its face is small ({quality.size_px:.0f} px; {LEAST_SIZE_PX:.0f} are needed)")
        if quality.blur > MOST_BLUR:
            found.append(f"its face is blurred ({quality.blur:.2f}; at most {MOST_BLUR:.2f})")
        if abs(quality.yaw_deg) > MOST_YAW_DEG:
            found.append(f"its face is turned aside ({abs(quality.yaw_deg):.0f} degrees; at most {MOST_YAW_DEG:.0f})")
        if abs(quality.pitch_deg) > MOST_PITCH_DEG:
            found.append(
                f"its face looks up or down ({abs(quality.pitch_deg):.0f} degrees; at most {MOST_PITCH_DEG:.0f})"
            )
        return ", ".join(found)


class Photographs:
    """Finds the faces of photographs, one at a time; the detector is loaded with the first."""

    def __init__(self, image_size: int = _SIDE) -> None:
        """image_size: side of the aligned faces, px."""
        self._image_size = image_size
        self._detector = FaceDetector()

    def faces(self, source: Path | bytes) -> list[Seen]:
        """The faces of a photograph, the largest first.

        source: a file, or what is in one.  Raises DataError, one line with the reason: no picture, damaged, too large,
        no face, more faces than MOST_FACES.
        """
        named = "the picture" if isinstance(source, bytes) else str(source)
        image = open_photo(source)
        found = self._detector.detect(image)
        if not found:
            raise DataError(f"{named}: no face was found; give a photograph in which a face can be seen.")
        if len(found) > MOST_FACES:
            raise DataError(f"{named}: {len(found)} faces; at most {MOST_FACES} are looked at: give a part of it.")
        seen = [one for face in found if (one := self._seen(image, face)) is not None]
        if not seen:
            raise DataError(f"{named}: the face is outside the picture; give one with the whole face.")
        return seen

    def _seen(self, image: NDArray[np.uint8], face: Face) -> Seen | None:
        """None for a face whose middle the picture's edge has cut off: there is nothing to align."""
        try:
            picture = aligned(image, face, self._image_size)
        except UnusablePicture:
            return None
        x, y, width, height = face.box.tolist()
        return Seen(picture=picture, box=(x, y, width, height), quality=face.quality)


def whose(faces: list[Seen]) -> tuple[Seen | None, str]:
    """The face of a photograph that is to be enrolled, or None and why not.  faces: the largest first."""
    if len(faces) > 1:
        first, second = (face.box[2] * face.box[3] for face in faces[:2])
        if first < LEAST_AREA_RATIO * second:
            return None, f"{len(faces)} faces, and nothing says whose it is"
    return (None, faces[0].faults) if faces[0].faults else (faces[0], "")
