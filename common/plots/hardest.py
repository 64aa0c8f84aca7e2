"""The pairs of pictures that a model gets most wrong, as it sees them, with their scores.

The figure shows faces: it stays where the pictures are, and nothing sends it anywhere.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from common.plots.style import BLACK, VERMILLION, WIDTH_IN, new_figure, say, shorten

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from numpy.typing import NDArray

PAIRS_SHOWN: Final = 8  # of each kind
_COLUMNS: Final = 4
_GAP: Final = 0.06  # between the two pictures, of their width
_NAME: Final = 15  # characters of a person's name


class ShownPair(NamedTuple):
    """Two pictures [S, S, 3] uint8 RGB, who they show, and the cosine of their embeddings."""

    first: "NDArray[np.uint8]"
    second: "NDArray[np.uint8]"
    names: tuple[str, str]
    score: float


def hardest_pairs(
    impostors: Sequence[ShownPair],
    genuine: Sequence[ShownPair],
    *,
    threshold: float | None,
    title: str,
    about: str = "",
) -> "Figure":
    """Pairs of two people with the highest scores, above pairs of one person with the lowest; up to 8 of each.

    threshold: from which on a pair is taken for one person; None: nothing is said of right and wrong.
    about: a line at the foot.  Raises ValueError for more pairs.
    """
    if max(len(impostors), len(genuine)) > PAIRS_SHOWN:
        raise ValueError(f"{len(impostors)} and {len(genuine)} pairs; show at most {PAIRS_SHOWN} of each")
    rows = [max(1, math.ceil(len(pairs) / _COLUMNS)) for pairs in (impostors, genuine)]
    row_in = WIDTH_IN / _COLUMNS / 2.0 + 0.4
    figure = new_figure("", 1.3 + 0.35 * 2 + row_in * sum(rows))
    figure.suptitle(title, fontsize=13, fontweight="bold")
    figure.supxlabel(about, fontsize=9)
    parts = figure.subfigures(2, 1, height_ratios=[0.35 + row_in * number for number in rows], squeeze=False)[:, 0]
    parts[0].suptitle("Two people who look alike to the model: the highest scores", fontsize=11)
    _draw_kind(parts[0], impostors, rows[0], threshold=threshold, wrong="accepted")
    parts[1].suptitle("One person whose pictures do not: the lowest scores", fontsize=11)
    _draw_kind(parts[1], genuine, rows[1], threshold=threshold, wrong="rejected")
    return figure


def _draw_kind(
    part: "SubFigure", pairs: Sequence[ShownPair], num_rows: int, *, threshold: float | None, wrong: str
) -> None:
    """wrong: what a model should not do with these pairs, "accepted" or "rejected"."""
    panels = part.subplots(num_rows, _COLUMNS, squeeze=False).flatten()
    for axes in panels:
        axes.set_axis_off()
    if not pairs:
        say(panels[1], "there are no such pairs")
    for axes, pair in zip(panels, pairs, strict=False):
        _draw_pair(axes, pair)
        if threshold is None:
            axes.set_title(f"{pair.score:.3f}", fontsize=9)
            continue
        judged = "accepted" if pair.score >= threshold else "rejected"
        text = f"{pair.score:.3f} {judged}, {'wrongly' if judged == wrong else 'rightly'}"
        axes.set_title(text, fontsize=9, color=VERMILLION if judged == wrong else BLACK)


def _draw_pair(axes: "Axes", pair: ShownPair) -> None:
    import numpy as np

    side = len(pair.first)
    gap = np.full((side, max(1, round(_GAP * side)), 3), 255, dtype=np.uint8)
    axes.imshow(np.concatenate([pair.first, gap, pair.second], axis=1), interpolation="nearest")
    one, other = (shorten(name, _NAME) for name in pair.names)
    below = one if one == other else f"{one}   |   {other}"
    axes.text(0.5, -0.04, below, transform=axes.transAxes, ha="center", va="top", fontsize=8)
