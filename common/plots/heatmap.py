"""Cells of a matrix, coloured and written into so that each number can be read."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal

from common.plots.style import ink_on

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage
    from numpy.typing import NDArray

_COLOURS: Final = "Blues"  # light to dark: it needs no hue to be read
_EMPTY: Final = "#EEEEEE"
_POINTS_PER_IN: Final = 72.0
_DIGIT_WIDTH: Final = 0.62  # of the font size


def draw_cells(
    axes: "Axes",
    values: "NDArray[np.float64]",
    span: tuple[float, float],
    *,
    aspect: "Literal['equal', 'auto']" = "equal",
    gamma: float = 1.0,
) -> "AxesImage":
    """Colour the cells: from white at span[0] to dark blue at span[1]; grey where the value is NaN.

    values: [R, C] float64.  gamma below 1 lets small values be seen.  No ticks are set; the first row is on top.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    colours = colormaps[_COLOURS].with_extremes(bad=_EMPTY)
    image = axes.imshow(
        np.ma.masked_invalid(values), cmap=colours, norm=PowerNorm(gamma, *span), aspect=aspect, interpolation="nearest"
    )
    axes.set_xticks([])
    axes.set_yticks([])
    return image


def write_cells(axes: "Axes", image: "AxesImage", texts: Sequence[Sequence[str]], cell_in: float) -> None:
    """A text for each cell of `cell_in` inches, black or white by the cell's colour, as large as fits."""
    import numpy as np

    colours = image.to_rgba(np.ma.array(image.get_array()))
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            if text:
                size = min(10.0, cell_in * _POINTS_PER_IN * min(0.85 / (_DIGIT_WIDTH * len(text)), 0.6))
                red, green, blue = (float(part) for part in colours[row, column, :3])
                axes.text(column, row, text, ha="center", va="center", fontsize=size, color=ink_on((red, green, blue)))
