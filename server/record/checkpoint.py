"""The server's checkpoint: the last two rounds' models, the best one, and a state file that names them.

Beside each of the last two models lie the strategy's moments, where it has any, so that a run can go on from there.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import CheckpointError
from common.protocol.parameters import Manifest, buffer_sha256, views
from common.runs import STATE_FILE
from common.system.checkpoints import read_flat, read_sealed, write_sealed, write_tensors
from common.system.files import read_sealed_json, write_bytes, write_sealed_json
from server.record.history import (
    History,
    history_from_json,
    history_to_json,
    read_scores,
    scores_path,
    write_scores,
)

log = logging.getLogger("facefed.server")

Buffer = NDArray[np.float32]
EARLIER_STATE_FILE = "state.earlier.json"


class RunCheckpoints:
    """Writes and reads RUN/checkpoints. The state file is written last, so it never names a file that is not whole."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """folder: RUN/checkpoints."""
        self._folder, self._manifest = folder, manifest
        self._written: dict[int, frozenset[str]] = {}  # step -> splits whose sums are on disk
        self._counts: dict[str, dict[str, float]] = {}  # of the last two rounds, by their number
        self._best = [0, 0]  # the best rounds that the last two states name

    def path(self, step: int) -> Path:
        """The file of that round's global model."""
        return self._folder / f"round-{step:06d}.safetensors"

    @property
    def replies_folder(self) -> Path:
        """Where a round's replies may be kept while they are compared."""
        return self._folder.parent / "replies"

    def moments_path(self, step: int) -> Path:
        """The file of the strategy's moments after that round."""
        return self._folder / f"moments-{step:06d}.safetensors"

    def save(
        self, step: int, model: Buffer, moments: Mapping[str, Buffer], history: History, counts: Mapping[str, float]
    ) -> str:
        """Write the model after round `step` and the strategy's moments, then the state; returns the model's SHA-256.

        moments: name -> [manifest.size] float32, or smaller for what `load_moments` is told the size of; empty for a
        strategy without any, which writes no file of them.
        counts: what else the record has counted so far.
        """
        sha256 = buffer_sha256(model)
        notes = {"round": str(step), "sha256": sha256}
        write_tensors(self.path(step), views(model, self._manifest), notes)
        if moments:
            tensors = {name: torch.from_numpy(buffer) for name, buffer in moments.items()}
            write_sealed(self.moments_path(step), tensors, notes)
        self.write_state(step, sha256, history, counts)
        self._prune(step)
        return sha256

    def write_state(self, step: int, sha256: str, history: History, counts: Mapping[str, float]) -> None:
        """Say in state.json what is known of the run after round `step`, whose model is on disk already."""
        self._write_scores(history)
        before = str(step - 1)
        self._counts = {str(step): dict(counts)} | ({before: self._counts[before]} if before in self._counts else {})
        moments = self.moments_path(step)
        state = {
            **history_to_json(history),
            "round": step,
            "counts": self._counts,
            "model": self.path(step).name,
            "moments": moments.name if moments.exists() else "",
            "sha256": sha256,
            "manifest": self._manifest.digest,
        }
        path = self._folder / STATE_FILE
        if path.exists():
            write_bytes(self._folder / EARLIER_STATE_FILE, path.read_bytes())
        write_sealed_json(path, state)
        self._best = [history.best_round, self._best[0]]

    def _write_scores(self, history: History) -> None:
        """The sums of the untrained and of the best model, where they are new."""
        for step in {0, history.best_round}:
            scored = frozenset(history.at(step).totals)
            if scored - self._written.get(step, frozenset()):
                write_scores(scores_path(self._folder, step), history.at(step))
                self._written[step] = scored

    def _prune(self, step: int) -> None:
        """Keep the models of the last two rounds and of the best one, and what the earlier state needs."""
        keep = {self.path(kept) for kept in (step, step - 1, *self._best)}
        keep |= {self.moments_path(kept) for kept in (step, step - 1)}
        keep |= {scores_path(self._folder, kept) for kept in (0, *self._best)}
        for pattern in ("round-*.safetensors", "moments-*.safetensors", "scores-*.safetensors"):
            for old in set(self._folder.glob(pattern)) - keep:
                old.unlink()

    def load(self, step: int) -> Buffer:
        """The global model of that round, [manifest.size] float32.  Raises CheckpointError."""
        layout = [(entry.name, entry.shape) for entry in self._manifest.entries]
        buffer, notes = read_flat(self.path(step), layout)
        if notes.get("sha256") != buffer_sha256(buffer):
            raise CheckpointError(f"{self.path(step)} is damaged: its numbers are not those that were written.")
        return buffer

    def exists(self) -> bool:
        """Whether there is anything to go on from."""
        return any(self.states())

    def states(self) -> Iterator[Path]:
        """The files of the last two states, the newest first, of those that are there."""
        return (path for name in (STATE_FILE, EARLIER_STATE_FILE) if (path := self._folder / name).exists())

    def read_state(self, path: Path) -> dict[str, Any]:
        """What `write_state` wrote.  Raises CheckpointError when it is damaged or of another model."""
        state = read_sealed_json(path)
        if state.get("manifest") != self._manifest.digest:
            raise CheckpointError(f"{path} is of another model; resume with the run's own settings.")
        return state

    def counts(self, step: int) -> dict[str, float]:
        """What the record had counted after round `step`, one of the last two.  Raises CheckpointError."""
        if str(step) not in self._counts:
            raise CheckpointError(f"the checkpoint in {self._folder} does not reach back to round {step}.")
        return dict(self._counts[str(step)])

    def take(self, path: Path, history: History, counts: Mapping[int, Mapping[str, float]]) -> None:
        """Go on from that state: it is the newest from now on.  counts: those of the rounds that it can go back to."""
        self._counts = {str(step): dict(counted) for step, counted in counts.items()}
        if path.name != STATE_FILE:  # else the next state would take its place, before there is another
            write_bytes(self._folder / STATE_FILE, path.read_bytes())
        self._best = [history.best_round] * 2
        self._written = {step: frozenset(history.at(step).totals) for step in {0, history.best_round}}

    def read_history(self, state: Mapping[str, Any]) -> History:
        """The history of a state, with the sums that the run's end needs, where they are whole.

        Raises CheckpointError.
        """
        history = history_from_json(state)
        for step in {0, history.best_round}:
            record = history.at(step)
            if record.scored:
                try:
                    read_scores(scores_path(self._folder, step), record)
                except CheckpointError as error:
                    log.warning("%s Round %d's model is scored again at the end, if it is the best.", error, step)
                    record.scored, record.totals, record.sums = set(), {}, {}
                self._written[step] = frozenset(record.totals)
        return history

    def load_moments(
        self, step: int, model_sha256: str, sizes: Mapping[str, int] = MappingProxyType({})
    ) -> dict[str, Buffer]:
        """The strategy's moments after that round, as `ServerOptimiser.restore` takes them.

        model_sha256: of the model that they go with.  sizes: of what is no buffer of the model's size, by name.
        Raises CheckpointError when the file is missing, damaged or goes with another model.
        """
        path = self.moments_path(step)
        tensors, notes = read_sealed(path)
        if notes.get("sha256") != model_sha256:
            raise CheckpointError(f"{path} does not go with the model of round {step}; it is of another run.")
        odd = next((name for name, tensor in tensors.items() if tensor.dtype != torch.float32), None)
        wanted = {name: (sizes.get(name, self._manifest.size),) for name in tensors}
        if odd is not None or any(tuple(tensor.shape) != wanted[name] for name, tensor in tensors.items()):
            raise CheckpointError(f"{path} is of another model; resume with the settings the run began with.")
        return {name: tensor.numpy() for name, tensor in tensors.items()}
