"""Peak memory of the server's loop with 2 and with 16 clients: real messages of ResNet-18 (45 MB), made on demand.

    python -m bench.loop_memory [--clients 2 16] [--rounds 2]

Each count runs in a process of its own, whose high-water mark is read. The clients are stand-ins that answer with
serialised replies, one at a time, as the SuperLink hands them out; `bench.server_memory` measures real processes.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from common import config, wire
from common.metrics.verification import NUM_BINS
from common.settings import Settings
from common.wire import CLOSED_FIELDS, TRAIN_FIELDS, Reply, Site, SplitSums
from server.app import Surroundings, federate, initial_model


class StandIns:
    """A mailbox behind which `count` clients answer everything with made-up replies of full size."""

    def __init__(self, count: int, size: int) -> None:
        self._count, self._size = count, size
        self._numbers = itertools.count()
        self._waiting: dict[str, tuple[int, wire.Task]] = {}
        self._originals: dict[str, Message] = {}  # they share one copy of the model, as the loop made them

    def node_ids(self) -> list[int]:
        return list(range(1, self._count + 1))

    def send(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            ids.append(str(next(self._numbers)))
            self._waiting[ids[-1]] = (message.metadata.dst_node_id, wire.read_task(message.content)[0])
            self._originals[ids[-1]] = message
        return ids

    def receive(self, message_id: str) -> Message | None:
        node, task = self._waiting.pop(message_id)
        original = self._originals.pop(message_id)
        content = wire.site_content(self._site(node)) if task.kind == "join" else wire.reply_content(self._reply(task))
        return Message(content, reply_to=original)

    def _site(self, node: int) -> Site:
        return Site(
            name=f"c{node:02d}", dataset="folder", num_people=12, num_pictures=100, num_training_people=6,
            num_training_pictures=50, num_quarantined=0, val_people="0", machine="here", cores=2, device="cpu",
            precision="float32", memory_format="contiguous",
        )  # fmt: skip

    def _reply(self, task: wire.Task) -> Reply:
        pairs = np.zeros((2, NUM_BINS), dtype=np.int64)
        pairs[0, 5000] = pairs[1, 4000] = 100
        closed = dict.fromkeys(CLOSED_FIELDS, 1) | {"num_examples": 4, "num_classes": 2, "loss_sum": 2.0}
        training = task.kind == "train"
        return Reply(
            server_round=task.server_round,
            manifest=task.manifest,
            num_examples=10,
            train=dict.fromkeys(TRAIN_FIELDS, 1.0) if training else {},
            evaluations={split: SplitSums(closed=closed, pairs=pairs) for split in task.splits.split()},
            change=np.full(self._size, 1e-6, dtype=np.float32) if training else None,
        )


def run_here(count: int, rounds: int) -> float:
    """Federate in this process; returns its high-water mark in MiB."""
    for name in ("_run_id", "_node_id", "_task_id"):
        setattr(TaskIdentity, name, 1)
    raw = config.to_mapping(Settings())
    raw["federation"] |= {"rounds": rounds, "min_clients": count}
    raw["tracking"] |= {"enabled": False, "plots": "none"}
    settings = config.from_mapping(raw)
    _, manifest = initial_model(settings)
    with tempfile.TemporaryDirectory() as folder:
        surroundings = Surroundings(
            run_folder=Path(folder), stopped=lambda: False, all_nodes_are_here=lambda: True, git_commit="bench"
        )
        federate(settings, StandIns(count, manifest.size), surroundings)
        outcome = json.loads((Path(folder) / "outcome.json").read_text())
    if outcome["exit_code"] != 0:
        sys.exit(outcome["line"])
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--here", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(run_here(arguments.here, arguments.rounds))
        return
    peaks = {}
    for count in arguments.clients:
        command = [sys.executable, "-m", "bench.loop_memory", "--rounds", str(arguments.rounds), "--here", str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(done.stderr.strip()[-400:])
        peaks[count] = float(done.stdout.split()[-1])
        ratio = peaks[count] / peaks[arguments.clients[0]]
        print(f"{count:3d} clients: {peaks[count]:6.0f} MiB, {ratio:.3f} of the first")


if __name__ == "__main__":
    main()
