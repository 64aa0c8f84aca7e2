"""What a site's people have spent of their privacy, over all runs on one data set, and how much they may.

One file for each data set, beside the site's secret (`common/protocol/spending.py`).  The sum holds whatever the runs
asked for and in whichever order.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from clients.policy import Against, Policy, PolicyRefusal
from clients.site import SiteSettings
from common.errors import CheckpointError
from common.privacy.accounting import epsilon_of, is_within, mu_of, squared_mu
from common.protocol.refusals import OF_PRIVACY
from common.protocol.spending import Spent, write_spend
from common.settings import PrivacySettings

FOLDER: Final = "privacy"  # beside the site's secret


@dataclass(frozen=True, kw_only=True)
class Release:
    """One reply that is to leave: what it costs, and for which run."""

    run_id: str
    server_round: int
    noise_multiplier: float  # z, of the sensitivity
    num_groups: int
    noises: int = 1  # of how many sites the noise hides this one's people; 1: its own

    @property
    def squared_mu(self) -> float:
        """What it takes of the budget."""
        return squared_mu(self.noise_multiplier)


def budget_file(site: SiteSettings) -> Path:
    """The file of the site's data set: of its kind and folder, and of a virtual client's part."""
    share = site.share
    part = "" if share is None else f"{share.number} of {share.num_clients}, {share.alpha}, {share.seed}"
    named = f"{site.dataset}\n{site.data_dir.resolve()}\n{part}"
    key = hashlib.sha256(named.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return site.cache_dir / FOLDER / f"{key}.jsonl"


def require_budget(spent: Spent, release: Release, privacy: PrivacySettings, policy: Policy) -> None:
    """Raises PolicyRefusal where the release goes beyond the run's epsilon or the site's own, over all runs."""
    for limit, gone, epsilon, delta in (
        ("max_epsilon", spent.in_all, policy.max_epsilon, policy.max_delta),
        ("epsilon_of_run", spent.in_run, privacy.epsilon, privacy.delta),
    ):
        if not is_within(mu_of(epsilon, delta) ** 2, gone + release.squared_mu):
            where = "over all runs on these data" if limit == "max_epsilon" else "in this run"
            seen = f"{epsilon_of(math.sqrt(gone), delta):.3g} of {epsilon:g} at delta {delta:g} are spent {where}"
            raise PolicyRefusal(Against(OF_PRIVACY, limit, seen, "what one more reply takes"))


def spend(site: SiteSettings, release: Release, privacy: PrivacySettings) -> None:
    """Write down that a reply leaves, and return once that survives a power cut.

    Raises PolicyRefusal where there is not enough left; CheckpointError where it cannot be written.
    """
    path = budget_file(site)
    words = {
        "round": release.server_round,
        "client": site.name,
        "dataset": site.dataset,
        "data_dir": str(site.data_dir),
        "noise_multiplier": release.noise_multiplier,
        "clip": privacy.clip,
        "num_groups": release.num_groups,
        "noises": release.noises,
        "colluding_sites": privacy.colluding_sites if privacy.is_shared else 0,
        "epsilon": privacy.epsilon,
        "delta": privacy.delta,
    }
    try:
        write_spend(
            path,
            release.run_id,
            release.squared_mu,
            words,
            lambda spent: require_budget(spent, release, privacy, site.policy),
        )
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror}), and nothing leaves that is not paid for there; make room for"
            " it, or let this account write it."
        ) from None
