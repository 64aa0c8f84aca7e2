"""Workload W with separate processes on one machine: stock Flower, and ours with float32 and with int8."""

from functools import partial

from bench.comparison import Claim, Comparison
from bench.sides import describe_workload, our_deployment, our_stock, plain_loop, stock_deployment

ROUNDS = 3
ROUND, OVERHEAD = "a round, separate processes", "of a round neither training nor scoring, separate processes"
TORCH = "processes of a client that import torch"
SIDES = {
    "stock Flower": partial(stock_deployment, rounds=ROUNDS - 1),
    "ours, float32": partial(our_deployment, rounds=ROUNDS, codec="float32"),
}

COMPARISON = Comparison(
    name="deployment",
    what="Workload W with a server and two clients as processes of their own; one thread each for training.",
    prepare=describe_workload,
    sides={
        "plain loop": partial(plain_loop, rounds=ROUNDS),
        **SIDES,
        "ours, int8": partial(our_deployment, rounds=ROUNDS, codec="int8"),
        "ours on stock Flower": partial(our_stock, rounds=ROUNDS),
    },
    claims=(
        Claim(what=ROUND, ours="ours, float32", figure="round_seconds", peer="plain loop", goal=1.2),
        Claim(what=f"{ROUND}, int8", ours="ours, int8", figure="round_seconds", peer="plain loop", goal=1.2),
        Claim(what=f"{ROUND}, stock Flower", ours="stock Flower", figure="round_seconds", peer="plain loop"),
        Claim(what=OVERHEAD, ours="ours, float32", figure="overhead_seconds", peer="stock Flower", goal=7.0, of="ours"),
        Claim(
            what=f"{OVERHEAD}, int8", ours="ours, int8", figure="overhead_seconds", peer="stock Flower", goal=5.0,
            of="ours",
        ),
        Claim(
            what=f"{OVERHEAD}, our app on stock Flower", ours="ours on stock Flower", figure="overhead_seconds",
            peer="stock Flower", goal=0.6,
        ),
        Claim(
            what="bytes of a round, both ways, int8", ours="ours, int8", figure="bytes_per_round", peer="ours, float32",
            goal=0.26, unit="",
        ),
        Claim(what=TORCH, ours="ours, float32", figure="torch_per_client", peer="stock Flower", unit="", goal=1,
              of="ours"),
    ),
)  # fmt: skip

TRAINER = Comparison(
    name="trainer",
    what="How many processes of one client import torch: stock Flower in two rounds (four messages), ours in three.",
    prepare=describe_workload,
    sides=SIDES,
    claims=(
        Claim(what=TORCH, ours="ours, float32", figure="torch_per_client", peer="stock Flower", unit="", goal=1,
              of="ours"),
    ),
    repeats=1,
    in_all=False,  # deployment tells the same
)  # fmt: skip
