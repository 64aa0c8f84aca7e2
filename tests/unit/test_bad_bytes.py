"""Replies whose bytes Flower cannot make a message of, replies in another's name, and answers to join that lie."""

import dataclasses
import json
import random
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, Message
from flwr.app.message import remove_content_from_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.serde import message_to_proto
from flwr.supercore.inflatable.inflatable_object import (
    add_header_to_object_body,
    get_all_nested_objects,
    get_object_body,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.superlink.grid.http_grid import HttpGrid
from malformed import damaged_bytes
from object_grid import FakeRuntime, ObjectMailbox
from tiny_federation import MANIFEST, client, federation_over, reply_to, settings_with, site_named

from common.errors import NotEnoughClients, ReplyRefused
from common.protocol import wire
from common.protocol.beats import Beat
from common.protocol.wire import Task
from common.settings import PRECISIONS
from common.system.events import EventReader
from server.exchange.guard import MOST_COUNTED, MOST_PAIRS, PAIRS_OF_SITE, check_sender, read_site
from server.flower.grid import COUNTS_BYTES, GridMailbox

pytestmark = pytest.mark.usefixtures("in_a_run")

NUM_BAD = 25


def honest_model():
    """Changes of 1 and 3 with 10 pictures each."""
    return [2.0] * MANIFEST.size


def honest():
    return {
        1: client("alpha", lambda task: reply_to(task, change=1.0)),
        2: client("beta", lambda t: reply_to(t, change=3.0)),
    }


def run(folder, tamper, number=1, nodes=None, **settings):
    """One round beside two honest clients; `tamper` changes the objects of the others' replies to training."""
    nodes = nodes or honest() | {100 + n: client(f"m{n:02d}") for n in range(number)}
    mailbox = ObjectMailbox(nodes, tamper, through=lambda node, kind: node >= 100 and kind == "train")
    federation = federation_over(mailbox, settings_with(federation__rounds=1, **settings), folder)
    federation.farewell = False
    federation.run()
    return federation


@pytest.mark.parametrize("seed", range(8))
def test_two_hundred_replies_of_damaged_bytes_are_refused_or_are_numbers(tmp_path, seed):
    """A bit that was flipped in a number gives another number, which a site may send; nothing else may come through."""

    def tamper(node, objects, tree):
        rng = random.Random(1000 * seed + node)
        name = rng.choice(sorted(objects))
        how = rng.randrange(6)
        if how == 0:
            del objects[name]
        elif how == 1:
            objects[name] = objects[rng.choice(sorted(objects))]
        elif how == 2:
            objects[name] = b"ArrayChunk  3\x00abc"
        elif how == 3:
            del tree.children[:]
        else:
            objects[name] = damaged_bytes(objects[name], 1000 * seed + node)

    federation = run(tmp_path, tamper, NUM_BAD)
    refused = federation.record.reasons(1)
    assert NUM_BAD * 0.6 < len(refused) <= NUM_BAD
    assert all(name.startswith("m") and reason and reason.isprintable() for name, reason in refused.items())
    assert np.isfinite(federation.model.received).all()
    assert len([event for event in EventReader(tmp_path).new_events() if event["kind"] == "refused"]) == len(refused)


def test_when_nothing_of_them_can_be_unpacked_the_model_is_that_of_the_honest_alone(tmp_path):
    federation = run(tmp_path, lambda _node, objects, _tree: objects.update(dict.fromkeys(objects, b"\xff\x00")), 3)
    assert federation.model.received.tolist() == honest_model()
    assert sorted(federation.record.reasons(1)) == ["m00", "m01", "m02"]
    assert all("cannot be unpacked" in reason for reason in federation.record.reasons(1).values())


def test_a_small_reply_that_unpacks_to_terabytes_is_refused_before_it_does(tmp_path):
    """One piece of 64 KiB that is listed 2 ** 25 times would be 2 TiB; the list of zeros is 64 MiB at most."""
    piece = ArrayChunk(memoryview(bytes(2**16))).deflate()

    def bomb(_node, objects, _tree):
        name = next(
            name for name, content in objects.items() if content.startswith(b"Array ") and b"facefed.flat" in content
        )
        body = json.loads(get_object_body(objects[name], Array))
        child = next(one for one in objects[name].split(b" ")[1].decode().split(",") if one)
        objects[child] = piece
        body["arraychunk_ids"] = [0] * 2**16
        holder = dataclasses.make_dataclass("Array", ["children"])({child: None})
        objects[name] = add_header_to_object_body(json.dumps(body).encode(), holder)

    federation = run(tmp_path, bomb)
    assert federation.model.received.tolist() == honest_model()
    assert f"more than {MANIFEST.num_bytes + COUNTS_BYTES} bytes" in federation.record.reasons(1)["m00"]


# ---- a reply's size is known before it is taken


TRAINING = Task(kind="train", run_id="r", server_round=1, settings="{}", splits="val")


class Counting(FakeRuntime):
    """Says once that a reply is there, as the SuperLink does, and counts what of it was pulled."""

    def __init__(self):
        super().__init__()
        self.said, self.pulled = 0, 0

    def PullMessages(self, request):  # noqa: N802
        if self.said:
            return SimpleNamespace(messages_list=[], message_object_trees=[])
        self.said += self.tree is not None
        return (
            super().PullMessages(request)
            if self.tree is not None
            else SimpleNamespace(messages_list=[], message_object_trees=[])
        )

    def PullObject(self, request):  # noqa: N802
        self.pulled += 1
        return super().PullObject(request)


@pytest.mark.parametrize(
    ("content", "is_short"),
    [
        (wire.beat_content(Beat(client="alpha")), True),
        (wire.site_content(site_named("alpha")), True),
        (wire.reply_content(reply_to(TRAINING)), False),
    ],
)
def test_whether_a_reply_holds_a_model_is_known_before_it_is_taken_and_then_it_is_taken_whole(content, is_short):
    runtime, asked = Counting(), wire.task_message(TRAINING, None, node_id=3, ttl_s=60.0)
    grid = HttpGrid("127.0.0.1:1", insecure=True, token="none")
    grid._client, grid._run = runtime, SimpleNamespace(run_id=1)
    mailbox = GridMailbox(grid)
    asked.metadata.__dict__["_message_id"] = "m"
    assert not mailbox.is_short("m")
    reply = Message(content, reply_to=asked)
    with no_object_id_recompute():
        reply.metadata.__dict__["_message_id"] = reply.object_id
        runtime.objects = {name: one.deflate() for name, one in get_all_nested_objects(reply).items()}
        runtime.tree = get_object_tree(reply)
    runtime.listed = message_to_proto(remove_content_from_message(reply))
    assert [mailbox.is_short("m"), mailbox.is_short("m"), runtime.pulled] == [is_short, is_short, 0]
    assert mailbox.receive("m").content.keys() == reply.content.keys()
    assert mailbox.receive("m") is None


# ---- announced and not delivered, and unasked


def test_a_reply_that_is_announced_and_not_delivered_is_no_answer_at_the_deadline(tmp_path):
    """Flower would wait for its parts for two hours."""

    def keep_back(_node, objects, tree):
        objects[tree.children[0].object_id] = b""

    began = time.monotonic()
    federation = run(tmp_path, keep_back, federation__round_timeout_s=2.0)
    assert 2.0 <= time.monotonic() - began < 60
    assert federation.record.reasons(1) == {"m00": "no answer: a reply was announced, and not all of it came"}
    assert federation.model.received.tolist() == honest_model()


def test_parts_that_come_before_the_deadline_are_waited_for(tmp_path):
    ready = {}

    def late(_node, objects, tree):
        name = tree.children[0].object_id
        ready["timer"] = threading.Timer(0.3, objects.__setitem__, (name, objects[name]))
        objects[name] = b""
        ready["timer"].start()

    federation = run(tmp_path, late, federation__round_timeout_s=20.0)
    ready["timer"].join()
    assert federation.record.reasons(1) == {}


def test_what_answers_nothing_is_dropped_counted_and_said_once(tmp_path, caplog):
    """A node's message that the SuperLink took for an order to the ServerApp, before and beside the reply."""
    nodes = honest() | {100: client("m00")}
    mailbox = ObjectMailbox(nodes, through=lambda node, kind: node >= 100 and kind == "train")

    def inject(_node, objects, _tree):
        forged = Message(wire.RecordDict({}), 1, "train")
        with no_object_id_recompute():
            forged.metadata.__dict__["_message_id"] = forged.object_id
            objects |= {name: one.deflate() for name, one in get_all_nested_objects(forged).items()}
            mailbox.runtime.unasked = [(message_to_proto(forged), get_object_tree(forged))] * 2

    mailbox._tamper = inject
    federation = federation_over(mailbox, settings_with(federation__rounds=1), tmp_path)
    federation.farewell = False
    federation.run()
    assert federation.record.reasons(1) == {}
    assert federation.model.received.tolist() != honest_model()  # m00's change is in it
    assert mailbox._grid.num_dropped == 2
    assert sum("answers nothing that was asked" in record.getMessage() for record in caplog.records) == 1


# ---- in another's name


def test_a_reply_in_another_nodes_name_is_refused(tmp_path):
    """Node 100 answers as if it were node 1."""

    def thief(task, request):
        reply = client("thief")(task, request)
        if task.kind == "train":
            reply.metadata.__dict__["_src_node_id"] = 1
        return reply

    federation = run(tmp_path, lambda *_: None, nodes=honest() | {100: thief})
    assert federation.record.reasons(1) == {"thief": "the reply is of another node than the one that was asked"}
    assert federation.model.received.tolist() == honest_model()


def test_an_answer_to_join_in_another_nodes_name_lets_nobody_in(tmp_path):
    def thief(task, request):
        reply = client("thief")(task, request)
        reply.metadata.__dict__["_src_node_id"] = 1
        return reply

    federation = run(tmp_path, lambda *_: None, nodes=honest() | {100: thief})
    assert sorted(federation.roster.members()) == ["alpha", "beta"]
    [told] = [event for event in EventReader(tmp_path).new_events() if event["kind"] == "refused"]
    assert "another node" in told["reason"]


def test_the_sender_is_the_node_that_was_asked():
    message = Message(wire.site_content(site_named("a")), reply_to=Message(wire.RecordDict({}), 5, "query"))
    check_sender(message, 5)
    with pytest.raises(ReplyRefused):
        check_sender(message, 6)


# ---- answers to join


def joined(**values):
    content = wire.site_content(site_named("a"))
    content["site"].update(values)
    return Message(content, reply_to=Message(wire.RecordDict({}), 5, "query"))


TEXTS = [name for name, value in vars(site_named("a")).items() if isinstance(value, str)]
COUNTS = [
    name for name, value in vars(site_named("a")).items() if isinstance(value, int) and not isinstance(value, bool)
]


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("value", ["a\nb", "\x1b[31m", "\x00", "x" * 129, "\u202e", 5, b"x", ["a"], True])
def test_a_text_that_cannot_be_shown_lets_nobody_in(name, value):
    with pytest.raises(ReplyRefused) as seen:
        read_site(joined(**{name: value}))
    assert str(seen.value).isprintable()
    assert len(str(seen.value)) < 500


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [-1, MOST_COUNTED + 1, 2**62, 1.0, float("nan"), True, "1", [1]])
def test_a_count_that_cannot_be_lets_nobody_in(name, value):
    """A site of 2 ** 62 pictures could give its change a weight that makes the sum infinite."""
    if value == MOST_COUNTED + 1 and name in PAIRS_OF_SITE:
        value = MOST_PAIRS + 1  # there are more pairs than pictures
    with pytest.raises(ReplyRefused):
        read_site(joined(**{name: value}))


@pytest.mark.parametrize(
    "values",
    [{"num_training_pictures": 101}, {"num_training_people": 13}, {"precision": "evil"}, {"memory_format": ""}],
)
def test_a_part_larger_than_the_whole_and_an_unknown_way_to_compute_let_nobody_in(values):
    with pytest.raises(ReplyRefused):
        read_site(joined(**values))
    for precision in PRECISIONS:
        assert read_site(joined(precision=precision)).precision == precision


def test_a_bad_answer_to_join_is_told_and_the_others_begin(tmp_path):
    def liar(task, request):
        reply = client("liar")(task, request)
        reply.content["site"]["num_pictures"] = 2**62
        return reply

    federation = run(tmp_path, lambda *_: None, nodes=honest() | {100: liar})
    assert sorted(federation.roster.members()) == ["alpha", "beta"]
    only_liars = {100: liar, 101: liar}
    with pytest.raises(NotEnoughClients, match="num_pictures is 4611686018427387904"):
        run(tmp_path / "b", lambda *_: None, nodes=only_liars)
