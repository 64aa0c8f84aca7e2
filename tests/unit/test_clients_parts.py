"""A model's way through the SuperNode's process: what comes out is what went in, and no byte lies there twice."""

import gc
import threading
import tracemalloc
from collections import deque
from multiprocessing import Pipe
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState
from flwr.supernode.runtime.run_clientapp import push_message
from flwr.supernode.servicer.runtime import runtime_handlers

from clients.flower.parts import Answered, Inside, ReadyChunk, Store, take_in_pieces
from clients.flower.trainer import PIECE_BYTES, receive_content, send_content

pytestmark = pytest.mark.usefixtures("in_a_run")

MIB = 2**20
SIZE = 3 * PIECE_BYTES // 4 + 7  # of float32: four pieces, the last a small one


@pytest.fixture
def in_pieces(monkeypatch):
    """Flower's table as the SuperNode's process has it."""
    monkeypatch.setattr(inflatable_utils, "inflatable_class_registry", dict(inflatable_utils.inflatable_class_registry))
    take_in_pieces()


@pytest.fixture
def state():
    """What a SuperNode keeps."""
    kept = InMemoryNodeState(InMemoryObjectStore())
    kept.set_node_id(5)
    return kept


def content_of(**arrays):
    record = ArrayRecord()
    for name, values in arrays.items():
        record[name] = Array(dtype="float32", shape=values.shape, stype="facefed.flat", data=values.tobytes())
    return RecordDict({"arrays": record, "task": ConfigRecord({"kind": "train"})})


def lay_down(state, message):
    """As the SuperNode does with what came from the server."""
    with no_object_id_recompute():
        tree, objects = get_object_tree(message), get_all_nested_objects(message)
        state.object_store.preregister(1, tree)
        for name, one in objects.items():
            state.object_store.put(name, one.deflate())
    return tree


def take_up(inside, tree, state):
    """As the executor does with what lies there."""
    return inflatable_utils.pull_and_inflate_object_from_tree(
        tree,
        make_pull_object_fn_protobuf(inside.PullObject, Node(node_id=5), 1),
        state.object_store.delete,
        return_type=Message,
    )


@pytest.mark.usefixtures("in_pieces")
def test_a_model_is_taken_where_it_lies_and_given_to_the_trainer_piece_by_piece(state):
    sent = np.random.default_rng(0).standard_normal(SIZE, dtype=np.float32)
    tree = lay_down(state, Message(content_of(shared=sent, small=np.zeros(3, np.float32)), 5, "train"))
    gc.collect()
    tracemalloc.start()
    message = take_up(Inside(None, state, Answered()), tree, state)
    assert tracemalloc.get_traced_memory()[1] < MIB  # of 15: nothing was copied
    tracemalloc.stop()
    assert len(state.object_store) == 0
    pieces = message.content["arrays"]["shared"].data
    assert [len(piece) for piece in pieces] == [PIECE_BYTES] * 3 + [28]

    ours, theirs = Pipe()
    sending = threading.Thread(target=send_content, args=(ours, message.content))
    sending.start()
    got = receive_content(theirs)
    sending.join()
    assert got["arrays"]["shared"].data == sent.tobytes()
    assert not got["arrays"]["shared"].data.readonly
    assert len(pieces) == 0  # each was given away
    assert list(got["arrays"]) == ["shared", "small"]


class Api:
    """The SuperNode's API, of which only the announcement of an answer is asked."""

    def __init__(self, state):
        self._state = state

    def PushMessages(self, request):  # noqa: N802
        return runtime_handlers.push_messages(request, self._state, SimpleNamespace(run_id=1))


def test_an_answer_lies_in_the_supernodes_store_as_it_came_and_flower_reads_it(state):
    """Two arrays of zeros have a piece in common."""
    rng = np.random.default_rng(1)
    arrays = {
        "change": rng.standard_normal(SIZE, dtype=np.float32),
        "zeros": np.zeros(2 * PIECE_BYTES // 4, np.float32),
        "more": np.zeros(PIECE_BYTES // 4, np.float32),
        "none": np.zeros(0, np.float32),
    }
    ours, theirs = Pipe()
    sending = threading.Thread(target=send_content, args=(ours, content_of(**arrays)))
    sending.start()
    answered = Answered()
    content = receive_content(theirs, answered.read)
    sending.join()
    ready = dict(answered.pieces)
    assert len(ready) == 5  # four of the change, and one of zeros

    asked = Message(RecordDict(), 5, "train")
    asked.metadata.__dict__["_message_id"] = "0" * 64
    reply = Message(content, reply_to=asked)
    context = Context(run_id=1, node_id=5, node_config={}, state=RecordDict(), run_config={})
    push_message(Inside(Api(state), state, answered), reply, context)
    assert answered.pieces == {}
    store = state.object_store
    assert all(store.get(name) is piece for name, piece in ready.items())

    contents = {name: store.get(name) for name in store.store}
    back = inflatable_utils.inflate_object_from_contents(reply.metadata.message_id, contents)
    for name, values in arrays.items():
        assert back.content["arrays"][name].data == values.tobytes()


def test_a_ready_piece_is_the_object_that_flower_makes():
    from flwr.app.message.arraychunk import ArrayChunk

    flowers = ArrayChunk(memoryview(b"\x00abc"))
    ready = ReadyChunk(b"\x00abc")
    assert (ready.deflate(), ready.object_id, bytes(ready.data)) == (flowers.deflate(), flowers.object_id, b"\x00abc")


def test_an_object_that_is_not_there_yet_is_said_so(state):
    tree = get_object_tree(Message(content_of(), 5, "train"))
    state.object_store.preregister(1, tree)
    inside = Inside(None, state, Answered())
    late = inside.PullObject(SimpleNamespace(run_id=1, object_id=tree.object_id))
    none = inside.PullObject(SimpleNamespace(run_id=1, object_id="0" * 64))
    assert (late.object_found, late.object_available) == (True, False)
    assert (none.object_found, none.object_available) == (False, False)


def test_the_store_of_this_process_is_learned_of_when_it_is_made(monkeypatch):
    monkeypatch.setattr(NodeStateFactory, "state", NodeStateFactory.state)
    store = Store()
    store.follow()
    assert store.state is None
    made = NodeStateFactory(SimpleNamespace(store=InMemoryObjectStore)).state()
    assert store.state is made


def test_pieces_and_whole_arrays_arrive_alike():
    ours, theirs = Pipe()
    content = content_of(shared=np.arange(4, dtype=np.float32))
    content["arrays"]["shared"].data = deque([memoryview(b"ab"), memoryview(b""), memoryview(b"cd")])
    send_content(ours, content)
    assert receive_content(theirs)["arrays"]["shared"].data == b"abcd"
