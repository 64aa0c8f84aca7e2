"""A reply at the server: it lies in memory once, and a model leaves a few pieces at a time."""

import dataclasses
import gc
import json
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import (
    add_header_to_object_body,
    get_all_nested_objects,
    get_object_body,
    get_object_tree,
    no_object_id_recompute,
)
from object_grid import FakeRuntime

from common.protocol.codec import encode
from common.protocol.parameters import manifest_of
from common.settings import FederationSettings
from server.flower import grid
from server.flower.grid import PUSHED_AT_ONCE, GridMailbox, push_in_turn
from server.global_model import GlobalModel, ServerOptimiser

pytestmark = pytest.mark.usefixtures("in_a_run")

MIB = 2**20
PIECE = 5 * MIB


@pytest.fixture
def runtime(monkeypatch):
    """The SuperLink's side; Flower's table is put back."""
    monkeypatch.setattr(inflatable_utils, "inflatable_class_registry", dict(inflatable_utils.inflatable_class_registry))
    return FakeRuntime()


def mailbox_over(runtime, model_bytes):
    from flwr.superlink.grid.http_grid import HttpGrid

    flowers = HttpGrid("127.0.0.1:1", insecure=True, token="none")
    flowers._client, flowers._run = runtime, SimpleNamespace(run_id=1)
    mailbox = GridMailbox(flowers)
    mailbox.expect(model_bytes)
    return mailbox


def lay_down(runtime, **arrays):
    """The reply of a node with these arrays, in the SuperLink's store."""
    record = ArrayRecord()
    for name, data in arrays.items():
        record[name] = Array(dtype="uint8", shape=(len(data),), stype="facefed.flat", data=data)
    asked = Message(RecordDict(), 5, "train")
    asked.metadata.__dict__["_message_id"] = "0" * 64
    message = Message(RecordDict({"arrays": record, "task": ConfigRecord({"manifest": "m"})}), reply_to=asked)
    from flwr.app.message import remove_content_from_message
    from flwr.common.serde import message_to_proto

    with no_object_id_recompute():
        message.metadata.__dict__["_message_id"] = message.object_id
        runtime.objects = {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
        runtime.tree = get_object_tree(message)
    runtime.listed = message_to_proto(remove_content_from_message(message))


class Part(bytes):
    """An object's bytes, which tell when they go."""

    gone = 0

    def __del__(self):
        Part.gone += 1


def test_a_reply_lies_in_memory_once_while_it_is_put_together(runtime, monkeypatch):
    """The stand-in for the SuperLink gives each part away as it is asked for, as a socket does."""
    data = np.random.default_rng(0).bytes(6 * PIECE + 11)
    lay_down(runtime, change=data)
    mailbox = mailbox_over(runtime, len(data))
    runtime.objects = {name: Part(content) for name, content in runtime.objects.items()}
    flowers, together, gone_by_then = runtime.PullObject, grid._put_together, []

    def pull(request):
        answer = flowers(request)
        runtime.objects[request.object_id] = b"given away"
        return answer

    def put_together(*parts):
        Part.gone = 0
        whole = together(*parts)
        gone_by_then.append(Part.gone)
        return whole

    runtime.PullObject = pull
    monkeypatch.setattr(grid, "_put_together", put_together)
    gc.collect()
    tracemalloc.start()
    array = mailbox.receive("0" * 64).content["arrays"]["change"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (array.dtype, array.shape, array.stype) == ("uint8", (len(data),), "facefed.flat")
    assert array.data == data
    assert gone_by_then == [7]  # each piece as it had its place
    assert peak < len(data) + PIECE  # the parts came before the tracing began; Flower's own makes two and more of it


def test_a_piece_that_two_arrays_share_is_in_both_and_in_one_twice(runtime):
    zeros = bytes(2 * PIECE)
    lay_down(runtime, change=zeros, counts=zeros[:PIECE], none=b"")
    arrays = mailbox_over(runtime, 4 * PIECE).receive("0" * 64).content["arrays"]
    assert {name: bytes(array.data) for name, array in arrays.items()} == {
        "change": zeros,
        "counts": zeros[:PIECE],
        "none": b"",
    }


def test_an_array_made_of_arrays_is_refused_before_it_grows(runtime):
    """An array of 1 MiB listed 2 ** 20 times would be a TiB; only pieces count against the limit."""
    lay_down(runtime, change=bytes(MIB))
    mailbox = mailbox_over(runtime, 4 * MIB)
    inner = next(name for name, content in runtime.objects.items() if content.startswith(b"Array "))
    body = json.loads(get_object_body(runtime.objects[inner], Array)) | {"arraychunk_ids": [0] * 2**20}
    holder = dataclasses.make_dataclass("Array", ["children"])({inner: None})
    outer_content = add_header_to_object_body(json.dumps(body).encode(), holder)
    pieces = {"x" * 64: outer_content, **runtime.objects}
    with grid.bounded(4 * MIB), pytest.raises(ValueError, match="other things than pieces"):
        inflatable_utils.inflate_object_from_contents("x" * 64, pieces)
    assert mailbox.receive("0" * 64) is not None


def test_the_bytes_of_a_few_pieces_are_made_before_they_are_sent(monkeypatch):
    monkeypatch.setattr(
        inflatable_utils, "push_object_contents_from_iterable", inflatable_utils.push_object_contents_from_iterable
    )
    push_in_turn()
    made, sent, ahead = [], [], []

    def contents():
        for number in range(13):
            made.append(number)
            yield f"{number}", b"piece"

    def push(name, _content):
        ahead.append(len(made) - len(sent))
        sent.append(name)

    inflatable_utils.push_object_contents_from_iterable(contents(), push, max_concurrent_pushes=2)
    assert sorted(sent, key=int) == [f"{number}" for number in range(13)]
    assert max(ahead) <= PUSHED_AT_ONCE


def test_what_was_sent_stays_as_it_is_when_the_model_goes_on():
    manifest = manifest_of({"weight": torch.zeros(3)})
    model = GlobalModel(np.ones(3, dtype=np.float32), "float32")
    sent = model.coded()
    model.step(ServerOptimiser.of(FederationSettings(), manifest, {"weight"}), np.full(3, 2.0, dtype=np.float32))
    assert bytes(sent.moving.data) == encode(np.ones(3, dtype=np.float32), "float32").data
    assert model.received.tolist() == [3.0, 3.0, 3.0]
