"""What one, two and three colluding clients of five and of seven can still do against each rule of aggregation.

    python -m bench.collusion

Made-up changes: an honest one is a common part of norm 1 and a part of its own of norm 1, of SIZE elements. All
colluders send one and the same change: the honest mean and `reach` times the honest spread, once against the common
part, once along every element's standard deviation ("a little is enough", arXiv:1902.06156). The table has, for each
rule, the aggregate's distance from the honest mean in units of the honest spread (the root mean square of the honest
changes' distances from their mean), at the worst of all reaches; "unbounded": it grows with the reach. 0 of N: the rule
without colluders. In one row the colluders count for ten times an honest client, as
`federation.max_weight_factor` lets them; a change longer than `federation.max_change_factor` allows is refused before
any of this.
"""

import json
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np

from bench.machine import describe

SIZE, SEEDS = 2000, 5
REACHES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 100.0)
UNBOUNDED = 10.0  # spreads; at a reach of 100 none of the bounded ones comes near it
RULES = {
    "fedavg, equal weights": ("fedavg", {}, 10),
    "fedavg, colluders ten times": ("fedavg", {}, 100),
    "fedmedian": ("fedmedian", {}, 10),
    "fedtrimmedavg 0.2": ("fedtrimmedavg", {"trim_fraction": 0.2}, 10),
    "fedtrimmedavg 0.4": ("fedtrimmedavg", {"trim_fraction": 0.4}, 10),
    "krum": ("krum", {}, 10),
    "multikrum": ("multikrum", {}, 10),
    "fedavg, norm_factor 3": ("fedavg", {"norm_factor": 3.0}, 10),
}


def honest(number: int, seed: int) -> np.ndarray:
    """[number, SIZE] float32."""
    random = np.random.default_rng(seed)
    common, own = random.normal(size=SIZE), random.normal(size=(number, SIZE))
    return ((common + own) / np.sqrt(SIZE)).astype(np.float32)


def aggregated(changes: np.ndarray, num_colluding: int, rule: str, folder: Path) -> np.ndarray:
    """[SIZE]: what the server makes of them; the colluders stand last."""
    from common.protocol.codec import encode
    from common.settings import FederationSettings
    from server.aggregate import aggregate_for

    strategy, values, weight = RULES[rule]
    federation = FederationSettings(strategy=strategy, num_malicious=(len(changes) - 3) // 2, **values)
    with closing(aggregate_for(federation, SIZE, folder)) as aggregate:
        for number, change in enumerate(changes):
            colludes = number >= len(changes) - num_colluding
            aggregate.add(encode(change, "float32"), weight if colludes else 10, f"c{number}")
        aggregate.outliers()
        return aggregate.mean()


def deviation(number: int, num_colluding: int, rule: str, folder: Path) -> float:
    """The mean over the seeds of the worst over reaches and directions, in spreads."""
    worst = []
    for seed in range(SEEDS):
        good = honest(number - num_colluding, seed)
        mean, around = good.mean(0), good.std(0)
        spread = float(np.sqrt(np.square(good - mean).sum(1).mean()))
        directions = [-mean / np.linalg.norm(mean), around / np.linalg.norm(around)]
        found = [
            aggregated(
                np.concatenate(
                    [good, np.tile(mean + reach * spread * direction, (num_colluding, 1))], dtype=np.float32
                ),
                num_colluding,
                rule,
                folder,
            )
            for reach in (REACHES if num_colluding else REACHES[:1])
            for direction in directions
        ]
        worst.append(max(float(np.linalg.norm(one - mean)) / spread for one in found))
    return float(np.mean(worst))


def main() -> None:
    """Print the table."""
    cases = [(number, colluding) for number in (5, 7) for colluding in (0, 1, 2, 3)]
    print("| rule | " + " | ".join(f"{colluding} of {number}" for number, colluding in cases) + " |")
    print("|---|" + "---|" * len(cases))
    with tempfile.TemporaryDirectory() as folder:
        for rule in RULES:
            cells = [deviation(*case, rule, Path(folder) / "replies") for case in cases]
            print(f"| {rule} | " + " | ".join("unbounded" if x > UNBOUNDED else f"{x:.2f}" for x in cells) + " |")
    print(json.dumps(describe()))


if __name__ == "__main__":
    main()
