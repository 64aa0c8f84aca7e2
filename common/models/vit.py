"""Vision transformers (arXiv:2010.11929), in torchvision's layout so that the weights of its vit_b_16 load by name.

vit_tiny and vit_small have the sizes of DeiT-Ti and DeiT-S (arXiv:2012.12877, table 1). Attention is
`scaled_dot_product_attention`, which never forms the map, wherever the map itself is not asked for.
"""

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.models.backbone import scaled

_NUM_HEADS: Final = {"vit_tiny": 3, "vit_small": 6, "vit_base": 12}
_HEAD_SIZE: Final = 64  # of every size at width 1: 192, 384 and 768 features
_MLP_RATIO: Final = 4
_EPSILON: Final = 1e-6  # of the layer normalisation, as in torchvision

QueriesKeysValues = tuple[Tensor, Tensor, Tensor]  # [B, heads, N, d] each


def attention_maps(queries: Tensor, keys: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)), the map that `scaled_dot_product_attention` does not give away.

    queries: [B, heads, N, d].  keys: [B, heads, M, d].  Returns [B, heads, N, M] of at least float32; rows sum to 1.
    """
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)


class Attention(nn.Module):
    """Projections of a multi-head attention, named as those of nn.MultiheadAttention."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def project(self, tokens: Tensor) -> QueriesKeysValues:
        """tokens: [B, N, D].  Returns queries, keys and values of all of them."""
        queries, keys, values = self._by_head(F.linear(tokens, self.in_proj_weight, self.in_proj_bias), 3)
        return queries, keys, values

    def project_apart(self, asking: Tensor, asked: Tensor) -> QueriesKeysValues:
        """asking: [B, N, D].  asked: [B, M, D].  Returns the first's queries, the second's keys and values."""
        dim = asking.shape[-1]
        (queries,) = self._by_head(F.linear(asking, self.in_proj_weight[:dim], self.in_proj_bias[:dim]), 1)
        keys, values = self._by_head(F.linear(asked, self.in_proj_weight[dim:], self.in_proj_bias[dim:]), 2)
        return queries, keys, values

    def merge(self, attended: Tensor) -> Tensor:
        """attended: [B, heads, N, d].  Returns [B, N, D]."""
        merged: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return merged

    def _by_head(self, projected: Tensor, num: int) -> Sequence[Tensor]:
        """[B, N, num x D] -> num tensors [B, heads, N, d]."""
        size = projected.shape[-1] // (num * self.num_heads)
        split = projected.reshape(*projected.shape[:2], num, self.num_heads, size)
        return split.permute(2, 0, 3, 1, 4).unbind(0)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP, each added to its input."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim, eps=_EPSILON)
        self.self_attention = Attention(dim, num_heads)
        self.ln_2 = nn.LayerNorm(dim, eps=_EPSILON)
        # torchvision has a dropout in third place.
        self.mlp = nn.Sequential(
            nn.Linear(dim, _MLP_RATIO * dim), nn.GELU(), nn.Identity(), nn.Linear(_MLP_RATIO * dim, dim)
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [B, N, D] float.  Returns the same shape."""
        return self.add(tokens, F.scaled_dot_product_attention(*self.project(tokens)))

    def project(self, tokens: Tensor) -> QueriesKeysValues:
        """tokens: [B, N, D].  Returns queries, keys and values of the normalised tokens, [B, heads, N, d] each."""
        return self.self_attention.project(self.ln_1(tokens))

    def add(self, tokens: Tensor, attended: Tensor) -> Tensor:
        """The rest of the block.  tokens: [B, N, D].  attended: what they attended to, [B, heads, N, d]."""
        tokens = tokens + self.self_attention.merge(attended)
        added: Tensor = tokens + self.mlp(self.ln_2(tokens))
        return added


class _Encoder(nn.Module):
    """Position embedding, blocks and closing normalisation, under torchvision's names."""

    def __init__(self, num_tokens: int, dim: int, num_heads: int, depth: int) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, num_tokens, dim).normal_(std=0.02))
        self.layers = nn.ModuleDict({f"encoder_layer_{number}": Block(dim, num_heads) for number in range(depth)})
        self.ln = nn.LayerNorm(dim, eps=_EPSILON)


class VitTrunk(nn.Module):
    """[B, 3, S, S] -> the class token after the last block, [B, num_features]."""

    def __init__(self, name: str, *, image_size: int, patch_size: int, depth: int, width: float = 1.0) -> None:
        """name: vit_tiny, vit_small or vit_base.  image_size: S in px, a multiple of patch_size.  depth: blocks.

        width: fraction of the features of every attention head; only 1.0 has torchvision's shapes.
        """
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size = {image_size} is not divisible by patch_size = {patch_size}")
        self.num_heads = _NUM_HEADS[name]
        dim = self.num_heads * scaled(_HEAD_SIZE, width)
        self.num_features = dim
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.conv_proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)
        nn.init.trunc_normal_(self.conv_proj.weight, std=math.sqrt(1.0 / (3 * patch_size**2)))
        nn.init.zeros_(self.conv_proj.bias)  # type: ignore[arg-type]
        self.encoder = _Encoder(1 + (image_size // patch_size) ** 2, dim, self.num_heads, depth)

    @property
    def blocks(self) -> list[Block]:
        """The blocks in order."""
        return [block for block in self.encoder.layers.values() if isinstance(block, Block)]

    def embed(self, pictures: Tensor) -> Tensor:
        """pictures: [B, 3, S, S] float in [-1, 1].  Returns class token and patches with position, [B, 1 + N, D]."""
        patches = self.conv_proj(pictures).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(patches.shape[0], -1, -1), patches], 1)
        return tokens + self.encoder.pos_embedding

    def close(self, tokens: Tensor) -> Tensor:
        """tokens: [B, 1 + N, D] after the last block.  Returns the normalised class token, [B, D]."""
        closed: Tensor = self.encoder.ln(tokens[:, 0])
        return closed

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures: [B, 3, S, S] float in [-1, 1].  Returns the class token, [B, num_features]."""
        tokens = self.embed(pictures)
        for block in self.blocks:
            tokens = block(tokens)
        return self.close(tokens)

    @torch.no_grad()
    def attention_maps(self, pictures: Tensor) -> list[Tensor]:
        """What each block attends to, without gradient; token 0 is the class token, the others the patches by rows.

        pictures: [B, 3, S, S] float in [-1, 1].  Returns, for each block, [B, heads, 1 + N, 1 + N]; rows sum to 1.
        """
        tokens, maps = self.embed(pictures), []
        for block in self.blocks:
            queries, keys, values = block.project(tokens)
            maps.append(attention_maps(queries, keys))
            tokens = block.add(tokens, F.scaled_dot_product_attention(queries, keys, values))
        return maps
