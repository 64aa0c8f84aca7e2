"""The global model in its two shapes: exact, as the server adds to it, and as the clients receive it.

With a lossy `federation.download_codec` they differ.  What coding lost stays in the exact one and is in the next
download (error feedback), so the losses do not add up.  The model of a round is the received one: it is what the
clients' scores are of, what is checkpointed and what is registered.

The server's step leads from one to the next: the strategy's rule, and what it remembers between rounds.  The rule
applies to trainable parameters only.  What else is shared (the running mean and variance of normalisation layers) is
averaged plainly: a step with momentum or an adaptive rate could make a variance negative.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import CheckpointError
from common.protocol.codec import Coded, decode, encode, is_lossy
from common.protocol.parameters import Manifest, Part, Span, buffer_sha256, trainable_spans
from common.settings import FederationSettings
from common.strategies import STRATEGIES, Rates, Strategy

Buffer = NDArray[np.float32]


class ServerOptimiser:
    """Applies a strategy's step and keeps its moments: flat float32 buffers in the model's layout.

    A moment's elements where the model has no trainable parameter are never touched.
    """

    def __init__(self, strategy: Strategy, rates: Rates, spans: tuple[Span, ...]) -> None:
        """spans: of `trainable_spans`."""
        self._strategy, self._rates, self.spans = strategy, rates, spans
        size = spans[-1][0].stop if spans else 0
        self.moments: dict[str, Buffer] = {
            name: np.full(size, value, dtype=np.float32) for name, value in strategy.first_moments(rates).items()
        }

    @classmethod
    def of(cls, federation: FederationSettings, manifest: Manifest, trainable: Collection[str]) -> Self:
        """The optimiser that the settings name, at the start of a run."""
        strategy = STRATEGIES[federation.strategy]
        rates = Rates(
            lr=strategy.default_lr if isinstance(federation.server_lr, str) else federation.server_lr,
            momentum=federation.server_momentum,
            beta2=federation.server_beta2,
            adaptivity=federation.server_adaptivity,
        )
        return cls(strategy, rates, trainable_spans(manifest, trainable))

    def apply(self, model: Buffer, mean_change: Buffer) -> None:
        """Make the next global model of this one and the clients' mean change, in place; both [size] float32."""
        weights, change = torch.from_numpy(model), torch.from_numpy(mean_change)
        moments = {name: torch.from_numpy(buffer) for name, buffer in self.moments.items()}
        for span, is_trainable in self.spans:  # one after the other, so that scratch space is a layer's, not a model's
            if is_trainable:
                here = {name: moment[span] for name, moment in moments.items()}
                self._strategy.step(weights[span], change[span], here, self._rates)
            else:
                weights[span].add_(change[span])

    def restore(self, moments: Mapping[str, Buffer]) -> None:
        """Go on from moments that a checkpoint kept.  Raises CheckpointError when they are another strategy's."""
        wanted = {name: buffer.shape for name, buffer in self.moments.items()}
        seen = {name: buffer.shape for name, buffer in moments.items()}
        if seen != wanted:
            raise CheckpointError(
                f"the checkpoint holds the server state {seen or 'of no moments'}, {self._strategy.name} needs"
                f" {wanted or 'none'}; resume with the settings that the run began with."
            )
        for name, buffer in moments.items():
            np.copyto(self.moments[name], buffer, casting="no")


EXACT = "exact-model"


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A model as it is sent: coded in two, so that who keeps what training does not move has the same bits."""

    moving: Coded
    frozen: Callable[[], Coded] | None = None  # makes the rest; None: all moves
    digest: str = ""  # SHA-256 of the rest as it is received
    part: Part | None = None

    @classmethod
    def of(cls, model: Buffer, codec: str, part: Part | None, digest: str = "") -> Self:
        """model: [size] float32, kept.  part: None, all moves.  digest: where it is known."""
        if part is None or not part.frozen.entries:
            return cls(moving=encode(model, codec))

        def rest() -> Coded:
            return encode(part.left(model), codec)

        digest = digest or buffer_sha256(decode(rest()))
        return cls(moving=encode(part.taken(model), codec), frozen=rest, digest=digest, part=part)

    def received(self) -> Buffer:
        """The model as clients get it, [size] float32; not to be changed."""
        moving = decode(self.moving)
        return moving if self.frozen is None or self.part is None else self.part.joined(moving, decode(self.frozen()))


class GlobalModel:
    """One flat model, changed in place."""

    def __init__(self, exact: Buffer, codec: str, part: Part | None = None) -> None:
        """exact: [size] float32, kept and changed.  codec: of the download, one of `common.settings.CODECS`.

        part: what of it training moves; None: all.
        """
        self._exact, self._codec, self._part = exact, codec, part
        self._digest = Sent.of(exact, codec, part).digest
        self._coded = self._encode()

    def _encode(self) -> Sent | None:
        return Sent.of(self._exact, self._codec, self._part, self._digest) if is_lossy(self._codec) else None

    @property
    def received(self) -> Buffer:
        """The model as clients get it, [size] float32; not to be changed."""
        return self._exact if self._coded is None else self._coded.received()

    def coded(self) -> Sent:
        """What is sent; it stays as it is when the model goes on."""
        if self._coded is not None:
            return self._coded
        moves_whole = self._part is None or not self._part.frozen.entries
        # A part is a copy already; the rest is never changed.
        model = self._exact.copy() if moves_whole else self._exact
        return Sent.of(model, self._codec, self._part, self._digest)

    def step(self, optimiser: ServerOptimiser, mean_change: Buffer) -> None:
        """Become the next round's model: the strategy's step with the clients' mean change."""
        optimiser.apply(self._exact, mean_change)
        self._coded = self._encode()

    def remembered(self) -> Mapping[str, Buffer]:
        """What a checkpoint needs beside the received model: nothing, or the exact one."""
        return {} if self._coded is None else {EXACT: self._exact}

    @classmethod
    def restored(
        cls, received: Buffer, moments: dict[str, Buffer], codec: str, part: Part | None = None
    ) -> "GlobalModel":
        """The model of a checkpoint.  moments: as kept; what is the model's own is taken out.

        Raises CheckpointError when the run was begun with another codec.
        """
        exact = moments.pop(EXACT, None)
        if (exact is not None) != is_lossy(codec):
            raise CheckpointError(
                f"the checkpoint holds {'no ' if exact is None else 'an '}exact model beside the received one, which"
                f" does not go with federation.download_codec {codec!r}; resume with the settings the run began with."
            )
        return cls(received if exact is None else exact, codec, part)
