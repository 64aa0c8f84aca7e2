"""The global model in its two shapes: exact, as the server adds to it, and as the clients receive it.

With a lossy `federation.download_codec` they differ.  What coding lost stays in the exact one and is in the next
download (error feedback), so the losses do not add up.  The model of a round is the received one: it is what the
clients' scores are of, what is checkpointed and what is registered.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from common.codec import Coded, decode, encode, is_lossy
from common.errors import CheckpointError
from server.optimiser import ServerOptimiser

Buffer = NDArray[np.float32]
EXACT = "exact-model"


class GlobalModel:
    """One flat model, changed in place."""

    def __init__(self, exact: Buffer, codec: str) -> None:
        """exact: [size] float32, kept and changed.  codec: of the download, one of `common.settings.CODECS`."""
        self._exact, self._codec = exact, codec
        self._coded = self._encode()

    def _encode(self) -> Coded | None:
        return encode(self._exact, self._codec) if is_lossy(self._codec) else None

    @property
    def received(self) -> Buffer:
        """The model as clients get it, [size] float32; not to be changed."""
        return self._exact if self._coded is None else decode(self._coded)

    def coded(self) -> Coded:
        """What is sent."""
        return encode(self._exact, self._codec) if self._coded is None else self._coded

    def step(self, optimiser: ServerOptimiser, mean_change: Buffer) -> None:
        """Become the next round's model: the strategy's step with the clients' mean change."""
        optimiser.apply(self._exact, mean_change)
        self._coded = self._encode()

    def remembered(self) -> Mapping[str, Buffer]:
        """What a checkpoint needs beside the received model: nothing, or the exact one."""
        return {} if self._coded is None else {EXACT: self._exact}

    @classmethod
    def restored(cls, received: Buffer, moments: dict[str, Buffer], codec: str) -> "GlobalModel":
        """The model of a checkpoint.  moments: as kept; what is the model's own is taken out.

        Raises CheckpointError when the run was begun with another codec.
        """
        exact = moments.pop(EXACT, None)
        if (exact is not None) != is_lossy(codec):
            raise CheckpointError(
                f"the checkpoint holds {'no ' if exact is None else 'an '}exact model beside the received one, which"
                f" does not go with federation.download_codec {codec!r}; resume with the settings the run began with."
            )
        return cls(received if exact is None else exact, codec)
