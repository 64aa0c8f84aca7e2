"""The similarity transform against Umeyama's own equations, and the template against where landmarks land."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.faces.align import (
    TEMPLATE_112_PX,
    box_maps,
    centre_map,
    landmark_maps,
    similarity,
    template,
)
from common.faces.index import read_index


def apply_map(affine: NDArray[np.floating], points: NDArray[np.floating]) -> NDArray[np.float64]:
    """Points [K, 2] px through one map [2, 3]."""
    return np.asarray(np.asarray(points, dtype=np.float64) @ affine[:, :2].T + affine[:, 2])


def umeyama_1991(source: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Umeyama, IEEE PAMI 13(4), 1991, eqs. 34-43, by singular values; independent of the product's closed form."""
    num = len(source)
    mu_x, mu_y = source.mean(axis=0), target.mean(axis=0)
    variance_x = ((source - mu_x) ** 2).sum() / num
    covariance = (target - mu_y).T @ (source - mu_x) / num
    u, d, vt = np.linalg.svd(covariance)
    s = np.diag([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u @ s @ vt
    scale = np.trace(np.diag(d) @ s) / variance_x
    return np.column_stack([scale * rotation, mu_y - scale * rotation @ mu_x])


def test_similarity_equals_umeyamas_equations() -> None:
    rng = np.random.default_rng(0)
    source = rng.uniform(0, 500, (200, 5, 2))
    source[100:] = TEMPLATE_112_PX * rng.uniform(0.2, 8, (100, 1, 1)) + rng.normal(0, 4, (100, 5, 2))
    ours = similarity(source, TEMPLATE_112_PX)
    theirs = np.stack([umeyama_1991(points, TEMPLATE_112_PX) for points in source])
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.1, 20), st.floats(-3.1, 3.1), st.floats(-300, 300), st.floats(-300, 300))
def test_a_turned_scaled_shifted_template_comes_back_exactly(scale: float, turn: float, x: float, y: float) -> None:
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    seen = scale * TEMPLATE_112_PX @ rotation.T + [x, y]
    np.testing.assert_allclose(apply_map(landmark_maps(seen[None], 112)[0], seen), TEMPLATE_112_PX, atol=1e-7)


def test_a_mirrored_face_is_never_mirrored_back() -> None:
    linear = similarity(TEMPLATE_112_PX * [-1.0, 1.0], TEMPLATE_112_PX)[:, :2]
    assert np.linalg.det(linear) > 0


def test_template_is_arcfaces_and_scales_with_the_picture() -> None:
    """The numbers are those of insightface's arcface_dst; at 224 px every coordinate doubles."""
    np.testing.assert_array_equal(template(112)[0], [38.2946, 51.6963])
    np.testing.assert_array_equal(template(112)[4], [70.7299, 92.2041])
    np.testing.assert_allclose(template(224), 2 * TEMPLATE_112_PX)


def test_points_that_coincide_or_are_absent_give_nan() -> None:
    points = np.stack([np.full((5, 2), 7.0), np.full((5, 2), np.nan), TEMPLATE_112_PX])
    found = landmark_maps(points, 112)
    assert np.isnan(found[0]).all()
    assert np.isnan(found[1]).all()
    np.testing.assert_allclose(found[2], [[1, 0, 0], [0, 1, 0]], atol=1e-12)


def test_box_becomes_the_square_around_its_longer_side() -> None:
    """Box x 10..30, y 20..60, margin 0.5: a square of 60 px around (20, 40), so its corner (-10, 10) is the output's.

    Corners are edges, half a px before the first centre; the output's edges are -0.5 and 29.5 for 30 px.
    """
    affine = box_maps(np.array([[10.0, 20.0, 20.0, 40.0]]), 0.5, 30)[0]
    edges = np.array([[-10.0, 10.0], [50.0, 70.0]]) - 0.5
    np.testing.assert_allclose(apply_map(affine, edges), [[-0.5, -0.5], [29.5, 29.5]])


@pytest.mark.parametrize("box", [[0, 0, 0, 5], [0, 0, 5, -1], [np.nan, 0, 5, 5]])
def test_an_empty_or_absent_box_gives_nan(box: list[float]) -> None:
    assert np.isnan(box_maps(np.array([box]), 0.0, 112)).any()


def test_centre_square_of_a_tall_picture() -> None:
    """178 x 218: the square is 178 px, 20 px below the top, so (0, 20) is the output's first edge."""
    affine = centre_map(178, 218, 89)
    edges = np.array([[0.0, 20.0], [178.0, 198.0]]) - 0.5
    np.testing.assert_allclose(apply_map(affine, edges), [[-0.5, -0.5], [88.5, 88.5]])


@pytest.mark.shared
@pytest.mark.parametrize("dataset", ["celeba", "vggface2"])
def test_landmarks_of_real_faces_land_near_the_template(shared_faces, dataset: str) -> None:  # type: ignore[no-untyped-def]
    """Faces differ and turn, so single points miss; over a data set the eyes lie on the template to 2 px of 112."""
    index = read_index(dataset, shared_faces / dataset)
    assert index.landmarks is not None
    maps = landmark_maps(index.landmarks, 112)
    landed = np.stack([apply_map(affine, points) for affine, points in zip(maps, index.landmarks, strict=True)])
    np.testing.assert_allclose(np.median(landed, axis=0), TEMPLATE_112_PX, atol=2.0)
    np.testing.assert_allclose(landed.mean(axis=1), np.tile(TEMPLATE_112_PX.mean(axis=0), (len(index), 1)), atol=1e-6)
