"""Batches: each picture once, never one alone, augmentation within its bounds and checked against another warp."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.faces import batches
from common.faces.batches import (
    augment,
    evaluation_batches,
    num_batches,
    on_device,
    prefetched,
    random_affine,
    random_colour,
    sampling_grid,
    to_float,
    training_batches,
)
from common.settings import AugmentationSettings

OFF = AugmentationSettings(flip=0.0, crop=0.0, rotation_rad=0.0, colour=0.0)
STRONG = AugmentationSettings(flip=0.5, crop=0.5, rotation_rad=0.8, colour=1.0)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, side: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def batches_of(chosen, *, batch_size=4, augmentation=OFF, seed=0, count=40):
    """Batches of pictures whose every pixel is the picture's number, labelled with it."""
    numbers = np.arange(count)
    flat = np.broadcast_to(numbers[:, None, None, None], (count, 8, 8, 3)).astype(np.uint8)
    return list(
        training_batches(
            flat,
            numbers,
            chosen=np.asarray(chosen),
            batch_size=batch_size,
            augmentation=augmentation,
            stream=stream(seed),
            device="cpu",
        )
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 300), st.integers(2, 64))
def test_sizes_are_nearly_equal_and_none_is_one(num_pictures, batch_size):
    sizes = [len(labels) for _, labels in batches_of(range(num_pictures), batch_size=batch_size, count=num_pictures)]
    assert sum(sizes) == num_pictures
    assert len(sizes) == num_batches(num_pictures, batch_size)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 2
    assert max(sizes) <= max(batch_size, 3)
    # no more batches than that takes
    assert len(sizes) <= math.ceil(num_pictures / batch_size)


def test_each_picture_comes_once_an_epoch_with_its_label():
    chosen = [3, 5, 8, 9, 20, 21, 30, 39, 1]
    parts = batches_of(chosen)
    seen = torch.cat([labels for _, labels in parts]).tolist()
    assert sorted(seen) == sorted(chosen)
    for images, labels in parts:
        shown = ((images + 1) * 127.5).mean((1, 2, 3))
        torch.testing.assert_close(shown, labels.float(), atol=1e-2, rtol=0)


def test_order_is_the_streams():
    def order(seed):
        return [labels.tolist() for _, labels in batches_of(range(40), seed=seed)]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert all(labels == sorted(labels) for labels in order(1)), "within a batch in file order"


def test_augmented_batches_are_the_streams():
    one, same, other = (batches_of(range(12), augmentation=STRONG, seed=seed)[0][0] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_read_only_pictures_are_no_trouble():
    """A pack may be memory-mapped read-only; PyTorch would warn, and pytest makes that an error."""
    fixed, labels = pictures(8), np.arange(8)
    fixed.flags.writeable = labels.flags.writeable = False
    arguments = {"chosen": labels, "batch_size": 4, "augmentation": STRONG, "stream": stream(), "device": "cpu"}
    assert len(list(training_batches(fixed, labels, **arguments))) == 2
    assert len(list(evaluation_batches(fixed, labels, batch_size=3, device="cpu"))) == 3


def test_bytes_become_minus_one_to_one():
    image = np.zeros((1, 2, 2, 3), dtype=np.uint8)
    image[0, 0, 1] = (255, 51, 0)
    floats = to_float(torch.from_numpy(image))
    assert floats.shape == (1, 3, 2, 2)
    torch.testing.assert_close(floats[0, :, 0, 1], torch.tensor([1.0, -0.6, -1.0]))
    assert float(floats[0, :, 1].max()) == -1.0


def test_evaluation_is_plain_and_in_order():
    images = pictures(7)
    indices = np.array([6, 2, 2, 0, 5])
    parts = list(evaluation_batches(images, indices, batch_size=2, device="cpu"))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat(parts), to_float(torch.from_numpy(images[indices])))


def test_reading_ahead_changes_no_bit(monkeypatch):
    """What a CUDA device is given, with pinning and copying to it left out: there is none here."""
    plain = batches_of(range(30), augmentation=STRONG, seed=3)
    moved = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, where, **how: moved.append((where, how)) or tensor)
    parts = ((np.full(2, number), np.full(3, number)) for number in range(30))
    ahead = [int(one[0] + other[0]) for one, other in on_device(parts, "cuda:0")]
    assert ahead == [2 * number for number in range(30)]
    assert moved == [("cuda:0", {"non_blocking": True})] * 60
    monkeypatch.undo()
    real = batches.on_device
    monkeypatch.setattr(batches, "on_device", lambda parts, device: prefetched(real(parts, device), depth=3))
    for (one, labels), (other, others) in zip(plain, batches_of(range(30), augmentation=STRONG, seed=3), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(labels, others)


# ------------------------------------------------------------------------------------------------------ augmentation


@pytest.mark.parametrize("side", [7, 16])
def test_the_sampling_grid_is_affine_grids(side):
    affine = random_affine(9, STRONG, stream(5))
    expected = torch.nn.functional.affine_grid(affine, [9, 3, side, side], align_corners=False)
    torch.testing.assert_close(sampling_grid(affine, side), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", [16, 33])
def test_augmentation_off_is_the_identity(side):
    images = to_float(torch.from_numpy(pictures(6, side)))
    torch.testing.assert_close(augment(images, OFF, stream()), images, atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_strong_augmentation_stays_in_range(seed):
    images = to_float(torch.from_numpy(pictures(16, seed=seed)))
    changed = augment(images, STRONG, stream(seed))
    assert changed.shape == images.shape
    assert bool(torch.isfinite(changed).all())
    assert float(changed.abs().max()) <= 1.0 + 1e-6


def numpy_warp(image: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Bilinear warp by loops, from the definition: output pixel (i, j) shows the input at `affine` (x, y, 1).

    image: [C, S, S].  Coordinates run from -1 to 1 over the picture's edges, so pixel j's centre is at
    (2 j + 1) / S - 1; beyond the border the nearest edge pixel shows.
    """
    channels, side, _ = image.shape
    out = np.empty_like(image)
    for i in range(side):
        for j in range(side):
            x, y = (2 * j + 1) / side - 1, (2 * i + 1) / side - 1
            source_x, source_y = affine @ np.array([x, y, 1.0])
            column = min(max(((source_x + 1) * side - 1) / 2, 0.0), side - 1.0)
            row = min(max(((source_y + 1) * side - 1) / 2, 0.0), side - 1.0)
            left, top = math.floor(column), math.floor(row)
            right, bottom = min(left + 1, side - 1), min(top + 1, side - 1)
            across, down = column - left, row - top
            for c in range(channels):
                upper = image[c, top, left] * (1 - across) + image[c, top, right] * across
                lower = image[c, bottom, left] * (1 - across) + image[c, bottom, right] * across
                out[c, i, j] = upper * (1 - down) + lower * down
    return out


def test_the_warp_agrees_with_an_independent_one():
    settings_ = AugmentationSettings(flip=0.5, crop=0.3, rotation_rad=0.6, colour=0.0)
    images = to_float(torch.from_numpy(pictures(6, 12)))
    affine = random_affine(6, settings_, stream(3)).numpy().astype(np.float64)
    warped = augment(images, settings_, stream(3)).numpy()
    for number in range(6):
        np.testing.assert_allclose(
            warped[number], numpy_warp(images[number].numpy().astype(np.float64), affine[number]), atol=2e-4
        )


def test_a_flip_alone_mirrors_the_picture():
    images = to_float(torch.from_numpy(pictures(4)))
    always = AugmentationSettings(flip=1.0, crop=0.0, rotation_rad=0.0, colour=0.0)
    torch.testing.assert_close(augment(images, always, stream()), images.flip(-1), atol=1e-4, rtol=0)


def test_affine_maps_are_a_flip_a_turn_a_zoom_and_a_shift():
    """The linear part is zoom * rotation * flip: its columns are orthogonal and as long as the zoom."""
    affine = random_affine(2000, AugmentationSettings(flip=0.3, crop=0.2, rotation_rad=0.5), stream()).double()
    linear, shift = affine[:, :, :2], affine[:, :, 2]
    length = linear.norm(dim=1)
    torch.testing.assert_close(length[:, 0], length[:, 1])
    assert float((linear[:, :, 0] * linear[:, :, 1]).sum(1).abs().max()) < 1e-6
    assert 0.8 <= float(length.min()) < 0.82
    assert 1.18 < float(length.max()) <= 1.2
    assert 0.19 < float(shift.abs().max()) <= 0.2
    determinant = linear[:, 0, 0] * linear[:, 1, 1] - linear[:, 0, 1] * linear[:, 1, 0]
    # 2,000 draws of probability 0.3: the share has a deviation of 0.0102
    assert abs(float((determinant < 0).double().mean()) - 0.3) < 0.05
    angle = torch.atan2(-linear[:, 0, 1], linear[:, 1, 1]).abs()
    assert 0.49 < float(angle.max()) <= 0.5 + 1e-6


def test_colour_factors_are_brightness_saturation_contrast():
    """Against the formula in NumPy, float64, with factors drawn in the same order."""
    images = to_float(torch.from_numpy(pictures(5)))
    changed = random_colour(images, 0.3, stream(4)).numpy()
    brightness, contrast, saturation = (torch.rand(15, generator=stream(4)) * 0.6 + 0.7).double().numpy().reshape(3, 5)
    for number in range(5):
        image = (images[number].numpy().astype(np.float64) + 1) * brightness[number] - 1
        grey = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
        image = grey + (image - grey) * saturation[number]
        image = image.mean() + (image - image.mean()) * contrast[number]
        np.testing.assert_allclose(changed[number], np.clip(image, -1, 1), atol=1e-4)


def test_nothing_touches_the_global_random_state():
    before = torch.random.get_rng_state()
    augment(to_float(torch.from_numpy(pictures(4))), STRONG, stream())
    assert torch.equal(torch.random.get_rng_state(), before)
