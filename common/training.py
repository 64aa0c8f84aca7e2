"""The one training step of all modes: local, federated, (later) centralised.

`train_epochs` knows nothing of rounds or messages: a caller says which of all epochs to run and what penalty to add.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import Settings, TrainingSettings
from common.errors import TrainingFailed
from common.faces.batches import num_batches, training_batches
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.models.heads import spreadout
from common.models.recogniser import Recogniser
from common.runtime import random_stream, use_threads

Penalty = Callable[[], None]  # adds its gradient to the parameters' .grad
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


@dataclass
class TrainSums:
    """What training adds up; everything here merges by addition."""

    num_pictures: int = 0  # processed, so a picture counts once an epoch
    num_steps: int = 0
    correct: int = 0
    loss_sum: float = 0.0  # over pictures
    gradient_norm_sum: float = 0.0  # over steps, before clipping
    num_warmup_pictures: int = 0  # seen by a new head alone, before training; in none of the sums above
    num_warmup_steps: int = 0
    lr_last: float = field(default=0.0)

    def merged(self) -> dict[str, float]:
        """The means the tracking shows: train_loss, train_acc, gradient_norm."""
        return {
            "train_loss": self.loss_sum / max(self.num_pictures, 1),
            "train_acc": self.correct / max(self.num_pictures, 1),
            "gradient_norm": self.gradient_norm_sum / max(self.num_steps, 1),
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

    Weight decay spares vectors and scalars (biases, normalisation), as is usual (arXiv:1812.01187, section 3.1).
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": training.weight_decay},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
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


def _step(  # one optimiser step
    recogniser: Recogniser,
    optimiser: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    *,
    training: TrainingSettings,
    compute: Compute,
    penalty: Penalty | None,
    where: str,
) -> tuple[float, int, float]:
    """Returns (mean loss, number of correct pictures, gradient norm).  Raises TrainingFailed if not finite."""
    pictures, labels = batch
    with compute.autocast():
        embeddings = recogniser.embed(compute.laid_out(pictures))
    logits = recogniser.head(embeddings.float(), labels)
    loss = F.cross_entropy(logits, labels, label_smoothing=training.label_smoothing)
    objective = loss
    if training.spreadout > 0.0:
        objective = loss + training.spreadout * spreadout(recogniser.head.identity_vectors, training.spreadout_margin)
    recogniser.zero_grad(set_to_none=True)  # also of what this optimiser does not hold, or it would count in the norm
    objective.backward()  # type: ignore[no-untyped-call]
    if penalty is not None:
        penalty()
    norm = float(nn.utils.clip_grad_norm_(recogniser.parameters(), training.clip_norm))
    value = loss.item()
    if not (math.isfinite(value) and math.isfinite(norm)):
        raise TrainingFailed(
            f"the loss is {value} and the gradient norm {norm} at {where}; lower training.lr (now {training.lr})."
        )
    with torch.no_grad():  # before the step, and without the margin, which would count right answers as wrong
        correct = int((recogniser.class_logits(embeddings.detach().float()).argmax(1) == labels).sum())
    optimiser.step()
    return value, correct, norm


def epoch_batches(
    pack: FacePack, settings: Settings, compute: Compute, *, stream_name: str, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The training batches of one epoch; the same (seed, stream_name, epoch) gives the same batches anywhere."""
    chosen = pack.indices(Split.TRAIN)
    return training_batches(
        pack.pictures,
        pack.training_labels,
        chosen=chosen,
        batch_size=settings.training.batch_size,
        augmentation=settings.augmentation,
        stream=random_stream(settings.run.seed, stream_name, "epoch", epoch),
        device=compute.device,
    )


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
    optimiser = make_optimiser(recogniser.head, settings.training)
    with _frozen(recogniser.backbone):
        for epoch in range(settings.training.head_warmup_epochs):
            batches = epoch_batches(
                pack, settings, compute, stream_name=f"{stream_name}/{HEAD_WARMUP_STREAM}", epoch=epoch
            )
            for step, batch in enumerate(batches):
                _step(
                    recogniser,
                    optimiser,
                    batch,
                    training=settings.training,
                    compute=compute,
                    penalty=None,
                    where=f"epoch {epoch + 1} of the head's warm-up, step {step + 1}",
                )
                sums.num_warmup_pictures += len(batch[1])
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
) -> TrainSums:
    """Train in place for `epochs`, a range within [0, total_epochs).

    The learning rate follows the position within all epochs, so rounds do not restart it; dropout and the like draw
    from a stream named by (seed, stream_name, epoch).  Raises TrainingFailed when a loss or gradient is not finite.
    """
    compute.place(recogniser)
    recogniser.train()
    sums = TrainSums()
    per_epoch = num_batches(len(pack.indices(Split.TRAIN)), settings.training.batch_size)
    for epoch in epochs:
        torch.manual_seed(random_stream(settings.run.seed, stream_name, "dropout", epoch).initial_seed())
        batches = epoch_batches(pack, settings, compute, stream_name=stream_name, epoch=epoch)
        for step, batch in enumerate(batches):
            sums.lr_last = learning_rate(settings.training, (epoch + (step + 0.5) / per_epoch) / total_epochs)
            for group in optimiser.param_groups:
                group["lr"] = sums.lr_last
            loss, correct, norm = _step(
                recogniser,
                optimiser,
                batch,
                training=settings.training,
                compute=compute,
                penalty=penalty,
                where=f"epoch {epoch + 1}, step {step + 1} of {per_epoch}",
            )
            sums.num_pictures += len(batch[1])
            sums.num_steps += 1
            sums.correct += correct
            sums.loss_sum += loss * len(batch[1])
            sums.gradient_norm_sum += norm
    return sums
