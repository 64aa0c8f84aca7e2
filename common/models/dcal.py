"""The backbone of a ViT, with the branches of dual cross-attention learning (DCAL, arXiv:2205.02151); where it looks.

GLCA (global-local cross-attention): the patches that the class token looks at most ask all tokens once more, with
weights of their own. PWCA (pair-wise cross-attention): a picture also sees the keys and values of another one, in
training only and with the weights of self-attention (SA).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.models.table import ATTENTIONS
from common.models.vit import Block, VitTrunk, attention_maps

Partners = Callable[[Tensor, torch.Generator], Tensor]  # labels [B], stream -> the partner of each picture, [B] int64


def rollout(maps: Sequence[Tensor]) -> Tensor:
    """Attention rollout (eq. 2): S_hat = S_bar_L ... S_bar_1 with S_bar = 0.5 S + 0.5 I, S the mean over heads.

    maps: [B, heads, N, N] float of each block, from the first to the last; rows sum to 1.
    Returns [B, N, N]: how much of input token j reaches output token i; rows sum to 1.
    """
    identity = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=maps[0].device)
    rolled = identity.expand(maps[0].shape[0], -1, -1)
    for block in maps:
        rolled = (0.5 * block.mean(1) + 0.5 * identity) @ rolled
    return rolled


def class_token_rollout(mean_maps: Sequence[Tensor]) -> Tensor:
    """The class token's row of `rollout`, from the last block backwards: a vector instead of a matrix in each step.

    mean_maps: [B, N, N] float of each block, from the first to the last, the mean over heads.
    Returns [B, N], which sums to 1.
    """
    row = 0.5 * mean_maps[-1][:, 0]
    row = row + F.pad(
        row.new_full((row.shape[0], 1), 0.5), (0, row.shape[1] - 1)
    )  # no len: it would fix B in an export
    for block in reversed(mean_maps[:-1]):
        # Not a matrix product, which autocast would round to bfloat16.
        row = 0.5 * row + 0.5 * (row.unsqueeze(2) * block).sum(1)
    return row


def num_local(num_patches: int, fraction: float) -> int:
    """How many patches ask in GLCA: the fraction R of them, at least one."""
    return max(1, round(fraction * int(num_patches)))  # a tensor while a graph is traced


def local_tokens(class_row: Tensor, num: int) -> Tensor:
    """The class token and the patches that it looks at most (sec. 3.2).

    class_row: [B, 1 + N], the class token's row of the rollout.  num: patches, in [1, N].
    Returns indices [B, 1 + num] int64 of tokens: 0, then patches by falling response.
    """
    chosen = 1 + class_row[:, 1:].topk(num, 1).indices
    return F.pad(chosen, (1, 0), value=0)


class GlobalLocal(nn.Module):
    """The GLCA branch: one block (M = 1) with weights of its own, behind the last block of self-attention.

    Eq. 3: softmax(Q_l K_g^T / sqrt(d)) V_g. In a single block no token sees what another one was told, so the class
    token's output alone would be the same for any choice of local queries, and the choice would do nothing. What
    embeds is therefore both: the class token's output, as in the paper, and the mean of the chosen patches'.
    """

    def __init__(self, dim: int, num_heads: int, fraction: float) -> None:
        """fraction: R in (0, 1], of the patches."""
        super().__init__()
        self.fraction = fraction
        self.num_features = 2 * dim
        self.block = Block(dim, num_heads)
        self.ln = nn.LayerNorm(dim, eps=self.block.ln_1.eps)

    def forward(self, tokens: Tensor, class_row: Tensor) -> Tensor:
        """tokens: [B, 1 + N, D] after the last block.  class_row: [B, 1 + N] of the rollout.  Returns [B, 2 D]."""
        chosen = local_tokens(class_row, num_local(tokens.shape[1] - 1, self.fraction))
        asking = tokens.gather(1, chosen.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
        told = self.ln(self.ask(asking, tokens))
        return torch.cat([told[:, 0], told[:, 1:].mean(1)], 1)

    def ask(self, asking: Tensor, tokens: Tensor) -> Tensor:
        """asking: [B, n, D], some of the tokens.  tokens: [B, 1 + N, D], all.  Returns the block's output [B, n, D]."""
        block = self.block
        queries, keys, values = block.self_attention.project_apart(block.ln_1(asking), block.ln_1(tokens))
        return block.add(asking, F.scaled_dot_product_attention(queries, keys, values))


def pair_wise(block: Block, tokens: Tensor, partners: Tensor) -> Tensor:
    """A block of self-attention with PWCA in its place (eq. 4): softmax(Q_1 [K_1; K_2]^T / sqrt(d)) [V_1; V_2].

    tokens: [B, N, D].  partners: [B] int64 in [0, B), the picture whose keys and values each one also sees.
    Returns [B, N, D]. With itself as partner a picture gets what `block` gives, since every weight halves and counts
    twice.
    """
    queries, keys, values = block.project(tokens)
    both_keys = torch.cat([keys, keys.index_select(0, partners)], 2)
    both_values = torch.cat([values, values.index_select(0, partners)], 2)
    return block.add(tokens, F.scaled_dot_product_attention(queries, both_keys, both_values))


def random_partners(labels: Tensor, stream: torch.Generator) -> Tensor:
    """Each picture of a batch is the partner of one other one: a random cycle, so nobody is his own.

    labels: [B] int64, B > 1; only their number counts.  stream: on the CPU.
    Returns [B] int64 on the labels' device, a permutation without a fixed point.
    """
    order = torch.randperm(len(labels), generator=stream)
    partners = torch.empty_like(order)
    partners[order] = order.roll(1)
    return partners.to(labels.device)


class Closing(nn.Module):
    """dropout -> linear -> batch normalisation without learned scale and shift, as behind the other trunks."""

    def __init__(self, num_features: int, embedding_size: int, dropout: float) -> None:
        """dropout: probability, before the linear layer."""
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(num_features, embedding_size, bias=False)
        self.normalisation: nn.BatchNorm1d | nn.GroupNorm = nn.BatchNorm1d(embedding_size, affine=False)
        nn.init.normal_(self.linear.weight, std=(3 * num_features) ** -0.5)

    def forward(self, features: Tensor) -> Tensor:
        """features: [B, num_features].  Returns the raw embedding [B, D]; B > 1 while training."""
        embedding: Tensor = self.normalisation(self.linear(self.dropout(features)))
        return embedding

    def distracted(self, features: Tensor) -> Tensor:
        """The same with the batch's own statistics, which are not gathered: inference never sees such features."""
        raw = self.linear(self.dropout(features))
        if isinstance(self.normalisation, nn.GroupNorm):
            own: Tensor = self.normalisation(raw)
            return own
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
        self.branches = ATTENTIONS[attention]
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

    @property
    def last_block(self) -> nn.Module:
        """The last block of self-attention."""
        last: nn.Module = list(self.trunk.blocks)[-1]
        return last

    @property
    def units(self) -> list[nn.Module]:
        """The parts that activation checkpointing works out again, in order.

        The blocks; with branches, which take the blocks apart, only their MLPs.
        """
        blocks = [module for module in self.modules() if isinstance(module, Block)]
        return list(blocks) if len(self.branches) == 1 else [block.mlp for block in blocks]


# ---- where it looks


@dataclass(frozen=True, kw_only=True)
class AttentionMaps:
    """Of each picture, what the patches get of each other's share: [B, h, w] float32, which sums to 1 over h and w.

    What goes to the class token itself is left out, since it has no place in the picture; h = w patches, by rows.
    """

    rollout: Tensor  # the class token's row of the rollout over all blocks (arXiv:2205.02151, eq. 2)
    last: Tensor  # the class token's attention in the last block, the mean over heads
    chosen: Tensor | None = None  # [B, n] int64 in [0, h w): GLCA's local queries, by falling rollout; None: no GLCA
    glca: Tensor | None = None  # GLCA's attention: half the class token's, half the mean of the local queries'


@torch.no_grad()
def attention_of(backbone: VitBackbone, pictures: Tensor) -> AttentionMaps:
    """The maps of a batch, in float32 on the CPU; the backbone's mode and gradients stay as they are.

    pictures: [B, 3, S, S] float32 in [-1, 1], RGB, on the backbone's device.
    While it works, the maps of all blocks are in memory: heads x (1 + N)^2 numbers for each block and picture.
    """
    trunk = backbone.trunk
    maps = [block.mean(1) for block in trunk.attention_maps(pictures)]
    class_row = class_token_rollout(maps)
    chosen = glca = None
    if backbone.glca is not None:
        asking = local_tokens(class_row, num_local(class_row.shape[1] - 1, backbone.glca.fraction))
        chosen = (asking[:, 1:] - 1).cpu()
        tokens = trunk.embed(pictures)
        for block in trunk.blocks:
            tokens = block(tokens)
        glca = _in_places(_glca_row(backbone.glca, tokens, asking))
    return AttentionMaps(rollout=_in_places(class_row), last=_in_places(maps[-1][:, 0]), chosen=chosen, glca=glca)


def joined(parts: Sequence[AttentionMaps]) -> AttentionMaps:
    """The maps of several batches of one model as those of one batch."""
    chosen = [part.chosen for part in parts if part.chosen is not None]
    glca = [part.glca for part in parts if part.glca is not None]
    return AttentionMaps(
        rollout=torch.cat([part.rollout for part in parts]),
        last=torch.cat([part.last for part in parts]),
        chosen=torch.cat(chosen) if chosen else None,
        glca=torch.cat(glca) if glca else None,
    )


def _glca_row(glca: GlobalLocal, tokens: Tensor, asking: Tensor) -> Tensor:
    """What GLCA's queries attend to, weighted as its output is made of theirs: [B, 1 + N], rows sum to 1.

    tokens: [B, 1 + N, D] after the last block.  asking: [B, 1 + n] int64, the class token first.
    """
    block = glca.block
    queries = tokens.gather(1, asking.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
    projected = block.self_attention.project_apart(block.ln_1(queries), block.ln_1(tokens))
    seen = attention_maps(projected[0], projected[1]).mean(1)
    return 0.5 * seen[:, 0] + 0.5 * seen[:, 1:].mean(1)


def _in_places(row: Tensor) -> Tensor:
    """A row over all tokens, [B, 1 + N] -> the patches' part of it, [B, h, w] float32 on the CPU, which sums to 1."""
    patches = row[:, 1:].float()
    side = round(patches.shape[1] ** 0.5)
    return (patches / patches.sum(1, keepdim=True)).reshape(-1, side, side).cpu()
