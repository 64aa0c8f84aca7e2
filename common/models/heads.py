"""Heads: embedding -> logits over one client's people; and the losses besides their cross-entropy.

Heads stay at the client: row i is another person elsewhere.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MarginFunction = Callable[[Tensor, Tensor, float, float], Tensor]

# sin(theta) is kept above this, so that its gradient, -cos / sin, stays finite at theta = 0 and pi.
_SMALLEST_SIN_SQUARED: Final = 1e-6
_SMALLEST_SQUARED_DISTANCE: Final = 1e-6
_SMALLEST_LENGTH: Final = 1e-12  # as in F.normalize


class _Cosines(torch.autograd.Function):
    """Cosines of unit embeddings and of rows of any length, without a normalised copy of the rows.

    F.normalize and F.linear would keep one, and make two more for its gradient: with 360,000 people 0.7 GB each. Here
    products are divided by the rows' lengths, and the gradient is made where it stays.
    """

    @staticmethod
    def forward(ctx: Any, unit: Tensor, rows: Tensor) -> Tensor:  # noqa: ANN401 - torch names no type
        """unit: [B, D] float.  rows: [C, D] float; a row of zeros has cosine 0.  Returns [B, C]."""
        lengths = torch.linalg.vector_norm(rows, dim=1).clamp_min_(_SMALLEST_LENGTH)
        cosine = (unit @ rows.T).div_(lengths)
        ctx.save_for_backward(unit, rows, lengths, cosine)
        return cosine

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:  # noqa: ANN401
        """gradient: [B, C] of the cosines.  Returns those of unit and rows.

        With L the row's length, d cos / d row = (unit - cos row / L) / L.
        """
        unit, rows, lengths, cosine = ctx.saved_tensors
        scaled = gradient / lengths
        of_unit = scaled @ rows if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_unit, None
        along = (scaled * cosine).sum(0).div_(lengths).neg_()
        along.masked_fill_(lengths <= _SMALLEST_LENGTH, 0.0)
        of_rows = scaled.T @ unit
        return of_unit, of_rows.addcmul_(rows, along[:, None])


def cosface_logits(cosine: Tensor, labels: Tensor, margin: float, scale: float) -> Tensor:
    """CosFace (arXiv:1801.09414, eq. 4): the target cosine becomes cos(theta) - margin, then all are scaled.

    cosine: [B, C] float in [-1, 1].  labels: [B] int64 in [0, C).  margin: in units of cosine.
    Returns logits [B, C].
    """
    column = labels.unsqueeze(1)
    return scale * cosine.scatter(1, column, cosine.gather(1, column) - margin)


def arcface_logits(cosine: Tensor, labels: Tensor, margin_rad: float, scale: float) -> Tensor:
    """ArcFace (arXiv:1801.07698, eq. 3): the target angle becomes theta + margin, then all cosines are scaled.

    cosine: [B, C] float in [-1, 1].  labels: [B] int64 in [0, C).  margin_rad: radians in [0, pi).
    Returns logits [B, C].

    Where theta + margin > pi, cos(theta + margin) would rise again with theta and so reward a worse angle; there the
    authors' code, and this, uses cos(theta) - margin sin(margin) instead, which goes on falling.
    """
    column = labels.unsqueeze(1)
    target = cosine.gather(1, column)
    sine = (1.0 - target.square()).clamp_min(_SMALLEST_SIN_SQUARED).sqrt()
    with_margin = target * math.cos(margin_rad) - sine * math.sin(margin_rad)  # cos(theta + margin)
    past_pi = target < math.cos(math.pi - margin_rad)
    with_margin = torch.where(past_pi, target - margin_rad * math.sin(margin_rad), with_margin)
    return scale * cosine.scatter(1, column, with_margin)


def spreadout(vectors: Tensor, margin: float) -> Tensor:
    """How much identity vectors crowd (FedAwS, arXiv:2004.10342, eq. 7): their mean squared lack of distance.

    With w_c the rows at unit length: the sum over pairs c != c' of max(0, margin - ||w_c - w_c'||)^2, divided by the
    number of those pairs, so that its weight means the same for any number of people.

    vectors: [C, D] float, one row a person.  margin: distance of unit vectors, in (0, 2].
    Returns a scalar in [0, margin^2], 0 for one person. Takes memory for a few matrices [C, C].
    """
    unit = F.normalize(vectors, dim=1)
    # Kept above 0, so that the gradient of the root stays finite; rows that coincide have no direction to part in.
    distances = (2.0 - 2.0 * unit @ unit.T).clamp_min(_SMALLEST_SQUARED_DISTANCE).sqrt()
    lacks = (margin - distances).clamp_min(0.0).square()
    num_pairs = max(len(vectors) * (len(vectors) - 1), 1)
    return (lacks.sum() - lacks.diagonal().sum()) / num_pairs


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


class SoftmaxHead(nn.Module):
    """A linear layer on the raw embedding."""

    def __init__(self, embedding_size: int, num_people: int) -> None:
        super().__init__()
        self.linear = nn.Linear(embedding_size, num_people)
        nn.init.normal_(self.linear.weight, std=embedding_size**-0.5)
        nn.init.zeros_(self.linear.bias)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings: [B, D], any float dtype.  labels: [B] int64, not used.  Returns logits [B, C] float32."""
        return self.with_margin(self.scores(embeddings), labels)

    @property
    def identity_vectors(self) -> nn.Parameter:
        """One row a person, [C, D] float32."""
        weight: nn.Parameter = self.linear.weight  # type: ignore[assignment]
        return weight

    def scores(self, embeddings: Tensor) -> Tensor:
        """embeddings: [B, D], any float dtype.  Returns logits [B, C] float32."""
        with torch.autocast(embeddings.device.type, enabled=False):
            logits: Tensor = self.linear(embeddings.float())
        return logits

    def with_margin(self, scores: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 - as the heads with a margin
        """The training logits of `scores`, which are the same: there is no margin."""
        return scores

    def class_logits(self, embeddings: Tensor) -> Tensor:
        """embeddings: [B, D].  Returns logits [B, C] float32."""
        return self.scores(embeddings)

    def reset_parameters(self) -> None:
        """Draw the head anew, as it was made, from the CPU's global random state."""
        people, size = self.linear.weight.shape
        self.load_state_dict(SoftmaxHead(size, people).state_dict())


class CosineHead(nn.Module):
    """Scaled cosines between the embedding and one direction for each person, with a margin while training."""

    def __init__(
        self, embedding_size: int, num_people: int, *, add_margin: MarginFunction, margin: float, scale: float
    ) -> None:
        """add_margin: cosface_logits or arcface_logits.  margin, scale: what it takes."""
        super().__init__()
        self.add_margin = add_margin
        self.margin = margin
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_people, embedding_size))
        self.reset_parameters()

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings: [B, D], any float dtype.  labels: [B] int64 in [0, C).  Returns logits [B, C] float32."""
        return self.with_margin(self.scores(embeddings), labels)

    @property
    def identity_vectors(self) -> nn.Parameter:
        """One row a person, [C, D] float32, of any length."""
        return self.weight

    def scores(self, embeddings: Tensor) -> Tensor:
        """embeddings: [B, D], any float dtype.  Returns cosines [B, C] float32."""
        # bfloat16 has 8 bits: at scale 64 it would round logits to steps of 0.25, so autocast is off here.
        with torch.autocast(embeddings.device.type, enabled=False):
            unit = F.normalize(embeddings.float(), dim=1)
            cosine: Tensor = _Cosines.apply(unit, self.weight.float())
        return cosine

    def with_margin(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The training logits of `scores`, [B, C] float32.  labels: [B] int64 in [0, C)."""
        return self.add_margin(scores, labels, self.margin, self.scale)

    def class_logits(self, embeddings: Tensor) -> Tensor:
        """embeddings: [B, D].  Returns scale x cosine, [B, C] float32, without margin."""
        return self.scale * self.scores(embeddings)

    def reset_parameters(self) -> None:
        """Draw the head anew, as it was made, from the CPU's global random state.

        Short rows, as in ArcFace's own code: a step turns a direction by lr / length squared, so short ones turn fast
        at first and slow down as they grow. Rows of unit length would learn about twenty times slower at the start.
        """
        with torch.no_grad():
            on_cpu = self.weight.device.type == "cpu"
            drawn = self.weight if on_cpu else torch.empty(self.weight.shape)
            nn.init.normal_(drawn, std=0.01)
            if not on_cpu:
                self.weight.copy_(drawn)


MARGINS: Final[dict[str, MarginFunction]] = {"cosface": cosface_logits, "arcface": arcface_logits}
