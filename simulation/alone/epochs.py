"""The epochs of training without a federation: train, validate, keep the best, stop early, go on after a break.

After each epoch RUN/checkpoints/resume holds the whole state, so that a run that was stopped or killed goes on where it
was: resumed equals uninterrupted, bit for bit (every random stream is named by seed and epoch, none is carried along).

What can be watched meanwhile, of a ViT: its graph, and where it looks in pictures of people it does not train on. They
show faces, so they stay in the run's folder and in TensorBoard's, and never go to MLflow.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np
import torch
from numpy.typing import NDArray

from clients.private_state import load_private, prune, save_private
from common.errors import CheckpointError
from common.faces.batches import to_float
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.metrics.figures import AUC, known_scores, validated
from common.metrics.names import EPOCH_SECONDS, of_split, present
from common.models.dcal import VitBackbone, attention_of
from common.models.recogniser import EmbeddingModel
from common.plots.attention import attention_maps
from common.system.checkpoints import read_tensors, write_tensors
from common.system.files import read_json, write_json
from common.system.live import Live, clock_text
from common.system.progress import Amount, Meter
from common.system.run_view import BEST_MARK, scores_text
from common.tracking.run import TrackedRun
from common.training.loop import make_optimiser, train_epochs, warm_up_head
from simulation.alone.trainee import Trainee

PROGRESS_FILE = "progress.json"
NUM_PICTURES: Final = 6  # that are looked at
NUM_LOOKS: Final = 5  # over all epochs, about
VAL_AUC = of_split("val", AUC)  # among an epoch's figures, what the best is chosen by
AfterEpoch = Callable[["Epochs"], None]  # may raise to end the training


def go_on(_epochs: "Epochs") -> None:
    """What happens after an epoch unless somebody listens: nothing."""


@dataclass
class Progress:
    """How far a run is. One row of figures for each epoch; best: by validation AUC, never by test."""

    epoch: int = 0  # epochs done
    best_epoch: int = 0
    best_val_auc: float = -1.0
    num_pictures: int = 0  # processed in training
    num_steps: int = 0
    num_warmup_pictures: int = 0  # seen by the new head alone, before
    rows: list[dict[str, float]] = field(default_factory=list)


@dataclass(kw_only=True)
class Epochs:
    """One run's epochs."""

    trainee: Trainee
    tracked: TrackedRun
    folder: Path  # RUN/checkpoints
    after_epoch: AfterEpoch = go_on
    progress: Progress = field(default_factory=Progress)
    optimiser: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.trainee.compute.place(self.trainee.recogniser)
        self.optimiser = make_optimiser(self.trainee.recogniser, self.trainee.settings.training)

    @property
    def total(self) -> int:
        """How many epochs the schedule is made for."""
        return self.trainee.settings.local_training_epochs

    def checkpoint(self, role: str) -> Path:
        """The file of the "best" or the "last" model."""
        return self.folder / f"{role}.safetensors"

    def load(self, role: str) -> None:
        """Put the "best" or the "last" model back into the recogniser.  Raises CheckpointError."""
        tensors, _ = read_tensors(self.checkpoint(role))
        self.trainee.recogniser.load_state_dict(tensors)

    def run(self, out: TextIO) -> None:
        """All epochs that are left; the best and the last model are in RUN/checkpoints then.  Raises TrainingFailed."""
        training, progress = self.trainee.settings.training, self.progress
        with Live(out) as live:
            if progress.epoch == 0:
                self._warm_up()
            while progress.epoch < self.total and not training.is_out_of_patience(progress.epoch - progress.best_epoch):
                self._epoch(live)
            if progress.epoch < self.total:
                why = f"{training.patience} validations without a better AUC"
                live.say(f"stopped early after epoch {progress.epoch}: {why}")
        if self.trainee.settings.tracking.plots != "none":
            show_attention(self.trainee, self.tracked)
        self._save_model("last")

    def _warm_up(self) -> None:
        sums = warm_up_head(
            self.trainee.recogniser,
            self.trainee.pack,
            settings=self.trainee.settings,
            compute=self.trainee.compute,
            stream_name=self.trainee.name,
        )
        self.progress.num_warmup_pictures = sums.num_warmup_pictures

    def _epoch(self, live: Live) -> None:
        started = time.perf_counter()
        epoch, progress = self.progress.epoch, self.progress
        label = f"epoch {epoch + 1}/{self.total}"
        meter = Meter(
            len(self.trainee.pack.indices(Split.TRAIN)),
            lambda amount: live.move(label, amount, self._rest_of_run(amount)),
        )
        sums = train_epochs(
            self.trainee.recogniser,
            self.optimiser,
            self.trainee.pack,
            settings=self.trainee.settings,
            compute=self.trainee.compute,
            epochs=range(epoch, epoch + 1),
            total_epochs=self.total,
            stream_name=self.trainee.name,
            tick=meter,
        )
        seconds = time.perf_counter() - started
        row = {**sums.merged(), "learning_rate": sums.lr_last, EPOCH_SECONDS: seconds} | self._validate()
        progress.epoch = epoch + 1
        progress.num_pictures += sums.num_pictures
        progress.num_steps += sums.num_steps
        former = progress.rows[-1].get(VAL_AUC) if progress.rows else None
        progress.rows.append({"step": float(epoch + 1), **row})
        if row.get(VAL_AUC, 0.0) > progress.best_val_auc:
            progress.best_epoch, progress.best_val_auc = epoch + 1, row.get(VAL_AUC, 0.0)
            self._save_model("best")
        self._save()
        self.tracked.log_metrics(row, step=epoch + 1)
        if self.trainee.settings.tracking.plots == "all" and is_time_to_look(epoch + 1, self.total):
            show_attention(self.trainee, self.tracked)
        live.say(self._line(row, former))
        self.after_epoch(self)

    def _line(self, row: Mapping[str, float], former: float | None) -> str:
        """The newest epoch in one line.  former: the AUC of the one before."""
        epoch, best = self.progress.epoch, self.progress.best_epoch
        figures = {name: row[metric] for metric, (name, _) in validated().items() if metric in row}
        scores = scores_text("val", figures, before=former)
        begun = f"epoch {epoch} of {self.total}: train loss {row['train_loss']:.3f}, {row[EPOCH_SECONDS]:.1f} s"
        return "; ".join(text for text in (begun, scores) if text) + BEST_MARK * (best == epoch)

    def _rest_of_run(self, amount: Amount) -> str:
        """What the epochs to come will take, at the pace of this one."""
        to_come = self.total - self.progress.epoch - 1
        if to_come < 1 or amount.rate <= 0.0 or amount.seconds_left is None:
            return ""
        return f" (whole run {clock_text(amount.seconds_left + to_come * amount.total / amount.rate)})"

    def _validate(self) -> dict[str, float]:
        scores = known_scores(self.trainee.evaluate_pooled("val"))
        return {metric: scores[name] for metric, (name, _) in validated().items() if name in scores}

    def _save_model(self, role: str) -> None:
        state = self.trainee.recogniser.state_dict()
        write_tensors(self.checkpoint(role), state, {"epoch": str(self.progress.epoch)})

    def _save(self) -> None:
        """The whole state; progress.json is written between the new state and the end of the old one."""
        resume, recogniser = self.folder / "resume", self.trainee.recogniser
        save_private(resume, self.progress.epoch, recogniser, self.optimiser, recogniser.state_dict())
        write_json(resume / PROGRESS_FILE, dataclasses.asdict(self.progress))
        prune(resume, {self.progress.epoch})

    def restore(self) -> None:
        """Go on where RUN/checkpoints/resume stands; a run without one starts anew.  Raises CheckpointError."""
        resume, recogniser = self.folder / "resume", self.trainee.recogniser
        if not (resume / PROGRESS_FILE).exists():
            return
        values: dict[str, Any] = read_json(resume / PROGRESS_FILE)
        try:
            self.progress = Progress(**values | {"rows": [present(row) for row in values["rows"]]})
        except (TypeError, KeyError):
            raise CheckpointError(f"{resume / PROGRESS_FILE} is not a file of ours.") from None
        found = load_private(resume, self.progress.epoch, recogniser, self.optimiser, recogniser.state_dict())
        if found != self.progress.epoch:
            raise CheckpointError(f"{resume}: the state of epoch {self.progress.epoch} is missing; start a new run.")
        self.tracked.log_missing_metrics(self._last_row(), step=self.progress.epoch)

    def _last_row(self) -> dict[str, float]:
        """What was saved but perhaps not logged when the run was killed."""
        return {name: value for name, value in self.progress.rows[-1].items() if name != "step"}


def shown_pictures(pack: FacePack) -> NDArray[np.int64]:
    """One picture of each of a few validation people: [at most 6] int64, with families siblings side by side."""
    indices, person, family = pack.shown_in(Split.VAL_PEOPLE)
    first = np.sort(np.unique(person, return_index=True)[1])
    return indices[first[np.argsort(family[first], kind="stable")]][:NUM_PICTURES]


def show_graph(trainee: Trainee, tracked: TrackedRun) -> None:
    """Show the graph of what embeds, in TensorBoard."""
    if trainee.settings.tracking.tensorboard == "none":
        return
    size = trainee.settings.data.image_size
    example = torch.zeros(2, 3, size, size)
    tracked.log_graph(EmbeddingModel(trainee.recogniser.backbone).cpu(), example)


def is_time_to_look(epoch: int, total: int) -> bool:
    """After the first epoch and about NUM_LOOKS times in all, but not after the last.  epoch: in [1, total]."""
    return epoch < total and (epoch == 1 or epoch % max(1, total // NUM_LOOKS) == 0)


def show_attention(trainee: Trainee, tracked: TrackedRun) -> None:
    """Draw the present model's attention; a model without attention, or no validation people, draws nothing."""
    backbone = trainee.recogniser.backbone
    if not isinstance(backbone, VitBackbone):
        return
    pack = next((pack for pack in trainee.clients.values() if len(pack.indices(Split.VAL_PEOPLE))), None)
    if pack is None:
        return
    rows = shown_pictures(pack)
    pictures = np.asarray(pack.pictures[rows])
    was_training = backbone.training
    backbone.eval()
    maps = attention_of(backbone, to_float(torch.from_numpy(pictures)).to(trainee.compute.device))
    backbone.train(was_training)
    names = [pack.people[person] for person in pack.person[rows].tolist()]
    tracked.keep_figure(attention_maps(pictures, maps, names, title="Where the model looks"), "plots/attention.png")
