"""NVFlare's simulator with its FedAvg job, one thread a client; started as a program by bench.rounds.

    BENCH_TIMES=FILE BENCH_ARRAYS=FOLDER BENCH_ROUNDS=3 python -m bench.peers.nvflare_simulation

A round begins when its model reaches the first client, so one more is run than is told.
"""

import os
import tempfile
from pathlib import Path

from nvflare.app_opt.pt.job_config.fed_avg import FedAvgJob
from nvflare.job_config.script_runner import ScriptRunner

from bench.peers.network import Network

NUM_CLIENTS = 2


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # with both cores each, two clients on two cores would do half the work
    rounds = int(os.environ["BENCH_ROUNDS"])
    job = FedAvgJob(name="w", n_clients=NUM_CLIENTS, num_rounds=rounds + 1, initial_model=Network())
    script = str(Path(__file__).parent / "nvflare_client.py")
    for number in range(1, NUM_CLIENTS + 1):
        job.to(ScriptRunner(script=script), f"site-{number}")  # the simulator gives each client a process
    with tempfile.TemporaryDirectory() as workspace:
        job.simulator_run(workspace, threads=NUM_CLIENTS)


if __name__ == "__main__":
    main()
