"""The server's checkpoint: the last two rounds' models, the best one, and a state file that names them."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.checkpoints import read_tensors, write_json, write_tensors
from common.parameters import Manifest, buffer_sha256, flatten, views
from server.history import History

Buffer = NDArray[np.float32]


class RunCheckpoints:
    """Writes and reads RUN/checkpoints. The state file is written last, so it never names a file that is not whole."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """folder: RUN/checkpoints."""
        self._folder, self._manifest = folder, manifest

    def path(self, step: int) -> Path:
        """The file of that round's global model."""
        return self._folder / f"round-{step:06d}.safetensors"

    def save(self, step: int, model: Buffer, history: History) -> str:
        """Write the model after round `step`, then the state; returns the model's SHA-256."""
        sha256 = buffer_sha256(model)
        write_tensors(self.path(step), views(model, self._manifest), {"round": str(step), "sha256": sha256})
        write_json(
            self._folder / "state.json",
            {
                "round": step,
                "best_round": history.best_round,
                "model": self.path(step).name,
                "sha256": sha256,
                "manifest": self._manifest.digest,
                "rounds": history.rows(),
            },
        )
        keep = {self.path(kept) for kept in (step, step - 1, history.best_round)}
        for old in set(self._folder.glob("round-*.safetensors")) - keep:
            old.unlink()
        return sha256

    def load(self, step: int) -> Buffer:
        """The global model of that round, [manifest.size] float32.  Raises CheckpointError."""
        tensors, _ = read_tensors(self.path(step))
        return flatten(tensors, self._manifest)
