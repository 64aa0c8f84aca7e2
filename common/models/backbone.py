"""The convolutional backbone, a trunk and what makes one embedding of its features; and the two small trunks."""

from typing import Final

from torch import Tensor, nn

# Trunks divide the side by 32 from here on, by 16 below: a small picture would otherwise end in a 2 x 2 map.
SMALL_PICTURE_PX: Final = 96
_CNN_CHANNELS: Final = (32, 64, 128, 256)
_MOBILE_FEATURES: Final = 1280
# (expansion, channels, repeats, stride) of each stage: table 2 of the paper.
_MOBILE_STAGES: Final = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


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

    def embeddings(self, pictures: Tensor, *, partners: Tensor | None) -> dict[str, Tensor]:  # noqa: ARG002 - as a ViT's
        """The raw embedding [B, D] of the only branch, "sa".  pictures: as for `forward`."""
        return {"sa": self(pictures)}

    @property
    def last_block(self) -> nn.Module:
        """The last of the trunk's parts."""
        return self.units[-1]

    @property
    def units(self) -> list[nn.Module]:
        """What activation checkpointing works out again, in order: the trunk's own choice, or the whole trunk."""
        said: list[nn.Module] = getattr(self.trunk, "units", [self.trunk])
        return said


class CnnTrunk(nn.Module):
    """[B, 3, H, W] -> [B, num_features, H / 16, W / 16] (256 at width 1), for machines without a GPU.

    Four blocks of convolution, normalisation, ReLU and pool.
    """

    def __init__(self, *, width: float = 1.0) -> None:
        """width: fraction of the channels of every layer."""
        super().__init__()
        channels = [scaled(count, width) for count in _CNN_CHANNELS]
        self.num_features = channels[-1]
        sizes = zip((3, *channels), channels, strict=False)
        self.blocks = nn.Sequential(*(_block(num_in, num_out) for num_in, num_out in sizes))
        for module in self.modules():  # He initialisation (arXiv:1502.01852), as in torchvision's trunks
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures: [B, 3, H, W] float.  Returns the last feature map."""
        features: Tensor = self.blocks(pictures)
        return features

    @property
    def units(self) -> list[nn.Module]:
        """The blocks."""
        return list(self.blocks)


def _block(num_in: int, num_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(num_in, num_out, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(num_out),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
    )


class MobileTrunk(nn.Module):
    """MobileNetV2 (arXiv:1801.04381): [B, 3, H, W] -> [B, 1280, h, w]; h = H / 32 from 96 px on, H / 16 below.

    The layout is torchvision's, so that its weights load by name. Below 96 px the second stage keeps its resolution; a
    stride has no weights.
    """

    def __init__(self, *, image_size: int, width: float = 1.0) -> None:
        """image_size: the side in px that the strides are chosen for; others work too.

        width: fraction of the channels (the paper's width multiplier); the last layer keeps 1280, as in the paper.
        """
        super().__init__()
        from torchvision.models import MobileNetV2  # seconds, for this backbone only

        stages = [list(stage) for stage in _MOBILE_STAGES]
        if image_size < SMALL_PICTURE_PX:
            stages[1][3] = 1
        self.features: nn.Sequential = MobileNetV2(
            num_classes=1, width_mult=width, inverted_residual_setting=stages
        ).features
        self.num_features = _MOBILE_FEATURES

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures: [B, 3, H, W] float.  Returns the last feature map."""
        features: Tensor = self.features(pictures)
        return features

    @property
    def units(self) -> list[nn.Module]:
        """The inverted residuals, between two convolutions."""
        return list(self.features[1:-1])
