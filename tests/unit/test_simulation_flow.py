"""Messages through the simulation engine: few models on their way, in the order of sending, whatever happens to one."""

import pickle
import queue
import threading

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.server.superlink.fleet.vce import vce_api

from common.protocol import wire
from simulation.engine.flow import LARGE_BYTES, WindowedMailbox, hand_out, handing_out, share_buffers

pytestmark = pytest.mark.usefixtures("in_a_run")


class Engine:
    """A mailbox that notes what was sent; tests say which of it is answered."""

    def __init__(self):
        self.sent, self.answered = [], set()

    def node_ids(self):
        return [1, 2]

    def send(self, messages):
        first = len(self.sent)
        self.sent += messages
        return [f"e{number}" for number in range(first, len(self.sent))]

    def receive(self, message_id, deadline=None):  # noqa: ARG002
        if message_id not in self.answered:
            return None
        self.answered.remove(message_id)
        return self.sent[int(message_id[1:])]


def messages(count, *, heavy=True):
    content = {wire.TASK: ConfigRecord({"n": 1})} | ({wire.ARRAYS: ArrayRecord()} if heavy else {})
    return [Message(RecordDict(dict(content)), node, MessageType.TRAIN) for node in range(1, count + 1)]


def nodes(engine):
    return [message.metadata.dst_node_id for message in engine.sent]


def test_so_many_are_on_their_way_and_the_next_goes_when_one_is_read():
    engine = Engine()
    mailbox = WindowedMailbox(engine, 3)
    ids = mailbox.send(messages(6))
    assert len(set(ids)) == 6
    assert nodes(engine) == [1, 2, 3]
    engine.answered |= {"e1", "e2"}  # answered, but the first is asked for first
    assert mailbox.receive(ids[0]) is None
    assert nodes(engine) == [1, 2, 3]
    engine.answered.add("e0")
    for number in (0, 1, 2):
        assert mailbox.receive(ids[number]).metadata.dst_node_id == number + 1
        assert nodes(engine) == list(range(1, min(6, number + 4) + 1))
    assert mailbox.receive(ids[5]) is None
    assert mailbox.receive(ids[0]) is None  # a reply comes once


def test_messages_without_a_model_go_at_once():
    engine = Engine()
    ids = WindowedMailbox(engine, 1).send(messages(50, heavy=False))
    assert len(ids) == len(engine.sent) == 50


def test_a_new_round_forgets_what_the_last_one_left():
    """A client that never answered takes no place in the next round, and what was held back is not sent late."""
    engine = Engine()
    mailbox = WindowedMailbox(engine, 2)
    mailbox.send(messages(5))
    ids = mailbox.send(messages(4))
    assert nodes(engine) == [1, 2, 1, 2]
    engine.answered.add("e2")
    assert mailbox.receive(ids[0]) is not None
    assert nodes(engine) == [1, 2, 1, 2, 3]


class State:
    def __init__(self, waiting):
        self.lock = threading.RLock()
        self.message_ins_store = {f"m{number}": message for number, message in enumerate(waiting)}


def test_the_engine_hands_out_each_message_once_oldest_first():
    waiting, stop, out = messages(20)[::-1], threading.Event(), queue.Queue()
    thread = threading.Thread(target=hand_out, args=(State(waiting), out, {}, stop))
    thread.start()
    got = [out.get(timeout=60).metadata.dst_node_id for _ in waiting]
    stop.set()
    thread.join()
    assert got == list(range(20, 0, -1))
    assert out.empty()
    assert all(message.metadata.delivered_at for message in waiting)


def test_flowers_own_comes_back(monkeypatch):
    monkeypatch.setattr(Array, "__reduce_ex__", Array.__reduce_ex__)
    flowers = vce_api.add_messages_to_queue
    with handing_out():
        assert vce_api.add_messages_to_queue is hand_out
    assert vce_api.add_messages_to_queue is flowers


def test_a_large_array_is_left_where_it_is_and_comes_whole(monkeypatch):
    monkeypatch.setattr(Array, "__reduce_ex__", Array.__reduce_ex__)
    share_buffers()
    for size, apart in ((10, 0), (LARGE_BYTES, 1)):
        array = Array(np.arange(size, dtype=np.uint8))
        buffers = []
        left = pickle.dumps(array, protocol=5, buffer_callback=buffers.append)
        assert len(buffers) == apart
        assert len(left) < 500
        again = pickle.loads(left, buffers=buffers)  # noqa: S301 - our own
        assert again.numpy().tolist() == array.numpy().tolist()
        assert pickle.loads(pickle.dumps(array, protocol=4)).data == array.data  # noqa: S301
