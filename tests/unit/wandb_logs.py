"""Writes logs as wandb does, for what its own small files in tests/data/wandb do not hold."""

import json
from pathlib import Path

from bench.wandb_log import field, framed

DATA = Path(__file__).parents[1] / "data" / "wandb"
OLD, NEW = DATA / "wandb-0.16.6", DATA / "wandb-0.31.0"


def log_of(folder):
    """The one log below a folder."""
    (log,) = folder.glob("wandb/*run-*/*.wandb")
    return log


def item(path, value):
    key = b"".join(field(2, name) for name in path) if isinstance(path, tuple) else field(1, path)
    return key + field(16, json.dumps(value))


def items(number, values):
    return b"".join(field(number, item(path, value)) for path, value in values.items())


def run_record(*, run_id="r1", project="p", name="a run", config=None, seconds=1_700_000_000, entity="", host=""):
    body = (
        field(1, run_id)
        + field(2, entity)
        + field(3, project)
        + field(8, name)
        + field(13, host)
        + field(17, field(1, seconds) + field(2, 5_000_000))
    )
    return field(17, body + field(4, items(1, config or {})))


def row_record(step, values, seconds):
    return field(2, items(1, {**values, "_timestamp": seconds, "_step": step}) + field(2, field(1, step)))


def summary_record(values):
    return field(3, items(1, values))


def exit_record(code=0):
    return field(18, field(1, code))


def write_log(folder, records, name="offline-run-20260101_000000-r1"):
    path = folder / "wandb" / name / "run-r1.wandb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(framed(records)[0])
    return path
