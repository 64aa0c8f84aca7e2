"""Flower's own way of a reply to the server, over scripted nodes: cut into objects and made a message again."""

from collections.abc import Callable
from types import SimpleNamespace

from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.superlink.grid.http_grid import HttpGrid
from tiny_federation import MANIFEST, ScriptedMailbox

from server.flower.grid import GridMailbox

Objects = dict[str, bytes]  # an object's id -> its content
Tamper = Callable[[int, Objects, ObjectTree], None]  # of that node, in place


class FakeRuntime:
    """The SuperLink's side of a Grid: holds one message."""

    def __init__(self):
        self.listed, self.objects, self.tree = None, {}, None

    def PullMessages(self, _request):  # noqa: N802
        return SimpleNamespace(messages_list=[self.listed], message_object_trees=[self.tree])

    def PullObject(self, request):  # noqa: N802
        content = self.objects.get(request.object_id)
        return SimpleNamespace(object_found=content is not None, object_available=True, object_content=content or b"")

    def ConfirmMessageReceived(self, _request):  # noqa: N802
        return None


class ObjectMailbox(ScriptedMailbox):
    """A ScriptedMailbox whose replies pass Flower's Grid and our GridMailbox; `tamper` may change their bytes.

    through: which nodes' replies to which kind of task; the others are handed over as they are, which is much faster.
    """

    def __init__(
        self,
        nodes,
        tamper: Tamper = lambda _node, _objects, _tree: None,
        through: Callable[[int, str], bool] = lambda _node, _kind: True,
    ):
        super().__init__(nodes)
        self._tamper, self._through = tamper, through
        self._runtime = FakeRuntime()
        grid = HttpGrid("127.0.0.1:1", insecure=True, token="none")
        grid._client, grid._run = self._runtime, SimpleNamespace(run_id=1)
        self._grid = GridMailbox(grid)
        self._grid.expect(MANIFEST.num_bytes)

    def receive(self, message_id):
        node = self._waiting[message_id].metadata.dst_node_id
        message = super().receive(message_id)
        kind = message.metadata.message_type if message else ""
        if not self._through(node, kind):
            return message
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            objects = {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
            tree = get_object_tree(message)
        self._tamper(node, objects, tree)
        self._runtime.listed = message_to_proto(remove_content_from_message(message))
        self._runtime.objects, self._runtime.tree = objects, tree
        return self._grid.receive(message_id)
