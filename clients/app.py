"""The ClientApp of the bundle: a site's work in the process that Flower starts for a message, on its stock programs.

`flower-client` does not come here: it answers messages by `clients/flower`, with a resident trainer, and never unpacks
a bundle.  A stock SuperNode and Flower's own simulation do.  What is the site's own stays as it is there: its private
state, its egress ledger, its policy, its refusals.
"""

import json
import logging
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any, Final

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from clients.egress import LEDGER, asked_by, refusal
from clients.flower.trainer import CLIENT_FAILED, JOIN, LEFT_ALONE
from clients.node import NodeRefused, check_room, site_of_node, site_of_partition
from clients.site import SiteSettings
from clients.state_folder import state_folder_held
from common.errors import FaceFedError
from common.system.console import set_up_logging
from common.system.files import private_files
from common.system.runtime import quiet_libraries

NOT_USABLE: Final = "this node's configuration cannot be used; its own output says why."
FREE_WITHIN_S: Final = 60.0  # the process of the message before this one may be ending

log = logging.getLogger("facefed.client")


def is_simulated() -> bool:
    """Whether this process is an actor of Flower's simulation; a SuperNode's process for a message has no Ray."""
    return "ray" in sys.modules


def find_site(message: Message, context: Context) -> SiteSettings:
    """The site that this node is.  Raises UserError; NodeRefused where the server may read the line."""
    if is_simulated():
        clients = str(context.run_config.get("clients", ""))
        return site_of_partition(context.node_config, clients, out=_out_of(message))
    site = site_of_node(context.node_config)
    if asked_by(message.content).kind == JOIN:
        check_room(site, str(context.node_config.get("policy", "")))
    return site


def _out_of(message: Message) -> str:
    """The run's `run.out`, which a task of ours has among its settings."""
    task: Mapping[str, Any] = message.content.get("task", {})
    try:
        return str(json.loads(str(task["settings"]))["run"]["out"])
    except (KeyError, TypeError, ValueError):
        raise NodeRefused("the server's message is not one of FaceFed's; use equal versions.") from None


def respond(message: Message, context: Context) -> Message:
    """Answer one message, with what the site has to say or with the one line of a refusal."""
    quiet_libraries()
    set_up_logging("info")
    with private_files():
        try:
            site = find_site(message, context)
        except FaceFedError as error:
            log.warning("%s", error)
            return _refused(message, str(error) if isinstance(error, NodeRefused) else NOT_USABLE)
        if is_simulated():
            return _answered(site, message)
        try:
            with state_folder_held(
                site.state_dir, site.name, flag="state-dir", within_s=FREE_WITHIN_S, say=log.warning
            ):
                return _answered(site, message)
        except FaceFedError as error:
            log.warning("%s: %s", site.name, error)
            reason = f"{site.name}: {NOT_USABLE}"
            return _refused(message, refusal(site.state_dir / LEDGER, site.name, message.content, reason))


def _answered(site: SiteSettings, message: Message) -> Message:
    from clients.message_handler import handle  # torch and all: a node that is no site answers without

    done = threading.Event()
    if not is_simulated():
        limits = (site.policy.max_task_seconds, done)
        threading.Thread(target=_end_when_late, args=limits, name="limit", daemon=True).start()
    try:
        return handle(site, message)
    except Exception as error:
        log.exception("%s: the task failed", site.name)
        reason = f"{site.name}: its task failed ({type(error).__name__}); the node's own output says why."
        return _refused(message, refusal(site.state_dir / LEDGER, site.name, message.content, reason))
    finally:
        done.set()


def _end_when_late(most_s: float, done: threading.Event) -> None:
    """End this process once its task has taken longer than the site's policy allows."""
    if not done.wait(most_s):
        log.warning("a task took longer than %g s (max_task_seconds) and is ended", most_s)
        os._exit(LEFT_ALONE)


def _refused(message: Message, reason: str) -> Message:
    return Message(Error(code=CLIENT_FAILED, reason=reason), reply_to=message)


app = ClientApp()
app.query()(respond)
app.train()(respond)
app.evaluate()(respond)
