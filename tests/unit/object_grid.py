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
    """The SuperLink's side of a Grid: holds one message; an object without a byte is announced and not there."""

    def __init__(self):
        self.listed, self.objects, self.tree = None, {}, None
        self.unasked = []  # what Flower would hand out beside it: [(announcement, tree)]

    def PullMessages(self, _request):  # noqa: N802
        messages, trees = zip(*[*self.unasked, (self.listed, self.tree)], strict=True)
        return SimpleNamespace(messages_list=list(messages), message_object_trees=list(trees))

    def PullObject(self, request):  # noqa: N802
        content = self.objects.get(request.object_id)
        return SimpleNamespace(
            object_found=content is not None, object_available=content != b"", object_content=content or b""
        )

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
        self.runtime = FakeRuntime()
        grid = HttpGrid("127.0.0.1:1", insecure=True, token="none")
        grid._client, grid._run = self.runtime, SimpleNamespace(run_id=1)
        self._grid = GridMailbox(grid)
        self._grid.expect(MANIFEST.num_bytes)

    def receive(self, message_id, deadline=None):
        node = self._waiting[message_id].metadata.dst_node_id
        message = super().receive(message_id, deadline)
        kind = message.metadata.message_type if message else ""
        if not self._through(node, kind):
            return message
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            objects = {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
            tree = get_object_tree(message)
        self._tamper(node, objects, tree)
        self.runtime.listed = message_to_proto(remove_content_from_message(message))
        self.runtime.objects, self.runtime.tree = objects, tree
        return self._grid.receive(message_id, deadline)
