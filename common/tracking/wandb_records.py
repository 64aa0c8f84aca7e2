"""What the records of a Weights & Biases log mean: the run, its config and summary, and the rows of its history.

Field numbers are those of wandb's public wandb_internal.proto, alike in 0.16 and 0.31.  Older versions write a nested
value as one JSON text, newer ones each leaf with its path; both come out as nested dictionaries here.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeGuard

from common.errors import TrackingError
from common.tracking.wandb_file import Damage, Malformed, Record, fields, raw, read_records, signed, text

_HISTORY, _SUMMARY, _CONFIG, _STATS, _ARTIFACT, _RUN, _EXIT = 2, 3, 5, 7, 8, 17, 18  # fields of Record
_ITEM_KEY, _ITEM_NESTED_KEY, _ITEM_JSON = 1, 2, 16  # of a history, summary or config item
_RUN_CONFIG, _RUN_SUMMARY, _RUN_TAGS, _RUN_START = 4, 5, 10, 17
_RUN_TEXTS: Final = {
    1: "run_id", 2: "entity", 3: "project", 6: "group", 7: "job_type", 8: "name", 9: "notes", 12: "sweep_id",
}  # fmt: skip
_NOT_CARRIED: Final = {_STATS: "system metrics", _ARTIFACT: "artifact versions"}
_MOST: Final = 1 << 53  # beyond this a step or time is nonsense, and no database takes it
_OF_WANDB: Final = "_wandb"  # its own notes in config and summary

Tree = dict[str, Any]


@dataclasses.dataclass
class RunFacts:
    """All of a log but its history."""

    run_id: str = ""
    entity: str = ""
    project: str = ""
    name: str = ""
    notes: str = ""
    group: str = ""
    job_type: str = ""
    sweep_id: str = ""
    tags: list[str] = dataclasses.field(default_factory=list)
    start_ms: int = 0  # wall clock; 0 where the log does not tell
    config: Tree = dataclasses.field(default_factory=dict)
    summary: Tree = dataclasses.field(default_factory=dict)
    exit_code: int | None = None  # None: the run did not end, or its end is not in the log
    num_records: int = 0
    num_rows: int = 0
    end: int = 0  # bytes up to the end of the last whole record
    damages: list[Damage] = dataclasses.field(default_factory=list)
    not_carried: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def sound_end(self) -> int:
        """Bytes up to which every record was read."""
        return min([self.end, *(damage.offset for damage in self.damages)])


class Row(NamedTuple):
    """One row of the history, logged at `step` and `time_ms` (wall clock); it begins at `offset` of the file."""

    offset: int
    step: int
    time_ms: int
    values: Tree


def read_facts(log: Path) -> RunFacts:
    """Read all of a log but its history.  Raises TrackingError when it is none, or has not one whole record."""
    facts = RunFacts()
    for found in read_records(log):
        if isinstance(found, Damage):
            facts.damages.append(found)
            continue
        try:
            _take(facts, found.data)
        except Malformed as error:
            facts.damages.append(Damage(found.offset, f"a record that is no protobuf message ({error})"))
        facts.num_records += 1
        facts.end = found.end
    if not facts.num_records:
        raise TrackingError(
            f"{log} has no whole record: wandb was stopped before it wrote one, or the file is cut off."
        )
    facts.run_id = facts.run_id or log.stem.removeprefix("run-")
    for tree in (facts.config, facts.summary):
        tree.pop(_OF_WANDB, None)
    return facts


def _take(facts: RunFacts, message: bytes) -> None:
    for number, value in fields(message):
        if number == _HISTORY:
            facts.num_rows += 1
        elif number == _SUMMARY:
            _update(facts.summary, raw(value))
        elif number == _CONFIG:
            _update(facts.config, raw(value))
        elif number == _RUN:
            _take_run(facts, raw(value))
        elif number == _EXIT:
            facts.exit_code = signed(dict(fields(raw(value))).get(1, 0))
        elif number in _NOT_CARRIED:
            name = _NOT_CARRIED[number]
            facts.not_carried[name] = facts.not_carried.get(name, 0) + 1


def _take_run(facts: RunFacts, message: bytes) -> None:
    """A run's record; a later one tells only what has changed."""
    tags = []
    for number, value in fields(message):
        if number in _RUN_TEXTS:
            setattr(facts, _RUN_TEXTS[number], text(value))
        elif number == _RUN_TAGS:
            tags.append(text(value))
        elif number == _RUN_START:
            parts = dict(fields(raw(value)))
            facts.start_ms = signed(parts.get(1, 0)) * 1000 + signed(parts.get(2, 0)) // 1_000_000
        elif number == _RUN_CONFIG:
            _update(facts.config, raw(value))
        elif number == _RUN_SUMMARY:
            _update(facts.summary, raw(value))
    facts.tags = tags or facts.tags


def _update(tree: Tree, message: bytes) -> None:
    """A config or summary record: field 1 sets items, field 2 removes them."""
    for number, value in fields(message):
        if number == 1:
            path, content = _item(raw(value))
            _put(tree, path, content)
        elif number == 2:
            path, _ = _item(raw(value))
            _drop(tree, path)


def read_history(log: Path, start_ms: int) -> Iterator[Row]:
    """The rows of a log's history in their order; damaged ones, which `read_facts` reports, are left out.

    start_ms: stands in for the time of a row that has none.
    """
    count = 0
    for found in read_records(log):
        if isinstance(found, Damage):
            continue
        for message in _history_messages(found):
            try:
                row = _row(found.offset, message, count, start_ms)
            except Malformed:
                continue
            count = row.step + 1
            yield row


def _history_messages(record: Record) -> list[bytes]:
    try:
        return [raw(value) for number, value in fields(record.data) if number == _HISTORY]
    except Malformed:
        return []


def _row(offset: int, message: bytes, next_step: int, start_ms: int) -> Row:
    values: Tree = {}
    step: int | None = None
    for number, value in fields(message):
        if number == 1:
            path, content = _item(raw(value))
            _put(values, path, content)
        elif number == 2:
            step = signed(dict(fields(raw(value))).get(1, 0))
    told = values.pop("_step", None)
    if isinstance(told, int) and abs(told) < _MOST:
        step = told
    runtime, stamp = values.pop("_runtime", None), values.pop("_timestamp", None)
    values.pop(_OF_WANDB, None)
    time_ms = start_ms
    if is_number(stamp) and 0 <= stamp * 1000 < _MOST:
        time_ms = int(stamp * 1000)
    elif is_number(runtime) and 0 <= runtime * 1000 < _MOST:
        time_ms = start_ms + int(runtime * 1000)
    return Row(offset, next_step if step is None else step, time_ms, values)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _item(message: bytes) -> tuple[Sequence[str], Any]:
    """The path and the content of a history, summary or config item; what is no JSON stays a text."""
    key, nested, content = "", [], ""
    for number, value in fields(message):
        if number == _ITEM_KEY:
            key = text(value)
        elif number == _ITEM_NESTED_KEY:
            nested.append(text(value))
        elif number == _ITEM_JSON:
            content = text(value)
    try:
        return nested or [key], json.loads(content)
    except (ValueError, RecursionError):
        return nested or [key], content


def _put(tree: Tree, path: Sequence[str], value: object) -> None:
    for name in path[:-1]:
        below = tree.get(name)
        if not isinstance(below, dict):
            below = tree[name] = {}
        tree = below
    tree[path[-1]] = value


def _drop(tree: Tree, path: Sequence[str]) -> None:
    for name in path[:-1]:
        below = tree.get(name)
        if not isinstance(below, dict):
            return
        tree = below
    tree.pop(path[-1], None)


def leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of each leaf; media (a dictionary with `_type`), lists and empty ones are leaves."""
    for name, value in tree.items():
        if isinstance(value, dict) and value and "_type" not in value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
