"""MobileNetV2 (arXiv:1801.04381) for face pictures, in torchvision's layout so that its weights load by name."""

from typing import Final

from torch import Tensor, nn

from common.models.backbone import SMALL_PICTURE_PX

NUM_FEATURES: Final = 1280

# (expansion, channels, repeats, stride) of each stage: table 2 of the paper.
_STAGES: Final = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileTrunk(nn.Module):
    """[B, 3, H, W] -> [B, 1280, h, w]; h = H / 32 from 96 px on, H / 16 below.

    Below 96 px the second stage keeps its resolution; a stride has no weights, so the layout stays torchvision's.
    """

    def __init__(self, *, image_size: int, width: float = 1.0) -> None:
        """image_size: the side in px that the strides are chosen for; others work too.

        width: fraction of the channels (the paper's width multiplier); the last layer keeps 1280, as in the paper.
        """
        super().__init__()
        from torchvision.models import MobileNetV2  # seconds, for this backbone only

        stages = [list(stage) for stage in _STAGES]
        if image_size < SMALL_PICTURE_PX:
            stages[1][3] = 1
        self.features: nn.Sequential = MobileNetV2(
            num_classes=1, width_mult=width, inverted_residual_setting=stages
        ).features
        self.num_features = NUM_FEATURES

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures: [B, 3, H, W] float.  Returns the last feature map."""
        features: Tensor = self.features(pictures)
        return features
