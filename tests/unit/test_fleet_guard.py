"""A site speaks for itself only: what it may push, pull and confirm at the SuperLink, over Flower's own link state.

Each attack is tried twice: `alone` on Flower's handlers, where it succeeds, and `guarded`.
"""

import contextlib
import hashlib
import inspect
import logging
import time
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import NOOP_FLWR_AID
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.routers.fleet import router
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers

from server.flower import fleet_guard
from server.flower.fleet_guard import COUNTS_BYTES, MOST_ASKED, MOST_UNREAD, FleetGuard, stand_guard

pytestmark = pytest.mark.usefixtures("in_a_run")
SUPERLINK = 1
MODEL_BYTES = 2**20


def cut(message):
    """(announcement, tree, objects by id) of a message, as Flower's programs make them."""
    with no_object_id_recompute():
        message.metadata.__dict__["_message_id"] = message.object_id
        objects = {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
        return message_to_proto(remove_content_from_message(message)), get_object_tree(message), objects


def content(num_bytes=100, fill=1):
    return RecordDict({"a": ArrayRecord({"x": Array(np.full(num_bytes, fill, dtype=np.uint8))})})


class Superlink:
    """A run with two nodes over Flower's link state; `fleet` is what nodes reach."""

    def __init__(self, *, guarded):
        self.store = InMemoryObjectStore()
        self.state = InMemoryLinkState(NoOpFederationManager(), self.store)
        self.run_id = self.state.create_run(
            None, None, "0" * 64, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        [run] = self.state.get_run_info(run_ids=[self.run_id])
        assert self.state.claim_task(run.primary_task_id)
        assert self.state.activate_task(run.primary_task_id)
        self.task = SimpleNamespace(run_id=self.run_id)
        self.model_bytes = MODEL_BYTES
        self.fleet = FleetGuard(fleet_handlers, lambda: self.model_bytes) if guarded else fleet_handlers
        self.told, told = [], logging.Handler()
        told.emit = lambda record: self.told.append(record.getMessage())
        fleet_guard.log.addHandler(told)
        self.close = lambda: fleet_guard.log.removeHandler(told)
        self.honest, self.hostile = self.node(b"honest"), self.node(b"hostile")

    def node(self, key):
        node = self.state.create_node(NOOP_FLWR_AID, "", key, 30)
        assert self.state.activate_node(node, 30)
        return node

    # ---- the ServerApp

    def ask(self, node, kind="train", ttl=60.0):
        """The id of a message that the ServerApp sends to the node."""
        request = Message(RecordDict({"c": ConfigRecord({"to": node, "at": time.time()})}), node, kind, ttl=ttl)
        request.metadata.__dict__["_run_id"] = self.run_id
        announced, tree, objects = cut(request)
        pushed = runtime_handlers.push_messages(
            PushAppMessagesRequest(messages_list=[announced], message_object_trees=[tree]), self.state, self.task
        )
        for name in pushed.objects_to_push:
            assert self.state.store_object(self.run_id, pushed.session_id, name, objects[name])
        return pushed.message_ids[0]

    def read(self, message_id):
        """[(message, whether all its objects are there)], as the ServerApp would pull them."""
        response = runtime_handlers.pull_messages(
            PullAppMessagesRequest(message_ids=[message_id]), self.state, self.task
        )
        return [
            (message, all(self.store.get(one) for one in ids(tree)))
            for message, tree in zip(response.messages_list, response.message_object_trees, strict=True)
        ]

    # ---- a node

    def pull(self, node):
        """The next message to the node, or None."""
        found = self.fleet.pull_messages(
            request=PullMessagesRequest(node=Node(node_id=node)), state=self.state, store=self.store
        )
        return message_from_proto(found.messages_list[0]) if found.messages_list else None

    def asked(self, node, kind="train", **values):
        """The message, that the node was asked and has pulled."""
        self.ask(node, kind, **values)
        return self.pull(node)

    def announce(self, node, announced, tree):
        return self.fleet.push_messages(
            request=PushMessagesRequest(
                node=Node(node_id=node), messages_list=[announced], message_object_trees=[tree],
                clientapp_runtime_list=[0.1],
            ),
            state=self.state,
        )  # fmt: skip

    def deliver(self, node, pushed, name, body):
        request = PushObjectRequest(
            node=Node(node_id=node), run_id=self.run_id, session_id=pushed.session_id, object_id=name,
            object_content=body,
        )  # fmt: skip
        stored = self.fleet.push_object(request=request, state=self.state).stored
        if not stored:  # the log says why
            raise FlowerError(0, self.told.pop())
        return stored

    def send(self, node, message, most=1000):
        """Announce a message and deliver so many of its parts."""
        announced, tree, objects = cut(message)
        pushed = self.announce(node, announced, tree)
        for name in list(pushed.objects_to_push)[:most]:
            assert self.deliver(node, pushed, name, objects[name])
        return announced.metadata.message_id

    def bytes(self):
        """Of all objects, in the store and before it."""
        making = self.fleet._making.values() if isinstance(self.fleet, FleetGuard) else []
        return sum(len(one.content) for one in self.store.store.values()) + sum(
            len(part.object_content) for reply in making for part in reply.parts.values()
        )


def ids(tree):
    return [tree.object_id, *(name for child in tree.children for name in ids(child))]


def reply(request, **values):
    return Message(content(**values), reply_to=request)


def forged(message, **metadata):
    message.metadata.__dict__.update({f"_{name}": value for name, value in metadata.items()})
    return message


@pytest.fixture
def alone():
    with contextlib.closing(Superlink(guarded=False)) as link:
        yield link


@pytest.fixture
def guarded():
    with contextlib.closing(Superlink(guarded=True)) as link:
        yield link


def refused(words):
    return pytest.raises(FlowerError, match=f"is refused: it {words}")


def test_an_answer_comes_to_the_serverapp_whole_and_is_then_gone(guarded):
    request = guarded.asked(guarded.honest)
    announced, tree, objects = cut(reply(request))
    pushed = guarded.announce(guarded.honest, announced, tree)
    names = list(pushed.objects_to_push)
    assert sorted(names) == sorted(objects)
    for name in names[:-1]:
        assert guarded.deliver(guarded.honest, pushed, name, objects[name])
        assert guarded.state.num_message_res() == 0
    assert guarded.deliver(guarded.honest, pushed, names[-1], objects[names[-1]])
    [(message, whole)] = guarded.read(request.metadata.message_id)
    assert (message.metadata.message_id, message.metadata.src_node_id, whole) == (
        announced.metadata.message_id, guarded.honest, True,
    )  # fmt: skip
    assert {name: guarded.store.get(name) for name in objects} == objects
    assert guarded.fleet._making == {}


def test_what_is_said_again_because_the_word_was_lost_is_understood(guarded):
    request = guarded.asked(guarded.honest)
    announced, tree, objects = cut(reply(request))
    first, again = (guarded.announce(guarded.honest, announced, tree) for _ in range(2))
    assert again == first
    for name in first.objects_to_push:
        assert [guarded.deliver(guarded.honest, first, name, objects[name]) for _ in range(2)] == [True, True]
    assert list(guarded.announce(guarded.honest, announced, tree).objects_to_push) == []
    assert len(guarded.read(request.metadata.message_id)) == 1


def order(link):
    """An order of the hostile node to the honest one, in the server's name."""
    return forged(Message(content(), link.honest, "train"), src_node_id=SUPERLINK, run_id=link.run_id)


def test_an_order_to_another_site_does_not_come(alone, guarded):
    alone.send(alone.hostile, order(alone))
    assert alone.pull(alone.honest).metadata.message_type == "train"
    with refused("sends what is no answer"):
        guarded.send(guarded.hostile, order(guarded))
    assert guarded.pull(guarded.honest) is None


def test_nor_does_an_answer_to_another_site(guarded):
    """With what the node was asked as what it answers."""
    request = guarded.asked(guarded.hostile)
    with refused("sends a message to another node"):
        guarded.send(guarded.hostile, forged(reply(request), dst_node_id=guarded.honest))


def injected(link):
    """A message to the SuperLink that answers nothing."""
    return forged(Message(content(), SUPERLINK, "train"), src_node_id=SUPERLINK, run_id=link.run_id)


def test_a_message_to_the_server_that_answers_nothing_does_not_come(alone, guarded):
    for link in (alone, guarded):
        link.request = link.asked(link.honest)
    alone.send(alone.hostile, injected(alone))
    [(message, _)] = alone.read(alone.request.metadata.message_id)
    assert message.metadata.reply_to_message_id == ""
    with refused("sends what is no answer"):
        guarded.send(guarded.hostile, injected(guarded))
    assert guarded.read(guarded.request.metadata.message_id) == []


def test_a_reply_in_another_sites_place_does_not_come(alone, guarded):
    """By whoever has learnt the message's id, under the other's name or its own."""
    for link in (alone, guarded):
        link.request = link.asked(link.honest)
    alone.send(alone.hostile, reply(alone.request))
    assert len(alone.read(alone.request.metadata.message_id)) == 1
    with refused("sends what is no answer"):
        guarded.send(guarded.hostile, reply(guarded.request))
    own = guarded.asked(guarded.hostile)
    with refused("speaks in the name of another node"):
        guarded.send(guarded.hostile, forged(reply(own), src_node_id=guarded.honest))
    guarded.send(guarded.honest, reply(guarded.request))
    assert len(guarded.read(guarded.request.metadata.message_id)) == 1


def test_a_second_answer_and_one_to_a_forgotten_message_do_not_come(guarded):
    request = guarded.asked(guarded.hostile)
    guarded.send(guarded.hostile, reply(request))
    with refused("answers a message a second time"):
        guarded.send(guarded.hostile, reply(request, fill=2))
    for _ in range(MOST_ASKED):
        guarded.asked(guarded.hostile, "query")
    with refused("sends what is no answer"):
        guarded.send(guarded.hostile, reply(request))


def test_of_a_late_answer_nothing_is_wanted(guarded):
    request = guarded.asked(guarded.honest, ttl=0.05)
    announced, tree, _ = cut(reply(request))
    time.sleep(0.1)
    assert list(guarded.announce(guarded.honest, announced, tree).objects_to_push) == []


def test_one_that_is_announced_and_not_delivered_is_not_there_for_the_serverapp(alone, guarded):
    """It would wait for the parts; here it sees no answer, as of a node that is silent."""
    for link, seen in ((alone, [False]), (guarded, [])):
        request = link.asked(link.hostile)
        link.send(link.hostile, reply(request), most=1)
        assert [whole for _, whole in link.read(request.metadata.message_id)] == seen


def test_a_megabyte_more_than_a_model_is_refused_before_it_is_kept(alone, guarded):
    """The most is a model, and twice the counts."""
    for link in (alone, guarded):
        link.big = reply(link.asked(link.hostile), num_bytes=MODEL_BYTES + 2 * COUNTS_BYTES + 1)
    alone.send(alone.hostile, alone.big)
    assert alone.bytes() > MODEL_BYTES + 2 * COUNTS_BYTES
    with refused(f"sends more than {MODEL_BYTES + 2 * COUNTS_BYTES} bytes"):
        guarded.send(guarded.hostile, guarded.big)
    assert guarded.bytes() < 10_000
    guarded.send(guarded.hostile, reply(guarded.asked(guarded.hostile), num_bytes=MODEL_BYTES + COUNTS_BYTES))


def test_an_answer_to_join_has_no_room_for_a_model(guarded):
    guarded.model_bytes = 2**30
    with refused(f"sends more than {2 * COUNTS_BYTES} bytes, the most of a reply to query"):
        guarded.send(guarded.hostile, reply(guarded.asked(guarded.hostile, "query"), num_bytes=2 * COUNTS_BYTES))


def test_a_hundred_and_twenty_messages_leave_no_more_than_two_and_none_of_what_answers_nothing(alone, guarded):
    big = MODEL_BYTES // 2
    for number in range(120):
        alone.send(
            alone.hostile,
            forged(Message(content(big, number), SUPERLINK, "train"), src_node_id=SUPERLINK, run_id=alone.run_id),
        )
    assert alone.bytes() > 120 * big
    for number in range(120):  # as many orders as it may answer, which the ServerApp does not read
        guarded.send(guarded.hostile, reply(guarded.asked(guarded.hostile), num_bytes=big, fill=number))
        with refused("sends what is no answer"):
            guarded.send(
                guarded.hostile,
                forged(Message(content(big, 1), SUPERLINK, "train"), src_node_id=SUPERLINK, run_id=guarded.run_id),
            )
    assert guarded.bytes() < (MOST_UNREAD + 0.5) * big


def test_what_the_serverapp_has_read_is_no_longer_counted(guarded):
    """So an honest site's replies are never dropped for those before."""
    for number in range(2 * MOST_UNREAD):
        request = guarded.asked(guarded.honest)
        name = guarded.send(guarded.honest, reply(request, fill=number))
        assert [whole for _, whole in guarded.read(request.metadata.message_id)] == [True]
        guarded.store.delete(name)  # it confirms
    assert guarded.fleet._unread[guarded.honest] == [name]


def test_too_many_objects_are_refused_before_one_is_kept(alone, guarded):
    for link in (alone, guarded):
        announced, tree, _ = cut(reply(link.asked(link.hostile)))
        tree.children.extend(ObjectTree(object_id=f"{number:064x}") for number in range(5_000))
        link.before, link.said = len(link.store), (announced, tree)
    alone.announce(alone.hostile, *alone.said)
    assert len(alone.store) > 5_000
    with refused("announces more than 69 objects"):
        guarded.announce(guarded.hostile, *guarded.said)
    assert len(guarded.store) == guarded.before


def test_a_small_tree_that_would_grow_without_end_is_refused(alone, guarded):
    """Each object has the next one twice, and says so at its first mention only; Flower makes 2 ** 16 of these 32."""
    for link in (alone, guarded):
        announced, tree, _ = cut(reply(link.asked(link.hostile)))
        del tree.children[:]
        one = tree
        for depth in range(16):
            name = f"{depth:064x}"
            one.children.extend([ObjectTree(object_id=name), ObjectTree(object_id=name)])
            one = one.children[0]
        link.said = announced, tree
    alone.announce(alone.hostile, *alone.said)
    assert alone.store.get_object_tree(alone.said[1].object_id).ByteSize() > 2**16 * 64
    with refused("announces a tree of objects that cannot be"):
        guarded.announce(guarded.hostile, *guarded.said)


def test_a_tree_under_a_foreign_root_or_of_what_are_no_ids_is_refused(guarded):
    announced, tree, _ = cut(reply(guarded.asked(guarded.hostile)))
    other = ObjectTree(object_id="0" * 64)
    with refused("announces a message by the objects of another"):
        guarded.announce(guarded.hostile, announced, other)
    tree.children.append(ObjectTree(object_id="../x"))
    with refused("announces a tree of objects that cannot be"):
        guarded.announce(guarded.hostile, announced, tree)


def test_nobody_spoils_anothers_reply_by_objects_that_can_be_guessed(alone, guarded):
    """The hostile node announces the honest one's histogram first, with a child that never comes."""
    for link, whole in ((alone, False), (guarded, True)):
        request, honest = link.asked(link.hostile), link.asked(link.honest)
        announced, tree, objects = cut(reply(honest))
        guessed = next(name for name, body in objects.items() if body.startswith(b"ArrayChunk "))
        mine, my_tree, _ = cut(reply(request, fill=2))
        my_tree.children.append(ObjectTree(object_id=guessed, children=[ObjectTree(object_id="0" * 64)]))
        pushed = link.announce(link.hostile, mine, my_tree)
        if link is guarded:
            with refused("announces a tree of objects that is not that of its reply"):
                link.deliver(link.hostile, pushed, guessed, objects[guessed])
        pushed = link.announce(link.honest, announced, tree)
        for name in pushed.objects_to_push:
            if name in objects:
                link.deliver(link.honest, pushed, name, objects[name])
        assert [seen for _, seen in link.read(honest.metadata.message_id)] == [whole]


def test_other_bytes_than_those_of_the_id_and_of_no_form_are_refused(guarded):
    announced, tree, objects = cut(reply(guarded.asked(guarded.hostile)))
    pushed = guarded.announce(guarded.hostile, announced, tree)
    with refused("sends an object under the id of another"):
        guarded.deliver(guarded.hostile, pushed, next(iter(objects)), b"other")
    odd = hashlib.sha256(b"odd").hexdigest()
    announced, tree, _ = cut(reply(guarded.asked(guarded.hostile), fill=3))
    tree.children.append(ObjectTree(object_id=odd))
    pushed = guarded.announce(guarded.hostile, announced, tree)
    with refused("sends an object of no form"):
        guarded.deliver(guarded.hostile, pushed, odd, b"odd")


def test_objects_of_no_announced_message_or_of_anothers_are_refused(guarded):
    request = guarded.asked(guarded.honest)
    announced, tree, objects = cut(reply(request))
    pushed = guarded.announce(guarded.honest, announced, tree)
    name = next(iter(objects))
    with refused("sends an object of no reply that it has announced"):
        guarded.deliver(guarded.hostile, pushed, name, objects[name])
    with refused("sends an object of no reply that it has announced"):
        guarded.deliver(guarded.honest, pushed, "0" * 64, b"x")


def pulled(link, node, name):
    return link.fleet.pull_object(
        request=PullObjectRequest(node=Node(node_id=node), run_id=link.run_id, object_id=name), state=link.state
    ).object_content


def confirm(link, node, message_id):
    link.fleet.confirm_message_received(
        request=ConfirmMessageReceivedRequest(
            node=Node(node_id=node), run_id=link.run_id, message_object_id=message_id
        ),
        state=link.state, store=link.store,
    )  # fmt: skip


def test_nobody_reads_or_deletes_what_is_anothers(alone, guarded):
    for link in (alone, guarded):
        link.message_id = link.asked(link.honest).metadata.message_id
        assert pulled(link, link.honest, link.message_id)
    assert pulled(alone, alone.hostile, alone.message_id)
    with refused("asks for an object of no message to it"):
        pulled(guarded, guarded.hostile, guarded.message_id)
    confirm(alone, alone.hostile, alone.message_id)
    with pytest.raises(NoObjectInStoreError):
        alone.store.get_object_tree(alone.message_id)
    with refused("confirms a message that it was not given"):
        confirm(guarded, guarded.hostile, guarded.message_id)
    confirm(guarded, guarded.honest, guarded.message_id)
    assert guarded.message_id not in guarded.store


def test_it_stands_where_flower_asks_and_says_each_refusal_once(monkeypatch, caplog):
    names = ("pull_messages", "push_messages", "pull_object", "push_object", "confirm_message_received")
    for name in names:
        monkeypatch.setattr(fleet_handlers, name, getattr(fleet_handlers, name))
    flowers = logging.getLogger("flwr")
    monkeypatch.setattr(flowers, "filters", list(flowers.filters))
    monkeypatch.setattr(flowers, "propagate", True)
    stand_guard(lambda: None)
    for name in names:
        assert getattr(fleet_handlers, name).__func__ is getattr(FleetGuard, name)
        assert f"return fleet_handlers.{name}(" in inspect.getsource(router)
    for _ in range(3):
        flowers.error("[/v1/fleet/push-messages][ApiError:9] node 5, %s sends x", fleet_guard.SAYS)
        flowers.error("another line")
    assert [record.getMessage().split()[0] for record in caplog.records].count("another") == 3
    assert sum("is refused" in record.getMessage() for record in caplog.records) == 1
