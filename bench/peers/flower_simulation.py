"""Stock Flower's simulation of the stock app, one core a client; started as a program by bench.rounds.

    BENCH_TIMES=FILE BENCH_ARRAYS=FOLDER BENCH_ROUNDS=4 python -m bench.peers.flower_simulation

`run_simulation` in this process, which starts sooner than the SuperLink and SuperExec of `flwr run`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "flower_app"))

from flwr.simulation import run_simulation
from stock.client_app import app as client_app
from stock.server_app import app as server_app

NUM_CLIENTS = 2


def main() -> None:
    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=NUM_CLIENTS,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )


if __name__ == "__main__":
    main()
