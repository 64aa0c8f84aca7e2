"""How the pictures of a data set were cut out in truth, which is not always what `data.alignment` asks for.

A layout without landmarks is cut to centre squares, whatever was asked.  A model's thresholds hold for faces that are
cut as those were that it was trained and validated on, so what was done is kept with it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

BEFOREHAND: Final = "aligned beforehand"  # by `facefed data align`, so the pictures are taken as they are
CENTRE: Final = "centre square"
CUTS: Final = ("landmarks", "box", "detect", BEFOREHAND, CENTRE)
# Eyes, nose and mouth are where a face that is found and aligned in a photograph has them.
BY_LANDMARKS: Final = frozenset(("landmarks", "detect", BEFOREHAND))


def counted(cuts: Iterable[str]) -> dict[str, int]:
    """Cut -> data sets, in the order of CUTS; what is none of them ("": nobody said) is left out."""
    numbers = Counter(cuts)
    return {cut: numbers[cut] for cut in CUTS if numbers[cut]}


def cut_words(counts: Mapping[str, int]) -> str:
    """For a line: "landmarks (2 data sets), centre square (1 data set)"; "" of none."""
    known = [(cut, counts[cut]) for cut in CUTS if cut in counts]
    return ", ".join(f"{cut} ({number} data set{'s' * (number > 1)})" for cut, number in known)
