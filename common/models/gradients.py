"""How large the gradient is, as a whole and in each part of a network, and its clipping."""

import math
import re
from collections.abc import Iterable
from functools import cache

import torch
from torch import nn

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
