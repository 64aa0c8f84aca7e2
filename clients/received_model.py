"""Whether a received model is what it claims to be: a run's first, or the next after the last one that came here.

The first is worked out from `run.seed` and the settings, as the server does, and compared.  A later one is compared
with the last, weight by weight: it may differ by `max_move` times what this site's own training moved it in between,
or by `max_relative_move` of its norm where that is more (another site may have many more pictures), and by what the
strategy's own step can add and the codec lost.  So no round's model is a quite different one; a drift over two rounds
or more is not noticed, and biases, scales and running statistics are not looked at.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clients.past_tasks import PastTasks
from clients.policy import ANY, Against, Policy, PolicyRefusal
from common.errors import CheckpointError
from common.protocol.codec import BLOCK, LARGEST_CODE, decode, encode
from common.protocol.parameters import Entry, Manifest, buffer_sha256
from common.protocol.wire import Task
from common.settings import FederationSettings, Settings
from common.strategies import STRATEGIES, Rates
from common.system.files import replacing

Buffer = NDArray[np.float32]

LAST = "last.npy"  # in the run's folder: the model that came last
SAME = 1e-5  # relative, of a tensor: other processors draw a seed's first weights with other last bits
ADAPTIVE_STEP = 3.0  # times server_lr an element of fedadam's and fedyogi's step is at most, with their usual betas
MOST_MEMORY = 10.0  # rounds' changes that a momentum adds up, as far as a site believes it
_AT_ONCE = 1 << 16  # elements
_ANY_RATES = Rates(lr=1.0, momentum=0.9, beta2=0.99, adaptivity=1e-3)  # a strategy's moments have names for any


def model_round(task: Task) -> int:
    """The round that made the model which comes with a task; 0: the first."""
    return task.server_round - 1 if task.kind == "train" else task.server_round


def norms(buffer: Buffer, manifest: Manifest) -> dict[str, float]:
    """The Euclidean norm of each tensor of a flat buffer, by name."""
    return {entry.name: _norm(buffer, entry) for entry in manifest.entries}


def _norm(buffer: Buffer, entry: Entry) -> float:
    part = buffer[entry.offset : entry.offset + entry.size]
    return math.sqrt(float(np.dot(part, part)))


def coding_loss(model: Buffer, codec: str) -> Buffer | None:
    """How far each element of a received model may be from the exact one, [size]; None: it is exact.

    Two models that came one after the other may differ by twice that without a change (error feedback).
    """
    if codec == "float32":
        return None
    if codec == "float16":
        return np.abs(model) * np.float32(2.0**-11) + np.float32(2.0**-24)
    padded = np.zeros(-(-len(model) // BLOCK) * BLOCK, dtype=np.float32)
    padded[: len(model)] = np.abs(model)
    scales = padded.reshape(-1, BLOCK).max(1) / LARGEST_CODE
    return np.repeat(scales * np.float32(0.5), BLOCK)[: len(model)].astype(np.float32)


class ModelWatch:
    """One run's received models at this site, looked at one after the other."""

    def __init__(
        self,
        record: PastTasks,
        settings: Settings,
        manifest: Manifest,
        first: Callable[[], Buffer],
        trainable: frozenset[str],
    ) -> None:
        """first: makes what the seed and the settings give, [size] float32; asked where no model came yet.

        trainable: names of what the server's step applies to.
        """
        self._record, self._settings, self._manifest = record, settings, manifest
        self._first, self._trainable = first, trainable

    @property
    def _policy(self) -> Policy:
        return self._record.policy

    @property
    def _file(self) -> Path:
        return self._record.path.parent / self._record.path.stem / LAST

    def admit(self, task: Task, model: Buffer) -> None:
        """Look at the model that came with a task, and remember it.  Raises PolicyRefusal.

        model: [size] float32.
        """
        sha256, made_in = buffer_sha256(model), model_round(task)
        if sha256 not in self._record.models:
            if not self._record.models:
                self._check_first(sha256, made_in, model)
            else:
                self._check_move(made_in, model)
        self._record.take_model(sha256, made_in, self._settings.federation.rounds)
        if self._policy.max_move > 0.0:
            with replacing(self._file, synced=False) as aside, aside.open("wb") as file:
                np.save(file, model)

    def trained(self, change: Buffer) -> None:
        """Own training changed the model that came last by this, [size] float32."""
        self._record.trained(norms(change, self._manifest))

    def _check_first(self, sha256: str, made_in: int, model: Buffer) -> None:
        policy = self._policy
        if made_in > 0:
            if not policy.late_entry:
                raise PolicyRefusal(Against("model", "late_entry", f"the model of round {made_in}", "the first one"))
            return
        if self._settings.model.pretrained != "none":
            if ANY not in policy.pretrained and sha256 not in policy.pretrained:
                raise PolicyRefusal(Against("model.pretrained", "pretrained", f"SHA-256 {sha256}", "those it names"))
            return
        if policy.first_model and not self._is_first(model, self._first()):
            raise PolicyRefusal(Against("model", "first_model", "another one", "what run.seed and the settings give"))

    def _is_first(self, model: Buffer, first: Buffer) -> bool:
        codec = self._settings.federation.download_codec
        ours = first if codec == "float32" else decode(encode(first, codec))
        lost = coding_loss(ours, codec)
        for entry in self._manifest.entries:
            allowed = SAME * _norm(ours, entry) + (2.0 * _norm(lost, entry) if lost is not None else 0.0)
            if not _distance(model, ours, entry)[0] <= allowed:  # not a number too
                return False
        return True

    def _check_move(self, made_in: int, model: Buffer) -> None:
        policy = self._policy
        last = self._read_last() if policy.max_move > 0.0 else None
        if last is None or not self._record.moved:
            return  # nothing was trained here yet: max_extra_models counts what is scored
        gap = max(1, abs(made_in - self._record.model_round))
        # With momentum the server's step goes on long after the learning rate, and own changes, became small.
        memory = self._memory()
        own: Mapping[str, float] = self._record.most_moved if memory > 1.0 or gap > 1 else self._record.moved
        lost = coding_loss(model, self._settings.federation.download_codec)
        for entry in self._manifest.entries:
            if len(entry.shape) < 2:  # few numbers, which honest training moves by hundreds of times another site's
                continue
            moved, before = _distance(model, last, entry)
            allowed = policy.max_move * memory * own.get(entry.name, 0.0) * gap + self._by_step(entry) * gap
            allowed = max(allowed, policy.max_relative_move * before)
            allowed += SAME * before + (4.0 * _norm(lost, entry) if lost is not None else 0.0)
            if not moved <= allowed:
                seen = moved / max(own.get(entry.name, 0.0) * gap, 1e-30)
                words = f"{entry.name} moved {seen:.3g} x what training moved it"
                raise PolicyRefusal(Against("model", "max_move", words, f"{policy.max_move * memory:g} x"))

    def _memory(self) -> float:
        """How many rounds' changes a step of the strategy may add up: 1 / (1 - momentum), and no more than ten."""
        federation: FederationSettings = self._settings.federation
        if not STRATEGIES[federation.strategy].first_moments(_ANY_RATES):
            return 1.0
        return min(MOST_MEMORY, 1.0 / max(1.0 - federation.server_momentum, 1e-9))

    def _by_step(self, entry: Entry) -> float:
        """How far the strategy's own step may move a tensor in a round, whatever the clients' changes were."""
        federation: FederationSettings = self._settings.federation
        row = STRATEGIES[federation.strategy]
        is_adaptive = "second" in row.first_moments(_ANY_RATES)
        if entry.name not in self._trainable or not is_adaptive:
            return 0.0
        lr = row.default_lr if isinstance(federation.server_lr, str) else federation.server_lr
        return ADAPTIVE_STEP * lr * math.sqrt(entry.size)

    def _read_last(self) -> Buffer | None:
        if not self._file.exists():
            return None
        try:
            last: Buffer = np.load(self._file, mmap_mode="r", allow_pickle=False)  # a model less in memory
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self._file} cannot be read ({error}).") from None
        return last if last.shape == (self._manifest.size,) else None


def _distance(model: Buffer, other: Buffer, entry: Entry) -> tuple[float, float]:
    """The Euclidean distance of a tensor of two models, and the other's norm; in blocks that a cache holds."""
    squares = before = 0.0
    for start in range(entry.offset, entry.offset + entry.size, _AT_ONCE):
        here = slice(start, min(start + _AT_ONCE, entry.offset + entry.size))
        theirs = other[here]
        moved = model[here] - theirs
        squares, before = squares + float(np.dot(moved, moved)), before + float(np.dot(theirs, theirs))
    return math.sqrt(squares), math.sqrt(before)
