"""Dual cross-attention learning (DCAL, arXiv:2205.02151): attention rollout, GLCA and PWCA, and who is whose partner.

GLCA (global-local cross-attention): the patches that the class token looks at most ask all tokens once more, with
weights of their own. PWCA (pair-wise cross-attention): a picture also sees the keys and values of another one, in
training only and with the weights of self-attention (SA).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.models.vit import Block

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
