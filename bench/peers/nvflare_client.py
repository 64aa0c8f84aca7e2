"""One client of NVFlare's FedAvg, by its client API's example: score what came, train, send."""

import os
import time
from pathlib import Path

import nvflare.client as flare

from bench.peers.flower_app.stock.notes import note
from bench.peers.network import Network, load, test, train


def main() -> None:
    network = Network()
    flare.init()
    site = flare.get_site_name()  # site-1, site-2
    arrays = sorted(Path(os.environ["BENCH_ARRAYS"]).glob("*.npz"))[int(site.rpartition("-")[2]) - 1]
    training, held_back = load(arrays, batch_size=32)
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        if site == "site-1":  # what comes first in a round says that the one before has ended
            note(round=received.current_round)
        network.load_state_dict(received.params)
        began = time.perf_counter()
        loss, accuracy = test(network, held_back)
        scored = time.perf_counter()
        train(network, training, lr=0.01, momentum=0.9)
        note(client=site, kind="evaluate", seconds=scored - began)
        note(client=site, kind="train", seconds=time.perf_counter() - scored)
        steps = {"NUM_STEPS_CURRENT_ROUND": len(training)}
        params = network.cpu().state_dict()
        flare.send(flare.FLModel(params=params, metrics={"accuracy": accuracy, "loss": loss}, meta=steps))


if __name__ == "__main__":
    main()
