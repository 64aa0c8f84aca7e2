"""The model of one client, backbone and head, and the one place that decides what of it is shared and what private."""

import copy
from collections.abc import Iterator, Mapping
from typing import Final, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import unknown_name
from common.models.backbone import Backbone
from common.models.dcal import VitBackbone
from common.models.group_norm import use_groups
from common.models.heads import CosineHead, SoftmaxHead, uncertainty_weighted
from common.models.pretrained import load_pretrained
from common.models.table import BACKBONES, HEADS
from common.models.vit import VitTrunk
from common.settings import ModelSettings

_SHARED_PREFIX: Final = "backbone."
_BATCH_NORMALISATION: Final = (nn.BatchNorm1d, nn.BatchNorm2d)
_NORMALISATION_LAYERS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)


class Recogniser(nn.Module):
    """A backbone, which may be shared, and a head over one client's people, which never leaves it.

    With a GLCA branch (arXiv:2205.02151) there is a second head; with any branch besides self-attention ("sa"), each
    has a learned weight of its loss. Both are private, as the head is. The PWCA branch uses the head of "sa".
    """

    def __init__(
        self,
        backbone: Backbone | VitBackbone,
        head: SoftmaxHead | CosineHead,
        glca_head: SoftmaxHead | CosineHead | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.glca_head = glca_head
        self.keeps_statistics = False  # in training too, batch normalisation uses the running statistics and keeps them
        self.still: list[nn.Module] = []  # those of the backbone that are as in evaluation while the rest is trained
        self.loss_weights: nn.ParameterDict | None = None
        if len(self.branches) > 1:
            self.loss_weights = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in self.branches})

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 - torch's own
        """As torch's; what is frozen, and with `keeps_statistics` running statistics, stays as in evaluation."""
        super().train(mode)
        for module in self.still:
            module.eval()
        if self.keeps_statistics:
            for module in self.modules():
                if isinstance(module, _BATCH_NORMALISATION):
                    module.eval()
        return self

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches of training, "sa" first; a convolutional backbone has that alone."""
        return self.backbone.branches if isinstance(self.backbone, VitBackbone) else ("sa",)

    @property
    def heads(self) -> nn.Module:
        """What a new client has to learn first: the head, or both."""
        return self.head if self.glca_head is None else nn.ModuleList([self.head, self.glca_head])

    def network_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters, by name, but the loss weights: their gradients are as large as losses and swamp a norm."""
        return ((name, p) for name, p in self.named_parameters() if not name.startswith("loss_weights."))

    def embed(self, pictures: Tensor) -> Tensor:
        """pictures: [B, 3, H, W] float in [-1, 1], RGB.  Returns the raw embedding [B, D], not normalised.

        D is `embedding_size`: twice model.embedding_size where two branches embed.
        """
        embeddings: Tensor = self.backbone(pictures)
        return embeddings

    def branch_embeddings(self, pictures: Tensor, partners: Tensor | None = None) -> dict[str, Tensor]:
        """The raw embeddings [B, D] that training looks at, by branch, "sa" first.

        pictures: [B, 3, H, W] float in [-1, 1], RGB; B > 1 while training.
        partners: [B] int64 in [0, B), PWCA's other picture of each; None: no PWCA.
        """
        return self.backbone.embeddings(pictures, partners=partners)

    def head_of(self, branch: str) -> SoftmaxHead | CosineHead:
        """The head of a branch's embeddings."""
        return self.glca_head if branch == "glca" and self.glca_head is not None else self.head

    def branch_logits(self, branch: str, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Training logits of a branch, [B, C] float32, with the margin of its head.

        embeddings: [B, D] of that branch.  labels: [B] int64 in [0, C).
        """
        logits: Tensor = self.head_of(branch)(embeddings, labels)
        return logits

    def combined(self, losses: Mapping[str, Tensor]) -> Tensor:
        """One loss of those of the branches, scalars by name: the learned weighting; a single one as it is."""
        if self.loss_weights is None:
            return losses["sa"]
        return uncertainty_weighted(losses, dict(self.loss_weights.items()))

    def forward(self, pictures: Tensor, labels: Tensor) -> Tensor:
        """Training logits of self-attention's branch, or the only one, [B, C] float32, with the head's margin.

        pictures: [B, 3, H, W] float in [-1, 1], RGB; B > 1 while training.  labels: [B] int64 in [0, C).
        """
        return self.branch_logits("sa", self.branch_embeddings(pictures)["sa"], labels)

    def class_logits(self, embeddings: Tensor) -> Tensor:
        """embeddings: [B, D] as `embed` returns them.  Returns logits [B, C] float32 without margin.

        Of the head whose branch embeds; where both do, [B, 2 D], the mean of each head's of its own half.
        """
        if self.glca_head is None or self._inference == "sa":
            return self.head.class_logits(embeddings)
        if self._inference == "glca":
            return self.glca_head.class_logits(embeddings)
        own, local = embeddings.chunk(2, 1)
        return 0.5 * (self.head.class_logits(own) + self.glca_head.class_logits(local))

    @property
    def _inference(self) -> str:
        return self.backbone.inference if isinstance(self.backbone, VitBackbone) else "sa"

    @property
    def embedding_size(self) -> int:
        """How many numbers `embed` gives of a picture."""
        return self.head.identity_vectors.shape[1] * (2 if self._inference == "both" else 1)


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


def build_backbone(model: ModelSettings, image_size: int) -> Backbone | VitBackbone:
    """The backbone that the settings name, freshly initialised from the global random state; no weights are loaded.

    image_size: side of the pictures in px. Names and shapes of the tensors depend on [model] alone, without
    `model.pretrained`, and not on `image_size`; but a ViT has a position embedding for each patch of its picture.
    """
    backbone = _with_batch_norm(model, image_size)
    if model.norm == "group":
        use_groups(backbone)
    return backbone


def _with_batch_norm(model: ModelSettings, image_size: int) -> Backbone | VitBackbone:
    trunk = BACKBONES[model.backbone].trunk(model, image_size)
    if isinstance(trunk, VitTrunk):
        return VitBackbone(
            trunk,
            embedding_size=model.embedding_size,
            dropout=model.dropout,
            attention=model.attention,
            inference=model.inference,
            glca_fraction=model.glca_fraction,
        )
    return Backbone(trunk, num_features=trunk.num_features, embedding_size=model.embedding_size, dropout=model.dropout)


def build_head(model: ModelSettings, *, num_people: int) -> SoftmaxHead | CosineHead:
    """The head that the settings name, for `num_people` people, freshly initialised from the global random state."""
    return HEADS[model.head](model, num_people)


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
        has_glca = isinstance(backbone, VitBackbone) and backbone.glca is not None
        glca_head = build_head(model, num_people=num_people) if has_glca else None
    load_pretrained(backbone, name=model.backbone, pretrained=model.pretrained)
    return Recogniser(backbone, head, glca_head)


def with_new_heads(recogniser: Recogniser, model: ModelSettings, *, num_people: int, head_seed: int) -> Recogniser:
    """Fresh heads for other people on the backbone of `recogniser`, which is the same module, not a copy.

    model: of equal settings.  The heads are those of `build_recogniser` for the same seed; the global random state
    stays untouched.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(head_seed)
        heads = [build_head(model, num_people=num_people) for head in (recogniser.head, recogniser.glca_head) if head]
    return Recogniser(recogniser.backbone, *heads)


def renew_heads(recogniser: Recogniser, head_seed: int) -> None:
    """Put what is private beside the backbone back to what `build_recogniser` made of this seed, in place.

    No copy of a head is needed to have a fresh one.  The global random state stays untouched.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(head_seed)
        recogniser.head.reset_parameters()
        if recogniser.glca_head is not None:
            recogniser.glca_head.reset_parameters()
        for weight in (recogniser.loss_weights or {}).values():
            weight.zero_()


def for_people(recogniser: Recogniser, people: slice) -> Recogniser:
    """The recogniser with the heads' rows of some people only; the backbone is the same module, not a copy.

    people: labels of the given recogniser; label k of the new one is `people.start + k`.
    """
    heads = [copy.deepcopy(head) for head in (recogniser.head, recogniser.glca_head) if head is not None]
    for head in heads:
        for parameter in head.parameters():  # each has one row a person
            parameter.data = parameter.data[people].clone()
    few = Recogniser(recogniser.backbone, *heads)
    few.loss_weights = copy.deepcopy(recogniser.loss_weights)
    return few


def named_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a recogniser, or of a backbone alone, under the recogniser's names, in state_dict order.

    The tensors are the model's own, not copies, and carry no gradient.
    """
    prefix = "" if isinstance(model, Recogniser) else _SHARED_PREFIX
    return {prefix + name: tensor for name, tensor in model.state_dict().items()}


def shared_names(model: nn.Module, normalisation: str) -> tuple[str, ...]:
    """Names, in state_dict order, of the parameters and buffers that travel between client and server.

    model: a Recogniser, or a backbone alone as the server holds it.  normalisation: "shared" or "private".
    All names begin with "backbone.", a GLCA branch's too; heads and loss weights never travel. With "private" those of
    normalisation layers are left out (FedBN, arXiv:2102.07623). Integer counters (`num_batches_tracked`) neither travel
    nor count as private: nothing is computed from them, since the layers average with a fixed momentum, and a mean of
    counts would mean nothing.
    """
    return _split(model, normalisation)[0]


def trainable_names(model: nn.Module, trainable: str = "all") -> frozenset[str]:
    """Names of what is learned by gradients, shared or private; the rest are statistics, and what is frozen.

    trainable: `training.trainable`.  Heads are always learned.
    """
    prefix = "" if isinstance(model, Recogniser) else _SHARED_PREFIX
    everything = [prefix + name for name, _ in model.named_parameters()]
    backbone = model.backbone if isinstance(model, Recogniser) else model
    learned = {_SHARED_PREFIX + name for name in _learned(backbone, trainable)}
    return frozenset(name for name in everything if not name.startswith(_SHARED_PREFIX) or name in learned)


def moving_names(model: nn.Module, normalisation: str, trainable: str) -> frozenset[str]:
    """Names of what is shared and training can change: what is learned, and statistics that follow batches."""
    backbone = model.backbone if isinstance(model, Recogniser) else model
    layers = {name for name, _ in _learned_modules(backbone, trainable)}
    shared = shared_names(model, normalisation)
    return frozenset(name for name in shared if name.removeprefix(_SHARED_PREFIX).rpartition(".")[0] in layers)


def _learned(backbone: nn.Module, trainable: str) -> list[str]:
    """Names in the backbone of the parameters that are learned."""
    layers = {name for name, _ in _learned_modules(backbone, trainable)}
    return [name for name, _ in backbone.named_parameters() if name.rpartition(".")[0] in layers]


def _learned_modules(backbone: nn.Module, trainable: str) -> list[tuple[str, nn.Module]]:
    """The backbone's modules whose own parameters are learned, and whose statistics follow the batches.

    last_block: the last block and what stands behind it.  head_side: what stands behind the trunk.  norm: the
    normalisation layers.
    """
    modules = list(backbone.named_modules())
    if trainable == "norm":
        return [(name, module) for name, module in modules if isinstance(module, _NORMALISATION_LAYERS)]
    if trainable == "head_side":
        return [(name, module) for name, module in modules if name and name.partition(".")[0] != "trunk"]
    if trainable == "last_block":
        first = next(number for number, (_, module) in enumerate(modules) if module is backbone.last_block)
        return modules[first:]
    return modules


def freeze(recogniser: Recogniser, trainable: str) -> None:
    """Have no more than `training.trainable` says learned from here on; statistics of the rest stay as they are too."""
    learned = set(_learned(recogniser.backbone, trainable))
    for name, parameter in recogniser.backbone.named_parameters():
        parameter.requires_grad_(name in learned)
    moving = {id(module) for _, module in _learned_modules(recogniser.backbone, trainable)}
    recogniser.still = [
        module
        for module in recogniser.backbone.modules()
        if isinstance(module, (*_BATCH_NORMALISATION, nn.Dropout)) and id(module) not in moving
    ]


def private_names(model: nn.Module, normalisation: str) -> tuple[str, ...]:
    """Names, in state_dict order, of the floating-point parameters and buffers that never leave the client."""
    return _split(model, normalisation)[1]


def _split(model: nn.Module, normalisation: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names that are shared, and those that are private."""
    if normalisation not in ("shared", "private"):
        raise ValueError(unknown_name("normalisation", normalisation, ("shared", "private")))
    kept = _normalisation_names(model) if normalisation == "private" else frozenset()
    names = [name for name, tensor in named_state(model).items() if tensor.is_floating_point()]
    shared = tuple(name for name in names if name.startswith(_SHARED_PREFIX) and name not in kept)
    return shared, tuple(name for name in names if name not in set(shared))


def _normalisation_names(model: nn.Module) -> frozenset[str]:
    prefix = "" if isinstance(model, Recogniser) else _SHARED_PREFIX
    return frozenset(
        f"{prefix}{module_name}.{name}"
        for module_name, module in model.named_modules()
        if isinstance(module, _NORMALISATION_LAYERS)
        for name in module.state_dict()
    )
