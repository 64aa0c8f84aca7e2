"""The blocks of a ResNet (arXiv:1512.03385), with torchvision's names and numbers, so that its weights load by name.

Not torchvision's own classes: their import brings torch's compiler, 1.4 s in each process that starts. A test
compares both, weights and outputs.
"""

from torch import Tensor, nn


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
