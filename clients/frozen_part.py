"""The part of a run's model that training does not move: it comes once, and stays on this site's disk.

`training.trainable` says which part that is.  Each task names it by its SHA-256, so a model that is put together here
has the bits that it would have had, had all of it come.
"""

import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import ReplyRefused
from common.protocol.codec import Coded, decode
from common.protocol.parameters import Part, buffer_sha256
from common.protocol.wire import Task
from common.system.files import replacing

log = logging.getLogger("facefed.client")

FILE = "frozen.npy"  # in the run's folder of private state
Buffer = NDArray[np.float32]


def whole_model(
    part: Part, folder: Path | None, task: Task, moving: Buffer, frozen: Coded | None
) -> tuple[Buffer, str]:
    """The whole model of a task, [part.whole.size] float32; and what to say is kept here (see `wire.Reply.frozen`).

    moving, frozen: as they came.  folder: of the run's state here; None: nothing is kept, of a virtual client.
    Raises ReplyRefused where the parts are not those of this model, or what did not come is not here either.
    """
    if not part.frozen.entries:
        if task.frozen or frozen is not None:
            raise ReplyRefused("the server's model has a part that training does not move, and here all of it moves.")
        return moving, ""
    if len(moving) != part.part.size or (frozen is not None and frozen.size != part.frozen.size):
        raise ReplyRefused("the parts of the server's model are not of this client's sizes; use equal versions.")
    values = _read(folder) if frozen is None else decode(frozen)
    if values is None or values.shape != (part.frozen.size,) or buffer_sha256(values) != task.frozen:
        raise ReplyRefused(
            "the part of the model that training does not move is not here any more; all of it has to be sent again."
            if frozen is None
            else "the part of the model that training does not move is not the one that the task names."
        )
    if folder is None:
        return part.joined(moving, values), ""
    if frozen is not None:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / FILE, synced=False) as aside, aside.open("wb") as file:
            np.save(file, values)
    return part.joined(moving, values), task.frozen


def _read(folder: Path | None) -> Buffer | None:
    """What is kept, whatever it is; None: nothing, or it is damaged."""
    if folder is None or not (folder / FILE).exists():
        return None
    try:
        kept: Buffer = np.load(folder / FILE, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s); the part of the model in it is asked for again.", folder / FILE, error)
        return None
    return kept if kept.dtype == np.float32 else None
