"""One look for every figure: colours that colour-blind readers can tell apart, the same for the same thing everywhere.

Figures are made with matplotlib's object interface: no window, no global state, safe in threads.  matplotlib is
imported inside the functions, since every program's `--help` passes by here.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008), "Color Universal Design"; their yellow is left out: too faint on white.
BLACK: Final = "#000000"
ORANGE: Final = "#E69F00"
SKY: Final = "#56B4E9"
GREEN: Final = "#009E73"
BLUE: Final = "#0072B2"
VERMILLION: Final = "#D55E00"
PURPLE: Final = "#CC79A7"
GREY: Final = "#7F7F7F"

METHOD_COLOURS: Final[Mapping[str, str]] = {
    "untrained": BLACK,  # grey would be green's double to a deuteranope
    "local": ORANGE,
    "centralized": GREEN,
    "fedavg": BLUE,
    "fedprox": VERMILLION,
}
SPLIT_COLOURS: Final[Mapping[str, str]] = {"train": BLUE, "val": GREEN, "test": VERMILLION}
PAIR_COLOURS: Final[Mapping[str, str]] = {"genuine": BLUE, "impostor": VERMILLION}
CLIENT_COLOURS: Final[Mapping[str, str]] = {"celeba": SKY, "vggface2": PURPLE, "twins": BLACK}

_OTHER_COLOURS: Final = (BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE, BLACK)
_LINES: Final = ("-", "--", ":", "-.")
_MARKERS: Final = ("o", "s", "^", "D")

WIDTH_IN: Final = 10.0
DPI: Final = 120  # 1200 px wide
_MOST_MARKED_POINTS: Final = 25


class LineStyle(NamedTuple):
    """How one thing is drawn wherever it appears."""

    colour: str
    line: str
    marker: str


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
    """A style for each compared model, in the order given: methods keep their colours; other names get free ones."""
    given = list(names)
    known = {name: LineStyle(METHOD_COLOURS[name], "-", "o") for name in given if name in METHOD_COLOURS}
    taken = {style.colour for style in known.values()}
    free = [colour for colour in _OTHER_COLOURS if colour not in taken]
    for number, name in enumerate(name for name in given if name not in known):
        kind = number // len(free) % len(_LINES)
        known[name] = LineStyle(free[number % len(free)], _LINES[kind], _MARKERS[kind])
    return {name: known[name] for name in given}


def marker_for(style: LineStyle, num_points: int) -> str:
    """Markers make few points visible (a single one has no line) and only clutter many."""
    return style.marker if num_points <= _MOST_MARKED_POINTS else ""


def new_figure(title: str, height_in: float) -> "Figure":
    """An empty figure, 1200 px wide, that places its parts without overlap."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    return figure


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
