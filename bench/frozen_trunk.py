"""A trunk that does not learn, worked out once a picture: what makes training behind it cheap enough to be measured.

With `training.trainable = "head_side"` and pictures that are not augmented, the trunk gives each picture the same
features in every step.  So a picture here is its row number, written as one pixel, and the trunk looks the row up.
What is behind the trunk, and all code that trains it, is the product's own.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

BATCH = 256


class FeaturesByRow(nn.Module):
    """[B, 3, 1, 1] row numbers -> [B, F, 1, 1] features; has no parameters, so none of it travels."""

    def __init__(self, table: Tensor) -> None:
        """table: [N, F] float32, as `features` returns it."""
        super().__init__()
        self.num_features = table.shape[1]
        self._table = table

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures: as `numbered` writes them, read as any picture: float in [-1, 1]."""
        digits = ((pictures[:, :, 0, 0].float() + 1.0) * 127.5).round().long()
        return self._table[digits @ torch.tensor([65536, 256, 1])][:, :, None, None]


def numbered(rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Pictures of one pixel, [n, 1, 1, 3] uint8, that say which row each is.  rows: [n] in [0, 2^24)."""
    digits = np.stack([rows >> 16, rows >> 8, rows], axis=1) & 255
    return digits.astype(np.uint8)[:, None, None, :]


@torch.no_grad()
def features(backbone: Any, pack: Any) -> Tensor:
    """What a trunk and its pool give of each picture of a pack, [N, F] float32, in evaluation mode."""
    from common.faces.batches import evaluation_batches

    backbone.eval()
    batches = evaluation_batches(pack.pictures, np.arange(len(pack)), batch_size=BATCH, device="cpu")
    return torch.cat([backbone.pool(backbone.trunk(batch)).flatten(1) for batch in batches])


def manifest_behind(recogniser: Any) -> Any:
    """The manifest of what is shared of a recogniser with this trunk."""
    from common.models.recogniser import shared_names
    from common.protocol.parameters import manifest_of

    tensors = recogniser.state_dict()
    return manifest_of({name: tensors[name] for name in shared_names(recogniser, "shared")})
