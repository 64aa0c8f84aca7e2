"""One model trained by several processes (ranks), each with a device of its own and its part of every batch.

torch's DistributedDataParallel adds up the backbone's gradients. Heads are not divided: the embeddings of the whole
batch go to every rank, which works out the same losses and the same step of the heads. So the traffic of a step does
not grow with the number of people, and what looks at the whole batch (batch-hard triplets, a sample of the head, a
mean over the batch) is what one process sees. Batch normalisation takes the statistics of the whole batch, and dropout
one mask of it: N ranks compute what one process computes with the same batch, but for the rounding of sums.

PWCA is the exception: a picture's partner and PWCA's batch statistics are those of the rank's own part.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.futures import Future
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError
from common.models.recogniser import Recogniser
from common.training.compute import Compute

_BATCH_NORMALISATION = (nn.BatchNorm1d, nn.BatchNorm2d)
Part = tuple[int, int]  # of a batch: from, to


def bounds_of(num_pictures: int, number: int) -> list[Part]:
    """A batch in so many parts of nearly equal size; in fewer where one would have a single picture."""
    number = max(1, min(number, num_pictures // 2))
    return _split(num_pictures, number)


def _split(num_pictures: int, number: int) -> list[Part]:
    """In so many parts of nearly equal size, the larger ones first."""
    ends = [0, *itertools.accumulate(len(part) for part in np.array_split(np.arange(num_pictures), number))]
    return list(itertools.pairwise(ends))


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Which of how many processes this one is.  rank: in [0, size); 0 is the one that started the others."""

    rank: int
    size: int

    def own(self, num_pictures: int) -> Part:
        """The rank's part of a batch, or of a part of it."""
        return self.all(num_pictures)[self.rank]

    def all(self, num_pictures: int) -> list[Part]:
        """Every rank's part."""
        return _split(num_pictures, self.size)

    def rows(self, num_pictures: int, *, accumulate: int) -> NDArray[np.int64]:
        """The places in a batch of the pictures that this rank computes on, ascending.  [b] int64.

        accumulate: in how many parts the batch is worked out, each of which is divided among the ranks.
        """
        parts = bounds_of(num_pictures, accumulate)
        return np.concatenate([np.arange(*self.own(end - start)) + start for start, end in parts])

    def require_pictures(self, num_pictures: int, *, per_epoch: int, accumulate: int, each: int) -> None:
        """Raises UserError where a rank would have fewer than `each` pictures of some part of some batch.

        num_pictures: of an epoch, in `per_epoch` batches.
        """
        if self.size == 1:
            return
        smallest = num_pictures // per_epoch
        part = min(end - start for start, end in bounds_of(smallest, accumulate))
        if part // self.size < each:
            raise UserError(
                f"--device names {self.size} devices, and the smallest batch has {smallest} pictures"
                f" (training.accumulate = {accumulate}), fewer than {each} for each; name fewer devices, or raise"
                " training.batch_size."
            )

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Make each the sum of all ranks'; all have the same ones in the same order."""
        for tensor in tensors:
            dist.all_reduce(tensor)

    def whole(self, own: Tensor, num_pictures: int) -> Tensor:
        """The rows of all ranks, in the order of the batch; those of this one carry its gradient, the others none.

        own: [b, D] float32 of this rank's part.  Returns [num_pictures, D] float32, the same numbers on each rank.
        """
        start, end = self.own(num_pictures)
        everything = own.new_zeros((num_pictures, *own.shape[1:]))
        everything[start:end] = own.detach()
        dist.all_reduce(everything)  # a sum with zeros: every number arrives as it was
        return torch.cat([everything[:start], own, everything[end:]])


class _Branches(nn.Module):
    """What DistributedDataParallel wraps: the backbone, asked for the embeddings of all branches."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pictures: Tensor, partners: Tensor | None) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.backbone.embeddings(pictures, partners=partners)  # type: ignore[operator]
        return found


def _summed(_: object, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
    """The sum of the ranks' gradients: each has that of the whole batch's loss by its own pictures."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


class Together:
    """One rank's forward and backward passes in step with the others'; made by `together`."""

    def __init__(self, recogniser: Recogniser, ranks: Ranks, compute: Compute) -> None:
        self.ranks, self._compute = ranks, compute
        self._plain = _Branches(recogniser.backbone)
        self._count = 0  # pictures of the part that is computed on
        self._network: DistributedDataParallel | None = None
        if any(parameter.requires_grad for parameter in recogniser.backbone.parameters()):
            self._network = DistributedDataParallel(self._plain, forward_sync_buffers=False)
            self._network.register_comm_hook(None, _summed)

    def close(self) -> None:
        """Let the parameters go: the next one has hooks of its own on them."""
        if self._network is not None:
            self._network._remove_autograd_hooks()  # type: ignore[no-untyped-call]  # noqa: SLF001 - the one way to leave it
            self._network = None

    @contextmanager
    def passes(self, *, is_last: bool) -> Iterator[None]:
        """Around the passes of one part of a batch.  is_last: then the gradients of all its parts are added up."""
        network = self._network
        with nullcontext() if is_last or network is None else network.no_sync():
            yield

    def embeddings(self, pictures: Tensor, partners: Tensor | None, *, count: int) -> dict[str, Tensor]:
        """Of a whole part of `count` pictures, by branch: [count, D] float32, this rank's rows with their gradient.

        pictures: [b, 3, H, W], this rank's.  partners: [b] int64 in [0, b), PWCA's; None: no PWCA.
        """
        self._count = count
        with self._compute.autocast():
            found = (self._network or self._plain)(self._compute.laid_out(pictures), partners)
        return {name: self.ranks.whole(own.float(), count) for name, own in found.items()}

    def dropped(self, module: nn.Dropout, inputs: Tensor) -> Tensor:
        """Dropout with this rank's rows of the mask that one process would draw for the whole part."""
        if not module.training or module.p == 0.0:
            return F.dropout(inputs, module.p, module.training)
        mask = F.dropout(inputs.new_ones((self._count, *inputs.shape[1:])), module.p, training=True)
        start, end = self.ranks.own(self._count)
        return inputs * mask[start:end]


@contextmanager
def together(recogniser: Recogniser, ranks: Ranks, compute: Compute) -> Iterator[Together]:
    """In here the recogniser's layers that look at a batch look at that of all ranks; nothing of it is renamed."""
    shared = Together(recogniser, ranks, compute)
    replaced: list[nn.Module] = []
    for module in recogniser.backbone.modules():
        forward: Callable[[Tensor], Tensor]
        if isinstance(module, _BATCH_NORMALISATION):
            forward = partial(_normalised, module, _on_gpu(module), ranks)
        elif isinstance(module, nn.Dropout):
            forward = partial(shared.dropped, module)
        else:
            continue
        vars(module)["forward"] = forward  # stands before the class's own
        replaced.append(module)
    try:
        yield shared
    finally:
        for module in replaced:
            del vars(module)["forward"]
        shared.close()


def _on_gpu(module: nn.Module) -> nn.Module:
    """The normalisation over ranks that torch has, for GPUs only, with this one's parameters."""
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    return converted


def _normalised(module: nn.BatchNorm1d | nn.BatchNorm2d, on_gpu: nn.Module, ranks: Ranks, inputs: Tensor) -> Tensor:
    """Batch normalisation by the statistics of all ranks' pictures; running statistics follow on each rank alike."""
    if not module.training:
        return type(module).forward(module, inputs)
    if inputs.device.type == "cuda":
        for name, buffer in module.named_buffers(recurse=False):  # those of now: checkpointing exchanges them
            setattr(on_gpu, name, buffer)
        on_gpu.train()
        normalised: Tensor = on_gpu(inputs)
        return normalised
    if module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
    mean, variance = module.running_mean, module.running_var
    normalised = _OverRanks.apply(
        inputs, module.weight, module.bias, mean, variance, module.eps, module.momentum, ranks
    )
    return normalised  # noqa: RET504 - torch does not say what it is


class _OverRanks(torch.autograd.Function):
    """Batch normalisation (arXiv:1502.03167) over the pictures of all ranks, as nn.SyncBatchNorm has it for GPUs."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch names no type
        inputs: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        momentum: float,
        ranks: Ranks,
    ) -> Tensor:
        """inputs: [b, C, ...] of this rank.  running_mean, running_var: [C], changed in place.  Returns inputs' like.

        Means and sums of squared deviations of the ranks become those of all (Chan, Golub and LeVeque 1983, eq. 2.1).
        """
        values, over = inputs.float(), [0, *range(2, inputs.ndim)]
        variance, mean = torch.var_mean(values, over, correction=0)
        parts = mean.new_zeros((ranks.size, 2 * len(mean) + 1))
        number = values.numel() // len(mean)
        parts[ranks.rank] = torch.cat([mean, variance * number, mean.new_tensor([number])])
        dist.all_reduce(parts)
        numbers, means, deviations = parts[:, -1:], parts[:, : len(mean)], parts[:, len(mean) : -1]
        total = float(numbers.sum())
        mean = (numbers * means).sum(0) / total
        squares = (deviations + numbers * (means - mean).square()).sum(0)
        scale = (squares / total + eps).rsqrt()
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(squares / max(total - 1.0, 1.0), momentum)
        ctx.save_for_backward(inputs, weight, mean, scale)
        ctx.total = total
        normalised = (values - _along(mean, inputs)) * _along(scale, inputs)
        if weight is not None and bias is not None:
            normalised = normalised * _along(weight, inputs) + _along(bias, inputs)
        return normalised.to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """gradient: [b, C, ...].  Weight and bias get this rank's part, which is added up with all others'."""
        inputs, weight, mean, scale = ctx.saved_tensors
        over = [0, *range(2, inputs.ndim)]
        of_output = gradient.float()
        unit = (inputs.float() - _along(mean, inputs)) * _along(scale, inputs)
        own = torch.stack([of_output.sum(over), (of_output * unit).sum(over)])
        sums = own.clone()
        dist.all_reduce(sums)
        sums /= ctx.total
        centred = of_output - _along(sums[0], inputs) - unit * _along(sums[1], inputs)
        factor = scale if weight is None else scale * weight
        of_inputs = (centred * _along(factor, inputs)).to(inputs.dtype)
        none = (None,) * 5
        return of_inputs, None if weight is None else own[1], None if weight is None else own[0], *none


def _along(values: Tensor, like: Tensor) -> Tensor:
    """[C] -> [1, C, 1, ...] of as many dimensions as `like`."""
    return values.view(1, -1, *[1] * (like.ndim - 2))


# ---- what rank 0 hands the others before they begin


Slots = list[tuple[int, str, float | None]]  # (number of the parameter, name, its value or None: a tensor like it)


def slots_of(optimiser: torch.optim.Optimizer) -> Slots:
    """What an optimiser holds, without its tensors, which `take_state` sends."""
    found: Slots = []
    for number, parameter in enumerate(_parameters(optimiser)):
        for name, value in optimiser.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found.append((number, name, float(value) if value.shape != parameter.shape else None))
    return found


def take_state(recogniser: Recogniser, optimiser: torch.optim.Optimizer | None, slots: Slots) -> None:
    """Give every rank the model and the optimiser's state of rank 0; each calls it.

    slots: `slots_of` rank 0's optimiser.  Every tensor has its place and shape already, but for the optimiser's.
    """
    with torch.no_grad():
        for tensor in recogniser.state_dict().values():
            _from_first(tensor)
        if optimiser is None:
            return
        parameters = _parameters(optimiser)
        for number, name, value in slots:
            state = optimiser.state[parameters[number]]
            if value is not None:
                state.setdefault(name, torch.tensor(value))
                continue
            state.setdefault(name, torch.zeros_like(parameters[number]))
            _from_first(state[name])


def _parameters(optimiser: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


def _from_first(tensor: Tensor) -> None:
    sent = tensor.detach().contiguous()
    dist.broadcast(sent, 0)
    if sent.data_ptr() != tensor.data_ptr():
        tensor.copy_(sent)
