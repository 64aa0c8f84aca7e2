"""The ClientApp: Flower's messages in, one site's answers out. A site that fails answers with one line."""

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from clients.egress import record_egress
from clients.local_update import Workplace, evaluate_global, join, open_workplace, read_settings, train
from clients.own_record import keep_round
from clients.site import SiteSettings
from common import wire
from common.errors import CheckpointError, DataError, FaceFedError, ReplyRefused
from common.evaluation import SPLITS
from common.events import LAST_TASK_FILE, SHOWN
from common.wire import Task

log = logging.getLogger("facefed.client")

FindSite = Callable[[Context], SiteSettings]
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # it names files here
NO_TASK = Task(kind="unknown", run_id="unknown", server_round=0, settings="")  # a message that is none of ours

# One per process: a Ray actor answers many messages, and the pack and the model's memory serve all of them.
_workplaces: dict[tuple[str, str, str], Workplace] = {}


def site_from_node_config(context: Context) -> SiteSettings:
    """The site settings that `flower-client` gave to its SuperNode."""
    node = context.node_config
    return SiteSettings(
        name=str(node["name"]),
        dataset=str(node["dataset"]),
        data_dir=Path(str(node["data-dir"])),
        device=str(node["device"]),
        state_dir=Path(str(node["state-dir"])),
        cache_dir=Path(str(node["cache-dir"])),
        pack_workers=int(node["pack-workers"]),
        tracking_uri=str(node["tracking-uri"]),
    )


def _workplace(site: SiteSettings, task: Task) -> Workplace:
    key = (site.name, task.run_id, task.settings)
    if key not in _workplaces:
        for old in [known for known in _workplaces if known[1] != task.run_id]:
            del _workplaces[old]  # one run's state at a time
        _workplaces[key] = open_workplace(site, read_settings(task))
    return _workplaces[key]


def _check(task: Task) -> None:
    """Raises ReplyRefused for a task that no server of ours sends: its words become paths and choices here."""
    if not RUN_ID.fullmatch(str(task.run_id)):
        raise ReplyRefused(f"the run id {task.run_id!r} is not one of FaceFed's.")
    if task.kind not in wire.MESSAGE_TYPES:
        raise ReplyRefused(f"the task {task.kind!r} is unknown; choose {', '.join(wire.MESSAGE_TYPES)}.")
    unknown = [split for split in task.splits.split() if split not in SPLITS]
    if unknown:
        raise ReplyRefused(f"the split {unknown[0]!r} is unknown; choose {', '.join(SPLITS)}.")


def _answer(site: SiteSettings, task: Task, shared: NDArray[np.float32] | None, began: float) -> RecordDict:
    workplace = _workplace(site, task)
    if task.kind == "join":
        return wire.site_content(join(workplace))
    if task.kind == "train":
        with keep_round(site, task, workplace.settings, num_pictures=len(workplace.pack)) as kept:
            reply = train(workplace, task, shared, began=began)
            kept(reply)
        return wire.reply_content(reply)
    return wire.reply_content(evaluate_global(workplace, task, shared))


def _public_reason(error: FaceFedError) -> str:
    """What the server may read of a failure: lines about data and files hold this site's paths, and maybe names."""
    if isinstance(error, DataError | CheckpointError):
        kind = "data" if isinstance(error, DataError) else "state"
        return f"its {kind} cannot be used; the client's own output says why."
    return str(error)


def handle(site: SiteSettings, message: Message) -> Message:
    """Answer one message; a failure that we understand becomes an error reply of one line, in the ledger as well."""
    began = time.perf_counter()
    task = NO_TASK
    ledger = site.state_dir / "egress"
    try:
        given, shared = wire.read_task(message)
        _check(given)
        task = given
        content = _answer(site, task, shared, began)
    except FaceFedError as error:
        log.warning("%s%s: %s", SHOWN, site.name, error)
        reason = f"{site.name}: {_public_reason(error)}"
        record_egress(ledger, site.name, task, reason)
        return wire.error_message(reason, message)
    record_egress(ledger, site.name, task, content)
    if task.last:
        (site.state_dir / LAST_TASK_FILE).write_text(task.run_id, encoding="utf-8")
    return Message(content, reply_to=message)


def build_client_app(find_site: FindSite) -> ClientApp:
    """A ClientApp whose site settings come from `find_site`: the node's configuration, or a simulation's table."""
    client_app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        return handle(find_site(context), message)

    client_app.query()(answer)
    client_app.train()(answer)
    client_app.evaluate()(answer)
    return client_app


app = build_client_app(site_from_node_config)
