"""`facefed privacy report`: what the people of each data set of this machine have spent, run by run and in all."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from clients.policy import Policy
from clients.privacy_budget import FOLDER
from common.errors import EXIT_DONE, UserError, escaped
from common.privacy.accounting import epsilon_of, mu_of
from common.protocol.spending import COST, releases_in, spent_in


def report_spending(cache_dir: Path, policy: Policy, out: TextIO, *, shape: str) -> int:
    """Print the report; shape: text or json.  policy: whose max_epsilon and max_delta it is held against.

    Raises UserError where nothing was ever spent.
    """
    files = sorted((cache_dir / FOLDER).glob("*.jsonl"))
    found = [one for path in files if (one := _of_data_set(path, policy))]
    if not found:
        raise UserError(
            f"nothing is spent: {cache_dir / FOLDER} holds no line of a noisy reply; give --cache-dir as flower-client"
            " or flower-simulation got it."
        )
    if shape == "json":
        out.write(json.dumps(found, indent=2) + "\n")
    else:
        out.write("\n\n".join("\n".join(map(escaped, _lines(one, policy))) for one in found) + "\n")
    return EXIT_DONE


def _of_data_set(path: Path, policy: Policy) -> dict[str, Any]:
    releases = list(releases_in(path))
    if not releases:
        return {}
    spent, budget = spent_in(path).in_all, mu_of(policy.max_epsilon, policy.max_delta) ** 2
    runs: dict[str, dict[str, Any]] = {}
    for one in releases:
        run = runs.setdefault(str(one.get("run")), {"replies": 0, COST: 0.0, "first": one.get("time")})
        run |= {"last": one.get("time"), "delta": one.get("delta"), "of_epsilon": one.get("epsilon")}
        run["replies"] += 1
        run[COST] += float(one[COST])
        noises, colluding = _whole(one.get("noises"), 1), _whole(one.get("colluding_sites"), 0)
        # Its own noise is 1 / sqrt(noises) of the planned one, so alone it costs `noises` times as much.
        run["alone"] = run.get("alone", 0.0) + noises * float(one[COST])
        run["colluding_sites"] = min(run.get("colluding_sites", colluding), colluding)
    for run in runs.values():
        run["epsilon"] = epsilon_of(math.sqrt(run[COST]), float(run["delta"]))
        run["epsilon_by_own_noise"] = epsilon_of(math.sqrt(run.pop("alone")), float(run["delta"]))
    return {
        "file": str(path),
        "dataset": str(releases[-1].get("dataset")),
        "data_dir": str(releases[-1].get("data_dir")),
        "clients": sorted({str(one.get("client")) for one in releases}),
        "replies": len(releases),
        "epsilon": epsilon_of(math.sqrt(spent), policy.max_delta),
        "delta": policy.max_delta,
        "max_epsilon": policy.max_epsilon,
        "fraction_left": max(0.0, 1.0 - spent / budget),
        "runs": runs,
    }


def _whole(value: object, least: int) -> int:
    """A count of a line that may have been written by another version."""
    return max(least, value) if isinstance(value, int) else least


def _lines(found: dict[str, Any], policy: Policy) -> Iterator[str]:
    yield f"{', '.join(found['clients'])}: {found['dataset']} in {found['data_dir']}, by {found['file']}"
    for name, run in found["runs"].items():
        yield (
            f"  run {name}: {run['replies']} noisy replies, {run['first']} to {run['last']}: epsilon"
            f" {run['epsilon']:.3g} of {run['of_epsilon']:g} at delta {run['delta']:g}"
        )
        if run["epsilon_by_own_noise"] > run["epsilon"]:
            yield (
                f"    by the noise of several sites, while at most {run['colluding_sites']} of them tell theirs; by"
                f" this site's own alone epsilon {run['epsilon_by_own_noise']:.3g}"
            )
    left = f"{100 * found['fraction_left']:.0f} % of it is left"
    if found["fraction_left"] <= 0.0:
        left = "it is spent: a flower-client takes no part in a further run (a simulation is held to no policy)"
    yield (
        f"  one person, over all runs: epsilon {found['epsilon']:.3g} at delta {policy.max_delta:g}; this policy allows"
        f" {policy.max_epsilon:g}, and {left}"
    )
