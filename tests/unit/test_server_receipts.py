"""What the server writes down of each reply, and tells its client with the next task."""

import json
import logging

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from tiny_federation import MANIFEST, ScriptedMailbox, client, federation_over, reply_to, settings_with

from common.protocol import wire
from common.protocol.ledger import RECEIPT, digest_of, parts_of
from common.protocol.wire import Task
from server.exchange.receipts import ReceiptMailbox

pytestmark = pytest.mark.usefixtures("in_a_run")


def received(folder):
    path = folder / "received.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def task(kind, server_round=0):
    return Task(kind=kind, run_id="r", server_round=server_round, settings="{}", manifest=MANIFEST.digest, splits="")


def exchange(mailbox, node, *tasks):
    """Send one task after the other to a node and take its replies."""
    replies = []
    for one in tasks:
        (message_id,) = mailbox.send([wire.task_message(one, None, node_id=node, ttl_s=9.0)])
        replies.append(mailbox.receive(message_id))
    mailbox.settle()
    return replies


def told(scripted, node):
    """The receipts that a node was sent, task by task."""
    return [task.received for to, task in scripted.tasks if to == node]


def test_each_task_carries_the_receipt_of_what_that_node_sent_last(tmp_path):
    scripted = ScriptedMailbox({1: client("alpha"), 2: client("beta")})
    mailbox = ReceiptMailbox(scripted, tmp_path, "r")
    sent = {node: exchange(mailbox, node, task("join"), task("train", 1), task("evaluate", 1)) for node in (1, 2)}
    for node, name in ((1, "alpha"), (2, "beta")):
        lines = [line for line in received(tmp_path) if line["client"] == name]
        assert [(line["answer_to"], line["round"]) for line in lines] == [("join", 0), ("train", 1), ("evaluate", 1)]
        for line, reply in zip(lines, sent[node], strict=True):
            assert line["parts"] == parts_of(reply.content)
            assert line["sha256"] == digest_of(line["parts"])
        first, *others = told(scripted, node)
        assert first == ""
        found = [RECEIPT.fullmatch(text).groups() for text in others]
        assert found == [
            (line["answer_to"], str(line["round"]), str(line["num_bytes"]), line["sha256"]) for line in lines[:2]
        ]


def test_the_words_of_a_client_that_failed_are_received_too_and_flowers_own_are_not(tmp_path):
    replies = iter([wire.CLIENT_FAILED, 2, 2])
    scripted = ScriptedMailbox({1: lambda _, m: Message(Error(code=next(replies), reason="no luck"), reply_to=m)})
    exchange(ReceiptMailbox(scripted, tmp_path, "r"), 1, task("train", 1), task("train", 2), task("train", 3))
    (line,) = received(tmp_path)
    assert [part["text"] for part in line["parts"]] == ["no luck"]
    assert [text.split()[:2] for text in told(scripted, 1)] == [[], ["train", "1"], ["train", "1"]]


HOSTILE = {
    "bytes": {"site": ConfigRecord({"name": b"\xff", "many": [b"\xff"]})},
    "lone surrogate": {"sums": MetricRecord({"\ud800": 1.0})},
    "numbers": {"sums": MetricRecord({"x": float("nan"), "y": 2**62})},
    "no header": {"arrays": ArrayRecord({"change": Array(dtype="x" * 5000, shape=(-1, 2**40), stype="?", data=b"")})},
    "name": {"site": ConfigRecord({"name": "../../../etc\n" * 100})},
    "site of arrays": {"site": ArrayRecord({"name": Array(np.zeros(1))})},
    "nothing": {},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_whatever_a_client_sends_is_passed_on_and_ends_no_run(tmp_path, kind):
    scripted = ScriptedMailbox({1: lambda _, message: Message(RecordDict(HOSTILE[kind]), reply_to=message)})
    (reply,) = exchange(ReceiptMailbox(scripted, tmp_path, "r"), 1, task("join"))
    assert set(reply.content) == set(HOSTILE[kind])
    assert [line["client"] for line in received(tmp_path)] == [""]


def test_a_record_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    (tmp_path / "received.jsonl").mkdir()
    mailbox = ReceiptMailbox(ScriptedMailbox({1: client("alpha")}), tmp_path, "r")
    with caplog.at_level(logging.WARNING, "facefed.server"):
        assert exchange(mailbox, 1, task("join"))[0] is not None
    assert "a reply is not in" in caplog.text


def test_a_whole_federation_has_a_line_for_each_reply_the_refused_ones_too(tmp_path):
    def poisoned(task):
        return reply_to(task, change=float("nan") if task.server_round == 1 else 0.5)

    scripted = ScriptedMailbox({1: client("alpha"), 2: client("beta", poisoned)})
    federation = federation_over(scripted, settings_with(federation__min_clients=1), tmp_path)
    federation.mailbox = federation.roster._mailbox = ReceiptMailbox(scripted, tmp_path, tmp_path.name)
    federation.run()
    federation.mailbox.close()
    lines = received(tmp_path)
    assert {line["run"] for line in lines} == {tmp_path.name}
    for name in ("alpha", "beta"):
        answered = [(line["answer_to"], line["round"]) for line in lines if line["client"] == name]
        assert answered == [("join", 0), ("train", 1), ("train", 2), ("evaluate", 2), ("evaluate", 1)]
    assert all(text for node in (1, 2) for text in told(scripted, node)[1:])
