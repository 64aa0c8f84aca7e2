"""Where a ViT looked: one row for each picture, beside it how much attention each patch got.

Colours go from dark to light with the attention alone (cividis, made for colour-blind readers), and thin lines repeat
the picture's outlines: colours laid over the picture itself could not be read off any scale.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from common.plots.style import BLACK, ORANGE, WIDTH_IN, new_figure, shorten

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from numpy.typing import NDArray

    from common.models.dcal import AttentionMaps

MOST_PICTURES: Final = 24  # on one page
_COLOURS: Final = "cividis"
_SKETCH: Final = "#FFFFFF"
_NAME: Final = 30  # characters of a picture's name
_LUMA: Final = (0.299, 0.587, 0.114)
_WORDS_IN: Final = 1.9  # title, heads of the columns, colour bars
_BAR: Final = 0.05  # the height of a colour bar, of a row's


class _Column(NamedTuple):
    head: str
    values: "NDArray[np.float64]"  # [B, h, w], times the even share


def attention_maps(
    pictures: "NDArray[np.uint8]",
    maps: "AttentionMaps",
    names: Sequence[str],
    *,
    title: str = "Where the model looked",
) -> "Figure":
    """Pictures with the rollout, the last block's attention and, with GLCA, its local queries and its attention.

    pictures: [B, S, S, 3] uint8 RGB, as the model sees them, B in [1, 24].  maps: of the same pictures.
    names: one for each.  A map's unit is the share that each patch would get if all got alike, 1; a column has one
    scale for all its rows, from 0.
    Raises ValueError when the three do not fit each other.
    """
    count = len(pictures)
    if not (1 <= count <= MOST_PICTURES and len(names) == count == len(maps.rollout)):
        raise ValueError(
            f"{count} pictures, {len(names)} names and maps of {len(maps.rollout)}: as many of each, at most"
            f" {MOST_PICTURES}"
        )
    columns = _columns(maps)
    side_in = 0.9 * WIDTH_IN / (1 + len(columns))
    figure = new_figure(title, _WORDS_IN + count * side_in)
    grid = figure.add_gridspec(count + 1, 1 + len(columns), height_ratios=[*[1.0] * count, _BAR])
    for row, name in enumerate(names):
        axes = figure.add_subplot(grid[row, 0])
        _draw_picture(axes, pictures[row], shorten(name, _NAME))
        if maps.chosen is not None:
            _mark(axes, maps.chosen[row].numpy(), maps.rollout.shape[2])
        if row == 0:
            axes.set_title(_head_of_pictures(maps), fontsize=10)
    for place, column in enumerate(columns, start=1):
        top = float(column.values.max())
        for row, picture in enumerate(pictures):
            axes = figure.add_subplot(grid[row, place])
            image = _draw_map(axes, column.values[row], picture, top)
            if row == 0:
                axes.set_title(column.head, fontsize=10)
        bar = figure.colorbar(image, cax=figure.add_subplot(grid[count, place]), orientation="horizontal")
        bar.set_label("attention (1: spread evenly)", fontsize=9)
    return figure


def _columns(maps: "AttentionMaps") -> list[_Column]:
    patches = maps.rollout.shape[1] * maps.rollout.shape[2]
    columns = [
        _Column("attention rollout\nof the class token, all blocks", patches * maps.rollout.double().numpy()),
        _Column("last block\nclass token, mean over heads", patches * maps.last.double().numpy()),
    ]
    if maps.glca is not None:
        columns.append(_Column("GLCA\nits class token and the marked", patches * maps.glca.double().numpy()))
    return columns


def _head_of_pictures(maps: "AttentionMaps") -> str:
    if maps.chosen is None:
        return "what the model sees"
    num = maps.chosen.shape[1]
    return f"what the model sees; marked:\nGLCA's {num} local quer{'y' if num == 1 else 'ies'}"


def _draw_picture(axes: "Axes", picture: "NDArray[np.uint8]", name: str) -> None:
    axes.imshow(picture)
    axes.set_ylabel(name, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])


def _mark(axes: "Axes", chosen: "NDArray[np.int64]", num_columns: int) -> None:
    """Outline patches, given by their number by rows."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    width = min(1.4, 12.0 / num_columns)  # points; small patches would drown in their outlines
    rim = withStroke(linewidth=2.0 * width, foreground=BLACK)  # seen on skin as well as on hair
    patch = axes.images[0].get_array().shape[0] / num_columns  # type: ignore[union-attr]
    for number in chosen.tolist():
        row, column = divmod(number, num_columns)
        corner = (column * patch - 0.5, row * patch - 0.5)  # pixel 0 reaches from -0.5 to 0.5
        outline = Rectangle(corner, patch, patch, fill=False, edgecolor=ORANGE, linewidth=width, path_effects=[rim])
        axes.add_patch(outline)


def _draw_map(axes: "Axes", values: "NDArray[np.float64]", picture: "NDArray[np.uint8]", top: float) -> "AxesImage":
    """values: [h, w].  top: the brightest colour's value."""
    import numpy as np

    side = len(picture)
    image = axes.imshow(
        values,
        cmap=_COLOURS,
        vmin=0.0,
        vmax=top,
        interpolation="nearest",
        extent=(-0.5, side - 0.5, side - 0.5, -0.5),  # the picture's own pixels
    )
    grey = _blurred(picture @ np.array(_LUMA))
    levels = np.unique(np.quantile(grey, (0.25, 0.5, 0.75)))
    if np.ptp(grey) > 0.0:
        axes.contour(grey, levels=levels, colors=_SKETCH, linewidths=0.5, alpha=0.6)
    axes.set_xticks([])
    axes.set_yticks([])
    return image


def _blurred(grey: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """[S, S] float64 without what is smaller than a sixteenth of the side, so that its outlines are few."""
    import numpy as np

    width = max(1, len(grey) // 16)
    kernel = np.ones(width) / width
    padded = np.pad(grey, ((width // 2, width - 1 - width // 2),) * 2, mode="edge")
    for axis in (0, 1):
        padded = np.apply_along_axis(np.convolve, axis, padded, kernel, mode="valid")
    return padded
