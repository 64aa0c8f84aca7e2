"""The one training step of all modes: local, federated, (later) centralised.

`train_epochs` knows nothing of rounds or messages: a caller says which of all epochs to run and what penalty to add.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import TrainingFailed
from common.faces.batches import num_batches
from common.faces.epoch_batches import Batch, epoch_batches
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.faces.twin_batches import NO_TWIN
from common.models.dcal import Partners, random_partners
from common.models.gradients import clip_gradient
from common.models.heads import spreadout
from common.models.losses import batch_hard_triplet
from common.models.recogniser import Recogniser
from common.runtime import random_stream, use_threads
from common.settings import Settings, TrainingSettings

Penalty = Callable[[], None]  # adds its gradient to the parameters' .grad
INPUT_VECTORS = ("class_token", "pos_embedding")
# Adam moves a number by about the rate in a step, whatever its gradient: weights of losses have to get from 0 to the
# logarithm of their loss, a few units, and at the network's rate would not within a run.
LOSS_WEIGHTS_ADAM = 20.0
HEAD_WARMUP_STREAM = "head-warmup"  # no client's name has a "/", so "NAME/head-warmup" is nobody's


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How to compute, resolved: nothing here is 'auto' any more."""

    device: str
    precision: str  # float32 | bfloat16
    memory_format: str  # contiguous | channels_last
    threads: int

    def autocast(self) -> torch.autocast:
        """The context in which forward passes run."""
        return torch.autocast(
            self.device.split(":")[0], dtype=torch.bfloat16, enabled=self.precision == "bfloat16", cache_enabled=True
        )

    def laid_out(self, pictures: Tensor) -> Tensor:
        """The batch in the chosen memory format."""
        layout = torch.channels_last if self.memory_format == "channels_last" else torch.contiguous_format
        return pictures.contiguous(memory_format=layout)

    def place(self, module: nn.Module) -> None:
        """Move a module to the device, in the chosen memory format, and set this process's threads."""
        use_threads(self.threads)
        if self.memory_format == "channels_last":
            module.to(memory_format=torch.channels_last)
        module.to(self.device)


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """What one optimiser step tells."""

    losses: dict[str, float]  # mean cross-entropy by branch
    correct: int  # pictures, by self-attention
    gradient_norm: float  # before clipping
    gradient_norms: dict[str, float]  # by group of parameters, see common/models/gradients.py


@dataclass
class TrainSums:
    """What training adds up; everything here merges by addition."""

    num_pictures: int = 0  # processed, so a picture counts once an epoch
    num_steps: int = 0
    correct: int = 0
    loss_sum: float = 0.0  # over pictures; the cross-entropy of self-attention where there are other branches
    branch_loss_sums: dict[str, float] = field(default_factory=dict)  # over pictures, of those others, by name
    gradient_norm_sum: float = 0.0  # over steps, before clipping
    gradient_norm_sums: dict[str, float] = field(default_factory=dict)  # over steps, by group of parameters
    num_warmup_pictures: int = 0  # seen by a new head alone, before training; in none of the sums above
    num_warmup_steps: int = 0
    lr_last: float = field(default=0.0)

    def add(self, stepped: Stepped, num_pictures: int) -> None:
        """Count one step of training on so many pictures."""
        self.num_pictures += num_pictures
        self.num_steps += 1
        self.correct += stepped.correct
        self.loss_sum += stepped.losses["sa"] * num_pictures
        self.gradient_norm_sum += stepped.gradient_norm
        for group, norm in stepped.gradient_norms.items():
            self.gradient_norm_sums[group] = self.gradient_norm_sums.get(group, 0.0) + norm
        for name, loss in stepped.losses.items():
            if name != "sa":
                self.branch_loss_sums[name] = self.branch_loss_sums.get(name, 0.0) + loss * num_pictures

    def merged(self) -> dict[str, float]:
        """The means the tracking shows: train_loss, train_acc, gradient_norm; train_loss_glca, gradient_norm_head..."""
        num_pictures, num_steps = max(self.num_pictures, 1), max(self.num_steps, 1)
        return {
            "train_loss": self.loss_sum / num_pictures,
            "train_acc": self.correct / num_pictures,
            "gradient_norm": self.gradient_norm_sum / num_steps,
            **{f"train_loss_{name}": total / num_pictures for name, total in self.branch_loss_sums.items()},
            **{f"gradient_norm_{group}": total / num_steps for group, total in self.gradient_norm_sums.items()},
        }


def learning_rate(training: TrainingSettings, progress: float) -> float:
    """Linear warm-up, then a half cosine to zero (arXiv:1608.03983, without restarts).

    progress: fraction of all steps of the whole federation that are done, in [0, 1].
    """
    warmup = training.warmup_fraction
    if progress < warmup:
        return training.lr * (progress / warmup)
    return training.lr * 0.5 * (1.0 + math.cos(math.pi * (progress - warmup) / (1.0 - warmup)))


def make_optimiser(module: nn.Module, training: TrainingSettings) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum or AdamW over all parameters of a recogniser, or of its head alone.

    Weight decay spares vectors and scalars (biases, normalisation), as is usual (arXiv:1812.01187, section 3.1), and a
    ViT's class token and positions, which are vectors of the input. Learned loss weights are a group of their own, the
    last; "lr_factor" of a group multiplies the schedule's rate.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.ndim > 1 and not name.endswith(INPUT_VECTORS)]
    spared = [p for name, p in named if p.ndim <= 1 or name.endswith(INPUT_VECTORS)]
    loss_weights = [p for name, p in named if name.startswith("loss_weights.")]
    spared = [p for p in spared if all(p is not weight for weight in loss_weights)]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": training.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    if loss_weights:
        factor = LOSS_WEIGHTS_ADAM if training.optimiser == "adamw" else 1.0
        groups.append({"params": loss_weights, "weight_decay": 0.0, "lr_factor": factor})
    if training.optimiser == "adamw":
        return torch.optim.AdamW(groups, lr=training.lr)
    return torch.optim.SGD(groups, lr=training.lr, momentum=training.momentum, nesterov=training.momentum > 0)


def proximal(parameters: Sequence[nn.Parameter], mu: float) -> Penalty:
    """FedProx's pull to the received model (arXiv:1812.06127, eq. 2).

    The objective gains mu / 2 * ||w - w_global||^2, the squared norm summed over the shared parameters; its gradient
    is mu * (w - w_global). `parameters` are the shared ones as received; their values now are the reference.
    """
    reference = [p.detach().clone() for p in parameters]

    def add_gradient() -> None:
        for parameter, received in zip(parameters, reference, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - received, alpha=mu)

    return add_gradient


def _branch_losses(
    recogniser: Recogniser, embeddings: dict[str, Tensor], labels: Tensor, training: TrainingSettings
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of each branch the cross-entropy, and what is minimised: that and the triplet loss."""
    told, minimised = {}, {}
    for name, embedding in embeddings.items():
        logits = recogniser.branch_logits(name, embedding.float(), labels)
        told[name] = minimised[name] = F.cross_entropy(logits, labels, label_smoothing=training.label_smoothing)
        if training.triplet > 0.0:
            triplet = batch_hard_triplet(embedding.float(), labels, training.triplet_margin)
            minimised[name] = told[name] + training.triplet * triplet
    return told, minimised


def _step(  # one optimiser step
    recogniser: Recogniser,
    optimiser: torch.optim.Optimizer,
    batch: Batch,
    *,
    training: TrainingSettings,
    compute: Compute,
    penalty: Penalty | None,
    partners: Tensor | None,
    where: str,
) -> Stepped:
    """partners: those of PWCA, [B] int64.  Raises TrainingFailed if loss or gradient is not finite."""
    pictures, labels = batch.pictures, batch.labels
    with compute.autocast():
        embeddings = recogniser.branch_embeddings(compute.laid_out(pictures), partners)
    told, minimised = _branch_losses(recogniser, embeddings, labels, training)
    objective = recogniser.combined(minimised)
    if training.spreadout > 0.0:
        apart = spreadout(recogniser.head.identity_vectors, training.spreadout_margin)
        objective = objective + training.spreadout * apart
    recogniser.zero_grad(set_to_none=True)  # also of what this optimiser does not hold, or it would count in the norm
    objective.backward()  # type: ignore[no-untyped-call]
    if penalty is not None:
        penalty()
    norm, norms = clip_gradient(recogniser.network_parameters(), training.clip_norm)
    values = {name: loss.item() for name, loss in told.items()}
    if not all(math.isfinite(value) for value in (*values.values(), norm)):
        raise TrainingFailed(
            f"the loss is {values['sa']} and the gradient norm {norm} at {where}; lower training.lr"
            f" (now {training.lr})."
        )
    with torch.no_grad():  # before the step, and without the margin, which would count right answers as wrong
        logits = recogniser.head.class_logits(embeddings["sa"].detach().float())
        correct = int((logits.argmax(1) == labels).sum())
    optimiser.step()
    return Stepped(losses=values, correct=correct, gradient_norm=norm, gradient_norms=norms)


def _pwca_partners(batch: Batch, stream: torch.Generator, wanted: str, choose: Partners) -> Tensor:
    """Each picture's partner, [B] int64.  wanted: "random", or "twin" where the batch has a picture of the twin."""
    partners = choose(batch.labels, stream)
    if wanted == "random" or batch.twins is None:
        return partners
    return torch.where(batch.twins == NO_TWIN, partners, batch.twins)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """In here the module neither learns nor gathers statistics; its mode is left as evaluation."""
    learned = [p for p in module.parameters() if p.requires_grad]
    module.eval()
    for parameter in learned:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad = True


def warm_up_head(
    recogniser: Recogniser, pack: FacePack, *, settings: Settings, compute: Compute, stream_name: str
) -> TrainSums:
    """Train a new head alone for training.head_warmup_epochs on the backbone as it is, which does not change.

    The learning rate is training.lr throughout, the optimiser the run's kind with a state of its own. Batches come from
    streams of their own, so training afterwards sees the same as without. Does nothing when the epochs are 0.

    Returns sums with num_warmup_pictures and num_warmup_steps only: they are no part of the budget of training.
    Raises TrainingFailed when a loss or gradient is not finite.
    """
    sums = TrainSums()
    if settings.training.head_warmup_epochs == 0:
        return sums
    compute.place(recogniser)
    optimiser = make_optimiser(recogniser.heads, settings.training)
    with _frozen(recogniser.backbone):
        for epoch in range(settings.training.head_warmup_epochs):
            batches = epoch_batches(
                pack, settings, device=compute.device, stream_name=f"{stream_name}/{HEAD_WARMUP_STREAM}", epoch=epoch
            )
            for step, batch in enumerate(batches):
                _step(
                    recogniser,
                    optimiser,
                    batch,
                    training=settings.training,
                    compute=compute,
                    penalty=None,
                    partners=None,
                    where=f"epoch {epoch + 1} of the head's warm-up, step {step + 1}",
                )
                sums.num_warmup_pictures += len(batch.labels)
                sums.num_warmup_steps += 1
    return sums


def train_epochs(
    recogniser: Recogniser,
    optimiser: torch.optim.Optimizer,
    pack: FacePack,
    *,
    settings: Settings,
    compute: Compute,
    epochs: range,
    total_epochs: int,
    stream_name: str,
    penalty: Penalty | None = None,
    choose_partners: Partners = random_partners,
) -> TrainSums:
    """Train in place for `epochs`, a range within [0, total_epochs).

    The learning rate follows the position within all epochs, so rounds do not restart it; dropout and the like draw
    from a stream named by (seed, stream_name, epoch).  choose_partners: PWCA's other pictures, where there is PWCA and
    `twins.partner` does not make it the twin.
    Raises TrainingFailed when a loss or gradient is not finite.
    """
    compute.place(recogniser)
    recogniser.train()
    sums = TrainSums()
    per_epoch = num_batches(len(pack.indices(Split.TRAIN)), settings.training.batch_size)
    partners = partial(_pwca_partners, wanted=settings.twins.partner, choose=choose_partners)
    for epoch in epochs:
        torch.manual_seed(random_stream(settings.run.seed, stream_name, "dropout", epoch).initial_seed())
        partner_stream = random_stream(settings.run.seed, stream_name, "partners", epoch)
        batches = epoch_batches(pack, settings, device=compute.device, stream_name=stream_name, epoch=epoch)
        for step, batch in enumerate(batches):
            sums.lr_last = learning_rate(settings.training, (epoch + (step + 0.5) / per_epoch) / total_epochs)
            for group in optimiser.param_groups:
                group["lr"] = sums.lr_last * group.get("lr_factor", 1.0)
            stepped = _step(
                recogniser,
                optimiser,
                batch,
                training=settings.training,
                compute=compute,
                penalty=penalty,
                partners=partners(batch, partner_stream) if "pwca" in recogniser.branches else None,
                where=f"epoch {epoch + 1}, step {step + 1} of {per_epoch}",
            )
            sums.add(stepped, len(batch.labels))
    return sums
