"""A federation small enough for a unit test: made-up replies, scripted nodes, tiny packs, clients in this process."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Flower's typer asks click for a name that click will drop
    import typer  # noqa: F401
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

import clients.message_handler
import clients.packs
from clients.local_update import ClientState
from clients.message_handler import handle
from clients.policy import OWN_MACHINE
from clients.site import OF_RUN, SiteSettings
from common import config
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.metrics.folds import FOLD_BINS, NUM_FOLDS
from common.metrics.sums import CLOSED_FIELDS, NUM_BINS, ClosedSetSums, EvaluationSums
from common.models.recogniser import build_recogniser, private_names, shared_names
from common.protocol import wire
from common.protocol.codec import encode
from common.protocol.parameters import Manifest, manifest_of
from common.protocol.wire import TRAIN_FIELDS, Reply, Site, Task
from common.runs import begin_tracking, federated_kind
from common.settings import Settings
from common.system.events import EventLog
from server.exchange.mailbox import Waiter
from server.exchange.roster import Roster
from server.global_model import GlobalModel, ServerOptimiser
from server.record.checkpoint import RunCheckpoints
from server.record.tell import Record
from server.rounds import Federation
from tests.tiny_settings import TINY, changed

SIDE = 32
# What tests are made of is smaller than any site's data, and not every model in them is one of a run.
UNWATCHED = dataclasses.replace(OWN_MACHINE, first_model=False, max_move=0.0)
NUM_TRAINING_PICTURES = 24


def enter_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's Message asks which run it is made in; outside of one it must be told."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def enter_tiny_federation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose sites, none known yet, have tiny packs, each by the name of the folder above its pictures."""
    enter_run(monkeypatch)
    monkeypatch.setattr(clients.message_handler, "_workplaces", {})
    packs: dict[str, FacePack] = {}

    def open_pack(_dataset: str, data_dir: Path, *_rest: object, **_named: object) -> FacePack:
        name = data_dir.parent.name
        return packs.setdefault(name, tiny_pack(name))

    monkeypatch.setattr(clients.packs, "open_pack", open_pack)


# ---- the server's side: made-up replies to a model of seven numbers

MANIFEST = manifest_of({"backbone.a": torch.zeros(3), "backbone.b": torch.zeros(2, 2)})


def settings_with(**values: object) -> Settings:
    """Settings of a tiny federation; values: section__key."""
    tiny = {
        "model__head_scale": 8.0,
        "model__head_margin": 0.1,
        "training__lr": 0.02,
        "federation__join_timeout_s": 0.3,
        "federation__round_timeout_s": 0.3,
    }
    return changed(TINY, **(tiny | values))


def site_named(name: str, **values: object) -> Site:
    """What a client of that name tells of itself."""
    plain = Site(
        name=name,
        dataset="folder",
        num_people=12,
        num_pictures=100,
        num_training_people=6,
        num_training_pictures=50,
        num_quarantined=0,
        val_people="0123",
        test_pairs="4567",
        machine="here",
        cores=2,
        device="cpu",
        precision="float32",
        memory_format="contiguous",
    )
    return dataclasses.replace(plain, **values)


def sums_with(auc: float) -> EvaluationSums:
    """Sums whose ROC AUC is `auc`: of 100 genuine pairs so many lie above all 100 impostor pairs, the others below."""
    pairs = np.zeros((2, NUM_BINS), dtype=np.int64)
    pairs[1, 4000] = 100
    pairs[0, 5000], pairs[0, 3000] = round(100 * auc), 100 - round(100 * auc)
    numbers = dict.fromkeys(CLOSED_FIELDS, 1) | {"num_examples": 4, "num_classes": 2, "loss_sum": 2.0}
    return EvaluationSums(
        closed=ClosedSetSums(**numbers),
        pairs=pairs,
        folds=folds_with(auc),
        confusion=np.ones((2, 2), dtype=np.int64),
    )


def folds_with(auc: float) -> NDArray[np.int64]:
    """Ten folds of ten genuine pairs, of which a part lies above all ten impostor pairs."""
    folds = np.zeros((NUM_FOLDS, 2, FOLD_BINS), dtype=np.int64)
    folds[:, 1, 500] = 10
    folds[:, 0, 600], folds[:, 0, 400] = round(10 * auc), 10 - round(10 * auc)
    return folds


def reply_to(
    task: Task,
    *,
    change: object = 0.5,
    num_examples: int = 10,
    auc: float = 0.6,
    test_auc: float = 0.6,
    codec: str = "float32",
) -> Reply:
    """A good reply to a train or evaluate task; change: one number for all elements, or an array."""
    training = task.kind == "train"
    return Reply(
        server_round=task.server_round,
        manifest=task.manifest,
        num_examples=num_examples,
        train=dict.fromkeys(TRAIN_FIELDS, 1.0) if training else {},
        evaluations={s: sums_with(auc if s == "val" else test_auc) for s in task.splits.split()},
        change=encode(np.broadcast_to(np.float32(change), (MANIFEST.size,)).astype(np.float32), codec)
        if training
        else None,
    )


Script = Callable[[Task, Message], Message | None]  # None: no answer yet


def client(name: str, answer: Callable[[Task], Reply | Message | None] = reply_to, **site: object) -> Script:
    """A node that joins under `name` and answers each train or evaluate task with `answer`."""

    def script(task: Task, message: Message) -> Message | None:
        if task.kind == "join":
            return Message(wire.site_content(site_named(name, **site)), reply_to=message)
        reply = answer(task)
        return Message(wire.reply_content(reply), reply_to=message) if isinstance(reply, Reply) else reply

    return script


class ScriptedMailbox:
    """A Mailbox whose nodes are functions; nodes may be added and removed while it is used."""

    def __init__(self, nodes: Mapping[int, Script]) -> None:
        self.nodes = dict(nodes)
        self.tasks: list[tuple[int, Task]] = []
        self.models: list[NDArray[np.float32] | None] = []
        self._waiting: dict[str, Message] = {}

    def node_ids(self) -> list[int]:
        return sorted(self.nodes)

    def send(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            task, shared = wire.read_task(message.content)
            self.tasks.append((node, task))
            self.models.append(None if shared is None else shared.copy())
            ids.append(f"message-{len(self.tasks)}")
            message.metadata.__dict__["_message_id"] = ids[-1]  # a reply says to which message it is one
            self._waiting[ids[-1]] = message
        return ids

    def receive(self, message_id: str, deadline: float | None = None) -> Message | None:  # noqa: ARG002
        message = self._waiting[message_id]
        script = self.nodes.get(message.metadata.dst_node_id)
        return None if script is None else script(wire.read_task(message.content)[0], message)

    def is_short(self, message_id: str) -> bool:
        reply = self.receive(message_id)
        return reply is not None and (reply.has_error() or wire.ARRAYS not in reply.content)


def roster_over(
    mailbox: ScriptedMailbox,
    settings: Settings,
    folder: Path,
    *,
    all_here: bool = False,
    waiter: Waiter | None = None,
) -> Roster:
    """A Roster as the server app makes it."""
    return Roster(
        mailbox,
        settings.federation,
        task=Task(kind="join", run_id=folder.name, server_round=0, settings=config.to_json(settings)),
        events=EventLog(folder),
        waiter=waiter or Waiter(lambda: False),
        all_nodes_are_here=lambda: all_here,
    )


def federation_over(mailbox: ScriptedMailbox, settings: Settings, folder: Path, first: float = 0.0) -> Federation:
    """A Federation of the model of seven numbers, all `first`, recorded in `folder`."""
    waiter = Waiter(lambda: False)
    return Federation(
        settings=settings,
        run_id=folder.name,
        manifest=MANIFEST,
        model=GlobalModel(np.full(MANIFEST.size, first, dtype=np.float32), settings.federation.download_codec),
        optimiser=ServerOptimiser.of(settings.federation, MANIFEST, {entry.name for entry in MANIFEST.entries}),
        mailbox=mailbox,
        roster=roster_over(mailbox, settings, folder, waiter=waiter),
        waiter=waiter,
        checkpoints=RunCheckpoints(folder / "checkpoints", MANIFEST),
        record=Record(begin_tracking(settings, folder, "none", federated_kind(settings)), EventLog(folder), settings),
    )


# ---- the clients' side: random faces in memory


def tiny_pack(name: str) -> FacePack:
    """Six training people of six pictures, three validation and three test people of three; noise around a base."""
    rng = np.random.default_rng(sum(name.encode()))
    kinds = [Split.TRAIN] * 4 + [Split.VAL_PICTURES, Split.TEST_PICTURES]
    rows = [(who, kind) for who in range(6) for kind in kinds]
    rows += [(who, Split.VAL_PEOPLE if who < 9 else Split.TEST_PEOPLE) for who in range(6, 12) for _ in range(3)]
    base = rng.integers(0, 256, (12, SIDE, SIDE, 3))
    noise = rng.integers(-40, 41, (len(rows), SIDE, SIDE, 3))
    person = np.array([who for who, _ in rows], dtype=np.int64)
    return FacePack(
        pictures=np.clip(base[person] + noise, 0, 255).astype(np.uint8),
        person=person,
        people=tuple(f"{name}-{number}" for number in range(12)),
        split=np.array([kind for _, kind in rows], dtype=np.int8),
        key=f"key-of-{name}",
        quarantined=(),
        dataset="folder",
        cut="centre square" if name == "beta" else "landmarks",
    )


def site_settings(name: str, folder: Path) -> SiteSettings:
    """A site whose state lies in `folder`/NAME."""
    return SiteSettings(
        name=name,
        dataset="folder",
        data_dir=folder / name / "no-pictures",
        device="cpu",
        state_dir=folder / name,
        cache_dir=folder / "packs",
        policy=UNWATCHED,
        seed=OF_RUN,
    )


def tiny_workplace(settings: Settings, folder: Path, name: str = "alpha") -> ClientState:
    """A ClientState over a tiny pack, made by hand."""
    pack = tiny_pack(name)
    recogniser = build_recogniser(
        settings.model, num_people=pack.num_classes, image_size=SIDE, backbone_seed=1, head_seed=2
    )
    state = recogniser.state_dict()
    private = private_names(recogniser, settings.model.normalisation)
    return ClientState(
        site=site_settings(name, folder),
        settings=settings,
        pack=pack,
        recogniser=recogniser,
        manifest=manifest_of({n: state[n] for n in shared_names(recogniser, settings.model.normalisation)}),
        private=private,
        head_seed=2,
        fresh={n: state[n].clone() for n in private if n.startswith("backbone.")},
    )


def task_for(layout: Manifest, settings: Settings, **values: object) -> Task:
    """A train task of round 1 for a tiny client."""
    plain = Task(
        kind="train",
        run_id="run-1",
        server_round=1,
        settings=config.to_json(settings),
        manifest=layout.digest,
        splits="val test",
        precision="float32",
        memory_format="contiguous",
    )
    return dataclasses.replace(plain, **values)


Tamper = Callable[[str, Task, Message], Message]


class InProcessMailbox:
    """A Mailbox whose nodes are clients in this process, answered by `clients.message_handler.handle` itself."""

    def __init__(self, names: Iterable[str], folder: Path, tamper: Tamper = lambda _name, _task, reply: reply) -> None:
        """tamper: may change a reply on its way to the server."""
        self.sites = {100 + number: site_settings(name, folder) for number, name in enumerate(names)}
        self._tamper = tamper
        self._sent: list[Message] = []

    def node_ids(self) -> list[int]:
        return sorted(self.sites)

    def send(self, messages: Iterable[Message]) -> list[str]:
        first = len(self._sent)
        self._sent += messages
        return [str(number) for number in range(first, len(self._sent))]

    def receive(self, message_id: str, deadline: float | None = None) -> Message | None:  # noqa: ARG002
        message = self._sent[int(message_id)]
        site = self.sites[message.metadata.dst_node_id]
        return self._tamper(site.name, wire.read_task(message.content)[0], handle(site, message))

    def is_short(self, _message_id: str) -> bool:
        return False
