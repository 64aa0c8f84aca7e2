"""One round of a site with differential privacy of people: groups, noise, and a budget that outlives the run."""

import dataclasses
import logging
import math
import secrets
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from clients.group_training import divide, num_groups_of, summed_changes
from clients.privacy_budget import Release, budget_file, require_budget, spend
from clients.private_state import load_answer, load_residue, prune_answers, rounds_here, save_answer
from clients.run_state import ClientState, coded_change, question_of, telling_of
from common.errors import ReplyRefused
from common.faces.splits import Split
from common.models.recogniser import trainable_names
from common.privacy.accounting import noise_multiplier
from common.privacy.mechanism import SEED_BYTES, norm, released
from common.protocol.codec import Coded, is_lossy, num_bytes
from common.protocol.parameters import trainable_spans
from common.protocol.spending import spent_in
from common.protocol.wire import Task
from common.settings import Settings
from common.system.events import SHOWN
from common.system.progress import TRAINING
from common.system.site_secret import site_secret
from common.training.loop import Compute, TrainSums

log = logging.getLogger("facefed.client")


def train_in_groups(
    state: ClientState, task: Task, compute: Compute, found: int, received: NDArray[np.float32]
) -> tuple[TrainSums, Coded, NDArray[np.float32] | None]:
    """A noisy change of the model: what training took, the change as it travels, and what the codec lost of it.

    The spend is on the disk before this returns.  The same question gets the bits that were answered before, and
    nothing is spent; where those are gone, or anything differs, it is a second release.
    Raises PolicyRefusal where the budget is spent.
    """
    folder, size = state.state_folder(task.run_id), state.part.part.size
    question = question_of(state, task, received)
    codec = state.settings.federation.upload_codec
    kept = load_answer(folder, task.server_round, question)
    if kept is not None and len(kept) == num_bytes(codec, size):
        log.info("%s%s: round %d is answered as before: nothing is spent", SHOWN, state.site.name, task.server_round)
        residue = load_residue(folder, task.server_round, size) if is_lossy(codec) else None
        return _nominal(state), Coded(codec=codec, size=size, data=kept), residue
    release = _release(state, task)
    before = spent_in(budget_file(state.site), task.run_id)
    require_budget(before, release, state.settings.privacy, state.site.policy)
    if task.server_round in rounds_here(folder):
        log.warning(
            "%s%s: round %d is asked for again, and its answer is not here or the question is another one: it is"
            " answered with noise of its own, and paid for again",
            SHOWN, state.site.name, task.server_round,
        )  # fmt: skip
    privacy = state.settings.privacy
    learned = trainable_names(state.recogniser, state.settings.training.trainable)
    spans = trainable_spans(state.manifest, learned)
    trained = [span for span, is_trained in spans if is_trained]
    deviation = release.noise_multiplier * 2.0 * privacy.clip
    _require_signal(state.settings, received, trained, deviation / release.num_groups)
    total, sums = _sum_of_groups(state, task, compute, received, release.num_groups)
    spend(state.site, release, state.settings.privacy)
    seed = secrets.token_bytes(SEED_BYTES)
    change = released(total, trained, deviation=deviation, divisor=release.num_groups, seed=seed)
    coded, residue = coded_change(state, folder, found, change)
    save_answer(folder, task.server_round, question, coded.data)
    prune_answers(folder, task.server_round - 2)
    return dataclasses.replace(_nominal(state), num_halvings=sums.num_halvings), coded, residue


def _release(state: ClientState, task: Task) -> Release:
    """What one more reply is, by the run's settings and how many people there are."""
    privacy, rounds = state.settings.privacy, state.settings.federation.rounds
    return Release(
        run_id=task.run_id,
        server_round=task.server_round,
        noise_multiplier=noise_multiplier(privacy.epsilon, privacy.delta, rounds),
        num_groups=num_groups_of(state.pack.num_classes, privacy.group_people),
    )


def _sum_of_groups(
    state: ClientState, task: Task, compute: Compute, received: NDArray[np.float32], num_groups: int
) -> tuple[NDArray[np.float64], TrainSums]:
    """The clipped changes of this round's groups, added: [size]; and what training took."""
    stream = f"{task.run_id}\n{task.server_round}"
    groups = divide(state.pack, number=num_groups, secret=site_secret(state.site.cache_dir), stream=stream)
    num_pictures = state.settings.round_pictures(sum(len(pack) for pack in groups.packs.values()))
    with telling_of(state, task, TRAINING, num_pictures) as tick:
        return summed_changes(
            state.recogniser,
            state.manifest,
            received,
            groups,
            settings=state.settings,
            compute=compute,
            server_round=task.server_round,
            stream_name=state.site.name,
            head_seed=state.head_seed,
            tick=tick,
        )


def _require_signal(
    settings: Settings, received: NDArray[np.float32], trained: Sequence[slice], deviation: float
) -> None:
    """Raises ReplyRefused where the noise alone is longer than the server takes, before anything is paid for it.

    deviation: of the noise on each trained element of the change.
    """
    factor = settings.federation.max_change_factor
    length = deviation * math.sqrt(sum(span.stop - span.start for span in trained))
    model = math.sqrt(sum(norm(received[span]) ** 2 for span in trained))
    if not isinstance(factor, str) and length > factor * model > 0.0:
        raise ReplyRefused(
            f"the noise of privacy.epsilon = {settings.privacy.epsilon:g} is {length / model:.3g} times as long as the"
            f" model, and {factor:g} times are taken (federation.max_change_factor); lower privacy.clip, train fewer"
            " parameters, or have more people."
        )


def _nominal(state: ClientState) -> TrainSums:
    """What a round takes as far as the counts that the site joined with say; how the groups turned out stays here."""
    num_pictures = state.settings.round_pictures(len(state.pack.indices(Split.TRAIN)))
    return TrainSums(num_pictures=num_pictures, num_steps=-(-num_pictures // state.settings.training.batch_size))
