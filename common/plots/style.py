"""One look for every figure: colours that colour-blind readers can tell apart, the same for the same thing everywhere.

Figures are made with matplotlib's object interface: no window, no global state, safe in threads.  matplotlib is
imported inside the functions, since every program's `--help` passes by here.
"""

import importlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from numpy.typing import NDArray

# Okabe and Ito (2008), "Color Universal Design"; their yellow is left out: too faint on white.
BLACK: Final = "#000000"
ORANGE: Final = "#E69F00"
SKY: Final = "#56B4E9"
GREEN: Final = "#009E73"
BLUE: Final = "#0072B2"
VERMILLION: Final = "#D55E00"
PURPLE: Final = "#CC79A7"
GREY: Final = "#7F7F7F"

SPLIT_COLOURS: Final[Mapping[str, str]] = {"train": BLUE, "val": GREEN, "test": VERMILLION}
PAIR_COLOURS: Final[Mapping[str, str]] = {"genuine": BLUE, "impostor": VERMILLION}
CLIENT_COLOURS: Final[Mapping[str, str]] = {"celeba": SKY, "vggface2": PURPLE, "twins": BLACK}

_OTHER_COLOURS: Final = (BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE, BLACK)
_LINES: Final = ("-", "--", ":", "-.")
_MARKERS: Final = ("o", "s", "^", "D")

WIDTH_IN: Final = 10.0
DPI: Final = 120  # 1200 px wide
_MOST_MARKED_POINTS: Final = 25
_STEPS: Final = (0.05, 0.1, 0.2, 0.25, 0.5, 1.0)  # between ticks that begin at the end of an axis


class LineStyle(NamedTuple):
    """How one thing is drawn wherever it appears."""

    colour: str
    line: str | tuple[int, tuple[int, ...]]  # matplotlib's name of a dash pattern, or the pattern
    marker: str


# Methods of one family share a colour and differ in line and marker: seven colours are all that colour-blind readers
# can tell apart on white.
METHOD_STYLES: Final[Mapping[str, LineStyle]] = {
    "untrained": LineStyle(BLACK, "-", "o"),  # grey would be green's double to a deuteranope
    "local": LineStyle(ORANGE, "-", "o"),
    "centralized": LineStyle(GREEN, "-", "o"),
    "fedavg": LineStyle(BLUE, "-", "o"),
    "fedprox": LineStyle(VERMILLION, "-", "o"),
    "fedavgm": LineStyle(BLUE, "--", "s"),
    "fedbn": LineStyle(SKY, "-", "o"),
    "fedadam": LineStyle(PURPLE, "-.", "D"),
    "fedyogi": LineStyle(PURPLE, ":", "^"),
}
SHOWN_METHODS: Final[Mapping[str, str]] = {"centralized": "centralised"}  # a method's name in words, where it differs
LOCAL: Final = "local "  # "local NAME": the model that NAME trained alone, in the colour of "local"
_LOCAL_LINES: Final[Mapping[str, tuple[str, str]]] = {
    "celeba": ("--", "s"),
    "vggface2": (":", "^"),
    "twins": ("-.", "D"),
}
_OTHER_LOCAL_LINES: Final = (
    ((0, (6, 1, 1, 1, 1, 1)), "v"),
    ((0, (9, 3)), "P"),
    ((0, (3, 1)), "X"),
    ((0, (1, 3)), "*"),
    ((0, (9, 2, 3, 2)), "p"),
)


def client_styles(names: Iterable[str]) -> dict[str, LineStyle]:
    """A style for each client: the known data sets keep theirs; others get colours, then dashes, in name order."""
    given = sorted(names, key=_by_number)
    others = [name for name in given if name not in CLIENT_COLOURS]
    free = [colour for colour in _OTHER_COLOURS if colour not in {CLIENT_COLOURS.get(name) for name in given}]
    styles = {name: LineStyle(CLIENT_COLOURS[name], "-", "o") for name in given if name in CLIENT_COLOURS}
    for number, name in enumerate(others):
        turn = number // len(free)
        kind = turn % len(_LINES)
        styles[name] = LineStyle(free[number % len(free)], _LINES[kind], _MARKERS[kind])
    return {name: styles[name] for name in given}


def _by_number(name: str) -> list[str | int]:
    """site-2 before site-10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def method_styles(names: Iterable[str]) -> dict[str, LineStyle]:
    """A style for each compared model, in the order given: methods keep theirs; other names get free colours.

    "local NAME" has the colour of "local" and a line and marker of its own.
    """
    given = list(names)
    in_words = {SHOWN_METHODS.get(name, name): look for name, look in METHOD_STYLES.items()}
    methods = {**METHOD_STYLES, **in_words}
    known = {name: methods[name] for name in given if name in methods} | _local_styles(given)
    taken = {style.colour for style in known.values()}
    free = [colour for colour in _OTHER_COLOURS if colour not in taken] or list(_OTHER_COLOURS)
    for number, name in enumerate(name for name in given if name not in known):
        kind = number // len(free) % len(_LINES)
        known[name] = LineStyle(free[number % len(free)], _LINES[kind], _MARKERS[kind])
    return {name: known[name] for name in given}


def _local_styles(names: Iterable[str]) -> dict[str, LineStyle]:
    holders = sorted((name.removeprefix(LOCAL) for name in names if name.startswith(LOCAL)), key=_by_number)
    styles = {name: LineStyle(ORANGE, *_LOCAL_LINES[name]) for name in holders if name in _LOCAL_LINES}
    for number, name in enumerate(name for name in holders if name not in styles):
        turn, kind = divmod(number, len(_OTHER_LOCAL_LINES))  # line and marker together differ for the first 25
        marker = _OTHER_LOCAL_LINES[(kind + turn) % len(_OTHER_LOCAL_LINES)][1]
        styles[name] = LineStyle(ORANGE, _OTHER_LOCAL_LINES[kind][0], marker)
    return {LOCAL + name: style for name, style in styles.items()}


def shorten(name: str, most: int) -> str:
    """`name` in at most `most` characters; what a long one loses is its middle, since names often differ at the end."""
    if len(name) <= most:
        return name
    end = (most - 1) // 2
    return f"{name[: most - 1 - end]}…{name[len(name) - end :]}"


def ink_on(rgb: Sequence[float]) -> str:
    """Black or white, whichever reads better on a colour (red, green, blue in [0, 1]): contrast at least 4.5 to 1.

    Relative luminance and contrast as in WCAG 2.1.
    """
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return BLACK if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else "#FFFFFF"


def marker_for(style: LineStyle, num_points: int) -> str:
    """Markers make few points visible (a single one has no line) and only clutter many."""
    return style.marker if num_points <= _MOST_MARKED_POINTS else ""


def say(axes: "Axes", text: str) -> None:
    """A line in the middle of axes that have nothing to show."""
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, fontsize=10)


def new_figure(title: str, height_in: float) -> "Figure":
    """An empty figure, 1200 px wide, that places its parts without overlap."""
    figure = _bare_figure(height_in)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    return figure


def _bare_figure(height_in: float) -> "Figure":
    """A figure, also while another thread is in the middle of importing IPython, as MLflow's client does.

    Matplotlib looks at IPython's version where IPython stands in `sys.modules`, and an import stands there from its
    beginning.
    """
    from matplotlib.figure import Figure

    def make() -> "Figure":
        return Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, facecolor="white")

    try:
        return make()
    except AttributeError:
        importlib.import_module("IPython")  # waits until the other thread's import has ended
        return make()


def widened(span: tuple[float, float], values: Iterable[float]) -> tuple[float, float]:
    """The span of an axis or a colour scale, widened to whole tenths where a finite value lies outside."""
    finite = [value for value in values if math.isfinite(value)]
    low = min([span[0], *(math.floor(10.0 * value) / 10.0 for value in finite)])
    high = max([span[1], *(math.ceil(10.0 * value) / 10.0 for value in finite)])
    return low, high


def span_x_axis(axes: "Axes", span: tuple[float, float], values: Iterable[float], *, num_ticks: int = 6) -> None:
    """Give the x axis a figure's own span, whatever part of it the values fill, with ticks that stand apart."""
    low, high = widened(span, values)
    room = 0.02 * (high - low)  # a dot at the end is seen whole
    step = next((step for step in _STEPS if (high - low) / step < num_ticks - 0.5), (high - low) / (num_ticks - 1))
    ticks = [low + number * step for number in range(math.floor((high - low) / step + 1e-6) + 1)]
    axes.set_xlim(low - room, high + room)
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])


def grid_of_axes(figure: "Figure", num_panels: int) -> Sequence["Axes"]:
    """Panels in up to two columns; a last one alone in its row takes the whole width."""
    num_rows = max(1, (num_panels + 1) // 2)
    grid = figure.add_gridspec(num_rows, 2)
    places = [grid[number // 2, number % 2] for number in range(num_panels)]
    if num_panels % 2:  # also a single panel
        places[-1] = grid[num_rows - 1, :]
    return [figure.add_subplot(place) for place in places]


def dress(axes: "Axes", *, title: str, x_label: str, y_label: str) -> None:
    """Title, axis names with their units, a quiet grid."""
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


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
