"""The backbones, a ViT's branches and the heads that settings may name: one row each, read by all that asks for them.

torch is imported where something is built, so that settings are checked against the table, and `--help` answers,
without it. A new backbone is a row here and a file with its trunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from common.settings import ModelSettings

if TYPE_CHECKING:
    from common.models.backbone import CnnTrunk, MobileTrunk
    from common.models.heads import CosineHead, SoftmaxHead
    from common.models.resnet import ResNetTrunk
    from common.models.vit import VitTrunk

    Trunk = CnnTrunk | MobileTrunk | ResNetTrunk | VitTrunk
    Head = CosineHead | SoftmaxHead


@dataclass(frozen=True, kw_only=True)
class BackboneRow:
    """What is known of a backbone before it is built."""

    name: str
    trunk: Callable[[ModelSettings, int], Trunk]  # (settings, side of the pictures in px) -> freshly initialised
    is_vit: bool = False  # cuts pictures into patches, has branches and attention to show
    imagenet: str | None = None  # torchvision's name of the weights, which are for model.width = 1
    imagenet_blocks: tuple[int, int] | None = None  # of a ViT: (patch_size, depth) that they are for


def _resnet(model: ModelSettings, image_size: int) -> ResNetTrunk:
    from common.models.resnet import ResNetTrunk  # see above

    return ResNetTrunk(model.backbone, image_size=image_size, width=model.width)


def _mobile(model: ModelSettings, image_size: int) -> MobileTrunk:
    from common.models.backbone import MobileTrunk  # see above

    return MobileTrunk(image_size=image_size, width=model.width)


def _cnn(model: ModelSettings, _image_size: int) -> CnnTrunk:
    from common.models.backbone import CnnTrunk  # see above

    return CnnTrunk(width=model.width)


def _vit(model: ModelSettings, image_size: int) -> VitTrunk:
    from common.models.vit import VitTrunk  # see above

    return VitTrunk(
        model.backbone, image_size=image_size, patch_size=model.patch_size, depth=model.depth, width=model.width
    )


_BACKBONES: Final = (
    BackboneRow(name="resnet18", trunk=_resnet, imagenet="ResNet18_Weights.IMAGENET1K_V1"),
    BackboneRow(name="resnet50", trunk=_resnet, imagenet="ResNet50_Weights.IMAGENET1K_V2"),
    BackboneRow(name="mobilenet_v2", trunk=_mobile, imagenet="MobileNet_V2_Weights.IMAGENET1K_V2"),
    BackboneRow(name="cnn", trunk=_cnn),
    BackboneRow(name="vit_tiny", trunk=_vit, is_vit=True),
    BackboneRow(name="vit_small", trunk=_vit, is_vit=True),
    BackboneRow(
        name="vit_base",
        trunk=_vit,
        is_vit=True,
        imagenet="ViT_B_16_Weights.IMAGENET1K_V1",
        imagenet_blocks=(16, 12),
    ),
)
BACKBONES: Final[dict[str, BackboneRow]] = {row.name: row for row in _BACKBONES}
VITS: Final = tuple(row.name for row in _BACKBONES if row.is_vit)

# model.attention: the branches of training, by name; self-attention ("sa") is always one.
ATTENTIONS: Final = {
    "sa": ("sa",),
    "glca": ("sa", "glca"),
    "pwca": ("sa", "pwca"),
    "dcal": ("sa", "glca", "pwca"),
}


def _softmax(model: ModelSettings, num_people: int) -> SoftmaxHead:
    from common.models.heads import SoftmaxHead  # see above

    return SoftmaxHead(model.embedding_size, num_people)


def _cosine(model: ModelSettings, num_people: int) -> CosineHead:
    from common.models.heads import MARGINS, CosineHead  # see above

    return CosineHead(
        model.embedding_size,
        num_people,
        add_margin=MARGINS[model.head],
        margin=model.head_margin,
        scale=model.head_scale,
    )


# model.head: (settings, number of people) -> freshly initialised
HEADS: Final[dict[str, Callable[[ModelSettings, int], Head]]] = {
    "softmax": _softmax,
    "cosface": _cosine,
    "arcface": _cosine,
}
