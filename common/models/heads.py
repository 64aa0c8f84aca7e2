"""Heads: embedding -> logits over one client's people. They stay at the client: row i is another person elsewhere."""

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.settings import ModelSettings

MarginFunction = Callable[[Tensor, Tensor, float, float], Tensor]

# sin(theta) is kept above this, so that its gradient, -cos / sin, stays finite at theta = 0 and pi.
_SMALLEST_SIN_SQUARED: Final = 1e-6
_SMALLEST_SQUARED_DISTANCE: Final = 1e-6


def cosface_logits(cosine: Tensor, labels: Tensor, margin: float, scale: float) -> Tensor:
    """CosFace (arXiv:1801.09414, eq. 4): the target cosine becomes cos(theta) - margin, then all are scaled.

    cosine: [B, C] float in [-1, 1].  labels: [B] int64 in [0, C).  margin: in units of cosine.
    Returns logits [B, C].
    """
    target = F.one_hot(labels, cosine.shape[1]).to(cosine.dtype)
    return scale * (cosine - margin * target)


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


class SoftmaxHead(nn.Module):
    """A linear layer on the raw embedding."""

    def __init__(self, embedding_size: int, num_people: int) -> None:
        super().__init__()
        self.linear = nn.Linear(embedding_size, num_people)
        nn.init.normal_(self.linear.weight, std=embedding_size**-0.5)
        nn.init.zeros_(self.linear.bias)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 - as the heads with a margin
        """embeddings: [B, D], any float dtype.  labels: [B] int64, not used.  Returns logits [B, C] float32."""
        return self.class_logits(embeddings)

    @property
    def identity_vectors(self) -> Tensor:
        """One row a person, [C, D] float32."""
        return self.linear.weight

    def class_logits(self, embeddings: Tensor) -> Tensor:
        """The same logits: there is no margin."""
        with torch.autocast(embeddings.device.type, enabled=False):
            logits: Tensor = self.linear(embeddings.float())
        return logits


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
        # Short rows, as in ArcFace's own code: a step turns a direction by lr / length squared, so short ones turn fast
        # at first and slow down as they grow. Rows of unit length would learn about twenty times slower at the start.
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings: [B, D], any float dtype.  labels: [B] int64 in [0, C).  Returns logits [B, C] float32."""
        return self.add_margin(self._cosine(embeddings), labels, self.margin, self.scale)

    @property
    def identity_vectors(self) -> Tensor:
        """One row a person, [C, D] float32, of any length."""
        return self.weight

    def class_logits(self, embeddings: Tensor) -> Tensor:
        """embeddings: [B, D].  Returns scale x cosine, [B, C] float32, without margin."""
        return self.scale * self._cosine(embeddings)

    def _cosine(self, embeddings: Tensor) -> Tensor:
        # bfloat16 has 8 bits: at scale 64 it would round logits to steps of 0.25, so autocast is off here.
        with torch.autocast(embeddings.device.type, enabled=False):
            return F.linear(F.normalize(embeddings.float(), dim=1), F.normalize(self.weight.float(), dim=1))


_MARGINS: Final[dict[str, MarginFunction]] = {"cosface": cosface_logits, "arcface": arcface_logits}


def build_head(model: ModelSettings, *, num_people: int) -> SoftmaxHead | CosineHead:
    """The head that the settings name, for `num_people` people, freshly initialised from the global random state."""
    if model.head == "softmax":
        return SoftmaxHead(model.embedding_size, num_people)
    return CosineHead(
        model.embedding_size,
        num_people,
        add_margin=_MARGINS[model.head],
        margin=model.head_margin,
        scale=model.head_scale,
    )
