"""The strategies, one row each: what clients add to their loss, how their changes become one, and the server's step.

Both sides read the table; the loop and the wire are the same for all. The maths is pure, on float32 tensors. torch is
imported where it is used, so that settings are checked against the table, and `--help` answers, without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from common.errors import UserError
from common.settings import FederationSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

# ---- what a client adds to its loss

Penalty = Callable[[], None]  # adds its gradient to the parameters' .grad
# (the shared parameters as they were received, settings) -> the penalty of the round's training, or None
ClientTerm = Callable[["Sequence[nn.Parameter]", FederationSettings], Penalty | None]


def proximal(parameters: Sequence[nn.Parameter], mu: float) -> Penalty:
    """FedProx's pull to the received model (arXiv:1812.06127, eq. 2).

    The objective gains mu / 2 * ||w - w_global||^2, the squared norm summed over the shared parameters; its gradient
    is mu * (w - w_global). `parameters` are the shared ones as received; their values now are the reference.
    """
    reference = [p.detach().clone() for p in parameters]

    def add_gradient() -> None:
        for parameter, received in zip(parameters, reference, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - received, alpha=mu)

    return add_gradient


def _fedprox_term(parameters: Sequence[nn.Parameter], federation: FederationSettings) -> Penalty | None:
    return proximal(parameters, federation.proximal_mu) if federation.proximal_mu > 0.0 else None


# ---- how the clients' changes become one, where that takes all of them at once


class Changes(Protocol):
    """All changes of a round, [clients, size] float32: too large for memory, so they are read piece by piece."""

    @property
    def size(self) -> int:
        """Number of elements of a change."""
        ...

    def __len__(self) -> int:
        """Number of clients."""
        ...

    def pieces(self, chosen: Sequence[int] | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Of all clients, or of the chosen: (where, [clients, piece] float32). May be asked for as often as wanted."""
        ...


# The aggregate, [size] float32: unweighted, as in the papers, for a client that could claim a weight could claim a
# large one.
Rule = Callable[[Changes, FederationSettings], "Tensor"]


def median(changes: Changes) -> Tensor:
    """The median of each element (arXiv:1803.01498, definition 1); of an even number the mean of the middle two."""
    middle = len(changes) // 2
    low = middle if len(changes) % 2 else middle - 1
    return _by_piece(changes, lambda values: values.sort(dim=0).values[low : middle + 1].mean(dim=0))


def trimmed_mean(changes: Changes, fraction: float) -> Tensor:
    """The mean of each element without its largest and smallest `fraction` (arXiv:1803.01498, definition 2).

    fraction: in [0, 0.5); of n changes floor(fraction * n) are cut at each end.
    """
    cut = int(fraction * len(changes))
    return _by_piece(changes, lambda values: values.sort(dim=0).values[cut : len(changes) - cut].mean(dim=0))


def krum_order(changes: Changes, num_malicious: int) -> list[int]:
    """The changes from the most to the least trusted (arXiv:1703.02757, section 4).

    A change's score is the sum of its squared distances to the n - f - 2 others that are nearest to it.
    num_malicious: f; n >= 2 f + 3.  Raises ValueError otherwise.
    """
    number = len(changes)
    if number < 2 * num_malicious + 3:
        raise ValueError(f"krum with {num_malicious} malicious clients needs {2 * num_malicious + 3}, not {number}")
    nearest = _squared_distances(changes).sort(dim=1).values[:, 1 : number - num_malicious - 1]  # 0 is itself
    scores = nearest.sum(dim=1)
    return sorted(range(number), key=lambda index: (float(scores[index]), index))


def mean_of(changes: Changes, chosen: Sequence[int]) -> Tensor:
    """The mean of the chosen changes: of krum the first of its order, of multikrum the first n - f."""
    return _by_piece(changes, lambda values: values.mean(dim=0), sorted(chosen))


def _by_piece(changes: Changes, rule: Callable[[Tensor], Tensor], chosen: Sequence[int] | None = None) -> Tensor:
    """rule: [clients, piece] -> [piece]."""
    import torch  # see above

    result = torch.empty(changes.size)
    for where, values in changes.pieces(chosen):
        result[where] = rule(values)
    return result


def _squared_distances(changes: Changes) -> Tensor:
    """[n, n] float64, from differences and not from products: equal changes are exactly 0 apart."""
    import torch  # see above

    total = torch.zeros(len(changes), len(changes), dtype=torch.float64)
    for _, values in changes.pieces():
        for row in range(len(changes)):
            total[row] += (values - values[row]).double().square().sum(dim=1)
    return total


def _krum(changes: Changes, federation: FederationSettings) -> Tensor:
    return mean_of(changes, krum_order(changes, federation.num_malicious)[:1])


def _multikrum(changes: Changes, federation: FederationSettings) -> Tensor:
    order = krum_order(changes, federation.num_malicious)
    return mean_of(changes, order[: len(changes) - federation.num_malicious])


# ---- the server's step: weights and moments are changed in place; all tensors [size] float32

Moments = Mapping[str, "Tensor"]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The numbers of a server's step, resolved: nothing here is 'auto' any more."""

    lr: float  # eta
    momentum: float  # beta; of fedadam and fedyogi beta 1
    beta2: float
    adaptivity: float  # tau


Step = Callable[["Tensor", "Tensor", Moments, Rates], object]  # (weights, the aggregated change, moments, rates)


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
    second.addcmul_(squared, (second - squared).sign(), value=-(1.0 - rates.beta2))
    _adaptive_step(weights, change, moments, rates)


def _squared(change: Tensor) -> Tensor:
    import torch  # see above

    # The guard lets a change of up to 1e30 pass; its square would be infinite, and Yogi's inf - inf no number.
    return change.square().clamp_(max=torch.finfo(torch.float32).max)


def _adaptive_step(weights: Tensor, change: Tensor, moments: Moments, rates: Rates) -> None:
    first = moments["first"].mul_(rates.momentum).add_(change, alpha=1.0 - rates.momentum)
    weights.addcdiv_(first, moments["second"].sqrt().add_(rates.adaptivity), value=rates.lr)


def _adaptive_moments(rates: Rates) -> Mapping[str, float]:
    # Algorithm 2 wants v >= tau^2 at the start; at 0 the first step would be lr * sign(change) however small it is.
    return {"first": 0.0, "second": rates.adaptivity**2}


# ---- the table


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """All that tells a strategy from the others; what a row does not say is FedAvg's."""

    name: str
    paper: str
    client_term: ClientTerm | None = None
    rule: Rule | None = None  # None: the mean weighted by examples, added up as replies come; else all are kept on disk
    fewest: Callable[[FederationSettings], int] = lambda _: 1  # clients whose changes the rule needs
    fewest_setting: str = ""  # of [federation], what `fewest` follows
    step: Step = plain_step
    first_moments: Callable[[Rates], Mapping[str, float]] = lambda _: {}  # the value that all of a buffer starts with
    default_lr: float = 1.0  # federation.server_lr = "auto"


_TABLE: Final = (
    Strategy(name="fedavg", paper="arXiv:1602.05629"),
    Strategy(name="fedprox", paper="arXiv:1812.06127", client_term=_fedprox_term),
    Strategy(name="fedavgm", paper="arXiv:1909.06335", step=momentum_step, first_moments=lambda _: {"momentum": 0.0}),
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
    Strategy(name="fedmedian", paper="arXiv:1803.01498", rule=lambda changes, _: median(changes)),
    Strategy(
        name="fedtrimmedavg",
        paper="arXiv:1803.01498",
        rule=lambda changes, federation: trimmed_mean(changes, federation.trim_fraction),
    ),
    *(
        Strategy(
            name=name,
            paper="arXiv:1703.02757",
            rule=rule,
            fewest=lambda federation: 2 * federation.num_malicious + 3,
            fewest_setting="num_malicious",
        )
        for name, rule in (("krum", _krum), ("multikrum", _multikrum))
    ),
)
STRATEGIES: Final[dict[str, Strategy]] = {strategy.name: strategy for strategy in _TABLE}


def fewest_clients(federation: FederationSettings) -> int:
    """How many changes the strategy needs."""
    return STRATEGIES[federation.strategy].fewest(federation)


def needs(federation: FederationSettings) -> str:
    """The beginning of an error: how many the strategy needs, and because of which setting."""
    setting = STRATEGIES[federation.strategy].fewest_setting
    because = f" with federation.{setting} = {getattr(federation, setting)}" if setting else ""
    return f"{federation.strategy}{because} needs {fewest_clients(federation)}"


def check_number(federation: FederationSettings, num_clients: int) -> None:
    """Raises UserError when so many clients a round can never be enough for the strategy."""
    if num_clients < fewest_clients(federation):
        lower = " lower it," if STRATEGIES[federation.strategy].fewest_setting else ""
        raise UserError(
            f"{needs(federation)} clients in each round, and there are {num_clients}; start more,{lower} or choose"
            " fedmedian."
        )
