"""The backbone: a picture goes through a convolutional trunk, then becomes one embedding."""

from typing import Final

from torch import Tensor, nn

# Trunks divide the side by 32 from here on, by 16 below: a small picture would otherwise end in a 2 x 2 map.
SMALL_PICTURE_PX: Final = 96


def scaled(channels: int, width: float) -> int:
    """The channels of a layer at a fraction of the full width, a multiple of 8 (which fast kernels want)."""
    return max(8, 8 * round(channels * width / 8))


class Backbone(nn.Module):
    """trunk -> global average pool -> dropout -> linear -> batch normalisation without learned scale and shift.

    Pooling instead of flattening keeps the layout independent of the picture's size, and small: a flattened
    7 x 7 x 512 map needs 12.8 million weights for 512 outputs, pooled 0.26 million, and all of them travel.
    The closing normalisation (ArcFace's BN-Dropout-FC-BN, arXiv:1801.07698, sec. 3.1) centres the embeddings, so that
    they use the whole sphere and not the cone that ReLU leaves. It has no scale and shift: heads that look at angles
    want equal axes, and a linear head has its own.
    """

    def __init__(self, trunk: nn.Module, *, num_features: int, embedding_size: int, dropout: float) -> None:
        """trunk: [B, 3, H, W] -> [B, num_features, h, w].  dropout: probability, before the linear layer."""
        super().__init__()
        self.trunk = trunk
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(num_features, embedding_size, bias=False)  # what follows subtracts any bias
        self.normalisation = nn.BatchNorm1d(embedding_size, affine=False)
        nn.init.normal_(self.linear.weight, std=(3 * num_features) ** -0.5)  # PyTorch's own scale for linear layers

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures: [B, 3, H, W] float in [-1, 1], RGB.  Returns the raw embedding [B, D]; B > 1 while training."""
        features = self.pool(self.trunk(pictures)).flatten(1)
        embedding: Tensor = self.normalisation(self.linear(self.dropout(features)))
        return embedding
