"""One site's answers: a message's content in, a reply's content out. A site that fails answers with one line."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from clients.egress import LEDGER, RUN_ID, Asked, record_egress, record_receipt
from clients.frozen_part import whole_model
from clients.local_update import ClientState, evaluate_global, join, open_client_state, read_settings, train, watched
from clients.masked_reply import MaskedReply, answer_small, is_in_lanes, is_masked, ledger_words, secure_sum_of
from clients.own_record import keep_round, tell_round
from clients.packs import prune_packs
from clients.past_tasks import PastTasks, prune_runs
from clients.policy import PolicyRefusal, TaskWords, against_settings, against_task, digest_of, require_none
from clients.secure_sum import forget_others
from clients.site import SiteSettings
from common.errors import CheckpointError, DataError, FaceFedError, ReplyRefused
from common.metrics.group_names import GROUPS
from common.protocol import wire
from common.protocol.codec import Coded, num_bytes
from common.protocol.ledger import RECEIPT
from common.protocol.secure_words import SMALL, WorkAsked, read
from common.protocol.wire import Task
from common.settings import Settings
from common.system.events import LAST_TASK_FILE, SHOWN
from common.system.runtime import UNKNOWN, facefed_version
from common.training.evaluation import SPLITS

_Model = tuple[NDArray[np.float32] | None, Coded | None]  # what of it training moves; what else came along

log = logging.getLogger("facefed.client")

# One per process: a trainer or a Ray actor answers many messages; the pack and the model's memory serve all of them.
_workplaces: dict[tuple[str, str, str], ClientState] = {}


def _workplace(site: SiteSettings, task: Task, settings: Settings) -> ClientState:
    """The site's state for this run, as it was left or new.

    Virtual clients take turns at one: what a process holds must not grow with the number of clients that it serves.
    """
    key = (site.name, task.run_id, task.settings)
    if key not in _workplaces:
        for old in [known for known in _workplaces if known[1] != task.run_id]:
            del _workplaces[old]  # one run's state at a time
        former = None
        if site.share is not None:
            former = next((place for (_, *run), place in _workplaces.items() if run == list(key[1:])), None)
            _workplaces.clear()
        _workplaces[key] = open_client_state(site, settings, former)
    return _workplaces[key]


def _check(task: Task) -> None:
    """Raises ReplyRefused for a task that no server of ours sends: its words become paths and choices here."""
    if not RUN_ID.fullmatch(str(task.run_id)):
        raise ReplyRefused(f"the run id {task.run_id!r} is not one of FaceFed's.")
    if task.kind not in wire.MESSAGE_TYPES:
        raise ReplyRefused(f"the task {task.kind!r} is unknown; choose {', '.join(wire.MESSAGE_TYPES)}.")
    unknown = [split for split in task.splits.split() if split not in (*SPLITS, GROUPS)]
    if unknown:
        raise ReplyRefused(f"the split {unknown[0]!r} is unknown; choose {', '.join((*SPLITS, GROUPS))}.")
    if task.received and not RECEIPT.fullmatch(task.received):
        raise ReplyRefused("the server's receipt of the last reply is malformed; use equal versions of FaceFed.")
    versions = (str(task.version), facefed_version())
    if versions[0] not in ("", UNKNOWN) and UNKNOWN != versions[1] != versions[0]:
        raise ReplyRefused(
            f"the server runs facefed {versions[0]} and this site facefed {versions[1]}; install equal versions."
        )


@contextlib.contextmanager
def _recorded(site: SiteSettings, task: Task, settings: Settings) -> Iterator[PastTasks | None]:
    """Hold a task against the site's policy and what the run asked before, and keep what comes of it.

    Yields the run's record; None of a virtual client, which keeps none.  Raises PolicyRefusal.
    """
    asked = TaskWords(*(getattr(task, name) for name in TaskWords._fields))
    against = against_settings(site.policy, settings) + against_task(site.policy, settings, task.kind, asked)
    if site.share is not None:
        require_none(against)
        yield None
        return
    record, began = PastTasks.of(site.state_dir, task.run_id, site.policy), time.process_time()
    try:
        record.take(task.kind, task.server_round, settings)
        require_none(against)
        record.require_disk(site.state_dir / "private" / task.run_id)
        yield record
    except PolicyRefusal:
        record.num_refusals += 1
        raise
    finally:
        record.cpu_seconds += time.process_time() - began
        record.save()


def _answer(site: SiteSettings, task: Task, model: _Model, began: float) -> RecordDict:
    settings = read_settings(task)
    with _recorded(site, task, settings) as record:
        return _done(site, task, settings, model, record, began)


def _done(
    site: SiteSettings,
    task: Task,
    settings: Settings,
    model: _Model,
    record: PastTasks | None,
    began: float,
) -> RecordDict:
    """The task's answer; whether the site does it has been decided, but for the model that came with it."""
    if task.kind == "join":
        if record is not None:
            prune_runs(site.state_dir, task.run_id, site.policy.keep_runs)
        forget_others(site.state_dir, task.run_id)  # of a virtual client too, whose folder is used again
        try:
            return wire.site_content(join(site, settings))
        finally:  # of a join that is refused too: its pack may have been made first
            if record is not None:
                prune_packs(site)
    if task.kind in SMALL:
        return wire.secure_content(answer_small(secure_sum_of(site, task, settings), task))
    secure = secure_sum_of(site, task, settings) if is_masked(task, settings) else None
    if secure is not None:  # before anything is done for it
        secure.require_turn(read(WorkAsked, task.secure), task.server_round)
    state = watched(_workplace(site, task, settings), record)
    folder = None if site.share is not None else state.state_folder(task.run_id)
    moving, frozen = model
    shared, keeps = (moving, "") if moving is None else whole_model(state.part, folder, task, moving, frozen)
    masked = None if secure is None or shared is None else MaskedReply(state, task, shared, secure)
    lose = masked.code if masked is not None and is_in_lanes(settings) else None
    if task.kind != "train":
        reply = evaluate_global(state, task, shared)
    elif site.share is not None:  # it is no site, so it keeps no record of its own
        reply = train(state, task, shared, began=began, lose=lose)
    else:
        codec = settings.federation.download_codec
        came = 0 if moving is None else num_bytes(codec, len(moving)) + (0 if frozen is None else frozen.nbytes)
        with keep_round(site, task, state.settings, num_pictures=len(state.pack), bytes_down=came) as kept:
            reply = train(state, task, shared, began=began, lose=lose)
            kept(reply)
        tell_round(site, task, state.settings, reply)
    if masked is not None:
        reply = masked.of(reply)
    elif task.last and settings.secagg.enabled:
        secure_sum_of(site, task, settings).forget()
    return wire.reply_content(dataclasses.replace(reply, frozen=keeps))


def _public_reason(error: FaceFedError) -> str:
    """What the server may read of a failure: lines about data and files hold this site's paths, and maybe names."""
    if isinstance(error, DataError | CheckpointError):
        kind = "data" if isinstance(error, DataError) else "state"
        return f"its {kind} cannot be used; the client's own output says why."
    return str(error)


def _own_words(error: FaceFedError) -> str:
    """What the site's own output says beside a refusal's fixed words."""
    return f" ({error.against.asked}; allowed: {error.against.allowed})" if isinstance(error, PolicyRefusal) else ""


def answer(site: SiteSettings, content: RecordDict) -> RecordDict | str:
    """Answer the content of one message, with the content of the reply or the one line of a refusal.

    Either is in the egress ledger before this returns.
    """
    began = time.perf_counter()
    request: Task | Asked = Asked()  # a message that is none of ours
    ledger = site.state_dir / LEDGER
    try:
        task, shared = wire.read_task(content)
        _check(task)
        request = task
        record_receipt(ledger, site.name, task, task.received)
        reply = _answer(site, task, (shared, wire.read_frozen(content)), began)
    except FaceFedError as error:
        log.warning("%s%s: %s%s", SHOWN, site.name, error, _own_words(error))
        reason = f"{site.name}: {_public_reason(error)}"
        record_egress(ledger, site.name, request, reason, digest_of(site.policy))
        return reason
    record_egress(ledger, site.name, task, reply, digest_of(site.policy), ledger_words(task, shared))
    if task.last and site.share is None:
        (site.state_dir / LAST_TASK_FILE).write_text(task.run_id, encoding="utf-8")
    return reply


def handle(site: SiteSettings, message: Message) -> Message:
    """Answer one message of Flower's."""
    reply = answer(site, message.content)
    return wire.error_message(reply, message) if isinstance(reply, str) else Message(reply, reply_to=message)


def build_client_app(find_site: Callable[[Context], SiteSettings]) -> ClientApp:
    """A ClientApp that answers in its own process, for the sites that `find_site` names: a simulation's."""
    client_app = ClientApp()

    def respond(message: Message, context: Context) -> Message:
        return handle(find_site(context), message)

    client_app.query()(respond)
    client_app.train()(respond)
    client_app.evaluate()(respond)
    return client_app
