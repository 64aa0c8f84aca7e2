"""The one training step of all modes: local, federated and centralised.

`train_epochs` knows nothing of rounds or messages: a caller says which of all epochs to run and what penalty to add.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from common.faces.batches import NO_TWIN, Batch, all_of, epoch_batches, num_batches
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.models.dcal import Partners, random_partners
from common.models.recogniser import Recogniser
from common.settings import Settings, TrainingSettings
from common.strategies import STRATEGIES, Penalty
from common.system.progress import Tick, no_tick
from common.system.runtime import random_stream
from common.training.compute import Compute as Compute
from common.training.gradient_shares import GradientShares
from common.training.midway import Midway, Training
from common.training.optimiser import make_optimiser as make_optimiser
from common.training.rank_processes import on_every_device
from common.training.ranks import Ranks, Together, together
from common.training.sampled_head import HeadSample
from common.training.step import Stepped, Stepper, activation_checkpointing, loss_scaler

HEAD_WARMUP_STREAM = "head-warmup"  # no client's name has a "/", so "NAME/head-warmup" is nobody's


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
    num_halvings: int = 0  # of the batch, because the device had no room for a whole one
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
        """The means that the tracking shows: train_loss, train_accuracy, train_loss_glca, gradient_norm/head, ..."""
        num_pictures, num_steps = max(self.num_pictures, 1), max(self.num_steps, 1)
        return {
            "train_loss": self.loss_sum / num_pictures,
            "train_accuracy": self.correct / num_pictures,
            "gradient_norm": self.gradient_norm_sum / num_steps,
            **({"num_halvings": float(self.num_halvings)} if self.num_halvings else {}),
            **{f"train_loss_{name}": total / num_pictures for name, total in self.branch_loss_sums.items()},
            **{f"gradient_norm/{group}": total / num_steps for group, total in self.gradient_norm_sums.items()},
        }


def learning_rate(training: TrainingSettings, progress: float) -> float:
    """Linear warm-up, then a half cosine to zero (arXiv:1608.03983, without restarts).

    progress: fraction of all steps of the whole federation that are done, in [0, 1].
    """
    warmup = training.warmup_fraction
    if progress < warmup:
        return training.lr * (progress / warmup)
    return training.lr * 0.5 * (1.0 + math.cos(math.pi * (progress - warmup) / (1.0 - warmup)))


def _pwca_partners(batch: Batch, *, stream: torch.Generator, wanted: str, choose: Partners) -> Tensor:
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


def _head_sample(settings: Settings, stream_name: str, *began: int) -> HeadSample | None:
    fraction = settings.model.head_sample
    if fraction >= 1.0:
        return None
    return HeadSample(fraction=fraction, stream=random_stream(settings.run.seed, stream_name, "head-sample", *began))


def warm_up_head(
    recogniser: Recogniser,
    pack: FacePack,
    *,
    settings: Settings,
    compute: Compute,
    stream_name: str,
    tick: Tick = no_tick,
) -> TrainSums:
    """Train a new head alone for training.head_warmup_epochs on the backbone as it is, which does not change.

    The learning rate is training.lr throughout, the optimiser the run's kind with a state of its own. Batches come from
    streams of their own, so training afterwards sees the same as without. Does nothing when the epochs are 0.
    tick: is told after each step how many pictures it took.

    Returns sums with num_warmup_pictures and num_warmup_steps only: they are no part of the budget of training.
    Raises TrainingFailed when a loss or gradient is not finite.
    """
    if settings.training.head_warmup_epochs == 0:
        return TrainSums()
    _require_room(recogniser, pack, settings, compute)
    return on_every_device(
        _warm_up,
        recogniser,
        None,
        pack,
        settings=settings,
        compute=compute,
        stream_name=stream_name,
        own_only={"tick": tick},
    )


def _warm_up(
    recogniser: Recogniser,
    _optimiser: None,
    pack: FacePack,
    *,
    settings: Settings,
    compute: Compute,
    stream_name: str,
    tick: Tick = no_tick,
    ranks: Ranks | None = None,
) -> TrainSums:
    sums = TrainSums()
    compute = dataclasses.replace(compute, compiled=False)  # a graph of its own would not pay back
    compute.place(recogniser)
    own = all_of if ranks is None else partial(ranks.rows, accumulate=settings.training.accumulate)
    stream_name = f"{stream_name}/{HEAD_WARMUP_STREAM}"
    with _frozen(recogniser.backbone), together(recogniser, ranks, compute) if ranks else nullcontext() as shared:
        stepper = Stepper(
            recogniser=recogniser,
            optimiser=make_optimiser(recogniser.heads, settings.training),
            training=settings.training,
            compute=compute,
            sample=_head_sample(settings, stream_name),
            together=shared,
        )
        for epoch in range(settings.training.head_warmup_epochs):
            batches = epoch_batches(
                pack, settings, device=compute.device, stream_name=stream_name, epoch=epoch, own=own
            )
            for step, batch in enumerate(batches):
                stepper.step(batch, where=f"epoch {epoch + 1} of the head's warm-up, step {step + 1}")
                sums.num_warmup_pictures += len(batch.labels)
                sums.num_warmup_steps += 1
                tick(len(batch.labels))
    return sums


def _require_room(recogniser: Recogniser, pack: FacePack, settings: Settings, compute: Compute) -> None:
    """Raises UserError where batches are too small for all devices; PWCA wants two pictures on each."""
    num_pictures = len(pack.indices(Split.TRAIN))
    Ranks(rank=0, size=1 + len(compute.others)).require_pictures(
        num_pictures,
        per_epoch=num_batches(num_pictures, settings.training.batch_size),
        accumulate=settings.training.accumulate,
        each=2 if "pwca" in recogniser.branches else 1,
    )


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
    shared: Sequence[str] = (),
    choose_partners: Partners = random_partners,
    tick: Tick = no_tick,
    shares: GradientShares | None = None,
    midway: Midway | None = None,
) -> TrainSums:
    """Train in place for `epochs`, a range within [0, total_epochs).

    The learning rate follows the position within all epochs, so rounds do not restart it; dropout and the like draw
    from a stream named by (seed, stream_name, epoch).  choose_partners: PWCA's other pictures, where there is PWCA and
    `twins.partner` does not make it the twin.  tick: is told after each step how many pictures it took.
    shares: counts whose gradients they are.
    shared: names of the parameters, as they were received, that the strategy's own term of the loss is about.
    penalty: any other; not with several devices.  midway: where it goes on from, and is kept; likewise.
    Raises TrainingFailed when a loss or gradient is not finite, or one of several devices fails, and UserError where a
    batch is too small for them.
    """
    if compute.others and not (penalty is None and midway is None):
        raise ValueError("a penalty of the caller's own, or a part of a training, is for one device alone")
    per_epoch = num_batches(len(pack.indices(Split.TRAIN)), settings.training.batch_size)
    _require_room(recogniser, pack, settings, compute)
    return on_every_device(
        _train,
        recogniser,
        optimiser,
        pack,
        settings=settings,
        compute=compute,
        stretches=[(epoch, range(per_epoch)) for epoch in epochs],
        progress=partial(_of_epochs, per_epoch, total_epochs),
        stream_name=stream_name,
        shared=shared,
        choose_partners=choose_partners,
        **_watched(shares),
        own_only={"penalty": penalty, "tick": tick, "shares": shares, "midway": midway},
    )


def _watched(shares: GradientShares | None) -> dict[str, int]:
    """What other processes need to know of it to have one of their own."""
    return {} if shares is None else {"num_watched": shares.num_people}


def _of_epochs(per_epoch: int, total_epochs: int, epoch: int, step: int) -> float:
    return (epoch + (step + 0.5) / per_epoch) / total_epochs


def _of_steps(per_epoch: int, total: int, epoch: int, step: int) -> float:
    return (epoch * per_epoch + step + 0.5) / total


def train_round(
    recogniser: Recogniser,
    optimiser: torch.optim.Optimizer,
    pack: FacePack,
    *,
    settings: Settings,
    compute: Compute,
    server_round: int,
    stream_name: str,
    shared: Sequence[str] = (),
    tick: Tick = no_tick,
    shares: GradientShares | None = None,
    midway: Midway | None = None,
) -> TrainSums:
    """`train_epochs` for a round of the federation, from 1: its local epochs, or its local steps.

    Steps go on in the next round where this one's end, also in the middle of an epoch, so every picture is still
    processed once an epoch.
    """
    federation = settings.federation
    if isinstance(federation.local_epochs, int):
        first = (server_round - 1) * federation.local_epochs
        return train_epochs(
            recogniser,
            optimiser,
            pack,
            settings=settings,
            compute=compute,
            epochs=range(first, first + federation.local_epochs),
            total_epochs=settings.total_epochs,
            stream_name=stream_name,
            shared=shared,
            tick=tick,
            shares=shares,
            midway=midway,
        )
    per_epoch = num_batches(len(pack.indices(Split.TRAIN)), settings.training.batch_size)
    total, steps = settings.total_steps(per_epoch), settings.total_steps(per_epoch) // federation.rounds
    _require_room(recogniser, pack, settings, compute)
    return on_every_device(
        _train,
        recogniser,
        optimiser,
        pack,
        settings=settings,
        compute=compute,
        stretches=in_epochs(range((server_round - 1) * steps, server_round * steps), per_epoch),
        progress=partial(_of_steps, per_epoch, total),
        stream_name=stream_name,
        shared=shared,
        **_watched(shares),
        own_only={"tick": tick, "shares": shares, "midway": midway},
    )


def in_epochs(steps: range, per_epoch: int) -> list[tuple[int, range]]:
    """Consecutive steps of all training as (epoch, its steps), in order."""
    epochs = range(steps.start // per_epoch, -(-steps.stop // per_epoch))
    return [
        (epoch, range(max(steps.start - epoch * per_epoch, 0), min(steps.stop - epoch * per_epoch, per_epoch)))
        for epoch in epochs
    ]


def _strategys_term(recogniser: Recogniser, settings: Settings, shared: Sequence[str]) -> Penalty | None:
    """What the strategy adds to the loss, from the named parameters as they are now; None where it adds nothing."""
    term = STRATEGIES[settings.federation.strategy].client_term
    if term is None or not shared:
        return None
    named = dict(recogniser.named_parameters())
    return term([named[name] for name in shared if name in named], settings.federation)


def _stepper(
    training: Training,
    settings: Settings,
    compute: Compute,
    *,
    stream_name: str,
    began: tuple[int, ...],
    penalty: Penalty | None,
    choose_partners: Partners,
    together: Together | None,
) -> Stepper:
    """What takes the steps of one stretch of an epoch, with random streams of its own.

    began: the epoch, and the step where that is not the first; it names the streams.
    """
    torch.manual_seed(random_stream(settings.run.seed, stream_name, "dropout", *began).initial_seed())
    stream = random_stream(settings.run.seed, stream_name, "partners", *began)
    partners = partial(_pwca_partners, stream=stream, wanted=settings.twins.partner, choose=choose_partners)
    return Stepper(
        recogniser=training.recogniser,
        optimiser=training.optimiser,
        training=settings.training,
        compute=compute,
        penalty=penalty,
        choose_partners=partners if "pwca" in training.recogniser.branches else None,
        stream=stream,
        scaler=training.scaler,
        sample=_head_sample(settings, stream_name, *began),
        shares=training.shares,
        together=together,
    )


def _train(
    recogniser: Recogniser,
    optimiser: torch.optim.Optimizer,
    pack: FacePack,
    *,
    settings: Settings,
    compute: Compute,
    stretches: Sequence[tuple[int, range]],
    progress: Callable[[int, int], float],
    stream_name: str,
    shared: Sequence[str] = (),
    choose_partners: Partners = random_partners,
    penalty: Penalty | None = None,
    tick: Tick = no_tick,
    shares: GradientShares | None = None,
    num_watched: int | None = None,
    ranks: Ranks | None = None,
    midway: Midway | None = None,
) -> TrainSums:
    """Train on some steps of some epochs.  progress: (epoch, step) -> the fraction of all steps that are done."""
    compute.place(recogniser)
    recogniser.train()
    sums = TrainSums()
    per_epoch = num_batches(len(pack.indices(Split.TRAIN)), settings.training.batch_size)
    own = all_of if ranks is None else partial(ranks.rows, accumulate=settings.training.accumulate)
    penalty = penalty or _strategys_term(recogniser, settings, shared)
    if ranks is not None and num_watched is not None:
        shares = shares or GradientShares(num_people=num_watched)
    training = Training(
        recogniser=recogniser, optimiser=optimiser, scaler=loss_scaler(compute), sums=sums, shares=shares
    )
    done = 0 if midway is None else midway.restore(training)  # after the strategy's term has seen what was received
    tick(sums.num_pictures)
    watched = nullcontext() if shares is None else shares.watching(recogniser)
    with together(recogniser, ranks, compute) if ranks else nullcontext() as shared_passes, watched:
        for number, (epoch, steps) in enumerate(stretches[done:], start=done + 1):
            # An epoch that was begun in an earlier round goes on with other numbers than it began with.
            began = (epoch,) if steps.start == 0 else (epoch, steps.start)
            stepper = _stepper(
                training,
                settings,
                compute,
                stream_name=stream_name,
                began=began,
                penalty=penalty,
                choose_partners=choose_partners,
                together=shared_passes,
            )
            batches = epoch_batches(
                pack, settings, device=compute.device, stream_name=stream_name, epoch=epoch, steps=steps, own=own
            )
            with closing(batches), activation_checkpointing(recogniser, settings.training):
                for step, batch in zip(steps, batches, strict=True):
                    sums.lr_last = learning_rate(settings.training, progress(epoch, step))
                    for group in optimiser.param_groups:
                        group["lr"] = sums.lr_last * group.get("lr_factor", 1.0)
                    stepped = stepper.step(batch, where=f"epoch {epoch + 1}, step {step + 1} of {per_epoch}")
                    sums.add(stepped, len(batch.labels))
                    tick(len(batch.labels))
            sums.num_halvings += stepper.num_halvings
            if midway is not None and number < len(stretches):
                midway.after_stretch(training, number)
    if ranks is not None and shares is not None:
        ranks.add_up(shares.by_layer())
    return sums
