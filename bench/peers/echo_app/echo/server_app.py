"""The ServerApp: one array to all nodes, and theirs back, as often as it is told."""

import json
import os
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

NUM_CLIENTS, LOOK_EVERY_S = 2, 0.5

app = ServerApp()


def _note(**what: object) -> None:
    with Path(os.environ["BENCH_TIMES"]).open("a") as file:
        file.write(json.dumps({"time": time.time(), **what}) + "\n")


@app.main()
def main(grid: Grid, _: Context) -> None:
    while len(nodes := list(grid.get_node_ids())) < NUM_CLIENTS:
        time.sleep(LOOK_EVERY_S)
    size, rounds = int(os.environ["BENCH_BYTES"]) // 4, int(os.environ["BENCH_ROUNDS"])
    shared = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    for number in range(rounds + 1):  # round 0 starts the processes: its array is small
        sent = shared if number else shared[:1000]
        content = RecordDict({"arrays": ArrayRecord([sent])})
        messages = [Message(content, node, MessageType.TRAIN) for node in nodes]
        began = time.perf_counter()
        wanted = list(grid.push_messages(messages))
        del content, messages
        pushed, pulling, answered = time.perf_counter(), 0.0, []
        while len(answered) < len(wanted):
            time.sleep(LOOK_EVERY_S)
            for name in [name for name in wanted if name not in answered]:
                looked = time.perf_counter()
                found = list(grid.pull_messages([name]))
                if found:
                    pulling += time.perf_counter() - looked
                    answered.append(name)
                del found
        if number:
            _note(round=number, send=pushed - began, receive=pulling, whole=time.perf_counter() - began)
    _note(ended=True)
