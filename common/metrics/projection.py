"""Embeddings laid out in the plane, to be looked at by who holds the pictures; the points never leave the client."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError, TrainingFailed

MOST_PICTURES: Final = 1000  # t-SNE of them takes seconds; callers draw a sample
FEWEST_PICTURES: Final = 5  # fewer have no neighbourhoods to keep
_PERPLEXITY: Final = 30.0


def pca(embeddings: NDArray[np.float32]) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """The two directions in which the unit-length embeddings vary most (Pearson, 1901).

    embeddings: [N, D] float, N >= 2 and D >= 2, of any length (normalised here, since they are compared by cosine).
    Returns (points [N, 2] float64 with mean 0, the fraction of the variance along each axis, largest first).  The sign
    of an axis is chosen so that its largest weight is positive: the same embeddings give the same picture.
    Raises DataError for fewer than two pictures, TrainingFailed when an embedding is not finite.
    """
    unit = _unit_length(embeddings)
    if len(unit) < 2:
        raise DataError(f"PCA of {len(unit)} pictures; give at least 2.")
    centred = unit - unit.mean(axis=0)
    _, spread, axes = np.linalg.svd(centred, full_matrices=False)
    first = axes[:2]
    signs = np.sign(first[np.arange(2), np.abs(first).argmax(axis=1)])
    variances = spread**2
    total = float(variances.sum())
    shares = variances[:2] / total if total > 0.0 else np.zeros(2)
    return centred @ (first * signs[:, None]).T, (float(shares[0]), float(shares[1]))


def tsne(embeddings: NDArray[np.float32], seed: int) -> NDArray[np.float64]:
    """Neighbours stay neighbours: t-SNE (van der Maaten and Hinton, 2008) of the unit-length embeddings.

    embeddings: [N, D] float, 5 <= N <= MOST_PICTURES.  The perplexity is 30, or (N - 1) / 3 with few pictures.
    Returns points [N, 2] float64 from the same seed always the same; their distances between groups mean little.
    Embeddings that are all alike give points that are all 0.
    Raises DataError for fewer than five pictures, TrainingFailed when an embedding is not finite, ValueError for more
    than MOST_PICTURES.
    """
    unit = _unit_length(embeddings)
    if len(unit) < FEWEST_PICTURES:
        raise DataError(f"t-SNE of {len(unit)} pictures; give at least {FEWEST_PICTURES}.")
    if len(unit) > MOST_PICTURES:
        raise ValueError(f"t-SNE of {len(unit)} pictures; draw a sample of at most {MOST_PICTURES}")
    if np.allclose(unit, unit[0]):  # scikit-learn would divide by their spread
        return np.zeros((len(unit), 2))
    from sklearn.manifold import TSNE

    perplexity = min(_PERPLEXITY, (len(unit) - 1) / 3)
    found = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(unit)
    return np.asarray(found, dtype=np.float64)


def _unit_length(embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    given = np.asarray(embeddings, dtype=np.float64)
    if given.ndim != 2 or given.shape[1] < 2:
        raise ValueError(f"embeddings {given.shape} must be [N, D] with D at least 2")
    finite = np.asarray(np.isfinite(given).all(axis=1))
    if not finite.all():
        raise TrainingFailed(
            f"{int((~finite).sum())} of {len(finite)} embeddings are not finite (NaN or infinity), so no map can be "
            "drawn; the model has diverged: lower training.lr or raise training.warmup_fraction."
        )
    unit: NDArray[np.float64] = given / np.maximum(np.linalg.norm(given, axis=1, keepdims=True), 1e-12)
    return unit
