"""The egress ledger against what really leaves: the same names, sizes and hashes, written before the reply goes."""

import hashlib
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from tiny_federation import settings_with, site_settings, task_for, tiny_pack, tiny_workplace

import clients.message_handler
import clients.packs
from clients.egress import record_egress
from clients.message_handler import handle
from common.protocol import wire
from common.protocol.codec import encode
from common.protocol.ledger import digest_of, parts_of
from common.protocol.parameters import flatten
from common.system.files import append_line, read_lines

pytestmark = pytest.mark.usefixtures("in_a_run")


@pytest.fixture
def at_a_site(tmp_path, monkeypatch):
    """(send, ledger, model): hand a task to the client, read its ledger, the shared parameters of a fresh model."""
    monkeypatch.setattr(clients.message_handler, "_workplaces", {})
    monkeypatch.setattr(clients.packs, "open_pack", lambda *_args, **_named: tiny_pack("alpha"))
    state = tiny_workplace(settings_with(), tmp_path)
    shared = flatten(state.recogniser.state_dict(), state.manifest)
    site = site_settings("alpha", tmp_path)

    def send(model=shared, **values):
        task = task_for(state.manifest, settings_with(), **values)
        return handle(site, wire.task_message(task, wire.pack_shared(encode(model, "float32")), node_id=7, ttl_s=60.0))

    def ledger(run_id="run-1"):
        path = site.state_dir / "egress" / f"{run_id}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    send.site, send.shared = site, shared
    return send, ledger


def test_the_ledger_names_everything_in_the_reply_with_its_size_and_hash(at_a_site):
    send, ledger = at_a_site
    content = send().content
    line = ledger()[0]
    assert (line["client"], line["run"], line["round"], line["answer_to"]) == ("alpha", "run-1", 1, "train")
    parts = {part["name"]: part for part in line["parts"]}
    assert set(parts) == {f"{record}.{key}" for record, values in content.items() for key in values}
    for key, array in content["arrays"].items():
        part = parts[f"arrays.{key}"]
        assert part["num_bytes"] == len(array.data) == math.prod(array.shape) * np.dtype(array.dtype).itemsize
        assert part["sha256"] == hashlib.sha256(array.data).hexdigest()
        assert (part["shape"], part["dtype"]) == (list(array.shape), array.dtype)
    for key, value in content["sums"].items():
        assert parts[f"sums.{key}"]["sha256"] == hashlib.sha256(json.dumps(value).encode()).hexdigest()
    assert line["num_bytes"] == sum(part["num_bytes"] for part in line["parts"])


def test_join_train_and_evaluate_are_three_lines(at_a_site):
    send, ledger = at_a_site
    for kind in ("join", "train", "evaluate"):
        assert not send(kind=kind).has_error()
    assert [line["answer_to"] for line in ledger()] == ["join", "train", "evaluate"]


def test_the_words_of_a_failure_leave_too_and_stand_in_the_ledger(at_a_site):
    send, ledger = at_a_site
    reply = send(manifest="0" * 64)
    assert reply.has_error()
    part = ledger()[0]["parts"][0]
    assert part["name"] == "error.reason"
    assert part["text"] == reply.error.reason
    assert part["sha256"] == hashlib.sha256(reply.error.reason.encode()).hexdigest()


def test_nothing_is_answered_that_could_not_be_written_down(at_a_site, monkeypatch):
    send, _ = at_a_site

    def full(*_arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(clients.message_handler, "record_egress", full)
    with pytest.raises(OSError, match="no space"):
        send()


def through_objects(message):
    """The message as it arrives."""
    contents = {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
    return inflate_object_from_contents(message.object_id, contents)


def test_the_digest_of_a_line_is_that_of_what_arrives(at_a_site):
    """As Flower's objects, where a number of NumPy's becomes a plain one and a tuple a list."""
    send, ledger = at_a_site
    arrived = through_objects(send())
    assert digest_of(parts_of(arrived.content)) == ledger()[0]["sha256"]
    content = RecordDict({"sums": MetricRecord({"x": np.float64(0.1), "y": [1.5, 2.5]})})
    content["task"] = ConfigRecord({"yes": True, "raw": b"\xff", "many": [b"\xff", b""], "text": "Zoë ✓"})
    there = Message(content, 7, "train")
    assert parts_of(through_objects(there).content) == parts_of(content)


def test_what_the_server_received_stands_before_the_reply_to_the_task_that_says_so(at_a_site):
    send, ledger = at_a_site
    send(kind="join", received="")
    told = f"join 0 123 {'ab' * 32}"
    send(received=told)
    assert [line["kind"] for line in ledger()] == ["sent", "received", "sent"]
    receipt = ledger()[1]
    assert (receipt["answer_to"], receipt["round"], receipt["num_bytes"]) == ("join", 0, 123)
    assert receipt["sha256"] == "ab" * 32


@pytest.mark.parametrize("received", ["yes", "join 0 1 " + "ab" * 31, "upload 0 1 " + "ab" * 32, "x" * 1000])
def test_a_receipt_that_no_server_of_ours_writes_is_refused(at_a_site, received):
    send, ledger = at_a_site
    assert "receipt of the last reply is malformed" in send(received=received).error.reason
    assert [line["kind"] for line in ledger("unknown")] == ["sent"]


def test_a_line_that_was_cut_spoils_no_other(tmp_path):
    path = tmp_path / "ledger.jsonl"
    append_line(path, {"n": 1}, synced=True)
    with path.open("ab") as file:
        file.write(b'{"n": 2')  # the power went
    append_line(path, {"n": 3}, synced=False)
    assert [line.record for line in read_lines(path)] == [{"n": 1}, None, {"n": 3}]


def test_lines_are_added_and_none_is_replaced(tmp_path):
    task = task_for(tiny_workplace(settings_with(), tmp_path).manifest, settings_with())
    for number in range(3):
        record_egress(tmp_path, "alpha", task, RecordDict({"sums": wire.MetricRecord({"x": number})}))
    assert len((tmp_path / "run-1.jsonl").read_text().splitlines()) == 3


def test_a_line_is_bounded_whatever_is_sent_and_tells_the_hash_of_the_whole():
    """At the server it is what a hostile client sent: a name, a word, a shape or a thousand parts too many."""
    words = "no \x1b[31m\n" + "x" * 7_000_000
    (part,) = parts_of(words)
    assert len(json.dumps(part)) < 1000
    assert part["text"].isprintable()
    assert (part["num_bytes"], part["sha256"]) == (len(words), hashlib.sha256(words.encode()).hexdigest())
    assert part["sha256"] in part["text"]
    array = SimpleNamespace(stype="x", dtype="d" * 10**6, shape=(1,) * 10**5, data=b"")
    for content in ({"a" * 10**6: {}}, {"a": {"b" * 10**6: 1}}, {"a": {"b": array}}):
        assert len(json.dumps(parts_of(content))) < 1000
    many = {"a": {str(number): number for number in range(10**4)}}
    assert len(json.dumps(parts_of(many))) < 1000
    assert parts_of(many) != parts_of({"a": {**many["a"], "7": 8}})
    assert digest_of(parts_of({"a" * 300: {}})) != digest_of(parts_of({"a" * 301: {}}))


# ---- tasks that no server of ours sends


@pytest.mark.parametrize("run_id", ["../../escape", "/etc/escape", "..", "", "a/b", "a\0b", "x" * 129])
def test_a_run_id_cannot_lead_out_of_the_state_folder(at_a_site, tmp_path, run_id):
    send, ledger = at_a_site
    reply = send(run_id=run_id)
    assert "the run id" in reply.error.reason
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"unknown.jsonl"}
    assert len(ledger("unknown")) == 1


@pytest.mark.parametrize(
    ("values", "said"),
    [({"kind": "upload"}, "'upload' is unknown"), ({"splits": "val train"}, "'train' is unknown")],
)
def test_an_unknown_kind_or_split_is_refused_in_words(at_a_site, values, said):
    send, _ = at_a_site
    site = send.site
    task = task_for(tiny_workplace(settings_with(), site.state_dir).manifest, settings_with(), **values)
    message = Message(RecordDict({"task": wire.ConfigRecord(vars(task))}), 7, "train")
    assert said in handle(site, message).error.reason


def test_a_message_that_is_none_of_ours_is_refused_in_words(at_a_site):
    send, ledger = at_a_site
    assert "not one of FaceFed's" in handle(send.site, Message(RecordDict({}), 7, "train")).error.reason
    assert len(ledger("unknown")) == 1


def test_the_last_task_leaves_its_mark_for_flower_client(at_a_site):
    send, _ = at_a_site
    send(kind="evaluate")
    assert not (send.site.state_dir / "last-task").exists()
    send(kind="evaluate", last=True)
    assert (send.site.state_dir / "last-task").read_text() == "run-1"


def test_a_loss_that_is_not_finite_is_an_error_reply_that_names_the_step(at_a_site):
    send, _ = at_a_site
    bad = np.full_like(send.shared, 1e30)
    assert "at epoch 1, step 1 of 3; lower training.lr" in send(model=bad).error.reason
