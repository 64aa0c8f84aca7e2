"""A long training that was cut off goes on after the last whole epoch, to the same bits.

Between two epochs all that the next one follows from is the model, its optimiser, the loss's scale, whether batches are
halved, and what was counted; random streams are named by epoch.  That is kept in one sealed file, no more often than
`training.checkpoint_minutes`, with a digest of the question that is answered: of any other question it is no part.
"""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from common.errors import CheckpointError
from common.models.recogniser import Recogniser
from common.system.checkpoints import read_sealed, write_sealed
from common.training.gradient_shares import GradientShares
from common.training.step import halve_from_now, is_halved

if TYPE_CHECKING:
    from common.training.loop import TrainSums

log = logging.getLogger("facefed.training")

MODEL, OPTIMISER, SHARES = "model/", "optimiser/", "shares/"
_ON_CPU: Final = "step"  # AdamW keeps its counter there


@dataclass(kw_only=True)
class Midway:
    """The file of one training, and what is in it.

    question: a digest of all that the training follows from.  every_s: seconds between two writes.
    counted: further numbers that go with it (of a head's warm-up, before); what the file held, once it was `found`.
    """

    path: Path
    question: str
    every_s: float
    counted: dict[str, float] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    seconds_before: float = 0.0  # that were trained before it was cut off
    _began: float = field(init=False)
    _written: float = field(init=False)
    _kept: tuple[dict[str, Tensor], Mapping[str, str]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._began = self._written = self.clock()

    def found(self) -> bool:
        """Whether a training of this very question was cut off here; a damaged file is none, and says so."""
        if not self.path.exists():
            return False
        try:
            tensors, notes = read_sealed(self.path)
        except CheckpointError as error:
            log.warning("%s The round is trained from its beginning.", error)
            return False
        if notes.get("question") != self.question:
            return False
        self._kept = (tensors, notes)
        self.counted = json.loads(notes["counted"])
        self.seconds_before = float(notes["seconds"])
        return True

    @property
    def is_found(self) -> bool:
        """Whether something was `found`, and is not put back yet."""
        return self._kept is not None

    def restore(self, training: "Training") -> int:
        """Put back what was `found`; returns how many stretches are done, 0 where nothing was found."""
        self._began = self.clock()
        if self._kept is None:
            return 0
        (tensors, notes), self._kept = self._kept, None
        with torch.no_grad():
            for name, tensor in training.recogniser.state_dict().items():
                tensor.copy_(tensors[MODEL + name])
        named = dict(training.recogniser.named_parameters())
        for key, value in tensors.items():
            if key.startswith(OPTIMISER):
                name, _, slot = key.removeprefix(OPTIMISER).rpartition("/")
                place = value if slot == _ON_CPU else torch.empty_like(named[name]).copy_(value)
                training.optimiser.state[named[name]][slot] = place
        if training.shares is not None:
            shares = {key.removeprefix(SHARES): value for key, value in tensors.items() if key.startswith(SHARES)}
            training.shares.go_on_from(shares)
        if training.scaler.is_enabled():
            training.scaler.load_state_dict(json.loads(notes["scaler"]))
        for name, value in json.loads(notes["sums"]).items():
            setattr(training.sums, name, value)
        if notes["halved"] == "yes":
            halve_from_now(training.recogniser)
        return int(notes["done"])

    def after_stretch(self, training: "Training", done: int) -> None:
        """So many stretches are done: write it down where that is due.  A full disk costs a warning, not the round."""
        if self.clock() - self._written < self.every_s:
            return
        self._written = self.clock()
        notes = {
            "question": self.question,
            "done": str(done),
            "sums": json.dumps(dataclasses.asdict(training.sums)),
            "scaler": json.dumps(training.scaler.state_dict()),
            "halved": "yes" if is_halved(training.recogniser) else "no",
            "counted": json.dumps(self.counted),
            "seconds": repr(self.seconds_before + self.clock() - self._began),
        }
        try:
            write_sealed(self.path, training.tensors(), notes)
        except OSError as error:
            log.warning("%s cannot be written (%s): a training that is cut off begins anew.", self.path, error.strerror)

    def forget(self) -> None:
        """The training is whole: nothing of it is to be gone on with."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a training works on, as it stands."""

    recogniser: Recogniser
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    sums: "TrainSums"
    shares: GradientShares | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All that is numbers of it, by name."""
        found = {MODEL + name: tensor for name, tensor in self.recogniser.state_dict().items()}
        for name, parameter in self.recogniser.named_parameters():
            slots: Mapping[str, Any] = self.optimiser.state.get(parameter, {})
            for slot, value in slots.items():
                if value is not None:
                    found[f"{OPTIMISER}{name}/{slot}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        if self.shares is not None:
            found |= {SHARES + name: tensor for name, tensor in self.shares.so_far().items()}
        return found
