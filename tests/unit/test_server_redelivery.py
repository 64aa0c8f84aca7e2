"""What got lost between the SuperLink and a node is said again; what arrived is not."""

import inspect
import time

import pytest
from flwr.app import Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.superlink.routers.fleet import router
from flwr.superlink.servicer.fleet import fleet_handlers

from server.flower.redelivery import MOST_TIMES, Redelivery, redeliver

pytestmark = pytest.mark.usefixtures("in_a_run")
NODE, OTHER = 5, 6


class Post:
    """Flower's handler as it is: each message once."""

    def __init__(self):
        self.store, self.waiting = InMemoryObjectStore(), {NODE: [], OTHER: []}
        self.redelivery = Redelivery(self.pull)

    def send(self, node, *, ttl=60.0):
        message = Message(RecordDict(), node, "train", ttl=ttl)
        message.metadata.__dict__["_message_id"] = message.object_id
        tree = get_object_tree(message)
        self.store.preregister(1, tree)
        self.waiting[node].append(
            PullMessagesResponse(messages_list=[message_to_proto(message)], message_object_trees=[tree])
        )
        return message.object_id

    def pull(self, *, request, state, store):  # noqa: ARG002 - Flower names it
        assert store is self.store
        waiting = self.waiting[request.node.node_id]
        return waiting.pop(0) if waiting else PullMessagesResponse()

    def ask(self, node=NODE):
        answer = self.redelivery.pull_messages(PullMessagesRequest(node=Node(node_id=node)), None, self.store)
        return [message.metadata.message_id for message in answer.messages_list]

    def confirm(self, message_id):
        self.store.delete(message_id)


def test_a_message_comes_until_it_is_confirmed_and_then_the_next_one():
    post = Post()
    first, second = post.send(NODE), post.send(NODE)
    assert [post.ask(), post.ask(), post.ask()] == [[first]] * 3
    post.confirm(first)
    assert [post.ask(), post.ask()] == [[second]] * 2
    post.confirm(second)
    assert post.ask() == []


def test_each_node_gets_its_own_only():
    post = Post()
    one, other = post.send(NODE), post.send(OTHER)
    assert [post.ask(), post.ask(OTHER), post.ask(), post.ask(OTHER)] == [[one], [other], [one], [other]]


def test_one_that_is_out_of_date_keeps_nothing_from_coming():
    post = Post()
    post.send(NODE, ttl=0.05)
    post.ask()
    time.sleep(0.1)
    second = post.send(NODE)
    assert post.ask() == [second]


def test_nor_does_one_that_a_node_cannot_take():
    post = Post()
    first, second = post.send(NODE), post.send(NODE)
    assert [post.ask() for _ in range(MOST_TIMES)] == [[first]] * MOST_TIMES
    assert post.ask() == [second]


def test_it_stands_where_flower_asks(monkeypatch):
    monkeypatch.setattr(fleet_handlers, "pull_messages", fleet_handlers.pull_messages)
    redeliver()
    assert fleet_handlers.pull_messages.__func__ is Redelivery.pull_messages
    source = inspect.getsource(router.fleet_pull_messages)
    assert "fleet_handlers.pull_messages(\n        request=request, state=state, store=state.object_store\n" in source
    assert "store.delete(request.message_object_id)" in inspect.getsource(fleet_handlers.confirm_message_received)
