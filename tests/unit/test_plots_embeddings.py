"""Maps of embeddings: who is coloured, what the legend says, and that nothing overlaps."""

import itertools

import numpy as np
import pytest

from common.plots.people import Projection, embedding_map, embedding_maps
from common.plots.style import GREY
from tests.unit.pictures import assert_nothing_overlaps


def _sample(num_people, num_pictures):
    rng = np.random.default_rng(0)
    return rng.normal(size=(num_pictures, 2)), rng.integers(0, num_people, num_pictures)


def test_those_with_most_pictures_are_named_and_all_others_grey():
    # Person p has 20 - p pictures: 0 to 11 are named, 12 to 14 (8 + 7 + 6 pictures) are not.
    person = np.repeat(np.arange(15), 20 - np.arange(15))
    points = np.stack([person, -person], axis=1).astype(np.float64)
    figure = embedding_map(points, person, title="celeba", method="t-SNE", names=[f"p{n}" for n in range(15)])
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [*(f"p{n} ({20 - n})" for n in range(12)), "3 other people (21)"]
    for number, dots in enumerate(axes.collections[:12]):
        assert set(np.asarray(dots.get_offsets())[:, 0]) == {number}
    assert set(np.asarray(axes.collections[12].get_offsets())[:, 0]) == {12, 13, 14}


def test_people_differ_by_colour_and_marker_and_from_the_others():
    points, person = _sample(30, 600)
    (axes,) = embedding_map(points, person, title="", method="PCA", explained=(0.2, 0.1)).axes
    looks = [(tuple(dots.get_facecolor()[0]), dots.get_paths()[0].vertices.tobytes()) for dots in axes.collections[:12]]
    assert len(set(looks)) == 12
    others = axes.collections[12].get_facecolor()[0]
    assert all(not np.allclose(colour, others) for colour, _ in looks)
    assert np.ptp(others[:3]) == 0.0  # a grey
    assert GREY not in {colour for colour, _ in looks}
    for (one, shape), (other, other_shape) in itertools.pairwise(looks):  # neighbours in the legend differ in both
        assert not np.allclose(one, other)
        assert shape != other_shape


def test_the_axes_of_pca_say_what_they_explain_and_those_of_tsne_have_no_numbers():
    points, person = _sample(3, 30)
    figure = embedding_maps([Projection(points, "PCA", (0.214, 0.1)), Projection(points, "t-SNE")], person, title="x")
    pca, tsne = figure.axes
    assert (pca.get_title(), pca.get_xlabel()) == ("PCA: 31 % of the variance", "first component (21.4 %)")
    assert pca.get_ylabel() == "second component (10.0 %)"
    assert (tsne.get_title(), len(tsne.get_xticks()), len(tsne.get_yticks())) == ("t-SNE", 0, 0)
    (legend,) = figure.legends
    counts = np.bincount(person)
    assert [text.get_text() for text in legend.get_texts()] == [
        f"{one} ({counts[one]})" for one in np.argsort(-counts, kind="stable")
    ]


def test_points_must_belong_to_the_pictures():
    points, person = _sample(3, 30)
    with pytest.raises(ValueError, match=r"\[29, 2\]"):
        embedding_map(points, person[:29], title="", method="PCA")


@pytest.mark.parametrize(("num_people", "num_pictures"), [(1, 1), (5, 60), (85, 900), (500, 1000)])
def test_nothing_overlaps(num_people, num_pictures):
    points, person = _sample(num_people, num_pictures)
    names = [f"a-name-that-is-quite-long-{number}" for number in range(num_people)]
    one = embedding_map(points, person, title="celeba", method="t-SNE", names=names)
    assert_nothing_overlaps(one, "one")
    both = [Projection(points, "PCA", (0.2, 0.1)), Projection(points, "t-SNE")]
    assert_nothing_overlaps(embedding_maps(both, person, title="celeba", names=names), "both")
