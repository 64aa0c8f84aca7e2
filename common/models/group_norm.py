"""Group normalisation in the place of batch normalisation (`model.norm = "group"`).

It looks at one picture alone, so nothing of a batch travels or has to be kept from it, small batches are no worse, and
evaluation computes what training does.  arXiv:1803.08494.
"""

from typing import Final

from torch import nn

CHANNELS: Final = 16  # of a group, as in the paper's table 3, or the largest smaller number that divides a layer's


def num_groups(channels: int) -> int:
    """In how many groups of equal size a layer's channels are normalised."""
    size = next(size for size in range(min(CHANNELS, channels), 0, -1) if channels % size == 0)
    return channels // size


def use_groups(module: nn.Module) -> None:
    """Put group normalisation, freshly initialised, where the module has batch normalisation, in place.

    Of an embedding, which has no places in a picture, all numbers are one group.  Its scale and shift are learned, for
    without statistics of a batch nothing else would centre embeddings.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(num_groups(child.num_features), child.num_features, eps=child.eps))
        elif isinstance(child, nn.BatchNorm1d):
            setattr(module, name, nn.GroupNorm(1, child.num_features, eps=child.eps))
        else:
            use_groups(child)
