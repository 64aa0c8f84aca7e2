"""What a checkpoint keeps of the rounds so far: every figure as JSON, and the sums that the run's end still needs.

These are the sums of the untrained and of the best model, a file for each, written when they change.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.checkpoints import read_sealed, write_sealed
from common.errors import CheckpointError
from common.evaluation import EvaluationSums
from common.metrics.classification import ClosedSetSums
from common.metrics.folds import FOLD_BINS, NUM_FOLDS
from common.metrics.verification import NUM_BINS
from server.history import History, RoundRecord
from server.scores import INTEGER_SUMS

_PARTS = ("pairs", "folds", "twins", "confusion")
_ALL = ""  # the name under which the sums of all clients stand; no client has it


def history_to_json(history: History) -> dict[str, Any]:
    """Everything but the sums."""
    return {
        "best_round": history.best_round,
        "best_val_auc": history.best_val_auc if history.best_round else None,
        "rounds": history.rows(),
        "scored": {str(step): sorted(record.scored) for step, record in sorted(history.rounds.items())},
        "clients": {str(step): record.clients for step, record in sorted(history.rounds.items()) if record.clients},
    }


def history_from_json(values: Mapping[str, Any]) -> History:
    """The inverse of `history_to_json`.  Raises CheckpointError."""
    try:
        history = History(best_round=int(values["best_round"]))
        if history.best_round:
            history.best_val_auc = float(values["best_val_auc"])
        for row in values["rounds"]:
            step = int(row["step"])
            metrics = {name: float(value) for name, value in row.items() if name != "step"}
            history.rounds[step] = RoundRecord(
                step=step,
                metrics=metrics,
                clients={
                    client: {name: float(value) for name, value in own.items()}
                    for client, own in values["clients"].get(str(step), {}).items()
                },
                scored=set(values["scored"].get(str(step), [])),
            )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"the checkpoint's state.json is not one of ours ({error!r}).") from None
    return history


def scores_path(folder: Path, step: int) -> Path:
    """The file of the sums of the model of that round."""
    return folder / f"scores-{step:06d}.safetensors"


def write_scores(path: Path, record: RoundRecord) -> None:
    """Write a model's sums: of all clients, and of each while they are kept."""
    tensors: dict[str, torch.Tensor] = {}
    notes: dict[str, str] = {}
    for split, total in record.totals.items():
        for client, sums in {_ALL: total, **record.sums.get(split, {})}.items():
            name = f"{split}/{client}"
            notes[name] = " ".join(repr(value) for value in dataclasses.astuple(sums.closed))
            for part in _PARTS:
                counts: NDArray[np.int64] | None = getattr(sums, part)
                if counts is not None:
                    tensors[f"{name}/{part}"] = torch.tensor(
                        counts
                    )  # a copy: of one client, its sums are also all sums
    write_sealed(path, tensors, notes)


def _check_counts(parts: Mapping[str, NDArray[np.int64]]) -> None:
    """Raises ValueError for counts of another shape or kind, or below zero: they would end the run later."""
    shapes = {"pairs": (2, NUM_BINS), "twins": (2, NUM_BINS), "folds": (NUM_FOLDS, 2, FOLD_BINS)}
    for name, counts in parts.items():
        wanted = shapes.get(name, counts.shape[:1] * 2)  # a confusion is square
        if counts.dtype != np.int64 or counts.shape != wanted or (counts < 0).any():
            raise ValueError(f"{name} is {counts.dtype} {counts.shape}, or negative")


def read_scores(path: Path, record: RoundRecord) -> None:
    """Put a file's sums into the record.  Raises CheckpointError."""
    tensors, notes = read_sealed(path)
    fields = [field.name for field in dataclasses.fields(ClosedSetSums)]
    try:
        for name, numbers in notes.items():
            split, _, client = name.partition("/")
            closed = dict(zip(fields, map(float, numbers.split()), strict=True))
            parts = {part: tensors[f"{name}/{part}"].numpy() for part in _PARTS if f"{name}/{part}" in tensors}
            _check_counts(parts)
            values: dict[str, Any] = {key: int(v) if key in INTEGER_SUMS else v for key, v in closed.items()}
            sums = EvaluationSums(closed=ClosedSetSums(**values), **parts)
            if client == _ALL:
                record.totals[split] = sums
            else:
                record.sums.setdefault(split, {})[client] = sums
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a file of ours ({error!r}).") from None
