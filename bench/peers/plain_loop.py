"""The plain PyTorch loop, in float32: one process, all clients' pictures one after the other, then scoring.

    python -m bench.peers.plain_loop --rounds 4 --threads 2 --times FILE ARRAYS.npz ARRAYS.npz

Appends one JSON line at each round's end to FILE: {"round": 1, "time": seconds since the epoch}.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch.utils.data import ConcatDataset, DataLoader
from torchvision.models import resnet18

from bench.peers.network import NUM_CLASSES, Network, load, test, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--times", type=Path, required=True)
    parser.add_argument("--network", choices=("ours", "torchvision"), default="ours")
    parser.add_argument("arrays", type=Path, nargs="+")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loaders = [load(path, arguments.batch) for path in arguments.arrays]
    together = ConcatDataset([training.dataset for training, _ in loaders])
    training = DataLoader(together, batch_size=arguments.batch, shuffle=True)
    network = Network() if arguments.network == "ours" else resnet18(num_classes=NUM_CLASSES)
    for number in range(1, arguments.rounds + 1):
        began = time.perf_counter()
        train(network, training, arguments.lr, arguments.momentum)
        trained = time.perf_counter()
        for _, held_back in loaders:
            test(network, held_back)
        ended = time.perf_counter()
        line = {"round": number, "time": time.time(), "train": trained - began, "evaluate": ended - trained}
        with arguments.times.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
