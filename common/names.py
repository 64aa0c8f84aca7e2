"""A client's name: what it may be, and when two names look alike to a person who reads them."""

import re
import unicodedata
from typing import Final

# It is shown on terminals and becomes part of folders, tags and metrics.
CLIENT_NAME = re.compile(r"\w(?:[\w .-]{0,62}[\w.-])?")
NAME_RULE = "1 to 64 letters, digits, spaces, '.', '_' or '-', with no space at the end"

# Letters that are drawn like Latin ones: those of Cyrillic, Greek and Armenian, and Latin's own; and letters that are
# drawn as nothing.  After Unicode's confusables.txt (UTS #39), which has more scripts.
_DRAWN_ALIKE: Final = {
    "абвгԁеһіјкӏмпорԛгѕтԝхуѵԌ": "a6brdehijklmnopqrstwxyvG",
    "АВСЕԐНІЈКМОРԚЅТԜХУҮѴԀЬ": "ABCEEHIJKMOPQSTWXYYVdb",
    "αβγεηικνορστυχωϲϳ": "aByenikvopotuxwcj",
    "ΑΒΕΖΗΙΚΜΝΟΡΤΥΧϹϿ": "ABEZHIKMNOPTYXCC",
    "աԁհյոսօցզքՏՍՕԼ": "wdhjnuogqpSUOL",
    "ıɑɡɩƖƽǀ": "iagil5l",
    "сн": "ch",
}
_LATIN: Final = {
    **{ord(one): latin for drawn, latins in _DRAWN_ALIKE.items() for one, latin in zip(drawn, latins, strict=True)},
    **dict.fromkeys((0x115F, 0x1160, 0x3164, 0xFFA0)),
}
_SHAPES: Final = str.maketrans({"I": "l", "1": "l", "0": "O"})


def looks_of(name: str) -> tuple[str, str]:
    """What a person may take a name for: without regard to case, and by the shapes of its characters.

    Two names look alike where they have one of these in common.  Compatibility forms, accents, blanks and letters of
    other scripts count as the plain ones that they look like.
    """
    plain = unicodedata.normalize("NFKD", name)
    latin = "".join(one for one in plain if not unicodedata.combining(one)).translate(_LATIN)
    latin = " ".join(latin.split())
    shapes = latin.translate(_SHAPES).replace("rn", "m").replace("vv", "w")
    return f"in any case: {latin.casefold()}", f"in shape: {shapes}"


def look_alike(one: str, other: str) -> bool:
    """Whether a person may take one name for the other."""
    return not set(looks_of(one)).isdisjoint(looks_of(other))
