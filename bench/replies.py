"""Real messages of made-up clients: what the server gets from the wire, without anyone having trained."""

import numpy as np
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from common.metrics.folds import FOLD_BINS, NUM_FOLDS
from common.metrics.sums import CLOSED_FIELDS, MOST_GROUPS, NUM_BINS, ClosedSetSums, EvaluationSums
from common.protocol import wire
from common.protocol.codec import encode
from common.protocol.wire import TRAIN_FIELDS, Reply, Site

NUM_PICTURES = 100


def enter_run() -> None:
    """Let this process make messages: Flower asks which run they are of."""
    for name in ("_run_id", "_node_id", "_task_id"):
        setattr(TaskIdentity, name, 1)


def site(number: int) -> Site:
    """Client `number` as it joins."""
    return Site(
        name=f"c{number:04d}", dataset="folder", num_people=12, num_pictures=NUM_PICTURES, num_training_people=6,
        num_training_pictures=50, num_quarantined=0, val_people="0", test_pairs="0", machine="here", cores=2,
        device="cpu", precision="float32", memory_format="contiguous",
    )  # fmt: skip


def _sums() -> EvaluationSums:
    pairs = np.zeros((2, NUM_BINS), dtype=np.int64)
    pairs[0, 5000] = pairs[1, 4000] = NUM_PICTURES
    numbers = dict.fromkeys(CLOSED_FIELDS, 1) | {"num_examples": 4, "num_classes": 2, "loss_sum": 2.0}
    return EvaluationSums(
        closed=ClosedSetSums(**numbers),
        pairs=pairs,
        folds=np.zeros((NUM_FOLDS, 2, FOLD_BINS), dtype=np.int64),
        confusion=np.zeros((min(6, MOST_GROUPS),) * 2, dtype=np.int64),
    )


def reply(task: wire.Task, size: int, *, codec: str = "float32", seed: int = 0) -> Reply:
    """The answer to a task; a change of `size` numbers when training was asked for."""
    training = task.kind == "train"
    change = np.random.default_rng(seed).standard_normal(size, dtype=np.float32) * 1e-3 if training else None
    return Reply(
        server_round=task.server_round,
        manifest=task.manifest,
        num_examples=10,
        train=dict.fromkeys(TRAIN_FIELDS, 1.0) if training else {},
        evaluations={split: _sums() for split in task.splits.split()},
        change=None if change is None else encode(change, codec),
    )


def answer(content, original: Message) -> Message:  # content: RecordDict
    """The message that answers another."""
    return Message(content, reply_to=original)
