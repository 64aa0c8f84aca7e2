"""One epoch's training batches of a pack: of single pictures, or of pairs where the data set knows families."""

from collections.abc import Generator
from typing import NamedTuple

from torch import Tensor

from common.faces.batches import training_batches
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.faces.twin_batches import twin_batches
from common.runtime import random_stream
from common.settings import Settings


class Batch(NamedTuple):
    """One optimiser step's pictures."""

    pictures: Tensor  # [B, 3, S, S] float32 in [-1, 1]
    labels: Tensor  # [B] int64
    twins: Tensor | None  # [B] int64, the place in the batch of a picture of each one's twin, or NO_TWIN


def epoch_batches(pack: FacePack, settings: Settings, *, device: str, stream_name: str, epoch: int) -> Generator[Batch]:
    """The training batches of one epoch; the same (seed, stream_name, epoch) gives the same batches anywhere.

    Each training picture is used once, whichever kind of batches it is: see `training_batches` and `twin_batches`.
    """
    chosen, stream = pack.indices(Split.TRAIN), random_stream(settings.run.seed, stream_name, "epoch", epoch)
    if pack.family is None:
        for pictures, labels in training_batches(
            pack.pictures,
            pack.training_labels,
            chosen=chosen,
            batch_size=settings.training.batch_size,
            augmentation=settings.augmentation,
            stream=stream,
            device=device,
        ):
            yield Batch(pictures, labels, None)
        return
    for pictures, labels, twins in twin_batches(
        pack.pictures,
        pack.training_labels,
        person=pack.person,
        family=pack.family[pack.person],
        chosen=chosen,
        batch_size=settings.training.batch_size,
        augmentation=settings.augmentation,
        twins=settings.twins,
        stream=stream,
        device=device,
    ):
        yield Batch(pictures, labels, twins)
