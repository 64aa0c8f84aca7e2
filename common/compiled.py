"""torch.compile of a network's passes, and eager again where the machine cannot.

The network itself is not wrapped: its names, copies and exports are those of one that was never compiled.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from common.models.recogniser import Recogniser

logger = logging.getLogger("facefed.training")
BranchEmbeddings = Callable[[Recogniser, Tensor, Tensor | None], dict[str, Tensor]]
_gave_up = False  # in this process, for good: what failed once takes as long to fail again


def eager(recogniser: Recogniser, pictures: Tensor, partners: Tensor | None) -> dict[str, Tensor]:
    """`Recogniser.branch_embeddings` as it is."""
    return recogniser.branch_embeddings(pictures, partners)


@functools.cache
def compiled() -> BranchEmbeddings:
    """The same compiled; the first pictures of a size wait for the compiler."""
    return torch.compile(eager)


def is_given_up() -> bool:
    """Whether compiling has failed in this process."""
    return _gave_up


def give_up(error: BaseException) -> None:
    """Compute eagerly from here on, and say so once."""
    global _gave_up
    if not _gave_up:
        line = str(error).strip().splitlines() or [type(error).__name__]
        logger.warning("torch.compile failed, so this process computes without it: %s", line[0][:300])
    _gave_up = True
