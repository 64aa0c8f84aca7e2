"""The model of one client, backbone and head, and the one place that decides what of it is shared and what private."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import ModelSettings
from common.errors import unknown_name
from common.models import cnn, mobile, resnet
from common.models.backbone import Backbone
from common.models.heads import CosineHead, SoftmaxHead, build_head
from common.models.pretrained import load_pretrained

_SHARED_PREFIX: Final = "backbone."
_NORMALISATION_LAYERS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)


class Recogniser(nn.Module):
    """A backbone, which may be shared, and a head over one client's people, which never leaves it."""

    def __init__(self, backbone: Backbone, head: SoftmaxHead | CosineHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def embed(self, pictures: Tensor) -> Tensor:
        """pictures: [B, 3, H, W] float in [-1, 1], RGB.  Returns the raw embedding [B, D], not normalised."""
        embeddings: Tensor = self.backbone(pictures)
        return embeddings

    def forward(self, pictures: Tensor, labels: Tensor) -> Tensor:
        """Training logits, [B, C] float32, with the head's margin.

        pictures: [B, 3, H, W] float in [-1, 1], RGB; B > 1 while training.  labels: [B] int64 in [0, C).
        """
        logits: Tensor = self.head(self.embed(pictures), labels)
        return logits

    def class_logits(self, embeddings: Tensor) -> Tensor:
        """embeddings: [B, D] as `embed` returns them.  Returns logits [B, C] float32 without margin."""
        return self.head.class_logits(embeddings)


class EmbeddingModel(nn.Module):
    """What is registered: pictures -> L2-normalised embeddings, in evaluation mode and in float32."""

    def __init__(self, backbone: nn.Module) -> None:
        """Keeps a copy of the backbone, so that its mode and its gradients stay as they are."""
        super().__init__()
        self.backbone = copy.deepcopy(backbone).float().requires_grad_(requires_grad=False)
        self.backbone.to(memory_format=torch.contiguous_format)  # as the export wants its weights
        self.eval()

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures: [B, 3, H, W] float32 in [-1, 1], RGB, aligned.  Returns [B, D] float32 of length 1."""
        return F.normalize(self.backbone(pictures), dim=1)


_TRUNKS: Final[dict[str, Callable[[int, float], resnet.ResNetTrunk | mobile.MobileTrunk | cnn.CnnTrunk]]] = {
    "resnet18": lambda size, width: resnet.ResNetTrunk("resnet18", image_size=size, width=width),
    "resnet50": lambda size, width: resnet.ResNetTrunk("resnet50", image_size=size, width=width),
    "mobilenet_v2": lambda size, width: mobile.MobileTrunk(image_size=size, width=width),
    "cnn": lambda _size, width: cnn.CnnTrunk(width=width),
}


def build_backbone(model: ModelSettings, image_size: int) -> Backbone:
    """The backbone that the settings name, freshly initialised from the global random state; no weights are loaded.

    image_size: side of the pictures in px. Names and shapes of the tensors depend on `model.backbone`, `model.width`
    and `model.embedding_size` only, never on `image_size` or `model.pretrained`.
    """
    trunk = _TRUNKS[model.backbone](image_size, model.width)
    return Backbone(
        trunk,
        num_features=trunk.num_features,
        embedding_size=model.embedding_size,
        dropout=model.dropout,
    )


def build_recogniser(
    model: ModelSettings, *, num_people: int, image_size: int, backbone_seed: int, head_seed: int
) -> Recogniser:
    """A recogniser on the CPU, the same for the same seeds; the global random state stays untouched.

    num_people: C, the client's own people.  image_size: side in px.
    `model.pretrained` is loaded last. A client whose server sends the shared parameters needs no weights of its own:
    it passes `dataclasses.replace(model, pretrained="none")`.
    Raises ConfigError or CheckpointError when `model.pretrained` cannot be loaded.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also reseed every GPU, and those are not forked here.
        torch.default_generator.manual_seed(backbone_seed)
        backbone = build_backbone(model, image_size)
        torch.default_generator.manual_seed(head_seed)
        head = build_head(model, num_people=num_people)
    load_pretrained(backbone, name=model.backbone, pretrained=model.pretrained)
    return Recogniser(backbone, head)


def for_people(recogniser: Recogniser, people: slice) -> Recogniser:
    """The recogniser with the head's rows of some people only; the backbone is the same module, not a copy.

    people: labels of the given recogniser; label k of the new one is `people.start + k`.
    """
    head = copy.deepcopy(recogniser.head)
    for parameter in head.parameters():  # each has one row a person
        parameter.data = parameter.data[people].clone()
    return Recogniser(recogniser.backbone, head)


def named_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a recogniser, or of a backbone alone, under the recogniser's names, in state_dict order.

    The tensors are the model's own, not copies, and carry no gradient.
    """
    prefix = "" if isinstance(model, Recogniser) else _SHARED_PREFIX
    return {prefix + name: tensor for name, tensor in model.state_dict().items()}


def shared_names(model: nn.Module, normalisation: str) -> tuple[str, ...]:
    """Names, in state_dict order, of the parameters and buffers that travel between client and server.

    model: a Recogniser, or a backbone alone as the server holds it.  normalisation: "shared" or "private".
    All names begin with "backbone."; with "private" those of normalisation layers are left out (FedBN,
    arXiv:2102.07623). Integer counters (`num_batches_tracked`) neither travel nor count as private: nothing is
    computed from them, since the layers average with a fixed momentum, and a mean of counts would mean nothing.
    """
    return _Split.of(model, normalisation).shared


def trainable_names(model: nn.Module) -> frozenset[str]:
    """Names of what is learned by gradients, shared or private; the rest are statistics of normalisation layers."""
    prefix = "" if isinstance(model, Recogniser) else _SHARED_PREFIX
    return frozenset(prefix + name for name, _ in model.named_parameters())


def private_names(model: nn.Module, normalisation: str) -> tuple[str, ...]:
    """Names, in state_dict order, of the floating-point parameters and buffers that never leave the client."""
    return _Split.of(model, normalisation).private


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Split:
    shared: tuple[str, ...]
    private: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, normalisation: str) -> "_Split":
        if normalisation not in ("shared", "private"):
            raise ValueError(unknown_name("normalisation", normalisation, ("shared", "private")))
        kept = _normalisation_names(model) if normalisation == "private" else frozenset()
        names = [name for name, tensor in named_state(model).items() if tensor.is_floating_point()]
        shared = tuple(name for name in names if name.startswith(_SHARED_PREFIX) and name not in kept)
        return cls(shared=shared, private=tuple(name for name in names if name not in set(shared)))


def _normalisation_names(model: nn.Module) -> frozenset[str]:
    prefix = "" if isinstance(model, Recogniser) else _SHARED_PREFIX
    return frozenset(
        f"{prefix}{module_name}.{name}"
        for module_name, module in model.named_modules()
        if isinstance(module, _NORMALISATION_LAYERS)
        for name in module.state_dict()
    )
