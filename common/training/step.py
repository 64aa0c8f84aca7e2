"""One optimiser step: gradient of a batch (in parts where memory is short), clipping, the step; and what it tells."""

import logging
import math
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common.errors import TrainingFailed
from common.faces.batches import NO_TWIN, Batch
from common.models.heads import batch_hard_triplet, spreadout
from common.models.recogniser import Recogniser
from common.settings import TrainingSettings
from common.strategies import Penalty
from common.training.compute import Compute, compiled, eager, give_up, is_given_up
from common.training.gradient_shares import GradientShares
from common.training.optimiser import flat, settle
from common.training.ranks import Part, Ranks, Together, bounds_of
from common.training.sampled_head import HeadSample, only_rows

ChoosePartners = Callable[[Batch], Tensor]  # of each picture PWCA's other one, [B] int64
TRIPLET_MARGIN = 0.3  # distance of unit embeddings
FIRST_LOSS_SCALE = 4096.0  # torch's own, 65,536, overflows in the first steps of our heads, which are lost then
logger = logging.getLogger("facefed.training")
_NORMALISATION = (nn.BatchNorm1d, nn.BatchNorm2d)
THIRDS = ("early", "middle", "late")
_NUMBERED = re.compile(r"backbone\.trunk\.(encoder\.layers\.encoder_layer_|blocks\.|features\.)(\d+)\.")
_BY_PREFIX = (
    ("head.", "head"),
    ("glca_head.", "head"),
    ("backbone.glca", "glca"),  # its block and its closing
    ("backbone.trunk.class_token", "embedding"),
    ("backbone.trunk.conv_proj.", "embedding"),
    ("backbone.trunk.encoder.pos_embedding", "embedding"),
    ("backbone.trunk.encoder.ln.", "closing"),
    ("backbone.closing.", "closing"),
    ("backbone.linear.", "closing"),
    ("backbone.trunk.conv1.", "stem"),
    ("backbone.trunk.bn1.", "stem"),
    *((f"backbone.trunk.layer{stage}.", f"layer{stage}") for stage in range(1, 5)),
)
# Models that the device had no room for: from then on their batches are halved, in later rounds and epochs too.
_halved: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # backbones, for virtual clients share one


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """What one optimiser step tells."""

    losses: dict[str, float]  # mean cross-entropy by branch
    correct: int  # pictures, by self-attention
    gradient_norm: float  # before clipping; 0 where float16 overflowed and no step was taken
    gradient_norms: dict[str, float]  # by group of parameters


def loss_scaler(compute: Compute) -> torch.amp.GradScaler:
    """Of float16, whose smallest gradients would be zeros otherwise (arXiv:1710.03740); off for all others."""
    return torch.amp.GradScaler(
        compute.device_kind, init_scale=FIRST_LOSS_SCALE, enabled=compute.precision == "float16"
    )


def is_halved(recogniser: Recogniser) -> bool:
    """Whether this process halves the model's batches because the device had no room for whole ones."""
    return recogniser.backbone in _halved


def halve_from_now(recogniser: Recogniser) -> None:
    """Halve the model's batches from now on: they were, before the training was cut off."""
    _halved.add(recogniser.backbone)


def in_parts(batch: Batch, number: int, own: Callable[[int], Part] | None = None) -> list[Batch]:
    """The batch in so many parts of nearly equal size; in fewer where one would have a single picture.

    Batch normalisation cannot train on one.  A twin in another part is none.
    own: which pictures of a part of so many the batch holds, of those of all ranks; None: all.
    """
    bounds = bounds_of(len(batch.labels), number)
    if len(bounds) == 1:
        return [batch]
    parts, place = [], 0
    for start, end in bounds:
        first, last = (0, end - start) if own is None else own(end - start)
        parts.append(_part(batch, start, end, batch.pictures[place : place + last - first]))
        place += last - first
    return parts


def _part(batch: Batch, start: int, end: int, pictures: Tensor) -> Batch:
    twins = batch.twins
    if twins is not None:
        own = twins[start:end]
        twins = torch.where((own >= start) & (own < end), own - start, NO_TWIN)
    return Batch(pictures, batch.labels[start:end], twins)


def _branch_losses(
    recogniser: Recogniser, embeddings: dict[str, Tensor], labels: Tensor, training: TrainingSettings
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Of each branch the cross-entropy, and what is minimised: that and the triplet loss.

    Third how many self-attention tells right, without the margin, which would count right answers as wrong.
    """
    told, minimised, correct = {}, {}, torch.zeros(())
    for name, embedding in embeddings.items():
        head = recogniser.head_of(name)
        scores = head.scores(embedding.float())
        if name == "sa":
            correct = (scores.detach().argmax(1) == labels).sum().float()
        logits = head.with_margin(scores, labels)
        told[name] = minimised[name] = F.cross_entropy(logits, labels, label_smoothing=training.label_smoothing)
        if training.triplet > 0.0:
            triplet = batch_hard_triplet(embedding.float(), labels, TRIPLET_MARGIN)
            minimised[name] = told[name] + training.triplet * triplet
    return told, minimised, correct


@cache
def parameter_groups(names: tuple[str, ...]) -> tuple[str, ...]:
    """Which part of a recogniser each parameter belongs to; names: of all of them, since parts are counted.

    A ViT: embedding, blocks_early, blocks_middle, blocks_late, closing, and glca where it has one. A ResNet: stem,
    layer1 to layer4, closing. The others: stem, blocks_early, blocks_middle, blocks_late, closing. All: head.
    """
    numbers = [int(found[2]) for name in names if (found := _NUMBERED.match(name))]
    return tuple(_group(name, 1 + max(numbers, default=0)) for name in names)


def _group(name: str, num_blocks: int) -> str:
    found = _NUMBERED.match(name)
    if found is None:
        return next((group for prefix, group in _BY_PREFIX if name.startswith(prefix)), "other")
    number = int(found[2])
    if number == 0 and not found[1].startswith("encoder"):  # a convolutional network's first one
        return "stem"
    return f"blocks_{THIRDS[3 * number // num_blocks]}"


def clip_gradient(named: Iterable[tuple[str, nn.Parameter]], clip_norm: float) -> tuple[float, dict[str, float]]:
    """Scale the gradient down to `clip_norm` in place, as `clip_grad_norm_` does, and tell how large it was.

    named: all parameters of a network; those without a gradient do not count.  Returns the Euclidean norm of the whole
    gradient and of each group's part, whose squares add up to the square of the whole.
    """
    everything = list(named)
    groups = dict(zip((n for n, _ in everything), parameter_groups(tuple(n for n, _ in everything)), strict=True))
    names = [name for name, p in everything if p.grad is not None]
    gradients = [p.grad for _, p in everything if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))  # noqa: SLF001 - as in clip_grad_norm_: all in one go
    total = torch.linalg.vector_norm(norms)
    whole, *parts = torch.cat([total[None], norms]).tolist()  # the one wait for the device
    if not whole <= clip_norm:  # otherwise every gradient would be read and written to be multiplied by 1
        nn.utils.clip_grads_with_norm_([p for _, p in everything], clip_norm, total)
    squares: dict[str, float] = {}
    for name, part in zip(names, parts, strict=True):
        squares[groups[name]] = squares.get(groups[name], 0.0) + part * part
    return whole, {group: math.sqrt(square) for group, square in squares.items()}


class _Before:
    """What a pass changes beside gradients, to be put back when it has to be done again."""

    def __init__(self, recogniser: Recogniser, stream: torch.Generator | None, device: str) -> None:
        self._buffers, self._stream, self._device = list(recogniser.buffers()), stream, device
        self._copies = [buffer.clone() for buffer in self._buffers]
        by_dtype = [
            [number for number, buffer in enumerate(self._buffers) if buffer.dtype == dtype]
            for dtype in dict.fromkeys(buffer.dtype for buffer in self._buffers)
        ]
        self._pairs = [([self._copies[n] for n in alike], [self._buffers[n] for n in alike]) for alike in by_dtype]

    def remember(self) -> None:
        """As it is now."""
        for copies, buffers in self._pairs:
            torch._foreach_copy_(copies, buffers)
        self._random = torch.get_rng_state()
        self._random_cuda = torch.cuda.get_rng_state(self._device) if self._device.startswith("cuda") else None
        self._stream_state = None if self._stream is None else self._stream.get_state()

    @torch.no_grad()
    def put_back(self) -> None:
        """As it was when it was last remembered."""
        for buffer, copy in zip(self._buffers, self._copies, strict=True):
            buffer.copy_(copy)
        torch.set_rng_state(self._random)
        if self._random_cuda is not None:
            torch.cuda.set_rng_state(self._random_cuda, self._device)
        if self._stream is not None and self._stream_state is not None:
            self._stream.set_state(self._stream_state)


@dataclass(kw_only=True)
class Stepper:
    """The steps of one model with one optimiser, one after the other.

    choose_partners: PWCA's other pictures, where there is PWCA; draws from `stream` alone.
    together: where several processes train the model; batches hold this one's pictures then.
    """

    recogniser: Recogniser
    optimiser: torch.optim.Optimizer
    training: TrainingSettings
    compute: Compute
    penalty: Penalty | None = None
    choose_partners: ChoosePartners | None = None
    stream: torch.Generator | None = None
    scaler: torch.amp.GradScaler | None = None  # a former stepper's, to go on with; None: a new one
    num_halvings: int = 0
    sample: HeadSample | None = None  # None: a step sees all of the head's people
    shares: GradientShares | None = None  # counts whose gradients they are, and wants passes that are not compiled
    together: Together | None = None
    _scaler: torch.amp.GradScaler = field(init=False)
    _before: _Before = field(init=False)

    def __post_init__(self) -> None:
        settle(self.optimiser)
        self._scaler = self.scaler or loss_scaler(self.compute)
        self._before = _Before(self.recogniser, self.stream, self.compute.device)

    def step(self, batch: Batch, *, where: str) -> Stepped:
        """Change the model by one batch.  where: "epoch 1, step 2 of 3", for errors.

        Raises TrainingFailed if loss or gradient is not finite, or when the memory does not suffice for half a batch;
        the parameters are then as before the step.
        """
        if self.shares is not None:
            self.shares.see(batch.labels)
        if self.sample is None:
            return self._step(batch, where)
        rows = self.sample.rows(batch.labels, self.recogniser.head.identity_vectors.shape[0])
        settle(self.optimiser)
        with only_rows(self.recogniser, self.optimiser, rows):
            return self._step(Batch(batch.pictures, torch.searchsorted(rows, batch.labels), batch.twins), where)

    def _step(self, batch: Batch, where: str) -> Stepped:
        self._before.remember()
        told = self._gradient(batch, where)
        self._scaler.unscale_(self.optimiser)
        if self.penalty is not None:
            self.penalty()
        norm, norms = clip_gradient(self.recogniser.network_parameters(), self.training.clip_norm)
        *losses, correct = told.tolist()  # after the norm, which has waited for the device
        values = dict(zip(self.recogniser.branches, losses, strict=False))
        overflowed = self._scaler.is_enabled() and self._scaler.get_scale() > 1.0 and not math.isfinite(norm)
        if not all(map(math.isfinite, losses)) or not (math.isfinite(norm) or overflowed):
            raise TrainingFailed(
                f"the loss is {values['sa']} and the gradient norm {norm} at {where}; lower training.lr"
                f" (now {self.training.lr})."
            )
        try:
            with flat(self.optimiser):
                self._scaler.step(self.optimiser)
        except torch.OutOfMemoryError:
            raise self._too_large(where) from None
        self._scaler.update()
        if overflowed:
            norm, norms = 0.0, {}
        return Stepped(losses=values, correct=int(correct), gradient_norm=norm, gradient_norms=norms)

    def _gradient(self, batch: Batch, where: str) -> Tensor:
        """Into the parameters' .grad; tells what `_passes` does.  Tries again in parts, or without a compiler."""
        while True:
            is_compiled, is_full = self.compute.compiled and self.shares is None and not is_given_up(), False
            try:
                return self._passes(batch, is_compiled=is_compiled)
            except torch.OutOfMemoryError:
                is_full = True
            except Exception as error:
                if not is_compiled:
                    raise
                give_up(error)
            # Out here nothing holds the failed pass any more, so its memory is free.
            self.recogniser.zero_grad(set_to_none=True)
            self._before.put_back()
            if is_full:
                self._halve(batch, where)

    def _halve(self, batch: Batch, where: str) -> None:
        # Other ranks have found room, and would wait for this one's old part of the batch.
        if self.together or is_halved(self.recogniser) or len(batch.labels) < 4 * self._num_parts():
            raise self._too_large(where)
        _halved.add(self.recogniser.backbone)
        self.num_halvings += 1
        if self.compute.device_kind == "cuda":
            torch.cuda.empty_cache()
        logger.warning(
            "out of memory on %s at %s: each batch is now computed in %d parts", self.compute.device, where,
            self._num_parts(),
        )  # fmt: skip

    def _too_large(self, where: str) -> TrainingFailed:
        return TrainingFailed(
            f"{self.compute.device} is out of memory at {where}, with each batch in {self._num_parts()} parts; lower"
            f" training.batch_size (now {self.training.batch_size}) or data.image_size, raise training.accumulate (now"
            f" {self.training.accumulate}), or set training.activation_checkpointing = true."
        )

    def _num_parts(self) -> int:
        return self.training.accumulate * (2 if is_halved(self.recogniser) else 1)

    def _passes(self, batch: Batch, *, is_compiled: bool) -> Tensor:
        """Forward and backward of all parts.

        Returns [branches + 1] float32 on the device: the mean cross-entropy of each branch, and how many of the batch
        self-attention tells right, before the step and without the margin, which would count right answers as wrong.
        """
        # Also of what this optimiser does not hold, or it would count in the norm.
        self.recogniser.zero_grad(set_to_none=True)
        ranks = self.together.ranks if self.together else None
        parts = in_parts(batch, self._num_parts(), ranks.own if ranks else None)
        figures, start = [], 0
        for part in parts:
            count = len(part.labels)
            if self.shares is not None:
                first, last = ranks.own(count) if ranks else (0, count)
                self.shares.begin_part(start + first, last - first)
                start += count
            with self.together.passes(is_last=part is parts[-1]) if self.together else nullcontext():
                figures.append(self._pass(part, count / len(batch.labels), is_compiled=is_compiled))
        return torch.stack(figures).sum(0)

    def _pass(self, part: Batch, share: float, *, is_compiled: bool) -> Tensor:
        """Forward and backward of one part, which is that share of its batch; tells its share of `_passes`'s answer."""
        embeddings = self._embeddings(part, is_compiled=is_compiled)
        told, minimised, correct = _branch_losses(self.recogniser, embeddings, part.labels, self.training)
        objective = self.recogniser.combined(minimised)
        if self.training.spreadout > 0.0:
            apart = spreadout(self.recogniser.head.identity_vectors, self.training.spreadout_margin)
            objective = objective + self.training.spreadout * apart
        self._scaler.scale(objective * share).backward()  # type: ignore[no-untyped-call]
        return torch.stack([*(loss.detach() * share for loss in told.values()), correct])

    def _embeddings(self, part: Batch, *, is_compiled: bool) -> dict[str, Tensor]:
        """Of the whole part, by branch; where there are several processes, with the gradient of this one's pictures."""
        if self.together is not None:
            partners = self._own_partners(part, self.together.ranks)
            return self.together.embeddings(part.pictures, partners, count=len(part.labels))
        partners = None if self.choose_partners is None else self.choose_partners(part)
        network = compiled() if is_compiled else eager
        with self.compute.autocast():
            return network(self.recogniser, self.compute.laid_out(part.pictures), partners)

    def _own_partners(self, part: Batch, ranks: Ranks) -> Tensor | None:
        """Among this rank's pictures; those of the others are drawn too, so that the streams stay alike."""
        if self.choose_partners is None:
            return None
        own = ranks.own(len(part.labels))
        chosen = {
            bounds: self.choose_partners(_part(part, *bounds, part.pictures)) for bounds in ranks.all(len(part.labels))
        }
        return chosen[own]


@contextmanager
def activation_checkpointing(recogniser: Recogniser, training: TrainingSettings) -> Iterator[None]:
    """In here the model's passes keep as few activations as the settings ask for.

    Activation checkpointing (arXiv:1604.06174) keeps only what goes into each of the backbone's `units` and works the
    rest out again when a gradient is due, for about one more forward pass. Names and values of the model's state stay
    as they are.
    """
    parts = recogniser.backbone.units if training.activation_checkpointing else []
    for part in parts:
        vars(part)["forward"] = partial(_forward, part)  # stands before the class's own
    try:
        yield
    finally:
        for part in parts:
            del vars(part)["forward"]


def _forward(part: nn.Module, *inputs: Tensor) -> Tensor:
    own = partial(type(part).forward, part)
    if not (torch.is_grad_enabled() and part.training):
        plain: Tensor = own(*inputs)
        return plain

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(part)

    output: Tensor = checkpoint(own, *inputs, use_reentrant=False, context_fn=contexts)
    return output


@contextmanager
def _statistics_kept(part: nn.Module) -> Iterator[None]:
    """In here batch normalisation writes into copies of its statistics: it has already seen this batch."""
    kept = [(module, dict(module.named_buffers())) for module in part.modules() if isinstance(module, _NORMALISATION)]
    for module, buffers in kept:
        _set_buffers(module, {name: buffer.clone() for name, buffer in buffers.items()})
    try:
        yield
    finally:
        for module, buffers in kept:
            _set_buffers(module, buffers)


def _set_buffers(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        setattr(module, name, buffer)
