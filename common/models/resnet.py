"""ResNet-18 and ResNet-50 (arXiv:1512.03385) for faces, in torchvision's layout so that its weights load by name.

The stem is ImageNet's 7 x 7 convolution of stride 2 for every choice of `pretrained`: one layout, so that any client
can hold any weights. Pictures under 96 px skip the max-pool, which has no weights.

The blocks are not torchvision's own classes: their import brings torch's compiler, 1.4 s in each process that starts.
A test compares both, weights and outputs.
"""

from typing import Final

from torch import Tensor, nn

from common.models.backbone import SMALL_PICTURE_PX, scaled


def _conv(num_in: int, num_out: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(num_in, num_out, kernel_size=size, stride=stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut: [B, num_in, H, W] -> [B, planes, H / stride, W / stride]."""

    expansion = 1

    def __init__(self, num_in: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        """downsample: the shortcut where shapes differ; None: the input itself."""
        super().__init__()
        self.conv1 = _conv(num_in, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, features: Tensor) -> Tensor:
        """features: [B, num_in, H, W] float."""
        shortcut = features if self.downsample is None else self.downsample(features)
        out = self.relu(self.bn1(self.conv1(features)))
        out = self.bn2(self.conv2(out))
        out += shortcut
        activated: Tensor = self.relu(out)
        return activated


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 convolutions beside a shortcut: [B, num_in, H, W] -> [B, 4 planes, H / stride, W / stride].

    The stride is the 3 x 3 convolution's, not the first's as in the paper ("v1.5"), as torchvision's weights want it.
    """

    expansion = 4

    def __init__(self, num_in: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        """downsample: the shortcut where shapes differ; None: the input itself."""
        super().__init__()
        self.conv1 = _conv(num_in, planes, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = _conv(planes, planes * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, features: Tensor) -> Tensor:
        """features: [B, num_in, H, W] float."""
        shortcut = features if self.downsample is None else self.downsample(features)
        out = self.relu(self.bn1(self.conv1(features)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += shortcut
        activated: Tensor = self.relu(out)
        return activated


_BLOCKS: Final[dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
}
_PLANES: Final = (64, 128, 256, 512)


def _stage(block: type[BasicBlock | Bottleneck], num_in: int, planes: int, depth: int, *, stride: int) -> nn.Sequential:
    """`depth` residual blocks, the first of which changes resolution and channels."""
    num_out = planes * block.expansion
    shortcut = None
    if stride != 1 or num_in != num_out:
        shortcut = nn.Sequential(
            nn.Conv2d(num_in, num_out, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(num_out)
        )
    first = block(num_in, planes, stride, shortcut)
    return nn.Sequential(first, *(block(num_out, planes) for _ in range(depth - 1)))


def _initialise(trunk: nn.Module) -> None:
    """He initialisation (arXiv:1502.01852) of every convolution.

    Residual branches do not start as zero (arXiv:1706.02677, sec. 5.1): on two small sets of real faces, 15 rounds of
    one epoch, that cost 0.12 of the test AUC (0.743 against 0.862, one seed); it is meant for long training.
    """
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ResNetTrunk(nn.Module):
    """[B, 3, H, W] -> [B, num_features, h, w] (512 or 2048 at width 1); h = H / 32 from 96 px on, H / 16 below.

    Why this stem: it costs nothing against a 3 x 3 one, and the max-pool saves two thirds of the time. ResNet-18,
    forward and backward, batch 32, bfloat16, channels-last, one core of an AMD EPYC with AVX512-BF16, pictures/s:

        side     7x7/2 + pool   3x3/2 + pool   7x7/2   3x3/2   3x3/1 + pool
        64 px         165            163         67      81        63
        80 px         148            152         55      54        53
        112 px         97             97         34      30        24
    """

    def __init__(self, name: str, *, image_size: int, width: float = 1.0) -> None:
        """name: resnet18 or resnet50.  image_size: the side in px that the stem is chosen for; others work too.

        width: fraction of the channels of every layer; only 1.0 has torchvision's shapes.
        """
        super().__init__()
        block, depths = _BLOCKS[name]
        channels = [scaled(planes, width) for planes in _PLANES]
        self.conv1 = nn.Conv2d(3, channels[0], kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU(inplace=True)
        pools = image_size >= SMALL_PICTURE_PX
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1) if pools else nn.Identity()
        num_in = [channels[0], *(planes * block.expansion for planes in channels[:3])]
        self.layer1 = _stage(block, num_in[0], channels[0], depths[0], stride=1)
        self.layer2 = _stage(block, num_in[1], channels[1], depths[1], stride=2)
        self.layer3 = _stage(block, num_in[2], channels[2], depths[2], stride=2)
        self.layer4 = _stage(block, num_in[3], channels[3], depths[3], stride=2)
        self.num_features = channels[3] * block.expansion
        _initialise(self)

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures: [B, 3, H, W] float.  Returns the last feature map."""
        features = self.maxpool(self.relu(self.bn1(self.conv1(pictures))))
        features = self.layer2(self.layer1(features))
        last: Tensor = self.layer4(self.layer3(features))
        return last

    @property
    def units(self) -> list[nn.Module]:
        """The residual blocks."""
        return [module for module in self.modules() if isinstance(module, BasicBlock | Bottleneck)]
