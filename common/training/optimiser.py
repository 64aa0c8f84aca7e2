"""The optimisers of training, with one fused pass over each parameter where torch has one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from common.models.recogniser import Recogniser, freeze
from common.settings import TrainingSettings

INPUT_VECTORS = ("class_token", "pos_embedding")
# Adam moves a number by about the rate in a step, whatever its gradient: weights of losses have to get from 0 to the
# logarithm of their loss, a few units, and at the network's rate would not within a run.
LOSS_WEIGHTS_ADAM = 20.0


def make_optimiser(module: nn.Module, training: TrainingSettings) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum or AdamW over the parameters of a recogniser, or of its head alone.

    What `training.trainable` leaves out is frozen from here on.

    Weight decay spares vectors and scalars (biases, normalisation), as is usual (arXiv:1812.01187, section 3.1), and a
    ViT's class token and positions, which are vectors of the input. Learned loss weights are a group of their own, the
    last; "lr_factor" of a group multiplies the schedule's rate.
    """
    if isinstance(module, Recogniser):
        freeze(module, training.trainable)
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
        return torch.optim.AdamW(groups, lr=training.lr, fused=True)
    return torch.optim.SGD(
        groups, lr=training.lr, momentum=training.momentum, nesterov=training.momentum > 0, fused=True
    )


def settle(optimiser: torch.optim.Optimizer) -> None:
    """Make the state fit the parameters as they lie, before the first step and after a restore.

    A private parameter comes with its momentum and a shared one without, and the fused SGD takes all or none: the
    missing ones become zeros, from which the first step gives the same bits as from none.
    """
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            state = optimiser.state[parameter]
            if group.get("momentum", 0.0) > 0.0 and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            for name, value in state.items():
                if isinstance(value, Tensor) and not _lies_like(value, parameter):
                    state[name] = _moved(value, parameter)


def _lies_like(value: Tensor, parameter: Tensor) -> bool:
    if value.shape != parameter.shape:  # AdamW's counter of steps
        return value.device == parameter.device
    return value.device == parameter.device and value.stride() == parameter.stride()


def _moved(value: Tensor, parameter: Tensor) -> Tensor:
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


@contextmanager
def flat(optimiser: torch.optim.Optimizer) -> Iterator[None]:
    """In here 4-dimensional parameters in channels-last, their gradients and state are seen as they lie in memory.

    On the CPU the fused kernels take 4 ms for the 11 million parameters of a ResNet-18 that lie in the order of their
    dimensions, and 12 ms for channels-last; a step is element by element, so any order gives the same.
    """
    turned = [
        parameter
        for group in optimiser.param_groups
        for parameter in group["params"]
        if parameter.ndim == 4 and parameter.device.type == "cpu" and not parameter.is_contiguous()
    ]
    _turn(optimiser, turned, (0, 2, 3, 1))
    try:
        yield
    finally:
        _turn(optimiser, turned, (0, 3, 1, 2))


def _turn(optimiser: torch.optim.Optimizer, parameters: list[nn.Parameter], order: tuple[int, ...]) -> None:
    for parameter in parameters:
        gradient, parameter.grad = parameter.grad, None
        parameter.data = parameter.data.permute(order)
        parameter.grad = None if gradient is None else gradient.permute(order)
        state = optimiser.state.get(parameter, {})
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim == 4:
                state[name] = value.permute(order)
