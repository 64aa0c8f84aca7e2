"""What differs between the strategies, as a table. The loop and the wire are the same for all.

The server's step is pure maths on flat float32 buffers, in place; its state between rounds is `server.optimiser`'s.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

Moments = Mapping[str, Tensor]  # name -> [size] float32, changed in place

_LARGEST: Final = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The numbers of a server's step, resolved: nothing here is 'auto' any more."""

    lr: float  # eta
    momentum: float  # beta; of fedadam and fedyogi beta 1
    beta2: float
    adaptivity: float  # tau


# (weights, mean change, moments, rates): weights and moments are changed in place; all tensors [size] float32
Step = Callable[[Tensor, Tensor, Moments, Rates], object]


def plain_step(weights: Tensor, change: Tensor, _moments: Moments, rates: Rates) -> None:
    """FedAvg (arXiv:1602.05629): w += lr * change; with lr = 1 this is the weighted mean of the clients' models."""
    weights.add_(change, alpha=rates.lr)


def momentum_step(weights: Tensor, change: Tensor, moments: Moments, rates: Rates) -> None:
    """FedAvgM (arXiv:1909.06335, section 4.2): v = beta * v + change; w += lr * v.

    A change that is the same in every round moves the model by lr / (1 - beta) of it in the end.
    """
    moments["momentum"].mul_(rates.momentum).add_(change)
    weights.add_(moments["momentum"], alpha=rates.lr)


def adam_step(weights: Tensor, change: Tensor, moments: Moments, rates: Rates) -> None:
    """FedAdam (arXiv:2003.00295, algorithm 2; no bias correction, as there).

    m = beta1 * m + (1 - beta1) * change; v = beta2 * v + (1 - beta2) * change^2; w += lr * m / (sqrt(v) + tau).
    """
    moments["second"].mul_(rates.beta2).add_(_squared(change), alpha=1.0 - rates.beta2)
    _adaptive_step(weights, change, moments, rates)


def yogi_step(weights: Tensor, change: Tensor, moments: Moments, rates: Rates) -> None:
    """FedYogi (arXiv:2003.00295, algorithm 2): as FedAdam, but v -= (1 - beta2) * change^2 * sign(v - change^2).

    v moves by at most (1 - beta2) * change^2 a round, and never below zero.
    """
    second, squared = moments["second"], _squared(change)
    second.addcmul_(squared, torch.sign(second - squared), value=-(1.0 - rates.beta2))
    _adaptive_step(weights, change, moments, rates)


def _squared(change: Tensor) -> Tensor:
    # The guard lets a change of up to 1e30 pass; its square would be infinite, and Yogi's inf - inf no number.
    return change.square().clamp_(max=_LARGEST)


def _adaptive_step(weights: Tensor, change: Tensor, moments: Moments, rates: Rates) -> None:
    first = moments["first"].mul_(rates.momentum).add_(change, alpha=1.0 - rates.momentum)
    weights.addcdiv_(first, moments["second"].sqrt().add_(rates.adaptivity), value=rates.lr)


def _no_moments(_rates: Rates) -> dict[str, float]:
    return {}


def _momentum(_rates: Rates) -> dict[str, float]:
    return {"momentum": 0.0}


def _adaptive_moments(rates: Rates) -> dict[str, float]:
    # Algorithm 2 wants v >= tau^2 at the start; at 0 the first step would be lr * sign(change) however small it is.
    return {"first": 0.0, "second": rates.adaptivity**2}


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How the mean change becomes the next global model, and what the client adds."""

    name: str
    paper: str
    step: Step
    first_moments: Callable[[Rates], Mapping[str, float]] = _no_moments  # the value that all of a buffer starts with
    default_lr: float = 1.0  # federation.server_lr = "auto"
    client_term: str = "none"  # what a client adds to its loss, for the record


_TABLE: Final = (
    Strategy(name="fedavg", paper="arXiv:1602.05629", step=plain_step),
    Strategy(
        name="fedprox",
        paper="arXiv:1812.06127",
        step=plain_step,
        client_term="proximal_mu / 2 * ||w - w_global||^2",
    ),
    Strategy(name="fedavgm", paper="arXiv:1909.06335", step=momentum_step, first_moments=_momentum),
    Strategy(
        name="fedadam",
        paper="arXiv:2003.00295",
        step=adam_step,
        first_moments=_adaptive_moments,
        default_lr=0.01,
    ),
    Strategy(
        name="fedyogi",
        paper="arXiv:2003.00295",
        step=yogi_step,
        first_moments=_adaptive_moments,
        default_lr=0.01,
    ),
    # What is robust is the aggregate of the changes (server/robust.py); the step with it is FedAvg's.
    Strategy(name="fedmedian", paper="arXiv:1803.01498", step=plain_step),
    Strategy(name="fedtrimmedavg", paper="arXiv:1803.01498", step=plain_step),
    Strategy(name="krum", paper="arXiv:1703.02757", step=plain_step),
    Strategy(name="multikrum", paper="arXiv:1703.02757", step=plain_step),
)
STRATEGIES: Final[dict[str, Strategy]] = {strategy.name: strategy for strategy in _TABLE}
