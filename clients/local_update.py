"""One client's part of a round: evaluate what was received, train, and answer with the change and sums.

Pure of Flower: arrays and settings in, a `Reply` out. A simulation's ClientApp and the resident trainer both call it.
"""

import hashlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from clients.group_scores import groups_leaving
from clients.own_record import export_own_model, keep_own_record, tell_end
from clients.packs import open_site_pack
from clients.policy import against_share, digest_of, require_none
from clients.private_round import train_in_groups
from clients.private_state import (
    end_run,
    load_private,
    prune,
    save_private,
    save_reply,
)
from clients.run_state import ClientState as ClientState
from clients.run_state import Lose, coded_change, question_of, require_enough, require_private, telling_of
from clients.run_state import open_client_state as open_client_state
from clients.run_state import state_of_pack as state_of_pack
from clients.run_state import watched as watched
from clients.scores import NOT_SHARED, leaving
from clients.site import MIDWAY, SiteSettings
from common import config
from common.errors import ReplyRefused
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.metrics.design import most_pairs_of_a_person, num_pairs_of
from common.metrics.group_names import GROUPS
from common.metrics.sums import EvaluationSums, open_set_only
from common.models.recogniser import (
    renew_heads,
)
from common.privacy.mechanism import add_clipped
from common.protocol.codec import Coded
from common.protocol.parameters import buffer_sha256, flatten, load_shared
from common.protocol.wire import OF_CONTENT, Reply, Site, Task
from common.settings import Settings
from common.system.events import SHOWN
from common.system.progress import SCORING, TRAINING, WARMING_UP
from common.system.runtime import machine_digest, num_cores, resolve_devices
from common.system.site_secret import keyed_digest, keyed_seed, site_secret
from common.training.autotune import resolve_compute, threads_for
from common.training.compute import on_devices
from common.training.evaluation import SPLITS, TEST_PAIRS, design_of, evaluate, num_scored, people_digest
from common.training.gradient_shares import GradientShares
from common.training.loop import Compute, TrainSums, make_optimiser, train_round, warm_up_head
from common.training.midway import Midway

log = logging.getLogger("facefed.client")


def val_people_digest(pack: FacePack, max_pairs: int | str = "all", person_pairs: int = 0) -> str:
    """A digest of the validation people's pictures and of which pairs are scored: equal for equal validation sets.

    It does not leave as it is.
    """
    digest = hashlib.sha256(pack.key.encode())
    digest.update(pack.indices(Split.VAL_PEOPLE).tobytes())
    design = design_of(pack, "val", max_pairs, person_pairs)
    if design is not None:
        digest.update(f"at most {max_pairs} pairs".encode())
        digest.update(f"at most {person_pairs} of a person".encode() if design.is_cut else b"")
    return digest.hexdigest()[:16]


def _pairs_scored(pack: FacePack, max_pairs: int | str, person_pairs: int) -> tuple[int, int]:
    """How many pairs of validation and test people there are, and how many of them a round scores."""
    every, scored = 0, 0
    for split, (_, people) in SPLITS.items():
        design, own = design_of(pack, split, max_pairs, person_pairs), num_pairs_of(len(pack.indices(people)))
        if design is not None and pack.family is not None:  # see `evaluation`: pairs of one choice of pictures
            scored += num_pairs_of(len(design.impostor))
        else:
            scored += own if design is None else design.num_pairs
        every += own
    return every, scored


def _tell_pairs_of_a_person(site: SiteSettings, pack: FacePack, max_pairs: int | str, person_pairs: int) -> None:
    """Say to the site's own user by how much one person can move a count of pairs."""
    for split, (_, people) in SPLITS.items():
        person = pack.person[pack.indices(people)]
        design = design_of(pack, split, max_pairs, person_pairs)
        most = most_pairs_of_a_person(person, design)
        cut = f", bounded by max_person_pairs = {person_pairs:,}" if design is not None and design.is_cut else ""
        log.info("%s%s: one person is in %s of %s's pairs at most%s", SHOWN, site.name, f"{most:,}", split, cut)


def join(site: SiteSettings, settings: Settings) -> Site:
    """What this client tells of itself; no model is built.  Raises UserError when the data do not fit."""
    pack = open_site_pack(site, settings.data)
    require_enough(site, pack)
    require_private(settings, pack.num_classes)
    devices = resolve_devices(site.device)
    compute = resolve_compute(
        settings,
        device=devices[0],
        threads=threads_for(settings, 1, num_cores()),
        cache_dir=site.cache_dir,
        num_training_pictures=len(pack.indices(Split.TRAIN)),
    )
    compute = on_devices(compute, devices)
    secret = site_secret(site.cache_dir)
    pairs = settings.verification.max_pairs, site.policy.max_person_pairs
    num_pairs, num_scored_pairs = _pairs_scored(pack, *pairs)
    if site.share is None:
        _tell_pairs_of_a_person(site, pack, *pairs)
    return Site(
        name=site.name,
        dataset=site.dataset,
        num_people=len(np.unique(pack.person)),
        num_pictures=len(pack.person),
        num_training_people=pack.num_classes,
        num_training_pictures=len(pack.indices(Split.TRAIN)),
        num_quarantined=len(pack.quarantined) + pack.account.num_unused_data,
        val_people=keyed_digest(secret, "val people", val_people_digest(pack, *pairs), digits=16),
        test_pairs=keyed_digest(secret, TEST_PAIRS, people_digest(pack, "test", *pairs), digits=16),
        num_pairs=num_pairs,
        num_scored_pairs=num_scored_pairs,
        machine=keyed_digest(secret, "machine", machine_digest(), digits=12),
        cores=num_cores(),
        device=compute.device_kind,
        precision=compute.precision,
        memory_format=compute.memory_format,
        compiled=compute.compiled and not _watches_gradients(site),
        policy=digest_of(site.policy),
        cut=pack.cut,
    )


def _receive(state: ClientState, task: Task, shared: NDArray[np.float32] | None) -> tuple[Compute, NDArray[np.float32]]:
    if shared is None or task.manifest != state.manifest.digest:
        raise ReplyRefused(
            f"the server's model (manifest {task.manifest[:12]}) is not this client's"
            f" ({state.manifest.digest[:12]}); use equal versions and model settings."
        )
    if state.watch is not None:
        state.watch.admit(task, shared)
    load_shared(state.recogniser, shared, state.manifest)
    devices = resolve_devices(state.site.device)
    compute = Compute(
        device=devices[0],
        precision=task.precision,
        memory_format=task.memory_format,
        threads=task.threads,
        compiled=task.compiled,
    )
    return on_devices(compute, devices), shared


def _restore_private(
    state: ClientState, run_id: str, server_round: int, optimiser: torch.optim.Optimizer | None
) -> int:
    """The private state after `server_round`, or the fresh one if none is here; returns its round or -1.

    The recogniser may hold what an earlier message left in it, and must not: which process answers is Flower's choice.
    """
    folder = state.state_folder(run_id)
    found = load_private(folder, server_round, state.recogniser, optimiser, state.private)
    if found < 0:
        renew_heads(state.recogniser, state.head_seed)
        tensors = state.recogniser.state_dict()
        with torch.no_grad():
            for name, tensor in state.fresh.items():
                tensors[name].copy_(tensor)
    return found


def _evaluate(
    state: ClientState, task: Task, compute: Compute, model: NDArray[np.float32]
) -> dict[str, EvaluationSums | str]:
    """By split what leaves of its sums, or the words that leave in their place.  model: as received, [size]."""
    splits = [split for split in task.splits.split() if split != GROUPS]
    if state.settings.privacy.is_on:  # nothing of a score would be inside the guarantee, nor that scoring failed
        return dict.fromkeys(splits, NOT_SHARED)
    policy, found = state.site.policy, dict[str, EvaluationSums | str]()
    max_pairs, person_pairs = state.settings.verification.max_pairs, policy.max_person_pairs
    for split in splits:
        with telling_of(state, task, SCORING, num_scored(state.pack, split)) as tick:
            sums = evaluate(
                state.recogniser,
                state.pack,
                split,
                compute,
                max_pairs=max_pairs,
                person_pairs=person_pairs,
                tick=tick,
            )
        if state.settings.federation.evaluate_only:
            sums = open_set_only(sums)
        seed = 0
        if policy.scores == "noisy":
            seed = keyed_seed(site_secret(state.site.cache_dir), "noise", f"{split}\n{buffer_sha256(model)}")
        asked = state.settings.tracking.plots != "none"
        found[split] = leaving(policy, sums, seed, num_pictures=len(state.pack), asks_confusion=asked)
        if isinstance(found[split], str):
            log.warning("%s%s: no score of %s leaves: %s", SHOWN, state.site.name, split, found[split])
    return found


def _shared_scores(found: Mapping[str, EvaluationSums | str]) -> dict[str, EvaluationSums]:
    return {split: sums for split, sums in found.items() if not isinstance(sums, str)}


def _withheld(found: Mapping[str, EvaluationSums | str]) -> dict[str, str]:
    return {split: words for split, words in found.items() if isinstance(words, str)}


def _train_fields(
    sums: TrainSums, warmup: TrainSums, *, seconds: Mapping[str, float], is_private: bool
) -> dict[str, float]:
    fields = {
        "num_pictures": sums.num_pictures,
        "num_steps": sums.num_steps,
        "correct": sums.correct,
        "loss_sum": sums.loss_sum,
        "gradient_norm_sum": sums.gradient_norm_sum,
        "num_warmup_pictures": warmup.num_warmup_pictures,
        "num_warmup_steps": warmup.num_warmup_steps,
        "num_halvings": sums.num_halvings + warmup.num_halvings,
        **seconds,
    }
    return {name: value for name, value in fields.items() if not (is_private and name in OF_CONTENT)}


def _watches_gradients(site: SiteSettings) -> bool:
    """Whether whose the gradients are is counted, which compiled passes do not tell."""
    return site.share is None and site.policy.max_person_share < 1.0


def _shares(state: ClientState) -> GradientShares | None:
    """What counts whose the gradients are; None where nothing is looked at."""
    if state.watch is None or not _watches_gradients(state.site):
        return None
    return GradientShares(num_people=state.pack.num_classes)


def _midway(state: ClientState, task: Task, compute: Compute, received: NDArray[np.float32]) -> Midway | None:
    """Where a round that is cut off between two epochs is gone on with; None where each begins anew.

    That is so on several devices, and of virtual clients and groups of people, whose parts are short.
    """
    minutes = state.settings.training.checkpoint_minutes
    if isinstance(minutes, str) or compute.others or state.site.share is not None:
        return None
    if state.settings.privacy.unit == "person":
        return None
    path = state.state_folder(task.run_id) / MIDWAY
    midway = Midway(path=path, question=question_of(state, task, received), every_s=60.0 * minutes)
    if midway.found():
        log.info("%s%s: round %d goes on where it was cut off", SHOWN, state.site.name, task.server_round)
    return midway


def _warm_up(state: ClientState, task: Task, compute: Compute, midway: Midway | None) -> TrainSums:
    """Train a new head alone, or take what is told of it from a round that was cut off after it."""
    num_pictures = len(state.pack.indices(Split.TRAIN)) * state.settings.training.head_warmup_epochs
    if midway is not None and midway.is_found:
        kept = {name: int(value) for name, value in midway.counted.items()}
        return TrainSums(
            num_warmup_pictures=kept["num_warmup_pictures"],
            num_warmup_steps=kept["num_warmup_steps"],
            num_halvings=kept["num_halvings"],
        )
    with telling_of(state, task, WARMING_UP, num_pictures) as tick:
        warmup = warm_up_head(
            state.recogniser,
            state.pack,
            settings=state.settings,
            compute=compute,
            stream_name=state.site.name,
            tick=tick,
        )
    if midway is not None:
        names = ("num_warmup_pictures", "num_warmup_steps", "num_halvings")
        midway.counted = {name: getattr(warmup, name) for name in names}
    return warmup


def _train_all(
    state: ClientState, task: Task, compute: Compute, optimiser: torch.optim.Optimizer, midway: Midway | None
) -> TrainSums:
    """Train backbone and head on all of the site's training pictures, in place.

    Raises PolicyRefusal where one person gave too much of it.
    """
    settings, recogniser, shares = state.settings, state.recogniser, _shares(state)
    recogniser.keeps_statistics = settings.privacy.is_on
    num_pictures = settings.round_pictures(len(state.pack.indices(Split.TRAIN)))
    with telling_of(state, task, TRAINING, num_pictures) as tick:
        sums = train_round(
            recogniser,
            optimiser,
            state.pack,
            settings=settings,
            compute=compute,
            server_round=task.server_round,
            stream_name=state.site.name,
            shared=[entry.name for entry in state.manifest.entries],
            tick=tick,
            shares=shares,
            midway=midway,
        )
    if shares is not None:
        require_none(against_share(state.site.policy, shares.largest()))
    return sums


def train(
    state: ClientState,
    task: Task,
    shared: NDArray[np.float32] | None,
    *,
    began: float | None = None,
    lose: Lose | None = None,
) -> Reply:
    """Round `task.server_round`: evaluate the received model, then train it for the round's local epochs.

    began: when the message came, by time.perf_counter(); what lies between is told as part of receiving.
    lose: as for `clients.run_state.coded_change`.
    Raises TrainingFailed, ReplyRefused or CheckpointError.
    """
    began = time.perf_counter() if began is None else began
    settings, recogniser = state.settings, state.recogniser
    compute, received = _receive(state, task, shared)
    compute.place(recogniser)
    optimiser = make_optimiser(recogniser, settings.training)
    folder, midway = state.state_folder(task.run_id), _midway(state, task, compute, received)
    found = _restore_private(state, task.run_id, task.server_round - 1, optimiser)
    started = time.perf_counter()
    found_scores = _evaluate(state, task, compute, received)
    evaluated = time.perf_counter()
    warmup = TrainSums()
    if found <= 0 and settings.privacy.unit != "person":  # the fresh state is round 0's, which no file has
        warmup = _warm_up(state, task, compute, midway)
    warmed_up = time.perf_counter()
    if settings.privacy.unit == "person":
        sums, change, residue = train_in_groups(state, task, compute, found, received, lose)
    else:
        sums = _train_all(state, task, compute, optimiser, midway)
        optimiser.zero_grad(set_to_none=True)  # the gradients are of no use any more, and as large as a model
        change, residue = _change_of(state, folder, found, received, lose)
    trained = time.perf_counter()

    save_private(folder, task.server_round, recogniser, optimiser, state.private, residue)
    if midway is not None:
        midway.forget()
    if state.site.share is None:
        save_reply(folder, task.server_round, received, change)
    # The round before last too: the server writes a round's checkpoint while the next is trained, and may have to
    # repeat both.  Not the state before the first round: it is made of the seed whenever it is wanted.
    prune(folder, {task.best_round, *range(task.server_round - 2, task.server_round + 1)})
    seconds = {
        "receive_seconds": started - began,
        "evaluate_seconds": evaluated - started,
        "warmup_seconds": warmed_up - evaluated,
        "seconds": trained - warmed_up + (midway.seconds_before if midway is not None else 0.0),
        "send_seconds": time.perf_counter() - trained,
    }
    return Reply(
        server_round=task.server_round,
        manifest=state.manifest.digest,
        num_examples=len(state.pack.indices(Split.TRAIN)),
        train=_train_fields(sums, warmup, seconds=seconds, is_private=settings.privacy.is_on),
        evaluations=_shared_scores(found_scores),
        withheld=_withheld(found_scores),
        change=change,
    )


def evaluate_global(state: ClientState, task: Task, shared: NDArray[np.float32] | None) -> Reply:
    """Evaluate the model of round `task.server_round` with the private state that round left here."""
    compute, received = _receive(state, task, shared)
    _restore_private(state, task.run_id, task.server_round, None)
    if task.last and state.site.share is None:  # the best model, for good; a virtual client keeps nothing
        export_own_model(state.site, task, state.settings, state.recogniser)
        keep_own_record(state.site, task, state.settings, state.recogniser, state.pack, compute)
        tell_end(state.site, task)
    found = _evaluate(state, task, compute, received)
    groups = groups_leaving(state, task, compute) if GROUPS in task.splits.split() else None
    if task.last:
        _end_run(state, task)
    return Reply(
        server_round=task.server_round,
        manifest=state.manifest.digest,
        num_examples=len(state.pack.indices(Split.TRAIN)),
        train={},
        evaluations=_shared_scores(found),
        withheld=_withheld(found),
        groups=groups,
        change=None,
    )


def _end_run(state: ClientState, task: Task) -> None:
    """Nothing is trained on any more: what of the private state no evaluation needs goes, and is told of."""
    num_files, num_bytes = end_run(state.state_folder(task.run_id), task.server_round)
    if num_files and state.site.share is None:
        log.info(
            "%s: run %s is over: %d private states (%.0f MB) removed, the best and the last two rounds' stay",
            state.site.name, task.run_id, num_files, num_bytes / 1e6,
        )  # fmt: skip


def _change_of(
    state: ClientState, folder: Path, found: int, received: NDArray[np.float32], lose: Lose | None
) -> tuple[Coded, NDArray[np.float32] | None]:
    """What training changed, as it travels, and what that leaves for the next time (None: nothing is ever left).

    found: the round of the private state that training began with.
    """
    change = flatten(state.recogniser.state_dict(), state.manifest)
    change -= received
    if state.settings.privacy.unit == "site":  # the server clips again, and adds the noise to the sum
        total = np.zeros(len(change), dtype=np.float64)
        add_clipped(total, change, state.settings.privacy.clip)
        change = total.astype(np.float32)
    return coded_change(state, folder, found, change, lose)


def read_settings(task: Task) -> Settings:
    """The run settings of a task.  Raises ConfigError, for example for a setting of a newer version."""
    return config.from_json(task.settings)
