"""Maps of embeddings in the plane, drawn only where the pictures are: a client's own folder, never the server's."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from common.plots.style import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION, dress, new_figure, shorten

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

MOST_NAMED: Final = 12  # more colours and markers nobody tells apart
# Six and four: the first twelve pairs all differ, and colours that colour-blind readers confuse have other markers.
_PERSON_COLOURS: Final = (BLUE, ORANGE, GREEN, PURPLE, VERMILLION, SKY)
_PERSON_MARKERS: Final = ("o", "^", "s", "D")
_OTHERS: Final = "#C8C8C8"
_NAME: Final = 22  # characters of a name in the legend


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
            label=f"{shorten(str(one) if names is None else names[one], _NAME)} ({len(mine)})",
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
