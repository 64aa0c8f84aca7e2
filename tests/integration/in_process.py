"""A whole federation in one process, without Flower's engines: the same ServerApp code and ClientApp code, by hand."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Flower's typer asks click for a name that click will drop
    import typer  # noqa: F401
from flwr.app import Message

from clients.local_update import ClientState, join, open_client_state, train
from clients.message_handler import handle
from clients.policy import OWN_MACHINE
from clients.site import OF_RUN, SiteSettings
from common import config
from common.models.recogniser import trainable_names
from common.protocol.codec import decode
from common.protocol.parameters import flatten
from common.protocol.wire import Reply, Task
from common.settings import Settings
from common.system.runtime import num_cores
from common.training.autotune import threads_for
from server.app import Surroundings, federate, initial_model
from server.exchange.mailbox import Mailbox
from server.global_model import GlobalModel, ServerOptimiser


def site_at(folder: Path, dataset: str, data_dir: Path, name: str = "alpha") -> SiteSettings:
    """A site whose state and cache lie in `folder`."""
    return SiteSettings(
        name=name,
        dataset=dataset,
        data_dir=data_dir,
        device="cpu",
        state_dir=folder / name,
        cache_dir=folder / "packs",
        policy=OWN_MACHINE,
        seed=OF_RUN,
    )


def task_for(state: ClientState, settings: Settings, server_round: int) -> Task:
    """The train task of a round, with what `auto` was resolved to when the client joined, as the server makes it."""
    joined = join(state.site, settings)
    return Task(
        kind="train",
        run_id="r",
        server_round=server_round,
        settings=config.to_json(settings),
        manifest=state.manifest.digest,
        splits="val",
        precision=joined.precision,
        memory_format=joined.memory_format,
        compiled=joined.compiled,
        threads=threads_for(settings, 1, num_cores()),
    )


def two_rounds(settings: Settings, site: SiteSettings) -> tuple[np.ndarray, list[Reply]]:
    """The global model after the settings' rounds with this one client, and its replies."""
    state = open_client_state(site, settings)
    recogniser, manifest = initial_model(settings)
    model = GlobalModel(flatten(recogniser.state_dict(), manifest), settings.federation.download_codec)
    optimiser = ServerOptimiser.of(
        settings.federation, manifest, trainable_names(recogniser, settings.training.trainable)
    )
    replies = []
    for server_round in range(1, settings.federation.rounds + 1):
        reply = train(state, task_for(state, settings, server_round), model.received)
        model.step(optimiser, state.part.spread(decode(reply.change)))
        replies.append(reply)
    return model.received, replies


class LocalMailbox(Mailbox):
    """Nodes 1, 2, ... are these sites; each message is answered at once, unless `silent` says that it never is."""

    def __init__(self, sites: Sequence[SiteSettings], silent: Callable[[Message], bool] = lambda _: False) -> None:
        """silent: the messages that get no answer."""
        self._sites: Mapping[int, SiteSettings] = dict(enumerate(sites, start=1))
        self._silent = silent
        self._replies: dict[str, Message] = {}
        self._count = 0

    def node_ids(self) -> list[int]:
        """All sites, always."""
        return list(self._sites)

    def send(self, messages: Iterable[Message]) -> list[str]:
        """Let each site answer its message."""
        names = []
        for message in messages:
            self._count += 1
            names.append(str(self._count))
            if not self._silent(message):
                self._replies[names[-1]] = handle(self._sites[message.metadata.dst_node_id], message)
        return names

    def receive(self, message_id: str, deadline: float | None = None) -> Message | None:  # noqa: ARG002
        """The answer, if there is one."""
        return self._replies.pop(message_id, None)


def federate_in(folder: Path, settings: Settings, mailbox: Mailbox) -> Path:
    """Run a whole federation into `folder`, which it returns."""
    folder.mkdir(parents=True, exist_ok=True)
    surroundings = Surroundings(
        run_folder=folder, stopped=lambda: False, all_nodes_are_here=lambda: False, git_commit="unknown"
    )
    federate(settings, mailbox, surroundings)
    return folder
