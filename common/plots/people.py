"""Figures of single people: who is taken for whom, readable from five people seen in training to hundreds; and maps of
their embeddings in the plane, drawn only where the pictures are: a client's own folder, never the server's.
"""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from common.metrics.sums import grouped_confusion
from common.plots.style import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    draw_cells,
    dress,
    new_figure,
    say,
    shorten,
    write_cells,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

MOST_WRITTEN: Final = 30  # classes whose counts fit into their cells
_MOST_CONFUSED: Final = 25  # people shown out of many
_MOST_PAIRS: Final = 12
_SIDE_IN: Final = 4.9  # of the matrix, about
_CHARACTERS_IN_A_ROW: Final = 45  # of labels under the matrix, before they are turned
_SHARES: Final = (0.0, 0.01, 0.05, 0.2, 0.5, 1.0)
_NAME: Final = 14  # characters of a name at the matrix and in a pair


class _Matrix(NamedTuple):
    """What is drawn: counts [R, R] int64 (rows true), a label for each row, and what the labels are called."""

    counts: "NDArray[np.int64]"
    labels: Sequence[str]
    axis: str
    heading: str
    shade: str = "share of the row's pictures"


class _Pair(NamedTuple):
    true: str
    predicted: str
    pictures: int


def confusion(
    counts: "NDArray[np.int64]", *, num_people: int, title: str, names: Sequence[str] | None = None
) -> "Figure":
    """A confusion matrix, and beside it the pairs that are confused most.

    counts: [G, G] int64, rows true and columns predicted, as `metrics.sums.grouped_confusion` returns it.
    num_people: how many people the G groups hold; G < num_people means they were grouped, which the picture says.
    names: of the people, num_people of them; their numbers where None, and where people are grouped.
    Up to 30 classes the counts stand in the cells; colours are shares of each row.
    Raises ValueError when counts is not square or does not fit num_people or names.
    """
    num_groups = len(counts)
    if counts.shape != (num_groups, num_groups) or not 0 < num_groups <= num_people:
        raise ValueError(f"counts {counts.shape} must be [G, G] with G in 1 to num_people = {num_people}")
    if names is not None and len(names) != num_people:
        raise ValueError(f"{len(names)} names for {num_people} people")
    grouped = num_groups < num_people
    if grouped:
        labels = _ranges(num_groups, num_people)
        heading = f"{num_people} people in {num_groups} groups of {_sizes(num_groups, num_people)}"
    else:
        labels = [str(number) for number in range(num_people)] if names is None else list(names)
        heading = f"{num_people} people"
    pairs = [_Pair(labels[row], labels[column], count) for row, column, count in _most_confused(counts)]
    if not grouped:
        return _figure(_Matrix(counts, labels, "person", heading), pairs, title, "people")
    shade = "share of the row's pictures; mistakes within a group are on the diagonal"
    return _figure(_Matrix(counts, labels, "group (numbers of its people)", heading, shade), pairs, title, "groups")


def confusion_of_predictions(
    predicted: "NDArray[np.int64]",
    labels: "NDArray[np.int64]",
    people_names: Sequence[str],
    *,
    title: str = "Confusion of people seen in training",
) -> "Figure":
    """The confusion matrix of one holder's own predictions; of many people the 25 most confused, and all others as one.

    predicted, labels: [N] int64 in [0, len(people_names)).
    Up to 30 people all are shown.  Otherwise the rows are those with most errors (of them, or for them), most first;
    the cell of all others with themselves holds their errors among each other too.  The list of pairs is of everyone.
    Raises ValueError when the arrays are not of one length or a number is out of range.
    """
    import numpy as np

    num_people = len(people_names)
    if num_people <= MOST_WRITTEN:
        counts = grouped_confusion(predicted, labels, num_people, MOST_WRITTEN)
        return confusion(counts, num_people=num_people, title=title, names=people_names)
    wrong = predicted != labels
    errors = np.bincount(labels[wrong], minlength=num_people) + np.bincount(predicted[wrong], minlength=num_people)
    shown = np.argsort(-errors, kind="stable")[:_MOST_CONFUSED]
    place = np.full(num_people, len(shown), dtype=np.int64)
    place[shown] = np.arange(len(shown))
    counts = grouped_confusion(place[predicted], place[labels], len(shown) + 1)
    names = [*(people_names[person] for person in shown), "all others"]
    heading = f"the {len(shown)} most confused of {num_people} people"
    codes, found = np.unique(labels[wrong] * num_people + predicted[wrong], return_counts=True)
    first = np.argsort(-found, kind="stable")[:_MOST_PAIRS]
    pairs = [
        _Pair(people_names[codes[k] // num_people], people_names[codes[k] % num_people], int(found[k])) for k in first
    ]
    return _figure(_Matrix(counts, names, "person", heading), pairs, title, "people")


def _ranges(num_groups: int, num_people: int) -> list[str]:
    """The class numbers of each group: class c is in group c * G // n, so group g begins at ceil(g * n / G)."""
    starts = [-(-group * num_people // num_groups) for group in range(num_groups + 1)]
    return [str(start) if end - start == 1 else f"{start}-{end - 1}" for start, end in itertools.pairwise(starts)]


def _sizes(num_groups: int, num_people: int) -> str:
    small = num_people // num_groups
    return str(small) if num_people % num_groups == 0 else f"{small} or {small + 1}"


def _most_confused(counts: "NDArray[np.int64]") -> list[tuple[int, int, int]]:
    """(true, predicted, count) of the largest cells off the diagonal, largest first; only those with any."""
    import numpy as np

    errors = counts.copy()
    np.fill_diagonal(errors, 0)
    order = np.argsort(-errors, axis=None, kind="stable")[:_MOST_PAIRS]
    rows, columns = np.unravel_index(order, errors.shape)
    found = [(int(row), int(column), int(errors[row, column])) for row, column in zip(rows, columns, strict=True)]
    return [cell for cell in found if cell[2] > 0]


def _figure(matrix: _Matrix, pairs: Sequence[_Pair], title: str, what: str) -> "Figure":
    figure = new_figure(title, 6.9)
    left, right = figure.subplots(1, 2, width_ratios=(2.5, 1.0))
    _draw_matrix(figure, left, matrix)
    _draw_pairs(right, pairs, what)
    return figure


def _draw_matrix(figure: "Figure", axes: "Axes", matrix: _Matrix) -> None:
    import numpy as np

    counts, labels = matrix.counts, [shorten(label, _NAME) for label in matrix.labels]
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    image = draw_cells(axes, shares, (0.0, 1.0), gamma=0.5)  # of many people each error is a small share
    written = len(counts) <= MOST_WRITTEN
    if written:
        write_cells(axes, image, [[_brief(int(count)) for count in row] for row in counts], _SIDE_IN / len(counts))
    step = 1 if written else -(-len(counts) // 16)
    places = list(range(0, len(counts), step))
    size = 9 if len(places) <= 16 else 7
    long = max(len(labels[place]) for place in places) * len(places) > _CHARACTERS_IN_A_ROW
    axes.set_xticks(places, [labels[place] for place in places], rotation=90 if long else 0, fontsize=size)
    axes.set_yticks(places, [labels[place] for place in places], fontsize=size)
    axes.set_title(
        f"{matrix.heading}, {int(counts.sum()):,} pictures" + (" (an empty cell: none)" if written else ""), fontsize=11
    )
    axes.set_xlabel(f"predicted {matrix.axis}")
    axes.set_ylabel(f"true {matrix.axis}")
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.7, aspect=40, ticks=_SHARES)
    bar.ax.set_xticklabels([f"{100 * share:g} %" for share in _SHARES])
    bar.set_label(matrix.shade + (" (grey: no pictures)" if not totals.all() else ""))


def _brief(count: int) -> str:
    """At most four characters for any count that occurs; nothing for 0, since most cells hold it."""
    if count == 0:
        return ""
    return str(count) if count < 10_000 else f"{count / 1000:.0f}k"


def _draw_pairs(axes: "Axes", pairs: Sequence[_Pair], what: str) -> None:
    axes.set_title(f"Most confused {what}\n(true → predicted: pictures)", fontsize=11)
    axes.set_axis_off()
    if not pairs:
        say(axes, "no picture was\ntaken for another")
        return
    for place, pair in enumerate(pairs):
        label = f"{shorten(pair.true, _NAME)} → {shorten(pair.predicted, _NAME)}: {pair.pictures:,}"
        axes.barh(place + 0.18, pair.pictures, height=0.24, color=BLUE)
        axes.text(0.0, place, label, ha="left", va="bottom", fontsize=9)
    axes.set_xlim(0.0, pairs[0].pictures)
    axes.set_ylim(_MOST_PAIRS - 0.4, -0.6)


MOST_NAMED: Final = 12  # more colours and markers nobody tells apart
# Six and four: the first twelve pairs all differ, and colours that colour-blind readers confuse have other markers.
_PERSON_COLOURS: Final = (BLUE, ORANGE, GREEN, PURPLE, VERMILLION, SKY)
_PERSON_MARKERS: Final = ("o", "^", "s", "D")
_OTHERS: Final = "#C8C8C8"
_NAME_IN_LEGEND: Final = 22  # characters of a name in the legend


class Projection(NamedTuple):
    """Points [N, 2] in the plane, how they were made ("PCA" or "t-SNE"), and what share each axis explains (PCA)."""

    points: "NDArray[np.float64]"
    method: str
    explained: tuple[float, float] | None = None


def embedding_map(
    points: "NDArray[np.float64]",
    person: "NDArray[np.int64]",
    *,
    title: str,
    method: str,
    explained: tuple[float, float] | None = None,
    names: Sequence[str] | None = None,
) -> "Figure":
    """One map of pictures, coloured by who they show.

    points: [N, 2] float; person: [N] int64, who each picture shows; method: "PCA" or "t-SNE".
    explained: the fraction of the variance along each axis (PCA).  names: by the person's number; numbers where None.
    The 12 people with most pictures have a colour and a marker each, all others are grey.
    Raises ValueError when points and person do not fit each other.
    """
    return embedding_maps([Projection(points, method, explained)], person, title=title, names=names)


def embedding_maps(
    projections: Sequence[Projection],
    person: "NDArray[np.int64]",
    *,
    title: str,
    names: Sequence[str] | None = None,
) -> "Figure":
    """Maps of the same pictures side by side, one legend; see `embedding_map`."""
    for projection in projections:
        if projection.points.shape != (len(person), 2):
            raise ValueError(f"points {projection.points.shape} must be [{len(person)}, 2]: one for each picture")
    figure = new_figure(title, 6.2)
    panels = figure.subplots(1, len(projections), squeeze=False)[0]
    for axes, projection in zip(panels, projections, strict=True):
        _draw_map(axes, projection, person, names)
    # Beside or below the maps: inside it would cover pictures.
    if len(projections) == 1:
        panels[0].legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), title="person (pictures)", fontsize=9)
    else:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", title="person (pictures)", fontsize=9, ncols=4)
    return figure


def _draw_map(axes: "Axes", projection: Projection, person: "NDArray[np.int64]", names: Sequence[str] | None) -> None:
    import numpy as np

    people, counts = np.unique(person, return_counts=True)
    named = people[np.argsort(-counts, kind="stable")[:MOST_NAMED]]
    rest = ~np.isin(person, named)
    for number, one in enumerate(named):
        mine = projection.points[person == one]
        axes.scatter(
            mine[:, 0],
            mine[:, 1],
            s=26,
            color=_PERSON_COLOURS[number % len(_PERSON_COLOURS)],
            marker=_PERSON_MARKERS[number % len(_PERSON_MARKERS)],
            edgecolors="white",
            linewidths=0.4,
            zorder=3,
            label=f"{shorten(str(one) if names is None else names[one], _NAME_IN_LEGEND)} ({len(mine)})",
        )
    if rest.any():
        others = projection.points[rest]
        label = f"{len(people) - len(named)} other people ({len(others)})"
        axes.scatter(others[:, 0], others[:, 1], s=9, color=_OTHERS, linewidths=0, zorder=2, label=label)
    _name_axes(axes, projection)


def _name_axes(axes: "Axes", projection: Projection) -> None:
    if projection.explained is None:  # positions of t-SNE have no unit and no meaning of their own
        dress(axes, title=projection.method, x_label="", y_label="")
        axes.set_xticks([])
        axes.set_yticks([])
        return
    first, second = projection.explained
    dress(
        axes,
        title=f"{projection.method}: {100 * (first + second):.0f} % of the variance",
        x_label=f"first component ({100 * first:.1f} %)",
        y_label=f"second component ({100 * second:.1f} %)",
    )
