"""Differential privacy of whole clients: changes clipped once more, added with equal weights, and one noise on the sum.

For many virtual clients, whose server is trusted; one client moves the sum by `privacy.clip` at most.  The sum is
divided by the number of clients that were to answer, whoever did.
"""

import secrets
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.privacy.accounting import is_within, mu_of, noise_multiplier, squared_mu
from common.privacy.mechanism import SEED_BYTES, Buffer, add_clipped, released
from common.privacy.people import problem_of
from common.protocol.codec import Coded, decode
from common.protocol.parameters import Span
from common.protocol.spending import RUN_FILE, spent_in, write_spend
from common.settings import FederationSettings, PrivacySettings


class BudgetSpent(Exception):
    """One more round would go beyond privacy.epsilon."""


class SitePrivacy:
    """The noise of one run's sums, and what it has spent; the file of that is in the run's folder."""

    def __init__(self, privacy: PrivacySettings, federation: FederationSettings, folder: Path) -> None:
        """folder: the run's."""
        self._privacy, self._path, self._run_id = privacy, folder / RUN_FILE, folder.name
        self._multiplier = noise_multiplier(privacy.epsilon, privacy.delta, federation.rounds)
        wanted = federation.clients_per_round
        self._planned = wanted if isinstance(wanted, int) else federation.min_clients

    def require_room(self, num_clients: int) -> None:
        """Raises BudgetSpent; UserError where delta is one in the clients or more."""
        privacy = self._privacy
        if problem := problem_of(privacy, num_clients):
            raise UserError(problem)
        spent = spent_in(self._path, self._run_id).in_run
        if not is_within(mu_of(privacy.epsilon, privacy.delta) ** 2, spent + squared_mu(self._multiplier)):
            raise BudgetSpent

    def spend(self, server_round: int) -> None:
        """Write down that a round's sum is seen.  Raises OSError where it cannot be."""
        words = {
            "round": server_round,
            "noise_multiplier": self._multiplier,
            "clip": self._privacy.clip,
            "epsilon": self._privacy.epsilon,
            "delta": self._privacy.delta,
        }
        write_spend(self._path, self._run_id, squared_mu(self._multiplier), words)

    def empty_sum(self, size: int, spans: tuple[Span, ...]) -> "NoisySum":
        """Where a round's changes go.  spans: of the flat model, [size]; only what is trainable is released."""
        return NoisySum(
            size,
            [span for span, is_trainable in spans if is_trainable],
            clip=self._privacy.clip,
            deviation=self._multiplier * self._privacy.clip,
            planned=self._planned,
        )


class NoisySum:
    """The changes of one round on their way to one, as `server.aggregate.Aggregate`."""

    def __init__(self, size: int, spans: list[slice], *, clip: float, deviation: float, planned: int) -> None:
        """deviation: of the noise on each element of the sum.  planned: by what it is divided."""
        self._total, self._spans = np.zeros(size, dtype=np.float64), spans
        self._clip, self._deviation, self._planned = clip, deviation, planned

    def add(self, change: Coded, num_examples: int, name: str = "") -> None:  # noqa: ARG002 - weights are equal
        """Add one client's change, clipped once more: a client may not have done so."""
        add_clipped(self._total, decode(change), self._clip)

    def outliers(self) -> Mapping[str, str]:
        """None: no change is compared with another."""
        return {}

    def mean(self) -> Buffer:
        """The noisy sum, divided by the planned number, [size] float32; to be asked for once."""
        seed = secrets.token_bytes(SEED_BYTES)
        return released(self._total, self._spans, deviation=self._deviation, divisor=self._planned, seed=seed)

    def close(self) -> None:
        """Nothing is kept."""
