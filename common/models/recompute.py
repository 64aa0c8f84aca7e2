"""Activation checkpointing (arXiv:1604.06174): a block's activations are worked out again when its gradient is due.

Costs about one more forward pass; keeps only what goes into each block.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.models.recogniser import Recogniser

_NORMALISATION: Final = (nn.BatchNorm1d, nn.BatchNorm2d)


@contextmanager
def recomputing(recogniser: Recogniser) -> Iterator[None]:
    """In here training keeps the inputs of the backbone's `units` only.

    Names and values of the model's state stay as they are.
    """
    parts = recogniser.backbone.units
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
