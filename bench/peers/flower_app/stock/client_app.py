"""The ClientApp of the quickstart: load what came, train or score, answer with each tensor as an array."""

import os
import time
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from bench.peers.network import Network, load, test
from bench.peers.network import train as train_network
from stock.notes import note

app = ClientApp()


def _data(context: Context):
    folder, number = Path(os.environ["BENCH_ARRAYS"]), int(context.node_config["partition-id"])
    return load(sorted(folder.glob("*.npz"))[number], batch_size=32)


def _network(message: Message) -> Network:
    network = Network()
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return network


@app.train()
def train(message: Message, context: Context) -> Message:
    network, (loader, _) = _network(message), _data(context)
    began = time.perf_counter()
    loss = train_network(network, loader, lr=message.content["config"]["lr"], momentum=0.9)
    note(client=context.node_id, kind="train", seconds=time.perf_counter() - began)
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(loader.dataset)})
    content = RecordDict({"arrays": ArrayRecord(network.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    network, (_, loader) = _network(message), _data(context)
    began = time.perf_counter()
    loss, accuracy = test(network, loader)
    note(client=context.node_id, kind="evaluate", seconds=time.perf_counter() - began)
    metrics = MetricRecord({"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(loader.dataset)})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)
