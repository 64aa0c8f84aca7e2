"""A site's reply to a run with secure aggregation: what the others would see of it becomes words of a masked sum.

What is left beside them are names, counts that the site joined with, and seconds.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clients.run_state import ClientState
from clients.secure_sum import SecureSum, keys_of
from clients.site import SiteSettings
from common.errors import ReplyRefused, SecureSumRefused
from common.faces.splits import Split
from common.privacy.shared_noise import grid_of_sum
from common.protocol.change_bound import ChangeBound
from common.protocol.codec import MASKED, Coded, decode, encode, is_lossy
from common.protocol.parameters import Part, buffer_sha256
from common.protocol.secure_vector import CONTENT, InWords, Sums, layout_of
from common.protocol.secure_words import (
    KEYS,
    SHARES,
    KeysAsked,
    SharesAsked,
    UnmaskAsked,
    WorkAsked,
    digest_of_work,
    read,
    share_of,
    write,
)
from common.protocol.wire import Reply, Task, words_of
from common.settings import Settings
from common.system.events import SHOWN

Buffer = NDArray[np.float32]

log = logging.getLogger("facefed.client")


def secure_sum_of(site: SiteSettings, task: Task, settings: Settings) -> SecureSum:
    """The site's part in the masked sums of a task's run.  Raises SecureSumRefused or UserError without keys."""
    folder = site.state_dir / "private" / task.run_id
    return SecureSum(
        folder,
        task.run_id,
        keys_of(site),
        threshold=settings.secagg.threshold,
        policy=site.policy,
        colluding=settings.privacy.colluding_sites,
    )


def is_in_lanes(settings: Settings) -> bool:
    """Whether changes go in words of 16 bits, from the second round on, with error feedback."""
    return settings.secagg.enabled and is_lossy(settings.federation.upload_codec)


def is_masked(task: Task, settings: Settings) -> bool:
    """Whether a task's answer is to be masked.  Raises ReplyRefused where it should be, and does not say how."""
    wanted = settings.secagg.enabled and (task.kind == "train" or (task.kind == "evaluate" and bool(task.splits)))
    if wanted != bool(task.secure):
        raise ReplyRefused(
            "the run has secure aggregation, and this task would have one site's reply in the clear."
            if wanted
            else "the task is of secure aggregation, which this run does not have; use equal versions of FaceFed."
        )
    return wanted


def answer_small(secure: SecureSum, task: Task) -> str:
    """The answer to a task of `secure_words.SMALL`.  Raises SecureSumRefused or PolicyRefusal."""
    if task.kind == KEYS:
        return write({"advert": secure.keys(read(KeysAsked, task.secure), task.server_round)})
    if task.kind == SHARES:
        return write(secure.shares(read(SharesAsked, task.secure), task.server_round))
    return write(secure.unmask(read(UnmaskAsked, task.secure), task.server_round))


class MaskedReply:
    """One site's reply with masked words in the place of its change and its sums."""

    def __init__(self, state: ClientState, task: Task, shared: Buffer, secure: SecureSum) -> None:
        """shared: the model that came, [size].  Raises SecureSumRefused for a task that no server of ours sends."""
        self._state, self._task, self._secure = state, task, secure
        self._asked = read(WorkAsked, task.secure)
        self._sha256, self._part = buffer_sha256(shared), state.part if task.kind == "train" else None
        if self._asked.shifts and not is_in_lanes(state.settings):
            raise SecureSumRefused("the change is asked for in words of 16 bits, which this run does not have.")
        self._layout = layout_of(
            self._part,
            task.splits.split(),
            num_members=len(self._asked.members),
            by=state.settings.verification.by,
            step=0.0 if self._part is None else step_of(state.settings, self._asked),
            shifts=self._asked.shifts,
        )
        self._received = shared if self._part is None else self._part.taken(shared)
        self._change: InWords | None = None

    def code(self, change: Buffer) -> Buffer:
        """Put the change in words; returns what these lack of it, which goes into the next, likewise.

        change: [part.size].
        Raises ReplyRefused for a change that is longer than the run's federation.max_change_factor, TrainingFailed for
        one that is not finite.
        """
        share = self._share(len(self._state.pack.indices(Split.TRAIN)))
        self._put_in_words(encode(change, "float32"), share)
        if self._change is None:
            raise ValueError("no change is asked for")
        lost, num_cut = self._layout.lost(change, self._change, self._received, share)
        if self._change.saturated:
            log.warning(
                "%s%s: %d of %d elements of the change were beyond their range; what is left goes with the next"
                " round's, but of %d no more than a range",
                SHOWN, self._state.site.name, self._change.saturated, len(change), num_cut,
            )  # fmt: skip
        return lost

    def of(self, reply: Reply) -> Reply:
        """The reply as it leaves.  Raises SecureSumRefused, and as `code` does."""
        asked, task = self._asked, self._task
        if self._change is None and reply.change is not None:
            self._put_in_words(reply.change, self._share(reply.num_examples))
        words = self._layout.words(self._change, _sums(asked, reply))
        digest = digest_of_work(asked, words=words_of(task), model_sha256=self._sha256)
        about = [f"round {task.server_round}"] if self._part is not None else []
        about += [f"{split} {self._sha256[:16]}" for split in task.splits.split()]
        masked = self._secure.mask(asked, task.server_round, words, about, digest, lanes=self._layout.lanes)
        return dataclasses.replace(
            reply,
            train={name: value for name, value in reply.train.items() if name not in CONTENT},
            evaluations={},
            groups=None,
            withheld={},
            change=Coded(
                codec=MASKED, size=self._layout.size, data=masked.astype("<u4", copy=False).view(np.uint8).data
            ),
        )

    def _put_in_words(self, change: Coded, share: float) -> None:
        _check_length(self._state.settings, self._state.part, self._received, change)
        self._change = self._layout.in_words(decode(change), self._received, share)

    def _share(self, num_examples: int) -> float:
        # what is on a grid was weighted before its noise: no number may leave that
        return 1.0 if self._layout.step else share_of(num_examples, self._asked)


def step_of(settings: Settings, asked: WorkAsked) -> float:
    """The grid of a change with shared noise; 0 without.  Raises SecureSumRefused where task and run do not agree."""
    is_shared = settings.privacy.is_shared
    if (asked.sensitivity > 0.0, asked.noises > 0) != (is_shared, is_shared):
        raise SecureSumRefused(
            f'privacy.noise = "{settings.privacy.noise}", and the task has the noise of {asked.noises} sites for a'
            f" sensitivity of {asked.sensitivity:g}; use equal versions of FaceFed."
        )
    if not is_shared:
        return 0.0
    rounds = settings.federation.rounds
    return grid_of_sum(settings.privacy, rounds, sensitivity=asked.sensitivity, noises=asked.noises)


def _check_length(settings: Settings, part: Part, received: Buffer, change: Coded) -> None:
    """The bound that the server has where it sees changes, beside the model that came."""
    bound = ChangeBound(part.spans, received, settings.federation.max_change_factor)
    bound.check(change)


def _sums(asked: WorkAsked, reply: Reply) -> Sums:
    evaluations = dict(reply.evaluations)
    if asked.most_pictures:
        evaluations = {split: sums.at_most(asked.most_pictures) for split, sums in evaluations.items()}
    content = {name: reply.train[name] for name in CONTENT if name in reply.train}
    return Sums(evaluations=evaluations, content=content, groups=reply.groups)


def ledger_words(task: Task, moving: Buffer | None) -> Mapping[str, Any]:
    """What the ledger says of a masked reply: of which attempt, with whom, of which model; nothing of another.

    moving: of the model what came; of the rest the task has the SHA-256.
    """
    if not task.secure or moving is None:
        return {}
    asked = read(WorkAsked, task.secure)
    model = {"model": buffer_sha256(moving)} | ({"frozen": task.frozen} if task.frozen else {})
    return {"masked": {"attempt": asked.attempt, "with": list(asked.members), **model}}
