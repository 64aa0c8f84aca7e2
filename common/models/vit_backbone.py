"""The backbone of a ViT: its class token becomes the embedding; DCAL's branches (arXiv:2205.02151) beside it."""

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.models.dcal import GlobalLocal, class_token_rollout, pair_wise
from common.models.vit import VitTrunk, attention_maps

_BRANCHES: Final = {
    "sa": ("sa",),
    "glca": ("sa", "glca"),
    "pwca": ("sa", "pwca"),
    "dcal": ("sa", "glca", "pwca"),
}


class Closing(nn.Module):
    """dropout -> linear -> batch normalisation without learned scale and shift, as behind the other trunks."""

    def __init__(self, num_features: int, embedding_size: int, dropout: float) -> None:
        """dropout: probability, before the linear layer."""
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(num_features, embedding_size, bias=False)
        self.normalisation = nn.BatchNorm1d(embedding_size, affine=False)
        nn.init.normal_(self.linear.weight, std=(3 * num_features) ** -0.5)

    def forward(self, features: Tensor) -> Tensor:
        """features: [B, num_features].  Returns the raw embedding [B, D]; B > 1 while training."""
        embedding: Tensor = self.normalisation(self.linear(self.dropout(features)))
        return embedding

    def distracted(self, features: Tensor) -> Tensor:
        """The same with the batch's own statistics, which are not gathered: inference never sees such features."""
        raw = self.linear(self.dropout(features))
        return F.batch_norm(raw, None, None, training=True, eps=self.normalisation.eps)


class VitBackbone(nn.Module):
    """trunk -> class token -> embedding of self-attention (SA); with GLCA, a second embedding of the same size.

    PWCA has no tensors of its own: a backbone trained with it is that of plain self-attention. All tensors, GLCA's
    included, are the backbone's and so may be shared between clients; heads and loss weights are not.
    """

    def __init__(  # sizes and what the settings say
        self,
        trunk: VitTrunk,
        *,
        embedding_size: int,
        dropout: float,
        attention: str,
        inference: str,
        glca_fraction: float,
    ) -> None:
        """attention: sa, glca, pwca or dcal.  inference: sa, glca or both (the last two with GLCA only)."""
        super().__init__()
        self.branches = _BRANCHES[attention]
        self.inference = inference
        self.trunk = trunk
        self.closing = Closing(trunk.num_features, embedding_size, dropout)
        self.glca: GlobalLocal | None = None
        self.glca_closing: Closing | None = None
        if "glca" in self.branches:
            self.glca = GlobalLocal(trunk.num_features, trunk.num_heads, glca_fraction)
            self.glca_closing = Closing(self.glca.num_features, embedding_size, dropout)
        elif inference != "sa":
            raise ValueError(f"inference = {inference!r} needs a GLCA branch, and attention = {attention!r} has none")

    def forward(self, pictures: Tensor) -> Tensor:
        """What embeds a picture after training, without PWCA.

        pictures: [B, 3, S, S] float in [-1, 1], RGB.  Returns the raw embedding [B, D]; B > 1 while training.
        With `inference` = both it is [B, 2 D], SA's and GLCA's side by side as in the paper's re-identification, each
        of length sqrt(D): the cosine of two pictures is then the mean of the two branches' cosines. (In a sum of the
        two, products of one branch with the other would be noise.)
        """
        if self.inference == "sa":
            embedding: Tensor = self.closing(self.trunk(pictures))
            return embedding
        found = self.embeddings(pictures, partners=None)
        if self.inference == "glca":
            return found["glca"]
        length = found["sa"].shape[1] ** 0.5  # about what the closing normalisation gives, as the heads learned it
        return torch.cat([length * F.normalize(found[name].float(), dim=1) for name in ("sa", "glca")], 1)

    def embeddings(self, pictures: Tensor, *, partners: Tensor | None) -> dict[str, Tensor]:
        """The raw embeddings [B, D] of all branches, by name: "sa", then "glca" and "pwca" where there are such.

        pictures: [B, 3, S, S] float in [-1, 1], RGB.
        partners: [B] int64 in [0, B), whose keys and values PWCA adds to a picture's own; None: no PWCA.
        """
        start = self.trunk.embed(pictures)
        tokens, class_row = self._self_attention(start)
        found: dict[str, Tensor] = {"sa": self.closing(self.trunk.close(tokens))}
        if self.glca is not None and self.glca_closing is not None and class_row is not None:
            found["glca"] = self.glca_closing(self.glca(tokens, class_row))
        if "pwca" in self.branches and partners is not None:
            pair = start
            for block in self.trunk.blocks:
                pair = pair_wise(block, pair, partners)
            found["pwca"] = self.closing.distracted(self.trunk.close(pair))
        return found

    def _self_attention(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens after all blocks, and with GLCA the class token's row of the rollout, without gradient."""
        if self.glca is None:
            for block in self.trunk.blocks:
                tokens = block(tokens)
            return tokens, None
        maps = []
        for block in self.trunk.blocks:
            queries, keys, values = block.project(tokens)
            maps.append(attention_maps(queries.detach(), keys.detach()).mean(1))
            tokens = block.add(tokens, F.scaled_dot_product_attention(queries, keys, values))
        return tokens, class_token_rollout(maps)
