"""What every figure must keep to: its parts and its words do not lie on each other, and all are in the picture."""

import itertools

from matplotlib.backends.backend_agg import FigureCanvasAgg

TOUCHING_PX = 0.5  # neighbouring cells share an edge


def assert_nothing_overlaps(figure, name):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [axes.get_tightbbox(renderer) for axes in figure.axes]  # with titles, labels, legends and numbers
    boxes += [legend.get_window_extent(renderer) for legend in figure.legends]
    boxes.append(figure._suptitle.get_window_extent(renderer))
    if figure._supxlabel is not None:
        boxes.append(figure._supxlabel.get_window_extent(renderer))
    for one, other in itertools.combinations([box for box in boxes if box.width and box.height], 2):
        assert not _overlap(one, other), name
    assert figure.bbox.width == 1200
    for box in boxes:
        assert box.x0 >= 0, name
        assert box.x1 <= 1200, name
        assert box.y0 >= 0, name
        assert box.y1 <= figure.bbox.height, name
    for axes in figure.axes:
        ticks = [axes.get_xticklabels(), axes.get_yticklabels()] if axes.axison else []
        for texts in (*ticks, axes.texts):
            upright = [text for text in texts if text.get_text() and text.get_rotation() in (0, 90)]
            extents = [(text.get_text(), text.get_window_extent(renderer)) for text in upright]
            for (one, here), (other, there) in itertools.combinations(extents, 2):
                assert not _overlap(here, there), (name, one, other)


def _overlap(one, other):
    across = min(one.x1, other.x1) - max(one.x0, other.x0)
    along = min(one.y1, other.y1) - max(one.y0, other.y0)
    return across > TOUCHING_PX and along > TOUCHING_PX
