"""Augmented training batches and plain evaluation batches from a pack, made on the training device."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from common.faces.pack import Pictures
from common.faces.prefetch import prefetched
from common.settings import AugmentationSettings

READ_AHEAD = 3  # batches
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601 weights of R, G, B


def to_float(pictures: Tensor) -> Tensor:
    """[B, S, S, 3] uint8 -> [B, 3, S, S] float32 in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def _uniform(count: int, low: float, high: float, stream: torch.Generator) -> Tensor:
    return torch.rand(count, generator=stream) * (high - low) + low


def random_affine(count: int, augmentation: AugmentationSettings, stream: torch.Generator) -> Tensor:
    """Random flips, turns, zooms and shifts.

    Returns [count, 2, 3] float32, the map from output to input coordinates that `affine_grid` takes.
    """
    flip = torch.where(torch.rand(count, generator=stream) < augmentation.flip, -1.0, 1.0)
    angle = _uniform(count, -augmentation.rotation_rad, augmentation.rotation_rad, stream)
    zoom = 1.0 + _uniform(count, -augmentation.crop, augmentation.crop, stream)
    shift = _uniform(2 * count, -augmentation.crop, augmentation.crop, stream).view(count, 2, 1)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    turn = torch.stack([torch.stack([cos * flip, -sin], 1), torch.stack([sin * flip, cos], 1)], 1)
    return torch.cat([turn, shift], 2)


def sampling_grid(affine: Tensor, side: int) -> Tensor:
    """Where each pixel's centre comes from, as `affine_grid` says it, an eighth of its time: without a product.

    affine: [B, 2, 3] float32.  Returns [B, side, side, 2] float32, the coordinates in planes of their own, which
    `grid_sample` reads fastest.
    """
    centres = (torch.arange(side, device=affine.device) * 2 + 1) / side - 1.0
    across = affine[:, :, 0, None] * centres
    down = affine[:, :, 1, None] * centres + affine[:, :, 2, None]
    return (down[:, :, :, None] + across[:, :, None, :]).permute(0, 2, 3, 1)


def random_colour(pictures: Tensor, strength: float, stream: torch.Generator) -> Tensor:
    """Random brightness, contrast and saturation, each by a factor in [1 - strength, 1 + strength] per picture.

    With black at 0: x b, then grey + (x - grey) s, then mean + (x - mean) c. All three are linear, so a picture's
    channels go through one 3 x 3 matrix.

    pictures: [B, 3, S, S] float32 in [-1, 1].  Returns the same shape and range.
    """
    count, device = len(pictures), pictures.device
    factors = _uniform(3 * count, 1.0 - strength, 1.0 + strength, stream).view(3, count, 1, 1).to(device)
    brightness, contrast, saturation = factors[0], factors[1], factors[2]
    greys = torch.tensor(LUMA, device=device).expand(3, 3)
    matrix = brightness * (saturation * torch.eye(3, device=device) + (1.0 - saturation) * greys)
    flat = pictures.reshape(count, 3, -1)
    mean = (matrix @ flat.mean(2, keepdim=True)).mean(1, keepdim=True) + brightness - 1.0  # after the first two
    offset = (contrast * (brightness - 1.0) + (1.0 - contrast) * mean).expand(count, 3, 1)
    return torch.baddbmm(offset, contrast * matrix, flat).clamp_(-1.0, 1.0).view_as(pictures)


def random_erase(pictures: Tensor, probability: float, stream: torch.Generator) -> Tensor:
    """Blank one random rectangle (a fifth to a half of the side) with that probability per picture.

    pictures: [B, 3, S, S] in [-1, 1].  Returns the same shape; blank is 0, the middle grey.
    """
    count, side = len(pictures), pictures.shape[-1]
    chosen = torch.rand(count, generator=stream) < probability
    extent = _uniform(2 * count, 0.2, 0.5, stream).view(count, 2)
    start = torch.rand(count, 2, generator=stream) * (1.0 - extent)
    position = (torch.arange(side) + 0.5) / side
    inside = (position >= start[..., None]) & (position < (start + extent)[..., None])
    mask = inside[:, 0, :, None] & inside[:, 1, None, :] & chosen[:, None, None]
    return pictures.masked_fill(mask[:, None].to(pictures.device), 0.0)


def augment(pictures: Tensor, augmentation: AugmentationSettings, stream: torch.Generator) -> Tensor:
    """All random changes of a training batch.

    pictures: [B, 3, S, S] float32 in [-1, 1].  Returns the same shape and range, on the same device.
    """
    affine = random_affine(len(pictures), augmentation, stream).to(pictures.device)
    grid = sampling_grid(affine, pictures.shape[-1])
    pictures = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    if augmentation.colour > 0.0:
        pictures = random_colour(pictures, augmentation.colour, stream)
    if augmentation.erase > 0.0:
        pictures = random_erase(pictures, augmentation.erase, stream)
    return pictures


def num_batches(num_pictures: int, batch_size: int) -> int:
    """How many batches one epoch has; no batch is larger than `batch_size`, but for one of three where that is two.

    (In batches of two an odd picture would be left alone, and batch normalisation cannot train on one.)
    """
    return max(1, min(-(-num_pictures // batch_size), num_pictures // 2))


def on_device(parts: Iterable[tuple[NDArray[Any], ...]], device: str) -> Iterator[tuple[Tensor, ...]]:
    """Arrays as tensors on the device, in their order.

    For CUDA a thread reads ahead into pinned memory, from which copies do not hold up this one; `parts` is then
    iterated there, so what it draws from must be its own.
    """
    tensors = (tuple(map(torch.from_numpy, part)) for part in parts)
    if not device.startswith("cuda"):
        for part in tensors:
            yield tuple(tensor.to(device) for tensor in part)
        return
    pinned = (tuple(tensor.pin_memory() for tensor in part) for part in tensors)
    for part in prefetched(pinned, depth=READ_AHEAD):
        yield tuple(tensor.to(device, non_blocking=True) for tensor in part)


def training_batches(
    pictures: Pictures,
    labels: NDArray[np.int64],
    *,
    chosen: NDArray[np.int64],
    batch_size: int,
    augmentation: AugmentationSettings,
    stream: torch.Generator,
    device: str,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch: each chosen picture once, in random order, in batches of nearly equal size.

    Equal sizes instead of a small last batch keep batch normalisation away from batches of one.
    pictures: [N, S, S, 3] uint8.  labels: [N] int64.  chosen: [M] int64 in [0, N).
    Yields ([B, 3, S, S] float32 in [-1, 1], [B] int64) on `device`.
    """
    order = chosen[torch.randperm(len(chosen), generator=stream).numpy()]
    parts = np.array_split(order, num_batches(len(chosen), batch_size))
    # in file order, so that reading the memory map moves forward
    read = ((pictures[rows], labels[rows]) for rows in map(np.sort, parts))
    for batch, targets in on_device(read, device):
        yield augment(to_float(batch), augmentation, stream), targets


def evaluation_batches(pictures: Pictures, indices: NDArray[Any], *, batch_size: int, device: str) -> Iterator[Tensor]:
    """The chosen pictures in order, unchanged: [B, 3, S, S] float32 in [-1, 1] on `device`."""
    read = ((pictures[indices[start : start + batch_size]],) for start in range(0, len(indices), batch_size))
    for (batch,) in on_device(read, device):
        yield to_float(batch)
