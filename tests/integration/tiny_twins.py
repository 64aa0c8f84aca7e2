"""Twins and settings small enough for a study in a test: 12 families of random faces of 32 px, a ViT of one block."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from common.faces.pack import FacePack, open_pack
from common.system.checkpoints import read_tensors
from simulation.data.synthetic import SynthSettings, write_dataset
from tests.tiny_settings import TINY, changed

SETTINGS = changed(
    TINY,
    data__fraction_val_people=0.25,
    data__fraction_test_people=0.25,
    model__backbone="vit_tiny",
    model__depth=1,
    model__width=0.125,
    model__patch_size=8,
    model__attention="dcal",
    model__glca_fraction=0.3,
    model__dropout=0.1,
    training__optimiser="adamw",
    training__lr=0.002,
    training__epochs=2,
    training__batch_size=16,
)


def write_twins(folder: Path) -> Path:
    """The pictures, in the layout of the data set."""
    write_dataset(SynthSettings(layout="twins", num_people=24, pictures_per_person=4), folder)
    return folder


def twins_pack(folder: Path) -> FacePack:
    """The same, packed."""
    return open_pack("twins", write_twins(folder / "data"), SETTINGS.data, folder / "packs", workers=1)


def spool(folder: Path) -> list[dict]:
    """All records of a run."""
    return [json.loads(line) for line in (folder / "spool.jsonl").read_text().splitlines()]


def points(folder: Path, key: str) -> list[tuple[str, int, float]]:
    """(nested run, step, value) of each point of a metric."""
    return [(line["run"], line["step"], line["value"]) for line in spool(folder) if line.get("key") == key]


def assert_same_bits(one: Path, other: Path, names: Sequence[str]) -> None:
    """The best and the last model of these nested runs are the same in two runs of a study."""
    for name in names:
        for role in ("best", "last"):
            models = [read_tensors(run / "checkpoints" / name / f"{role}.safetensors")[0] for run in (one, other)]
            assert all(np.array_equal(models[0][key], models[1][key]) for key in models[0]), (name, role)


class Killed(Exception):
    """Stands for kill -9: nothing of ours runs after it."""


@contextlib.contextmanager
def killed_at(holder: object, name: str, number: int) -> Iterator[None]:
    """What is done here dies when it calls holder.name for the n-th time."""
    real, calls = getattr(holder, name), []

    def dying(*arguments, **keywords):
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return real(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holder, name, dying)
        with pytest.raises(Killed):
            yield
