"""The ServerApp: from run settings to a trained, recorded and registered global model."""

import hashlib
import logging
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common import config
from common.errors import EXIT_DONE, EXIT_FAILED, FaceFedError, one_line
from common.metrics.figures import AUC
from common.metrics.names import of_split
from common.models.recogniser import Recogniser, build_recogniser, moving_names, shared_names, trainable_names
from common.protocol.parameters import Manifest, Part, flatten, load_shared, manifest_of
from common.protocol.wire import Task
from common.results import Trained, keep_thresholds, register_models
from common.runs import CHECKPOINTS, CONFIG_FILE, federated_kind, new_run_folder, recorded
from common.secagg.sites import require_sites
from common.settings import Settings
from common.system.events import OUTCOME_FILE, STOP_FILE, EventLog
from common.system.files import write_json
from common.system.group_table import group_section
from common.system.run_view import model_words
from common.system.runtime import facefed_version, give_back_what_is_freed, stream_seed
from common.tracking.run import TrackedRun
from server.exchange.mailbox import Mailbox, Waiter
from server.exchange.patience import beat_s
from server.exchange.receipts import ReceiptMailbox
from server.exchange.roster import MOST_TOLD_APART, Roster
from server.flower.superlink import NODES_FILE, read_nodes, write_model_bytes
from server.global_model import GlobalModel, ServerOptimiser
from server.public_set import public_scorer
from server.record.checkpoint import RunCheckpoints
from server.record.history import History
from server.record.tell import Record
from server.resume import resume
from server.rounds import Federation, Outcome
from server.secure_sum import SecureSums
from server.site_privacy import SitePrivacy

log = logging.getLogger("facefed.server")


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What differs between the engines."""

    run_folder: Path
    stopped: Callable[[], bool]  # asked often; True ends the run
    all_nodes_are_here: Callable[[], bool]  # a simulation: nobody else can come
    simulated: bool = False  # the clients are processes of this program
    git_commit: str
    program: str = "flower-server"
    moves: Callable[[], bool] = lambda: False  # whether clients of this machine have moved since the last call
    clients_keep_the_model: bool = True  # else nobody is told what the best one was: they are virtual
    # Is told the bytes of the flat model as float32: no reply has more, beside its counts.
    expect: Callable[[int], None] = lambda _num_bytes: None


def initial_model(settings: Settings) -> tuple[Recogniser, Manifest]:
    """The recogniser whose shared parameters are round 0's, and their manifest. Its head is never used."""
    recogniser = build_recogniser(
        settings.model,
        num_people=2,
        image_size=settings.data.image_size,
        backbone_seed=stream_seed(settings.run.seed, "backbone"),
        head_seed=0,
    )
    state = recogniser.state_dict()
    # With private normalisation these are fewer names, by the same rule as at the clients.
    names = shared_names(recogniser, settings.model.normalisation)
    return recogniser, manifest_of({name: state[name] for name in names})


def _register(tracked: TrackedRun, federation: Federation, outcome: Outcome, held_back: str) -> list[str]:
    """Register the last, then the best, global model; returns what was registered, for the summary.

    held_back: why the best shall not become champion; "": it may.
    """
    settings = federation.settings
    if settings.model.normalisation == "private":
        return [
            "none: with private normalisation there is no single global model; each client keeps its own in export/"
        ]
    sites = [member.site for member in federation.roster.members().values()]
    cuts = [site.cut for site in sites]
    if not settings.tracking.enabled:  # no model is built for it
        keep_thresholds(tracked, _trained(settings, outcome, outcome.history.best_round), cuts)
        return []
    recogniser, manifest = initial_model(settings)
    digests = [site.val_people for site in sites]
    val_people = "+".join(digests)
    if len(digests) > MOST_TOLD_APART:  # a tag has room for a few
        val_people = hashlib.sha256(val_people.encode()).hexdigest()

    def trained(step: int) -> Trained:
        model = _trained(settings, outcome, step)
        return replace(model, load=lambda: load_shared(recogniser, federation.checkpoints.load(step), manifest))

    return register_models(
        tracked,
        settings,
        recogniser,
        name=f"{settings.model.backbone}_federated_{settings.federation.strategy}",
        unit="round",
        val_people=val_people,
        cuts=cuts,
        last=trained(outcome.last_round),
        best=trained(outcome.history.best_round),
        held_back=held_back,
    )


def _trained(settings: Settings, outcome: Outcome, step: int) -> Trained:
    """The model of a round, which nobody loads."""
    metrics, least = outcome.history.at(step).metrics, settings.verification.group_people
    groups = outcome.history.by_group(step, "federated", least)
    return Trained(
        step=step,
        val_auc=metrics.get(of_split("val", AUC), float("nan")),
        load=lambda: None,
        metrics=metrics,
        validation=lambda: outcome.history.validation_pairs(step),
        tested=lambda: outcome.history.tested_sums(step),
        groups="" if groups is None else group_section(groups, least),
    )


def federate(settings: Settings, mailbox: Mailbox, surroundings: Surroundings) -> None:
    """Run the federation into the run's folder; always leaves RUN/outcome.json with the exit code and its line."""
    folder = surroundings.run_folder
    events = EventLog(folder)
    exit_code, line = EXIT_FAILED, ""
    kind = federated_kind(settings, surroundings.program)
    try:
        with recorded(settings, folder, kind, commit=surroundings.git_commit) as tracked:
            with closing(ReceiptMailbox(mailbox, folder, folder.name)) as kept:
                summary = _federate(settings, kept, surroundings, tracked, events)
            events.emit("finished", **summary)
        exit_code = EXIT_DONE
    except FaceFedError as error:
        exit_code, line = error.exit_code, str(error)
    except Exception as error:
        line = f"the server failed: {type(error).__name__}: {one_line(str(error))}"
        log.exception("the round loop failed")
    finally:
        if line:
            events.emit("failed", line=line, exit_code=exit_code)
        write_json(folder / OUTCOME_FILE, {"exit_code": exit_code, "line": line})


def _federate(
    settings: Settings, mailbox: Mailbox, surroundings: Surroundings, tracked: TrackedRun, events: EventLog
) -> dict[str, object]:
    recogniser, manifest = initial_model(settings)
    surroundings.expect(manifest.num_bytes)
    num_parameters = sum(parameter.numel() for parameter in recogniser.backbone.parameters())
    events.emit("begun", model=model_words(settings, num_parameters=num_parameters, travels=manifest.size))
    trainable = settings.training.trainable
    learned = trainable_names(recogniser, trainable)
    moving = moving_names(recogniser, settings.model.normalisation, trainable)
    part = Part.of(manifest, moving=moving, trainable=learned)
    limit = settings.federation.run_timeout_s
    waiter = Waiter(surroundings.stopped, run_timeout_s=float("inf") if isinstance(limit, str) else limit)
    federation = Federation(
        settings=settings,
        run_id=surroundings.run_folder.name,
        manifest=manifest,
        model=GlobalModel(flatten(recogniser.state_dict(), manifest), settings.federation.download_codec, part),
        optimiser=ServerOptimiser.of(settings.federation, manifest, learned),
        part=part,
        mailbox=mailbox,
        roster=_roster(settings, mailbox, surroundings, events, waiter),
        waiter=waiter,
        checkpoints=RunCheckpoints(surroundings.run_folder / CHECKPOINTS, manifest),
        record=Record(tracked, events, settings, clients_are_here=surroundings.simulated),
        public=public_scorer(settings, recogniser, manifest),
        site_privacy=_site_privacy(settings, surroundings.run_folder),
        secure=_secure_sums(settings, surroundings.run_folder),
        history=History(),
        farewell=surroundings.clients_keep_the_model,
        moves=surroundings.moves,
    )
    del recogniser
    if federation.checkpoints.exists():
        resume(federation)
        events.emit("resumed", round=federation.first_round - 1)
    outcome = federation.run()
    if settings.federation.evaluate_only:
        return federation.record.evaluated(outcome.history, outcome.sha256)
    summary: dict[str, object] = federation.record.finished(outcome.history, outcome.last_round, outcome.sha256)
    if settings.tracking.enabled:
        events.emit("saving")
    summary["registered"] = _register(tracked, federation, outcome, str(summary["below_untrained"]))
    return summary


def _roster(
    settings: Settings, mailbox: Mailbox, surroundings: Surroundings, events: EventLog, waiter: Waiter
) -> Roster:
    task = Task(
        kind="join",
        run_id=surroundings.run_folder.name,
        server_round=0,
        settings=config.to_json(settings),
        beat_s=beat_s(settings.federation),
        version=facefed_version(),
    )
    return Roster(
        mailbox,
        settings.federation,
        task=task,
        events=events,
        waiter=waiter,
        all_nodes_are_here=surroundings.all_nodes_are_here,
        keys=partial(read_nodes, surroundings.run_folder / NODES_FILE),
        simulated=surroundings.simulated,
    )


def _site_privacy(settings: Settings, folder: Path) -> SitePrivacy | None:
    privacy = settings.privacy
    return SitePrivacy(privacy, settings.federation, folder) if privacy.unit == "site" else None


def _secure_sums(settings: Settings, folder: Path) -> SecureSums | None:
    """Raises UserError for too few or too many sites."""
    if not settings.secagg.enabled:
        return None
    require_sites(settings.federation.min_clients)
    return SecureSums(settings, folder.name, folder)


app = ServerApp()  # of flower-server; `flwr run` has server/stock.py


def prepare_process() -> None:
    """Have the process of a ServerApp hold no more memory and no more cores than it needs."""
    give_back_what_is_freed()
    torch.set_num_threads(1)  # adding buffers is bound by memory; the clients may share this machine's cores


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Flower's entry for `flower-server`'s run: settings and the run's folder come in the run config."""
    from server.flower.grid import GridMailbox, ask_soon, push_in_turn  # with Flower's inside, which may have changed

    prepare_process()
    ask_soon()
    push_in_turn()
    text = str(context.run_config.get("settings", ""))
    settings = config.from_json(text) if text else Settings()
    given = str(context.run_config.get("run-folder", ""))
    folder = Path(given) if given else new_run_folder(settings)
    if given:  # Flower hands the run config to every client, so it has no secrets
        settings, _ = config.load_of_run(folder / CONFIG_FILE)
    home = (folder / NODES_FILE).parent  # of flower-server, which gave the folder
    mailbox = GridMailbox(grid, tell=partial(write_model_bytes, home)) if given else GridMailbox(grid)
    federate(
        settings,
        mailbox,
        Surroundings(
            run_folder=folder,
            stopped=(folder / STOP_FILE).exists,
            all_nodes_are_here=lambda: False,
            git_commit=str(context.run_config.get("git-commit", "")) or "unknown",
            expect=mailbox.expect,
        ),
    )
