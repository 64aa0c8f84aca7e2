"""A hostile ServerApp: what `flower-server` runs in its place when the folder of a `sitecustomize.py` is on its path.

It asks each site what no server of ours asks, and writes what came back into RUN/hostile.json, by attack: the reason of
a refusal, or "answered".
"""

import dataclasses
import importlib.abc
import importlib.machinery
import json
import sys
import time
from pathlib import Path

REAL = "server.app"
ESCAPES = "1]\nSuperNode ID: 4242\njoined: someone\x1b[31m\r\x07"
SITECUSTOMIZE = "import sys\nsys.path.insert(0, {folder!r})\nimport hostile_server\nhostile_server.install()\n"
ANSWERED, DONE = "answered", "the hostile server is done."


class _InPlace(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the real ServerApp, whose loop is then ours."""

    def find_spec(self, name, path=None, target=None):
        if name != REAL:
            return None
        self._spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        return importlib.machinery.ModuleSpec(name, self, origin=self._spec.origin)

    def create_module(self, spec):  # noqa: ARG002
        return None

    def exec_module(self, module):
        module.__file__ = self._spec.origin
        self._spec.loader.exec_module(module)
        module.federate = federate


def install():
    """From here on this process has the hostile ServerApp."""
    sys.meta_path.insert(0, _InPlace())


def federate(settings, mailbox, surroundings):
    """In the place of `server.app.federate`."""
    from flwr.app import Message

    from common import config
    from common.protocol import wire
    from common.protocol.codec import encode
    from common.protocol.wire import Task
    from common.system.files import write_json
    from simulation.admin import imprint
    from simulation.admin.attacks import first_model

    def ask(node, task, model=None):
        shared = None if model is None else wire.pack_shared(encode(model, "float32"))
        kind = wire.MESSAGE_TYPES.get(task.kind, "train")
        asked = Message(wire.task_content(task, shared), node, kind, ttl=600.0, group_id=ESCAPES)
        [message] = mailbox.send([asked])
        deadline = time.monotonic() + 120
        while (reply := mailbox.receive(message, deadline)) is None:
            if time.monotonic() > deadline:
                return "no answer"
            time.sleep(0.05)
        return reply.error.reason if reply.has_error() else ANSWERED

    while not (nodes := mailbox.node_ids()):
        time.sleep(0.1)
    model, manifest = first_model(settings)
    printing = config.with_values(settings, imprint.SETTINGS | {"model.patch_size": settings.data.image_size})
    crafted, other = imprint.crafted(printing)
    surroundings.expect(max(manifest.num_bytes, other.num_bytes))
    plain = Task(
        kind="train", run_id="honest", server_round=1, settings=config.to_json(settings), manifest=manifest.digest,
        precision="float32", memory_format="contiguous",
    )  # fmt: skip
    fast = config.to_json(config.with_values(settings, {"training.lr": 20.0}))

    def task(**values):
        return dataclasses.replace(plain, **values)

    asked = {
        "honest": (task(kind="join", server_round=0), None),
        "imprint": (task(run_id="a", settings=config.to_json(printing), manifest=other.digest), crafted),
        "crafted": (task(run_id="b"), first_model(settings, seed=7)[0]),
        "rate": (task(run_id="c", settings=fast), model),
        "round": (task(run_id="d", server_round=2**40), model),
        "threads": (task(run_id="e", threads=100_000), model),
        "log lines": (task(run_id=ESCAPES), model),
        "split": (task(run_id="f", splits=f"val {ESCAPES}"), model),
        "precision": (task(run_id="g", precision=ESCAPES), model),
        "settings": (task(run_id="h", settings=json.dumps({ESCAPES: {ESCAPES: 1}})), model),
        "kind": (task(kind=ESCAPES), model),
        "receipt": (task(received=ESCAPES), model),
        "path": (task(run_id="../../outside"), model),
        "absolute": (task(run_id=str(Path(surroundings.run_folder).parent / "outside")), model),
        "trained": (plain, model),
    }
    told = {name: ask(nodes[0], *one) for name, one in asked.items()}
    write_json(Path(surroundings.run_folder) / "hostile.json", told)
    write_json(Path(surroundings.run_folder) / "outcome.json", {"exit_code": 1, "line": DONE})
