"""The ServerApp of the quickstart: FedAvg, started with a fresh network."""

import os

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from bench.peers.network import Network
from stock.notes import note

app = ServerApp()


def _round_ended(number: int, _: ArrayRecord) -> None:
    """Flower calls this after each round, and as round 0 before the first."""
    note(round=number)


@app.main()
def main(grid: Grid, _: Context) -> None:
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=1.0)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Network().state_dict()),
        train_config=ConfigRecord({"lr": 0.01}),
        num_rounds=int(os.environ["BENCH_ROUNDS"]),
        evaluate_fn=_round_ended,
    )
    note(ended=True)
