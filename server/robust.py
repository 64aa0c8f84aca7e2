"""Rules that make one change of many although some may be wrong or malicious; they look at all changes at once.

Each takes the changes as they lie on disk and returns the aggregate, [size] float32, unweighted as in the papers: a
client that could claim a weight could claim a large one.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.stored_changes import Stored, stacked

Buffer = NDArray[np.float32]


def median(changes: list[Stored]) -> Buffer:
    """The median of each element (arXiv:1803.01498, definition 1); of an even number the mean of the middle two."""
    middle = len(changes) // 2
    low = middle if len(changes) % 2 else middle - 1
    return _by_element(changes, low, middle + 1)


def trimmed_mean(changes: list[Stored], fraction: float) -> Buffer:
    """The mean of each element without its largest and smallest `fraction` (arXiv:1803.01498, definition 2).

    fraction: in [0, 0.5); of n changes floor(fraction * n) are cut at each end.
    """
    cut = int(fraction * len(changes))
    return _by_element(changes, cut, len(changes) - cut)


def _by_element(changes: list[Stored], low: int, high: int) -> Buffer:
    """The mean of the elements whose ranks are in [low, high)."""
    result = torch.empty(changes[0].size)
    for where, values in stacked(changes):
        result[where] = values.sort(dim=0).values[low:high].mean(dim=0)
    return result.numpy()


def norms(changes: list[Stored]) -> list[float]:
    """The Euclidean norm of each change."""
    squares = torch.zeros(len(changes), dtype=torch.float64)
    for _, values in stacked(changes):
        squares += values.double().square().sum(dim=1)
    return squares.sqrt().tolist()


def norm_outliers(changes: list[Stored], factor: float) -> dict[str, str]:
    """The clients whose change is longer than `factor` times the median's, with a reason; none of fewer than four."""
    if len(changes) < 4:
        return {}
    lengths = norms(changes)
    usual = float(np.median(lengths))
    return {
        change.name: f"its change has the norm {length:.4g}, more than {factor:g} times the clients' median {usual:.4g}"
        for change, length in zip(changes, lengths, strict=True)
        if length > factor * usual
    }


def krum_order(changes: list[Stored], num_malicious: int) -> list[int]:
    """The changes from the most to the least trusted (arXiv:1703.02757, section 4).

    A change's score is the sum of its squared distances to the n - f - 2 others that are nearest to it.
    num_malicious: f; n >= 2 f + 3.  Raises ValueError otherwise.
    """
    number = len(changes)
    if number < 2 * num_malicious + 3:
        raise ValueError(f"krum with {num_malicious} malicious clients needs {2 * num_malicious + 3}, not {number}")
    nearest = _squared_distances(changes).sort(dim=1).values[:, 1 : number - num_malicious - 1]  # 0 is itself
    scores = nearest.sum(dim=1)
    return sorted(range(number), key=lambda index: (float(scores[index]), index))


def _squared_distances(changes: list[Stored]) -> Tensor:
    """[n, n] float64, from differences and not from products: equal changes are exactly 0 apart."""
    total = torch.zeros(len(changes), len(changes), dtype=torch.float64)
    for _, values in stacked(changes):
        for row in range(len(changes)):
            total[row] += (values - values[row]).double().square().sum(dim=1)
    return total


def mean_of(changes: list[Stored], chosen: Sequence[int]) -> Buffer:
    """The mean of the chosen changes: of krum the first of its order, of multikrum the first n - f."""
    result = torch.empty(changes[0].size)
    kept = [changes[index] for index in sorted(chosen)]
    for where, values in stacked(kept):
        result[where] = values.mean(dim=0)
    return result.numpy()
