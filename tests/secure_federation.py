"""A tiny federation whose sites have keys of each other, for secure aggregation."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray
from tiny_federation import (
    MANIFEST,
    InProcessMailbox,
    Script,
    ScriptedMailbox,
    Tamper,
    federation_over,
    reply_to,
    site_named,
    site_settings,
)

from clients.masked_reply import MaskedReply, answer_small, secure_sum_of
from clients.site import MadeKeys
from common import config
from common.errors import FaceFedError
from common.protocol import wire
from common.protocol.parameters import Part, trainable_spans
from common.protocol.secure_words import SMALL
from common.protocol.wire import Reply, Task
from common.settings import Settings
from server.rounds import Federation
from server.secure_sum import SecureSums
from simulation.engine.run import made_keys


def secure_mailbox(
    names: Iterable[str], folder: Path, tamper: Tamper = lambda _name, _task, reply: reply
) -> InProcessMailbox:
    """An `InProcessMailbox` with keys."""
    names = list(names)
    mailbox, keys = InProcessMailbox(names, folder, tamper), made_keys(names)
    mailbox.sites = {node: dataclasses.replace(site, keys=keys[site.name]) for node, site in mailbox.sites.items()}
    return mailbox


def secure_client(
    name: str,
    keys: MadeKeys,
    folder: Path,
    *,
    change: NDArray[np.float32],
    num_examples: int = 10,
    spoil: Callable[[Reply], Reply] = lambda reply: reply,
) -> Script:
    """A node of `ScriptedMailbox` that answers each round with that change, masked, of the model of seven numbers.

    spoil: may change what it masks.
    """
    site = dataclasses.replace(site_settings(name, folder), keys=keys)
    part = Part(whole=MANIFEST, part=MANIFEST, spans=trainable_spans(MANIFEST, {e.name for e in MANIFEST.entries}))

    def script(task: Task, message: Message) -> Message | None:
        if task.kind == "join":
            site_words = site_named(name, num_training_pictures=num_examples)
            return Message(wire.site_content(site_words), reply_to=message)
        settings = config.from_json(task.settings)
        try:
            secure = secure_sum_of(site, task, settings)
            if task.kind in SMALL:
                return Message(wire.secure_content(answer_small(secure, task)), reply_to=message)
            reply = spoil(reply_to(task, change=change, num_examples=num_examples))
            if task.secure:
                _, shared = wire.read_task(message.content)
                state: Any = SimpleNamespace(part=part, settings=settings)
                reply = MaskedReply(state, task, shared, secure).of(reply)
        except FaceFedError as error:
            return wire.error_message(f"{name}: {error}", message)
        return Message(wire.reply_content(reply), reply_to=message)

    return script


def secure_federation(mailbox: ScriptedMailbox, settings: Settings, folder: Path) -> Federation:
    """`federation_over` with secure aggregation."""
    federation = federation_over(mailbox, settings, folder, first=0.25)
    federation.secure = SecureSums(settings, folder.name, folder)
    return federation
