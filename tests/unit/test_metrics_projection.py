"""PCA against scikit-learn, t-SNE by what it must keep, and the edges: few pictures, all alike, not finite."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from common.errors import DataError, TrainingFailed
from common.private_figures import MOST_PICTURES, pca, tsne


def _people(num_people, pictures_each, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(num_people, 16))
    person = np.repeat(np.arange(num_people), pictures_each)
    embeddings = centres[person] + 0.1 * rng.normal(size=(len(person), 16))
    return (embeddings * rng.uniform(0.5, 2.0, (len(person), 1))).astype(np.float32), person


def test_pca_is_that_of_the_unit_length_embeddings():
    embeddings, _ = _people(6, 8)
    points, explained = pca(embeddings)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    oracle = PCA(n_components=2, svd_solver="full").fit(unit)
    np.testing.assert_allclose(np.abs(points), np.abs(oracle.transform(unit)), atol=1e-5)
    assert explained == pytest.approx(tuple(oracle.explained_variance_ratio_), abs=1e-6)
    np.testing.assert_allclose(points.mean(axis=0), 0.0, atol=1e-9)


def test_the_signs_of_pca_do_not_depend_on_the_order_of_the_pictures():
    embeddings, _ = _people(5, 6)
    order = np.random.default_rng(1).permutation(len(embeddings))
    np.testing.assert_allclose(pca(embeddings[order])[0], pca(embeddings)[0][order], atol=1e-6)


def test_pca_of_two_pictures_is_a_line_and_of_pictures_alike_a_point():
    points, explained = pca(np.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]], dtype=np.float32))
    assert explained == pytest.approx((1.0, 0.0))
    assert abs(points[0, 0] - points[1, 0]) == pytest.approx(np.sqrt(2))
    alike, share = pca(np.ones((4, 3), dtype=np.float32))
    np.testing.assert_allclose(alike, 0.0, atol=1e-12)
    assert share == pytest.approx((0.0, 0.0))


def test_tsne_keeps_neighbours_and_repeats_itself():
    embeddings, person = _people(6, 10)
    points = tsne(embeddings, seed=3)
    assert points.shape == (60, 2)
    distances = np.linalg.norm(points[:, None] - points[None], axis=2) + np.diag(np.full(60, np.inf))
    assert (person[distances.argmin(axis=1)] == person).mean() > 0.95
    np.testing.assert_array_equal(tsne(embeddings, seed=3), points)


@pytest.mark.parametrize("num_pictures", [5, 6, 31])
def test_tsne_of_few_pictures_lowers_the_perplexity(num_pictures):
    points = tsne(_people(num_pictures, 1)[0], seed=0)
    assert points.shape == (num_pictures, 2)
    assert np.isfinite(points).all()


def test_tsne_of_pictures_alike_is_a_point():
    np.testing.assert_array_equal(tsne(np.ones((8, 4), dtype=np.float32), seed=0), 0.0)


def test_too_few_too_many_or_not_finite():
    with pytest.raises(DataError, match="PCA of 1 picture"):
        pca(np.ones((1, 4), dtype=np.float32))
    with pytest.raises(DataError, match="t-SNE of 4 pictures; give at least 5"):
        tsne(np.ones((4, 4), dtype=np.float32), seed=0)
    with pytest.raises(ValueError, match="at most 1000"):
        tsne(np.ones((MOST_PICTURES + 1, 4), dtype=np.float32), seed=0)
    bad = np.ones((6, 4), dtype=np.float32)
    bad[2, 1] = np.nan
    for project in (pca, lambda embeddings: tsne(embeddings, 0)):
        with pytest.raises(TrainingFailed, match="1 of 6 embeddings are not finite"):
            project(bad)
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        pca(np.ones(4, dtype=np.float32))
