"""What noisy releases cost together: Gaussian differential privacy, exact, in the square of one number.

A release whose noise is z times its sensitivity is mu-GDP with mu = 1 / z; releases one after the other, chosen as one
likes by what came before, are GDP with the root of the sum of their mu^2 (arXiv:1905.02383, corollary 3.3, and for
budgets that are chosen on the way arXiv:2210.17520, where the filter is this sum).  mu-GDP is (epsilon, delta)-DP for

    delta(epsilon) = Phi(-epsilon / mu + mu / 2) - e^epsilon Phi(-epsilon / mu - mu / 2)

(arXiv:1905.02383, corollary 2.13; arXiv:1805.06530, theorem 8), and for no smaller delta.  No sampling is counted: who
takes part in a round follows from a public seed.

A pure epsilon-DP release is mu-GDP for mu = -2 Phi^-1(1 / (1 + e^epsilon)): its trade-off curve is two straight lines
that meet at alpha = beta = 1 / (1 + e^epsilon), the curve of mu-GDP is convex, has the same ends and goes through the
same point, so it lies below both lines.  So counts with geometric noise and Gaussian changes share one sum.
"""

import math
from collections.abc import Callable
from typing import Final

STEPS: Final = 200  # halvings of an interval; 60 give all digits of a double
FAR: Final = 30.0  # standard deviations from which on a tail is worked out by its series
LARGEST_MU: Final = 1e4  # epsilon 5e7: nothing is protected
ROUNDING: Final = 1e-9  # relative; so much more than a budget is the budget


def _log_tail(x: float) -> float:
    """The logarithm of the normal mass beyond x, log Phi(-x), to a relative 1e-14 of the mass."""
    if x < FAR:
        return math.log(0.5 * math.erfc(x / math.sqrt(2.0)))
    inverse = 1.0 / (x * x)  # the asymptotic series; its fifth term is below 1e-12 here
    series = 1.0 - inverse * (1.0 - 3.0 * inverse * (1.0 - 5.0 * inverse * (1.0 - 7.0 * inverse)))
    return -0.5 * x * x - math.log(x * math.sqrt(2.0 * math.pi)) + math.log(series)


def delta_of(mu: float, epsilon: float) -> float:
    """The smallest delta of mu-GDP at this epsilon, in [0, 1].

    mu: >= 0; 0 is a release of nothing.  epsilon: >= 0.  Raises ValueError otherwise.
    """
    if not (0.0 <= mu <= LARGEST_MU and 0.0 <= epsilon < math.inf):
        raise ValueError(f"mu = {mu} must be in [0, {LARGEST_MU:g}] and epsilon = {epsilon} finite and not negative")
    if mu == 0.0:
        return 0.0
    log_first = _log_tail(epsilon / mu - 0.5 * mu)
    log_second = epsilon + _log_tail(epsilon / mu + 0.5 * mu)
    # as a product, for the two are nearly the same where the difference is small
    return math.exp(log_first) * -math.expm1(min(0.0, log_second - log_first))


def _largest(fits: Callable[[float], bool], low: float, high: float) -> float:
    """The largest x in [low, high] that fits, to the last digit; of those the ones that fit come first."""
    for _ in range(STEPS):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def epsilon_of(mu: float, delta: float) -> float:
    """The smallest epsilon of mu-GDP at this delta, in (0, 1).  Rounded up.  Raises ValueError for another delta."""
    _require_delta(delta)
    if delta_of(mu, 0.0) <= delta:
        return 0.0
    high = 1.0
    while delta_of(mu, high) > delta:
        high *= 2.0
    found = _largest(lambda epsilon: delta_of(mu, epsilon) > delta, 0.0, high)
    return math.nextafter(found, math.inf)


def mu_of(epsilon: float, delta: float) -> float:
    """The largest mu whose releases are (epsilon, delta)-DP.  epsilon: > 0.  Raises ValueError."""
    _require_delta(delta)
    if not 0.0 < epsilon < math.inf:
        raise ValueError(f"epsilon = {epsilon} must be finite and greater than 0")
    return _largest(lambda mu: delta_of(mu, epsilon) <= delta, 0.0, LARGEST_MU)


def _require_delta(delta: float) -> None:
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta = {delta} must be in (0, 1)")


def squared_mu(noise_multiplier: float, rounds: int = 1) -> float:
    """What so many Gaussian releases take of a budget, mu^2.  noise_multiplier: z, of the sensitivity; > 0."""
    return rounds / noise_multiplier**2


def squared_mu_of_pure(epsilon: float) -> float:
    """What a pure epsilon-DP release takes of a budget, mu^2; see the head of this file.  epsilon: >= 0."""
    if not 0.0 <= epsilon < math.inf:
        raise ValueError(f"epsilon = {epsilon} must be finite and not negative")
    log_corner = -epsilon - math.log1p(math.exp(-epsilon))  # log of 1 / (1 + e^epsilon)
    half = _largest(lambda x: _log_tail(x) >= log_corner, 0.0, LARGEST_MU)
    return (2.0 * math.nextafter(half, math.inf)) ** 2


def pure_epsilon_of(mu_squared: float) -> float:
    """The inverse of `squared_mu_of_pure`: the epsilon of the pure release that takes so much of a budget."""
    log_tail = _log_tail(0.5 * math.sqrt(mu_squared))
    return max(0.0, math.log(-math.expm1(log_tail)) - log_tail)


def noise_multiplier(epsilon: float, delta: float, rounds: int) -> float:
    """z: how many times their sensitivity the noise of so many releases is, for (epsilon, delta) together."""
    return math.sqrt(rounds) / mu_of(epsilon, delta)


def rounds_left(budget: float, spent: float, each: float) -> int:
    """How many releases of `each` are still within a budget; all in mu^2.  each: > 0."""
    return max(0, math.floor((budget * (1.0 + ROUNDING) - spent) / each))


def is_within(budget: float, spent: float) -> bool:
    """Whether so much may be spent of a budget, both in mu^2."""
    return spent <= budget * (1.0 + ROUNDING)
