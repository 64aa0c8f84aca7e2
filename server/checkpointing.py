"""The server's checkpoint: the last two rounds' models, the best one, and a state file that names them.

Beside each of the last two models lie the strategy's moments, where it has any, so that a run can go on from there.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from common.checkpoints import read_tensors, write_json, write_tensors
from common.errors import CheckpointError
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

    def moments_path(self, step: int) -> Path:
        """The file of the strategy's moments after that round."""
        return self._folder / f"moments-{step:06d}.safetensors"

    def save(self, step: int, model: Buffer, moments: Mapping[str, Buffer], history: History) -> str:
        """Write the model after round `step` and the strategy's moments, then the state; returns the model's SHA-256.

        moments: name -> [manifest.size] float32; empty for a strategy without any, which writes no file of them.
        """
        sha256 = buffer_sha256(model)
        notes = {"round": str(step), "sha256": sha256}
        write_tensors(self.path(step), views(model, self._manifest), notes)
        if moments:
            tensors = {name: torch.from_numpy(buffer) for name, buffer in moments.items()}
            write_tensors(self.moments_path(step), tensors, notes)
        self.write_state(step, sha256, history)
        self._prune(step, history)
        return sha256

    def write_state(self, step: int, sha256: str, history: History) -> None:
        """Say in state.json what is known of the run after round `step`, whose model is on disk already."""
        moments = self.moments_path(step)
        write_json(
            self._folder / "state.json",
            {
                "round": step,
                "best_round": history.best_round,
                "model": self.path(step).name,
                "moments": moments.name if moments.exists() else "",
                "sha256": sha256,
                "manifest": self._manifest.digest,
                "rounds": history.rows(),
            },
        )

    def _prune(self, step: int, history: History) -> None:
        """Keep the models of the last two rounds and of the best one."""
        keep = {self.path(kept) for kept in (step, step - 1, history.best_round)}
        keep |= {self.moments_path(kept) for kept in (step, step - 1)}
        for pattern in ("round-*.safetensors", "moments-*.safetensors"):
            for old in set(self._folder.glob(pattern)) - keep:
                old.unlink()

    def load(self, step: int) -> Buffer:
        """The global model of that round, [manifest.size] float32.  Raises CheckpointError."""
        tensors, _ = read_tensors(self.path(step))
        return flatten(tensors, self._manifest)

    def load_moments(self, step: int, model_sha256: str) -> dict[str, Buffer]:
        """The strategy's moments after that round, as `ServerOptimiser.restore` takes them.

        model_sha256: of the model that they go with.  Raises CheckpointError when the file is missing, damaged or goes
        with another model.
        """
        path = self.moments_path(step)
        tensors, notes = read_tensors(path)
        if notes.get("sha256") != model_sha256:
            raise CheckpointError(f"{path} does not go with the model of round {step}; it is of another run.")
        return {name: tensor.numpy() for name, tensor in tensors.items()}
