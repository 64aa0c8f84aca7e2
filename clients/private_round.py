"""One round of a site with differential privacy of people: groups, noise, and a budget that outlives the run."""

import dataclasses
import json
import logging
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clients.group_training import divide, summed_changes
from clients.privacy_budget import Release, budget_file, require_budget, spend
from clients.private_state import load_answer, load_residue, prune_answers, rounds_here, save_answer
from clients.run_state import ClientState, Lose, coded_change, question_of, telling_of
from common.errors import ReplyRefused, SecureSumRefused
from common.faces.splits import Split
from common.models.recogniser import trainable_names
from common.privacy.accounting import noise_multiplier
from common.privacy.mechanism import SEED_BYTES, norm, released
from common.privacy.people import num_groups_of
from common.privacy.shared_noise import deviation_of_each, sensitivity_of, within_words
from common.protocol.codec import Coded, decode, is_lossy, num_bytes
from common.protocol.parameters import trainable_spans
from common.protocol.secure_words import WorkAsked, read, share_of
from common.protocol.spending import spent_in
from common.protocol.wire import Task
from common.settings import Settings
from common.system.events import SHOWN
from common.system.progress import TRAINING
from common.system.site_secret import site_secret
from common.training.loop import Compute, TrainSums

log = logging.getLogger("facefed.client")


def train_in_groups(
    state: ClientState,
    task: Task,
    compute: Compute,
    found: int,
    received: NDArray[np.float32],
    lose: Lose | None = None,
) -> tuple[TrainSums, Coded, NDArray[np.float32] | None]:
    """A noisy change of the model: what training took, the change as it travels, and what the codec lost of it.

    The spend is on the disk before this returns.  The same question gets the bits that were answered before, and
    nothing is spent; where those are gone, or anything differs, it is a second release.
    Raises PolicyRefusal where the budget is spent.
    """
    folder, size = state.state_folder(task.run_id), state.part.part.size
    noise = _noise(state, task)
    question = question_of(state, task, received, noise.question)
    codec = state.settings.federation.upload_codec if lose is None else "float32"
    kept = load_answer(folder, task.server_round, question)
    if kept is not None and len(kept) == num_bytes(codec, size):
        log.info("%s%s: round %d is answered as before: nothing is spent", SHOWN, state.site.name, task.server_round)
        coded = Coded(codec=codec, size=size, data=kept)
        if lose is not None:  # another attempt may be over other sites, in other steps
            return _nominal(state), coded, lose(decode(coded))
        return _nominal(state), coded, load_residue(folder, task.server_round, size) if is_lossy(codec) else None
    release = _release(state, task, noise)
    before = spent_in(budget_file(state.site), task.run_id)
    require_budget(before, release, state.settings.privacy, state.site.policy)
    if task.server_round in rounds_here(folder):
        log.warning(
            "%s%s: round %d is asked for again, and its answer is not here or the question is another one: it is"
            " answered with noise of its own, and paid for again",
            SHOWN, state.site.name, task.server_round,
        )  # fmt: skip
    learned = trainable_names(state.recogniser, state.settings.training.trainable)
    spans = trainable_spans(state.manifest, learned)
    trained = [span for span, is_trained in spans if is_trained]
    _require_signal(state.settings, received, trained, noise.deviation / noise.divisor)
    total, sums = _sum_of_groups(state, task, compute, received, release.num_groups)
    spend(state.site, release, state.settings.privacy)
    seed = secrets.token_bytes(SEED_BYTES)
    if state.settings.privacy.is_shared:
        total = within_words(total * noise.factor, noise.deviation)
    change = released(total, trained, deviation=noise.deviation, divisor=noise.divisor, seed=seed)
    coded, residue = coded_change(state, folder, found, change, lose)
    save_answer(folder, task.server_round, question, coded.data)
    prune_answers(folder, task.server_round - 2)
    return dataclasses.replace(_nominal(state), num_halvings=sums.num_halvings), coded, residue


@dataclass(frozen=True, kw_only=True)
class _Noise:
    """What becomes of the sum of the groups' changes: (factor * sum + noise) / divisor."""

    factor: float
    deviation: float  # of this site's noise on each element
    divisor: float
    noises: int = 1  # of how many sites the noise hides this one's people
    question: str = ""  # what else it follows from


def _noise(state: ClientState, task: Task) -> _Noise:
    """The whole noise; or where it is shared out, this site's part of it, in the units of the masked sum.

    Raises SecureSumRefused where this site's people move the sum further than the sites were told.
    """
    privacy, rounds = state.settings.privacy, state.settings.federation.rounds
    num_groups = num_groups_of(state.pack.num_classes, privacy.group_people)
    if not privacy.is_shared:
        deviation = noise_multiplier(privacy.epsilon, privacy.delta, rounds) * 2.0 * privacy.clip
        return _Noise(factor=1.0, deviation=deviation, divisor=num_groups)
    asked = read(WorkAsked, task.secure)
    share = share_of(len(state.pack.indices(Split.TRAIN)), asked)
    own = sensitivity_of(privacy, num_people=state.pack.num_classes, share=share)
    if asked.noises < 1 or own > asked.sensitivity:
        raise SecureSumRefused(
            f"one person here moves the sum by {own:.6g}, and the sites' noise is to be for {asked.sensitivity:.6g}; a"
            " site joins again whose data have changed."
        )
    return _Noise(
        factor=share / num_groups,
        deviation=deviation_of_each(privacy, rounds, sensitivity=asked.sensitivity, noises=asked.noises),
        divisor=1.0,
        noises=asked.noises,
        # Of one round two sums over other sites would be each other's difference, so each has noise of its own.
        question=json.dumps([asked.sensitivity, asked.noises, share, list(asked.members)]),
    )


def _release(state: ClientState, task: Task, noise: _Noise) -> Release:
    """What one more reply is, by the run's settings and how many people there are."""
    privacy, rounds = state.settings.privacy, state.settings.federation.rounds
    return Release(
        run_id=task.run_id,
        server_round=task.server_round,
        noise_multiplier=noise_multiplier(privacy.epsilon, privacy.delta, rounds),
        num_groups=num_groups_of(state.pack.num_classes, privacy.group_people),
        noises=noise.noises,
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
