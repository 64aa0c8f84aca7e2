"""How long one client's change may be beside the model that it is of.

The server looks at each change; with secure aggregation, where it sees none, the client looks at its own.
"""

import math
from collections.abc import Iterable
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import ReplyRefused
from common.protocol.codec import Coded, pieces
from common.protocol.parameters import Span

Buffer = NDArray[np.float32]

STATISTICS_FACTOR: Final = 100.0  # how much longer running statistics may be beside theirs: they follow the activations


class ChangeNorms(NamedTuple):
    """The Euclidean norms of a model's or a change's two parts; 0 for a part that is not there."""

    parameters: float
    statistics: float  # the running mean and variance of normalisation layers


class ChangeBound:
    """How long a change may be beside the model, of trainable parameters and of running statistics apart.

    Relative to the longer of the received and the run's first model: a model that somebody made short must not turn
    the honest changes into long ones. Where both are zero there is no scale, and no bound.
    """

    def __init__(self, spans: tuple[Span, ...], first: Buffer, factor: float | str) -> None:
        """first: the model of round 0, [size] float32.  factor: `federation.max_change_factor`."""
        self._spans, self._factor = spans, factor
        self._first = self.received = self._norms([(slice(0, len(first)), torch.from_numpy(first))])

    def receive(self, model: Buffer) -> None:
        """The changes that come next are of this model, [size] float32."""
        self.received = self._norms([(slice(0, len(model)), torch.from_numpy(model))])

    def check(self, change: Coded) -> ChangeNorms:
        """The norms of a change that is finite.  Raises ReplyRefused when one is too long."""
        found = self._norms(pieces(change))
        if isinstance(self._factor, str):
            return found
        factors = (self._factor, self._factor * STATISTICS_FACTOR)
        parts = zip(ChangeNorms._fields, factors, found, self.received, self._first, strict=True)
        for what, factor, norm, here, first in parts:
            beside = max(here, first)
            if norm > factor * beside > 0.0:
                raise ReplyRefused(
                    f"the change of {what} has the norm {norm:.4g}, more than {factor:g} times the model's"
                    f" {beside:.4g} (federation.max_change_factor)"
                )
        return found

    def _norms(self, parts: Iterable[tuple[slice, Tensor]]) -> ChangeNorms:
        """parts: the buffer in order, as `common.protocol.codec.pieces` gives it."""
        squares = {True: 0.0, False: 0.0}
        for where, values in parts:
            for span, is_trainable in self._spans:
                start, stop = max(span.start, where.start), min(span.stop, where.stop)
                if start < stop:
                    norm = torch.linalg.vector_norm(values[start - where.start : stop - where.start])
                    squares[is_trainable] += float(norm) ** 2
        return ChangeNorms(parameters=math.sqrt(squares[True]), statistics=math.sqrt(squares[False]))
