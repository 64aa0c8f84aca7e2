"""What differs between the strategies, as a table. The loop and the wire are the same for all."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Buffer = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How the mean change becomes the next global model, and what the client adds."""

    name: str
    paper: str
    apply: Callable[[Buffer, Buffer], Buffer]  # (global model, mean change) -> next global model, in place
    client_term: str  # what a client adds to its loss, for the record


def add_mean(model: Buffer, mean_change: Buffer) -> Buffer:
    """FedAvg's server step: w + mean change, in place; both [size] float32."""
    return np.add(model, mean_change, out=model)


STRATEGIES: dict[str, Strategy] = {
    "fedavg": Strategy(name="fedavg", paper="arXiv:1602.05629", apply=add_mean, client_term="none"),
    "fedprox": Strategy(
        name="fedprox", paper="arXiv:1812.06127", apply=add_mean, client_term="proximal_mu / 2 * ||w - w_global||^2"
    ),
}
