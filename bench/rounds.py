"""Workload W in one machine's simulation: the plain PyTorch loop, stock Flower's simulation, ours, NVFlare's."""

from functools import partial

from bench.comparison import Claim, Comparison
from bench.sides import (
    describe_workload,
    nvflare_simulation,
    our_simulation,
    plain_loop,
    stock_simulation,
)

ROUNDS = 4
ROUND, TO_ROUND_1 = "a round, simulation, our defaults", "from the start to the end of round 1, simulation"

COMPARISON = Comparison(
    name="rounds",
    what=(
        "Workload W: ResNet-18 at 64 px, 2 clients, 512 pictures trained and 128 scored each a round, batch 32; a round"
        " is the median of all but each run's first. The plain loop: one process, float32, all cores."
    ),
    prepare=describe_workload,
    sides={
        "plain loop": partial(plain_loop, rounds=ROUNDS),
        "stock Flower": partial(stock_simulation, rounds=ROUNDS - 1),
        "ours": partial(our_simulation, rounds=ROUNDS),
        "NVFlare": partial(nvflare_simulation, rounds=ROUNDS - 1),
    },
    claims=(
        Claim(what=ROUND, ours="ours", figure="round_seconds", peer="plain loop", goal=0.60),
        Claim(what=ROUND, ours="ours", figure="round_seconds", peer="stock Flower"),
        Claim(what=ROUND, ours="ours", figure="round_seconds", peer="NVFlare"),
        Claim(what=TO_ROUND_1, ours="ours", figure="to_round_1_seconds", peer="stock Flower", goal=0.7),
        Claim(what="of a round neither training nor scoring", ours="ours", figure="overhead_seconds"),
    ),
)
