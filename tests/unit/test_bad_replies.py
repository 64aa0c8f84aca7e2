"""A thousand made-up replies, each on the server's real path beside honest ones: none that is bad reaches the model.

From a good reply one to three things are changed. Some of what comes out is still a good reply, and has to count: a
server that refused everything would fail here.
"""

import json
import os
import shutil
from collections import Counter

import numpy as np
import pytest
from bad_replies import bad_replies
from flwr.app import Message
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from object_grid import ObjectMailbox
from tiny_federation import MANIFEST, client, federation_over, reply_to, settings_with

from common.protocol import wire
from common.protocol.codec import encode
from common.system.events import EventReader
from server.aggregate import aggregate_for

pytestmark = pytest.mark.usefixtures("in_a_run", "no_syncing")


@pytest.fixture
def no_syncing(monkeypatch):
    """Fifty federations' checkpoints need not survive a power cut."""
    monkeypatch.setattr(os, "fsync", lambda _file: None)


A_ROUND = 20  # bad clients beside the honest ones
HONEST = 5
FEDERATIONS = [
    {"federation__strategy": "fedavg"},
    {"federation__strategy": "fedavg", "federation__upload_codec": "int8"},
    {"federation__strategy": "fedavg", "federation__upload_codec": "float16"},
    {"federation__strategy": "fedavg", "federation__norm_factor": 5.0},
    {"federation__strategy": "fedmedian"},
    {"federation__strategy": "fedtrimmedavg", "federation__upload_codec": "int8"},
    {"federation__strategy": "krum"},
    {"federation__strategy": "multikrum", "federation__norm_factor": 3.0},
]
# Each example is a round of its own, so shrinking one would take minutes; its faults are told as they are.
FUZZ = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "database": None,
    "phases": [Phase.generate],
}


@st.composite
def rounds_of_bad_replies(draw):
    chosen = draw(st.sampled_from(FEDERATIONS))
    codec = chosen.get("federation__upload_codec", "float32")
    return chosen, draw(st.lists(bad_replies(codec), min_size=A_ROUND, max_size=A_ROUND))


def honest(number, codec):
    change = np.linspace(-1, 1, MANIFEST.size, dtype=np.float32) * (1 + number / 10)
    return client(f"h{number}", lambda task: reply_to(task, change=change, num_examples=10 + number, codec=codec))


def misbehaving(name, bad, codec, sent):
    """A client that answers well but for the one kind of task; `sent` gets the change that it sent in training."""

    def script(task, request):
        if task.kind == "join":
            return client(name)(task, request)
        content = wire.reply_content(reply_to(task, codec=codec))
        if task.kind != bad.kind or not task.splits:
            reply = Message(content, reply_to=request)
        else:
            reply = bad.reply(content, request)
        if task.kind == "train" and (bad.is_valid or bad.kind != "train"):
            sent[name] = (reply.content["arrays"]["change"], reply.content["sums"]["num-examples"])
        return reply

    return script


def expected_model(chosen, sent, folder):
    """The aggregate of those changes alone, and who stands out by its norm."""
    federation = settings_with(**chosen).federation
    total = aggregate_for(federation, MANIFEST.size, folder / "expected")
    for name, (array, number) in sorted(sent.items()):
        total.add(wire._read_flat({"change": array}, "change"), number, name)
    outliers = set(total.outliers())
    return total.mean(), outliers


seen = Counter()


@pytest.mark.filterwarnings("ignore:Generating overly large repr")  # of a failure; it is told all the same
@given(rounds_of_bad_replies())
@settings(max_examples=50, **FUZZ)
def test_no_bad_reply_reaches_the_model_or_stops_the_server_and_each_is_named(tmp_path_factory, drawn):
    chosen, bad = drawn
    codec = chosen.get("federation__upload_codec", "float32")
    folder = tmp_path_factory.mktemp("run")
    sent = {}
    nodes = {n: honest(n, codec) for n in range(1, HONEST + 1)}
    for number, one in enumerate(bad):
        nodes[100 + number] = misbehaving(f"m{number:02d}", one, codec, sent)
    for number in range(1, HONEST + 1):
        change = np.linspace(-1, 1, MANIFEST.size, dtype=np.float32) * (1 + number / 10)
        sent[f"h{number}"] = (wire._flat_array(encode(change, codec)), 10 + number)
    # A QUERY and the replies that nobody changed need no unpacking.
    changed = {(100 + number, one.kind) for number, one in enumerate(bad)}
    mailbox = ObjectMailbox(nodes, through=lambda node, kind: (node, kind) in changed)
    federation = federation_over(mailbox, settings_with(federation__rounds=1, **chosen), folder)
    federation.farewell = False

    outcome = federation.run()

    model, outliers = expected_model(chosen, sent, folder)
    assert federation.model.received.tobytes() == model.tobytes()
    refused = {f"m{number:02d}" for number, one in enumerate(bad) if not one.is_valid} | outliers
    odd = set(federation.record.reasons(1)) ^ refused
    assert not odd, {name: bad[int(name[1:])] for name in odd if name[0] == "m"}
    told = [event for event in EventReader(folder).new_events() if event["kind"] == "refused"]
    assert {event["client"] for event in told} == refused
    assert all(event["reason"] and len(event["reason"]) < 600 and event["reason"].isprintable() for event in told)
    summary = federation.record.finished(outcome.history, outcome.last_round, outcome.sha256)
    assert summary["refused_replies"] == len(told) >= len(refused)
    logged = [json.loads(line) for line in (folder / "spool.jsonl").read_text().splitlines()]
    values = [float(row["value"]) for row in logged if "value" in row]
    assert np.isfinite(values).all(), "a bad reply spoilt a figure"
    seen.update(valid=sum(one.is_valid for one in bad), bad=sum(not one.is_valid for one in bad))
    shutil.rmtree(folder)


def test_a_thousand_were_made_and_some_of_them_were_good():
    """Runs after the test above, in this file's order."""
    if not seen:
        pytest.skip("only with the test above")
    assert seen["bad"] + seen["valid"] >= 1000
    assert seen["valid"] >= 100
