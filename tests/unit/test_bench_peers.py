"""Each peer of the bench runs one tiny step: one that breaks would otherwise be found out in the middle of a bench."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench import aggregation, pictures
from bench.peers import network, plain_loop
from bench.replies import enter_run
from bench.workload import CLIENTS, Workload

APP = Path(network.__file__).parent / "flower_app"


@pytest.fixture
def arrays(tmp_path):
    """Two clients of four training and two test pictures, in the form that the peers read."""
    random = np.random.default_rng(0)
    for client in CLIENTS:
        parts = {}
        for part, count in (("train", 4), ("test", 2)):
            parts[f"{part}_pictures"] = random.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
            parts[f"{part}_labels"] = random.integers(0, 36, count)
        np.savez(tmp_path / f"{client}.npz", **parts)
    return tmp_path


@pytest.fixture
def in_a_run(monkeypatch):
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, None)  # so that what enter_run sets is taken back
    enter_run()


@pytest.fixture
def stock(arrays, monkeypatch):
    """The stock app's modules, which find each other as in Flower's bundle, and the file of their notes."""
    monkeypatch.syspath_prepend(str(APP))
    monkeypatch.setenv("BENCH_ARRAYS", str(arrays))
    monkeypatch.setenv("BENCH_TIMES", str(arrays / "times.jsonl"))
    yield arrays / "times.jsonl"
    for name in [name for name in sys.modules if name.partition(".")[0] == "stock"]:
        del sys.modules[name]


def test_the_plain_loop_trains_and_tells_when_its_round_ended(arrays, monkeypatch):
    import torch

    times = arrays / "times.jsonl"
    data = [str(arrays / f"{client}.npz") for client in CLIENTS]
    threads = str(torch.get_num_threads())
    monkeypatch.setattr(sys, "argv", ["loop", "--rounds", "1", "--threads", threads, "--times", str(times), *data])

    plain_loop.main()

    (note,) = [json.loads(text) for text in times.read_text().splitlines()]
    assert note["round"] == 1
    assert note["train"] > 0


def test_the_peers_training_lowers_the_loss(arrays):
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, network.NUM_CLASSES))
    training, _ = network.load(arrays / f"{CLIENTS[0]}.npz", batch_size=4)

    losses = [network.train(model, training, lr=1e-4, momentum=0.9) for _ in range(4)]

    assert losses[-1] < losses[0]


@pytest.mark.usefixtures("in_a_run")
def test_the_stock_app_answers_each_message_and_fedavg_takes_the_answers(stock):
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
    from flwr.serverapp.strategy import FedAvg
    from stock import client_app

    state = network.Network().state_dict()
    content = RecordDict({"arrays": ArrayRecord(state), "config": ConfigRecord({"lr": 0.01})})
    answers = []
    for number in (0, 1):
        context = Context(1, number, {"partition-id": number}, RecordDict(), {})
        answers.append(client_app.train(Message(content, number, MessageType.TRAIN), context))
        scored = client_app.evaluate(Message(content, number, MessageType.EVALUATE), context)
        assert scored.content["metrics"]["num-examples"] == 2

    merged, metrics = FedAvg().aggregate_train(1, answers)

    assert answers[0].content["metrics"]["num-examples"] == 4
    assert list(merged) == list(state)
    assert metrics["train_loss"] > 0
    kinds = [json.loads(text)["kind"] for text in stock.read_text().splitlines()]
    assert kinds == ["train", "evaluate"] * 2


@pytest.mark.parametrize("side", ["ours", "ours, int8", "stock"])
@pytest.mark.usefixtures("in_a_run")
def test_each_side_of_the_aggregation_runs(side, monkeypatch):
    monkeypatch.setattr(aggregation, "NUM_REPLIES", 2)
    monkeypatch.setattr(aggregation, "PASSES", 1)

    found = aggregation.SIDES[side]()

    assert len(found["seconds"]) == 1


def test_image_folder_gives_batches_of_w(tmp_path):
    import torch

    workload, threads = Workload(folder=tmp_path), torch.get_num_threads()
    for person in ("a", "b"):
        folder = workload.pictures(CLIENTS[0]) / person
        folder.mkdir(parents=True)
        Image.new("RGB", (80, 100), (200, 30, 30)).save(folder / "1.jpg")

    found = pictures.image_folder(workload, workers=0)

    torch.set_num_threads(threads)
    assert len(found["images_per_second"]) == pictures.EPOCHS
