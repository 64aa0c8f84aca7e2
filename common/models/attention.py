"""Where a ViT looks: how much of its attention each patch of a picture gets, and which patches GLCA asks with."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.models.dcal import GlobalLocal, class_token_rollout, local_tokens, num_local
from common.models.vit import attention_maps
from common.models.vit_backbone import VitBackbone


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
