"""ResNet-18 and ResNet-50 (arXiv:1512.03385) for faces, in torchvision's layout so that its weights load by name.

The stem is ImageNet's 7 x 7 convolution of stride 2 for every choice of `pretrained`: one layout, so that any client
can hold any weights. Pictures under 96 px skip the max-pool, which has no weights.
"""

from typing import Final

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from common.models.backbone import SMALL_PICTURE_PX

_BLOCKS: Final[dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
}
NUM_FEATURES: Final = {"resnet18": 512, "resnet50": 2048}


class ResNetTrunk(nn.Module):
    """[B, 3, H, W] -> [B, 512 or 2048, h, w]; h = H / 32 from 96 px on, H / 16 below.

    Why this stem: it costs nothing against a 3 x 3 one, and the max-pool saves two thirds of the time. ResNet-18,
    forward and backward, batch 32, bfloat16, channels-last, one core of an AMD EPYC with AVX512-BF16, pictures/s:

        side     7x7/2 + pool   3x3/2 + pool   7x7/2   3x3/2   3x3/1 + pool
        64 px         165            163         67      81        63
        80 px         148            152         55      54        53
        112 px         97             97         34      30        24
    """

    def __init__(self, name: str, *, image_size: int) -> None:
        """name: resnet18 or resnet50.  image_size: the side in px that the stem is chosen for; others work too."""
        super().__init__()
        block, depths = _BLOCKS[name]
        # Each residual branch starts as zero, so a deep net starts as a shallow one (arXiv:1706.02677, sec. 5.1).
        net = ResNet(block, depths, num_classes=1, zero_init_residual=True)
        self.conv1, self.bn1, self.relu = net.conv1, net.bn1, net.relu
        self.maxpool = net.maxpool if image_size >= SMALL_PICTURE_PX else nn.Identity()
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures: [B, 3, H, W] float.  Returns the last feature map."""
        features = self.maxpool(self.relu(self.bn1(self.conv1(pictures))))
        features = self.layer2(self.layer1(features))
        last: Tensor = self.layer4(self.layer3(features))
        return last
