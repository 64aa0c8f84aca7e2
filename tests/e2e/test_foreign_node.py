"""A node that is registered and hostile, at a federation that runs: it speaks for itself only, and the run ends well.

In plain text on loopback, where anybody may register.  What each attack does to Flower alone: test_fleet_guard.py.
"""

import re
import time

import httpx
import numpy as np
import psutil
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from programs import free_port, run_folder, state_of

from server.flower.superlink import read_model_bytes

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("in_a_run")]
SUPERLINK = 1
NUM_MESSAGES, MESSAGE_BYTES = 40, 5 * 2**20
NUM_BEFORE = 10  # messages; then the SuperLink has the memory that it needs for each
MOST_GROWTH_BYTES = 60 * 2**20  # of the SuperLink by the others, which are 150 MiB
BEGINS_WITHIN_S = 120.0  # a reply that is announced and not delivered would block the server for 180 s


class Foreign:
    """A node of its own key."""

    def __init__(self, port):
        keys = generate_key_pairs()
        self.fleet = FleetHttpClient.from_server_address(
            f"127.0.0.1:{port}", insecure=True, root_certificates=None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="foreign"), NodeAuthHttpInterceptor(*keys)],
        )  # fmt: skip
        key = public_key_to_bytes(keys[1])
        self.fleet.RegisterNode(RegisterNodeFleetRequest(public_key=key))
        answer = self.fleet.ActivateNode(ActivateNodeRequest(public_key=key, heartbeat_interval=300))
        self.node = Node(node_id=answer.node_id)

    def asked(self):
        """The message that the server sends to each node that appears."""
        deadline = time.monotonic() + 60
        while not (found := self.fleet.PullMessages(PullMessagesRequest(node=self.node)).messages_list):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return message_from_proto(found[0])

    def announce(self, message):
        """What Flower wants of it, with its objects."""
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            objects = {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
            announced, tree = message_to_proto(remove_content_from_message(message)), get_object_tree(message)
        request = PushMessagesRequest(
            node=self.node, messages_list=[announced], message_object_trees=[tree], clientapp_runtime_list=[0.1]
        )
        return self.fleet.PushMessages(request), objects

    def is_taken(self, message):
        """Whether the server takes it: the announcement, and each part."""
        try:
            wanted, objects = self.announce(message)
        except httpx.HTTPStatusError as error:
            if error.response.status_code == 403:
                return False
            raise
        return all(self.deliver(message, wanted, name, objects[name]) for name in wanted.objects_to_push)

    def deliver(self, message, wanted, name, body):
        request = PushObjectRequest(
            node=self.node, run_id=message.metadata.run_id, session_id=wanted.session_id, object_id=name,
            object_content=body,
        )  # fmt: skip
        return self.fleet.PushObject(request).stored


def content(num_bytes=100, fill=0):
    return RecordDict({"a": ArrayRecord({"x": Array(np.full(num_bytes, fill, dtype=np.uint8))})})


def in_the_servers_name(node, run_id, **values):
    message = Message(content(**values), node, "train")
    message.metadata.__dict__.update(_src_node_id=SUPERLINK, _run_id=run_id)
    return message


def superlink_of(server):
    [process] = [one for one in server.processes() if "server.flower.redelivery" in one.cmdline()]
    return psutil.Process(process.pid)


def test_it_gives_no_orders_takes_no_place_fills_no_memory_and_blocks_nobody(faces, programs):
    port = free_port()
    server = programs.start(
        "flower-server", "--address", f"127.0.0.1:{port}", *faces.bare, "--min-clients", 2, "--no-mlflow"
    )

    def client(dataset):
        return programs.start(
            "flower-client", "--dataset", dataset, "--data-dir", faces.folder / "data" / dataset, "--once",
            "--server", f"127.0.0.1:{port}", *faces.cache,
        )  # fmt: skip

    celeba = client("celeba")
    server.wait_for("joined: celeba")
    log = (programs.cwd / ".facefed" / "clients" / "celeba" / "supernode.log").read_text()
    victim = int(re.search(r"SuperNode ID: (\d+)", log)[1])
    foreign = Foreign(port)
    request = foreign.asked()
    run_id = request.metadata.run_id

    assert not foreign.is_taken(in_the_servers_name(victim, run_id))  # an order to another site
    assert not foreign.is_taken(in_the_servers_name(SUPERLINK, run_id))  # into the server's next reply
    link = superlink_of(server)
    for number in range(NUM_MESSAGES):
        if number == NUM_BEFORE:
            before = link.memory_info().rss
        big = {"num_bytes": MESSAGE_BYTES, "fill": number}
        assert not foreign.is_taken(in_the_servers_name(SUPERLINK, run_id, **big))
        assert not foreign.is_taken(Message(content(**big), reply_to=request))  # no answer to join is so large
    assert link.memory_info().rss - before < MOST_GROWTH_BYTES

    foreign.announce(Message(content(), reply_to=request))  # and never delivers it
    foreign.fleet.close()
    began = time.monotonic()
    vggface2 = client("vggface2")
    server.wait_for("round 1 of 2: 2 clients")
    assert time.monotonic() - began < BEGINS_WITHIN_S
    ended = server.ended()
    assert ended.code == 0, ended
    assert set(re.findall(r"^joined: (\w+)", ended.out, re.MULTILINE)) == {"celeba", "vggface2"}
    assert "refused" not in ended.out
    folder = run_folder(programs.cwd)
    assert state_of(folder)["round"] == 2
    assert [site.ended(120).code for site in (celeba, vggface2)] == [0, 0]
    assert read_model_bytes(folder / "flwr") > 0
    told = (folder / "logs" / "superlink.log").read_text().splitlines()
    told = [line for line in told if f"node {foreign.node.node_id}, of a site, is refused" in line]
    assert len(told) == 2, told  # each kind once: no answer, and too large
