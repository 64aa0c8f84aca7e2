"""What a site's people have spent of their privacy, over all runs on one data set, and how much they may.

One file for each data set, beside the site's secret: a line for each reply, appended and on the disk before the reply
leaves, so that a crash spends and never saves.  Lines are chained as the egress ledger's are.  The spend is a sum of
mu^2 (`common/privacy/accounting.py`), which holds whatever the runs asked for and in whichever order.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from clients.policy import Against, Policy, PolicyRefusal
from clients.site import SiteSettings
from common.privacy.accounting import epsilon_of, is_within, mu_of, squared_mu
from common.protocol.ledger import PREVIOUS, link_of
from common.settings import PrivacySettings
from common.system.files import Line, append_after, read_lines

FOLDER: Final = "privacy"  # beside the site's secret
OF_PRIVACY: Final = "privacy.epsilon"  # the setting that a refusal names


@dataclass(frozen=True, kw_only=True)
class Release:
    """One reply that is to leave: what it costs, and for which run."""

    run_id: str
    server_round: int
    noise_multiplier: float  # z, of the sensitivity
    num_groups: int

    @property
    def squared_mu(self) -> float:
        """What it takes of the budget."""
        return squared_mu(self.noise_multiplier)


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What is gone, in mu^2."""

    in_all: float = 0.0
    in_run: float = 0.0


def budget_file(site: SiteSettings) -> Path:
    """The file of the site's data set: of its kind and folder, and of a virtual client's part."""
    share = site.share
    part = "" if share is None else f"{share.number} of {share.num_clients}, {share.alpha}, {share.seed}"
    named = f"{site.dataset}\n{site.data_dir.resolve()}\n{part}"
    key = hashlib.sha256(named.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return site.cache_dir / FOLDER / f"{key}.jsonl"


def spent_in(path: Path, run_id: str = "") -> Spent:
    """What the file says is spent, in all and of a run.

    A line that was cut as it was written stands for a reply that never left.  One that is damaged otherwise counts as
    the dearest that can be read: each line carries the sum so far, so what stood before a good line is known.
    """
    in_all, in_run, dearest = 0.0, 0.0, 0.0
    for line in _lines(path):
        cost = _cost(line)
        if cost is None:
            in_all += dearest if line.is_whole else 0.0
            continue
        dearest = max(dearest, cost)
        record = line.record or {}
        in_all = max(in_all + cost, _number(record.get("spent")))
        if record.get("run") == run_id:
            in_run += cost
    return Spent(in_all=in_all, in_run=in_run)


def _lines(path: Path) -> Iterator[Line]:
    if path.is_file():
        yield from (line for line in read_lines(path) if line.text)


def _cost(line: Line) -> float | None:
    cost = _number((line.record or {}).get("squared_mu"))
    return cost if cost > 0.0 else None


def _number(value: object) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else 0.0  # type: ignore[arg-type]


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

    Raises PolicyRefusal where there is not enough left; OSError where it cannot be written.
    """
    path = budget_file(site)

    def line(before: bytes) -> dict[str, Any]:  # nobody else writes meanwhile
        spent = spent_in(path, release.run_id)
        require_budget(spent, release, privacy, site.policy)
        return {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "client": site.name,
            "dataset": site.dataset,
            "data_dir": str(site.data_dir),
            "run": release.run_id,
            "round": release.server_round,
            "noise_multiplier": release.noise_multiplier,
            "clip": privacy.clip,
            "num_groups": release.num_groups,
            "delta": privacy.delta,
            "squared_mu": release.squared_mu,
            "spent": spent.in_all + release.squared_mu,
            PREVIOUS: link_of(before),
        }

    append_after(path, line, synced=True)
