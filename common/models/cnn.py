"""A small convolutional trunk for machines without a GPU: four blocks of convolution, normalisation, ReLU and pool."""

from typing import Final

from torch import Tensor, nn

from common.models.backbone import scaled

_CHANNELS: Final = (32, 64, 128, 256)


class CnnTrunk(nn.Module):
    """[B, 3, H, W] -> [B, num_features, H / 16, W / 16] (256 at width 1)."""

    def __init__(self, *, width: float = 1.0) -> None:
        """width: fraction of the channels of every layer."""
        super().__init__()
        channels = [scaled(count, width) for count in _CHANNELS]
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


def _block(num_in: int, num_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(num_in, num_out, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(num_out),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
    )
