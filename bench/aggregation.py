"""Aggregating 32 replies of ResNet-18 (45 MB each) that are in memory as the wire left them, against stock FedAvg.

    python -m bench.aggregation --side ours|stock|memory

Ours decodes each reply, checks all of it, finiteness included, and adds it; the last figure is the addition alone.
Stock FedAvg gets the same numbers, each tensor an array, and checks nothing. A pass before the measured ones warms up.
"memory" is the speed of `torch.add_` on the very same buffers: as quickly as this machine can add them.
"""

import argparse
import json
import sys
import time
from functools import partial

from bench.comparison import Claim, Comparison, Figures, Place
from bench.sides import ROOT, environment
from bench.watch import run_side

NUM_REPLIES, PASSES = 32, 3


def _training_task():
    from common.protocol.wire import Task
    from common.settings import Settings
    from server.app import initial_model

    _, manifest = initial_model(Settings())
    task = Task(kind="train", run_id="r", server_round=1, settings="", manifest=manifest.digest, splits="val")
    return task, manifest


def _messages(codec: str) -> tuple[list, object]:
    """32 replies as Flower hands them over, and the model's manifest."""
    from bench.replies import answer, enter_run, reply
    from common.protocol import wire

    enter_run()
    task, manifest = _training_task()
    asked = wire.task_message(task, None, node_id=1, ttl_s=60.0)
    replies = (reply(task, manifest.size, codec=codec, seed=number) for number in range(NUM_REPLIES))
    return [answer(wire.reply_content(one), asked) for one in replies], manifest


def ours(codec: str = "float32") -> Figures:
    """Seconds for all 32: everything, and the addition alone."""
    from bench.replies import site
    from common.protocol import wire
    from server.aggregate import WeightedChange
    from server.exchange.guard import check_train_reply

    messages, manifest = _messages(codec)
    whole, adding = [], []
    for _ in range(1 + PASSES):
        total, added_s, began = WeightedChange(manifest.size), 0.0, time.perf_counter()
        for message in messages:
            got = wire.read_reply(message, "val")
            check_train_reply(got, server_round=1, manifest=manifest, site=site(0), codec=codec)
            checked = time.perf_counter()
            total.add(got.change, got.num_examples)
            added_s += time.perf_counter() - checked
        whole.append(time.perf_counter() - began)
        adding.append(added_s)
    return {"seconds": whole[1:], "add_seconds": adding[1:]}


def memory() -> Figures:
    """Seconds of the bare additions."""
    import numpy as np
    import torch

    _, manifest = _training_task()
    buffers = [torch.from_numpy(np.full(manifest.size, 1e-3, dtype=np.float32)) for _ in range(NUM_REPLIES)]
    total, seconds = torch.zeros(manifest.size), []
    for _ in range(1 + PASSES):
        began = time.perf_counter()
        for buffer in buffers:
            total.add_(buffer, alpha=10.0)
        seconds.append(time.perf_counter() - began)
    return {"add_seconds": seconds[1:]}


def stock() -> Figures:
    """Seconds of FedAvg's aggregate_train on the same numbers, each tensor an array."""
    import torch
    from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
    from flwr.serverapp.strategy import FedAvg

    from bench.peers.network import Network
    from bench.replies import enter_run

    enter_run()
    asked = Message(RecordDict({"config": ConfigRecord({})}), 1, MessageType.TRAIN)
    state = Network().backbone.state_dict()
    messages = []
    for number in range(NUM_REPLIES):
        torch.manual_seed(number)
        arrays = {
            name: torch.randn_like(tensor) * 1e-3 if tensor.is_floating_point() else tensor
            for name, tensor in state.items()
        }
        metrics = MetricRecord({"num-examples": 10})
        content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
        messages.append(Message(content, reply_to=asked))
    seconds = []
    for _ in range(1 + PASSES):
        began = time.perf_counter()
        FedAvg().aggregate_train(1, messages)
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[1:]}


SIDES = {"stock": stock, "ours": ours, "ours, int8": partial(ours, "int8"), "memory": memory}


def in_a_process(_: Place, *, side: str) -> Figures:
    command = [sys.executable, "-W", "ignore", "-m", "bench.aggregation", "--side", side]
    return run_side(command, cwd=ROOT, environment=environment())


WHAT = f"{NUM_REPLIES} replies of 45 MB"
COMPARISON = Comparison(
    name="aggregation",
    what=f"{WHAT}, in memory; stock: FedAvg.aggregate_train. memory: bare torch additions of the same buffers.",
    sides={side: partial(in_a_process, side=side) for side in SIDES},
    claims=(
        Claim(what=f"{WHAT}: decode, check finite, add", ours="ours", figure="seconds", peer="stock", goal=0.30,
              of="ours"),
        Claim(what=f"{WHAT}: the addition alone", ours="ours", figure="add_seconds", peer="memory", goal=0.12,
              of="ours"),
        Claim(what=f"{NUM_REPLIES} replies in int8: decode, check, add", ours="ours, int8", figure="seconds",
              peer="stock"),
    ),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES, required=True)
    print(json.dumps(SIDES[parser.parse_args().side]()))


if __name__ == "__main__":
    main()
