"""The server's memory: the loop with 2, 16 and 64 clients, in models above a server that is ready."""

import sys
from functools import partial

from bench.comparison import Claim, Comparison, Figures, Place
from bench.sides import ROOT, environment
from bench.watch import run_side

WHAT = "ServerApp memory, in models"


def with_clients(_: Place, *, count: int) -> Figures:
    command = [sys.executable, "-W", "ignore", "-m", "bench.loop_memory", "--here", str(count)]
    return run_side(command, cwd=ROOT, environment=environment())


COUNTS = (2, 16, 64)
COMPARISON = Comparison(
    name="memory",
    what="The server's loop over two rounds of ResNet-18; the clients are stand-ins (bench/loop_memory.py).",
    sides={f"{count} clients": partial(with_clients, count=count) for count in COUNTS},
    claims=tuple(
        Claim(
            what=f"{WHAT}, {count} clients", ours=f"{count} clients", figure="models", unit="", goal=3.0, of="ours",
            peer="" if count == COUNTS[0] else f"{COUNTS[0]} clients",
        )
        for count in COUNTS
    ),
    repeats=1,
)  # fmt: skip
