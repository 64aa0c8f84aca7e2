"""The stock app on stock Flower with separate processes: a SuperLink, two SuperNodes, `flwr run`.

    BENCH_TIMES=FILE BENCH_ARRAYS=FOLDER BENCH_ROUNDS=2 python -m bench.peers.flower_deployment

Each SuperNode gets one thread: with both cores each, two clients on two cores would do half the work.
"""

import os
import shutil
import tempfile
from pathlib import Path

from bench.stock_flower import Node, federate

APP = Path(__file__).parent / "flower_app"
NUM_CLIENTS = 2


def run(folder: Path, app: Path = APP) -> None:
    """One run of a stock app; every process it starts has ended afterwards."""
    times = Path(os.environ["BENCH_TIMES"])

    def run_ended() -> bool:
        return times.exists() and '"ended"' in times.read_text()

    shutil.copytree(app, folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    one_thread = {"BENCH_PART": "client", "OMP_NUM_THREADS": "1"}
    nodes = [Node(f"partition-id={number}", one_thread) for number in range(NUM_CLIENTS)]
    federate(folder / "app", folder, nodes, run_ended, cwd=folder)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder))


if __name__ == "__main__":
    main()
