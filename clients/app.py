"""The ClientApp: Flower's messages in, one site's answers out. A site that fails answers with one line."""

import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.egress import record_egress
from clients.local_update import Workplace, evaluate_global, join, open_workplace, read_settings, train
from clients.site import SiteSettings
from common import wire
from common.errors import FaceFedError
from common.events import LAST_TASK_FILE
from common.wire import Task

log = logging.getLogger("facefed.client")

FindSite = Callable[[Context], SiteSettings]

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
    )


def _workplace(site: SiteSettings, task: Task) -> Workplace:
    key = (site.name, task.run_id, task.settings)
    if key not in _workplaces:
        for old in [known for known in _workplaces if known[1] != task.run_id]:
            del _workplaces[old]  # one run's state at a time
        _workplaces[key] = open_workplace(site, read_settings(task))
    return _workplaces[key]


def _answer(site: SiteSettings, message: Message) -> tuple[Task, RecordDict]:
    task, shared = wire.read_task(message)
    workplace = _workplace(site, task)
    if task.kind == "join":
        return task, wire.site_content(join(workplace))
    work = train if task.kind == "train" else evaluate_global
    return task, wire.reply_content(work(workplace, task, shared))


def handle(site: SiteSettings, message: Message) -> Message:
    """Answer one message; a failure that we understand becomes an error reply of one line."""
    try:
        task, content = _answer(site, message)
    except FaceFedError as error:
        log.warning("%s: %s", site.name, error)
        return wire.error_message(f"{site.name}: {error}", message)
    record_egress(site.state_dir / "egress", site.name, task, content)
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
