"""The page of attention maps: what is drawn where, in which unit, and that nothing overlaps."""

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle

from common.models.dcal import AttentionMaps
from common.plots.attention import MOST_PICTURES, attention_maps
from tests.unit.pictures import assert_nothing_overlaps

SIDE, GRID = 32, 4


def _pictures(num):
    return np.random.default_rng(0).integers(0, 256, (num, SIDE, SIDE, 3), dtype=np.uint8)


def _maps(num, *, glca=False):
    def shares(seed):
        found = torch.rand(num, GRID, GRID, generator=torch.Generator().manual_seed(seed))
        return found / found.sum((1, 2), keepdim=True)

    if not glca:
        return AttentionMaps(rollout=shares(1), last=shares(2))
    chosen = torch.tensor([[7, 8]]).repeat(num, 1)  # row 1, column 3; row 2, column 0
    return AttentionMaps(rollout=shares(1), last=shares(2), chosen=chosen, glca=shares(3))


def _drawn(figure, column, num_columns):
    """The picture or map in each row of a column; colour bars come last in a column."""
    axes = [one for one in figure.axes if one.images and one.get_subplotspec().colspan.start == column]
    assert num_columns > column
    return sorted(axes, key=lambda one: one.get_subplotspec().rowspan.start)


def test_each_row_has_its_picture_and_its_maps_in_even_shares():
    pictures, maps = _pictures(3), _maps(3, glca=True)
    figure = attention_maps(pictures, maps, ["a.jpg", "b.jpg", "c.jpg"])
    for column, values in enumerate((maps.rollout, maps.last, maps.glca), start=1):
        drawn = _drawn(figure, column, 4)
        top = float(GRID**2 * values.max())
        for row, axes in enumerate(drawn):
            [image] = axes.images
            np.testing.assert_allclose(image.get_array(), GRID**2 * values[row].numpy(), rtol=1e-6)
            assert image.get_clim() == pytest.approx((0.0, top))  # one scale for a column
            assert image.get_cmap().name == "cividis"
    shown = _drawn(figure, 0, 4)
    for row, axes in enumerate(shown):
        assert (axes.images[0].get_array() == pictures[row]).all()
    assert [axes.get_ylabel() for axes in shown] == ["a.jpg", "b.jpg", "c.jpg"]


def test_a_map_covers_its_picture_upright():
    """Row 0 is on top and column 0 on the left of both, over the same pixels."""
    values = torch.zeros(1, GRID, GRID)
    values[0, 1, 3] = 1.0
    figure = attention_maps(_pictures(1), AttentionMaps(rollout=values, last=values), ["a"])
    [picture], [drawn] = _drawn(figure, 0, 3), _drawn(figure, 1, 3)
    assert picture.images[0].get_extent() == drawn.images[0].get_extent()
    assert (picture.get_xlim(), picture.get_ylim()) == (drawn.get_xlim(), drawn.get_ylim())
    image = drawn.images[0]
    assert image.origin == picture.images[0].origin == "upper"
    row, column = np.unravel_index(np.argmax(image.get_array()), (GRID, GRID))
    assert (row, column) == (1, 3)


def test_local_queries_are_outlined_at_their_patches():
    figure = attention_maps(_pictures(2), _maps(2, glca=True), ["a", "b"])
    for axes in _drawn(figure, 0, 4):
        outlines = [one for one in axes.patches if isinstance(one, Rectangle)]
        # Patch 7 of 4 x 4 is in row 1 and column 3 of patches of 8 px; pixel 0 begins at -0.5.
        assert [one.get_xy() for one in outlines] == [(23.5, 7.5), (-0.5, 15.5)]
        assert {(one.get_width(), one.get_height()) for one in outlines} == {(8.0, 8.0)}


def test_every_column_and_scale_has_its_words():
    titles = [axes.get_title() for axes in attention_maps(_pictures(1), _maps(1, glca=True), ["a"]).axes]
    assert [title.split("\n")[0] for title in titles if title] == [
        "what the model sees; marked:", "attention rollout", "last block", "GLCA",
    ]  # fmt: skip
    assert "GLCA's 2 local queries" in titles[0]
    plain = attention_maps(_pictures(1), _maps(1), ["a"], title="of twins")
    assert [axes.get_title().split("\n")[0] for axes in plain.axes if axes.get_title()] == [
        "what the model sees", "attention rollout", "last block",
    ]  # fmt: skip
    assert [axes.get_xlabel() for axes in plain.axes if axes.get_xlabel()] == ["attention (1: spread evenly)"] * 2
    assert plain.get_suptitle() == "of twins"


def test_a_picture_of_one_colour_has_no_outlines():
    flat = np.full((1, SIDE, SIDE, 3), 200, dtype=np.uint8)
    figure = attention_maps(flat, _maps(1), ["flat"])
    assert not any(axes.collections for axes in _drawn(figure, 1, 3))
    assert all(axes.collections for axes in _drawn(attention_maps(_pictures(1), _maps(1), ["a"]), 1, 3))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="2 pictures, 1 names and maps of 2"):
        attention_maps(_pictures(2), _maps(2), ["a"])
    with pytest.raises(ValueError, match="1 pictures, 1 names and maps of 2"):
        attention_maps(_pictures(1), _maps(2), ["a"])
    with pytest.raises(ValueError, match="at most 24"):
        attention_maps(_pictures(25), _maps(25), ["a"] * 25)
    with pytest.raises(ValueError, match="0 pictures"):
        attention_maps(_pictures(0), _maps(0), [])


@pytest.mark.parametrize("glca", [True, False])
@pytest.mark.parametrize("num", [1, 2, MOST_PICTURES])
def test_nothing_overlaps(num, glca):
    names = [f"a-picture-whose-name-is-rather-long-{number}.jpg" for number in range(num)]
    title = "Where the model looked: 20260101-000000-abcdef (vit_tiny, dcal, embeds with both)\ncosine similarity 0.5"
    assert_nothing_overlaps(attention_maps(_pictures(num), _maps(num, glca=glca), names, title=title), str(num))
