"""Streaming, order-fixed averaging: replies are added in place, so memory does not grow with their number."""

import numpy as np
import torch
from numpy.typing import NDArray

from common.codec import Coded, add_to


class WeightedChange:
    """The running sum of num_examples * change over clients, in float32.

    Holds one buffer whatever the number of clients. Added in a fixed client order, the sum does not depend on who
    answered first.
    """

    def __init__(self, size: int) -> None:
        """size: number of float32 elements of the flat model."""
        self._sum = torch.zeros(size)
        self.num_examples = 0
        self.num_clients = 0

    def add(self, change: Coded, num_examples: int) -> None:
        """Add one client's change of `size` elements with its weight; it is decoded piece by piece as it is added."""
        add_to(self._sum, change, float(num_examples))
        self.num_examples += num_examples
        self.num_clients += 1

    def mean(self) -> NDArray[np.float32]:
        """The weighted mean change, [size] float32 (FedAvg, arXiv:1602.05629, algorithm 1).

        Divides in place; nothing may be added afterwards.  Raises ValueError when nothing was added.
        """
        if self.num_examples == 0:
            raise ValueError("no reply was added, so there is no mean")
        mean: NDArray[np.float32] = self._sum.div_(float(self.num_examples)).numpy()
        return mean
