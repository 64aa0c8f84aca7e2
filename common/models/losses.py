"""Losses besides the heads' cross-entropy: batch-hard triplets, and several losses as one with learned weights."""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

_SMALLEST_SQUARED_DISTANCE: Final = 1e-6


def batch_hard_triplet(embeddings: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Batch-hard triplet loss (arXiv:1703.07737, eq. 5) of unit embeddings, with Euclidean distances.

    For each picture a: max(0, margin + the largest distance to its person's others - the smallest to anyone else),
    averaged over the pictures that have both; 0 when there is none, as in a batch of strangers.

    embeddings: [B, D] float, of any length.  labels: [B] int64.  margin: distance of unit vectors, in (0, 2].
    Returns a scalar >= 0.
    """
    unit = F.normalize(embeddings, dim=1)
    # Kept above 0, so that the gradient of the root stays finite where two pictures coincide.
    distances = (2.0 - 2.0 * unit @ unit.T).clamp_min(_SMALLEST_SQUARED_DISTANCE).sqrt()
    same = labels.unsqueeze(0) == labels.unsqueeze(1)
    positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    furthest = distances.masked_fill(~positive, 0.0).amax(1)
    nearest = distances.masked_fill(same, 2.0).amin(1)  # 2 is the largest distance
    counts = positive.any(1) & ~same.all(1)
    losses = torch.where(counts, (margin + furthest - nearest).clamp_min(0.0), 0.0)
    return losses.sum() / counts.sum().clamp_min(1)


def uncertainty_weighted(losses: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """Several losses as one, with learned weights (arXiv:2205.02151, sec. 4.1, after arXiv:1705.07115).

    0.5 * sum(exp(-w_i) L_i + w_i); its minimum over w_i is at exp(w_i) = L_i.
    losses: scalars by name.  weights: w_i, learned scalars, at least of the same names.  Returns a scalar.
    """
    terms = [torch.exp(-weights[name]) * loss + weights[name] for name, loss in losses.items()]
    return 0.5 * torch.stack(terms).sum()
