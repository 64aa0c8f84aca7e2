"""`facefed evaluate --by ATTRIBUTE,...`: each model's errors at its own threshold, group by group."""

import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clients.own_machine import ClientOption
from common.errors import UserError
from common.faces.datasets import DATASETS
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.metrics.groups import GroupErrors, GroupPairs, group_errors, pairs_of_groups, worst_to_best
from common.metrics.pairs import pair_counts, pair_histogram
from common.metrics.thresholds import USUAL_FAR, Threshold, thresholds_from
from common.system.console import table
from common.training.evaluation import embed
from common.training.loop import Compute
from simulation.compare.model_loading import ModelFiles
from simulation.compare.model_lookup import FoundModel


@dataclass(frozen=True, kw_only=True)
class ByGroup:
    """One model's errors by group.  threshold: None where its validation people support none.

    errors: of each group with enough people.  too_small: group -> its test people.
    """

    model: str
    threshold: Threshold | None
    errors: tuple[GroupErrors, ...]
    too_small: Mapping[str, int]


def read_groups(options: Sequence[ClientOption], wanted: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Client -> group -> its people's identifiers: of each attribute who has it ("Male") and who has not ("not Male").

    Raises UserError where a client's layout says nothing of its people, DataError as its reader does.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for option in options:
        reader = DATASETS[option.dataset].attributes
        if not reader:
            known = ", ".join(name for name, row in DATASETS.items() if row.attributes)
            raise UserError(f"--by: {option.name} ({option.dataset}) says nothing of its people; {known} do.")
        read: Callable[[Path, Sequence[str]], Mapping[str, Mapping[str, bool]]] = pkgutil.resolve_name(reader)
        found[option.name] = {
            group: [person for person, has in people.items() if has is wants]
            for name, people in read(option.data_dir, wanted).items()
            for group, wants in ((name, True), (f"not {name}", False))
        }
    return found


def errors_by_group(
    model: FoundModel,
    packs: Mapping[str, FacePack],
    groups: Mapping[str, Mapping[str, Sequence[str]]],
    compute: Compute,
    least_people: int,
) -> ByGroup:
    """One model's errors on its clients' test people, at the threshold of their validation people.

    packs: client -> its pack with this model's data settings.  groups: as `read_groups`.
    """
    files = ModelFiles(model)
    num_people = {name: pack.num_classes for name, pack in packs.items()}
    validation: list[NDArray[np.int64]] = []
    by_client: list[dict[str, GroupPairs]] = []
    for name, pack in packs.items():
        recogniser = files.at(name, pack, num_people).recogniser
        indices, person, family = pack.shown_in(Split.VAL_PEOPLE)
        if all(pair_counts(person, family)["all"]):
            validation.append(pair_histogram(embed(recogniser, pack, indices, compute), person))
        indices, person, _ = pack.shown_in(Split.TEST_PEOPLE)
        number = {identifier: row for row, identifier in enumerate(pack.people)}
        members = {
            group: [number[identifier] for identifier in people if identifier in number]
            for group, people in groups[name].items()
        }
        by_client.append(pairs_of_groups(embed(recogniser, pack, indices, compute).numpy(), person, members))
    threshold = _threshold(validation)
    errors, small = group_errors(by_client, math.inf if threshold is None else threshold.threshold, least_people)
    return ByGroup(
        model=model.name,
        threshold=threshold,
        errors=() if threshold is None else tuple(errors),
        too_small=small,
    )


def _threshold(validation: Sequence[NDArray[np.int64]]) -> Threshold | None:
    """At USUAL_FAR, or at the strictest FAR above it that the validation pairs support."""
    rows = thresholds_from(validation).rows if validation else ()
    return next((row for row in reversed(rows) if row.far >= USUAL_FAR), None)


def group_lines(found: Sequence[ByGroup], least_people: int) -> list[str]:
    """What is shown on the terminal, model by model."""
    lines = []
    for one in found:
        if one.threshold is None:
            lines += ["", f"{one.model} by group: too few validation pairs for a threshold"]
            continue
        at = f"cosine {one.threshold.threshold:.4f}, FAR {one.threshold.far:g} on validation people"
        lines += ["", f"{one.model} by group, at its threshold ({at}), with 95 % intervals:"]
        rows = [("group", "people", "FMR", "FNMR")]
        for row in one.errors:
            rates = _rate(row.fmr, row.fmr_low, row.fmr_high), _rate(row.fnmr, row.fnmr_low, row.fnmr_high)
            rows.append((row.group, f"{row.num_people:,}", *rates))
        lines += table(rows).split("\n") if one.errors else ["no group has people enough"]
        if len(one.errors) > 1:
            lines.append(f"worst to best: FMR {_ratio(one, 'fmr')}, FNMR {_ratio(one, 'fnmr')}")
        small = ", ".join(f"{group} {number}" for group, number in one.too_small.items())
        lines += [f"left out, fewer than {least_people} people: {small}"] if small else []
    return lines


def group_content(found: Sequence[ByGroup], least_people: int) -> dict[str, Any]:
    """The same for groups.json."""
    return {"least_people": least_people, "models": [asdict(one) for one in found]}


def _rate(rate: float, low: float, high: float) -> str:
    return f"{rate:.4f} ({low:.4f} to {high:.4f})"


def _ratio(one: ByGroup, rate: str) -> str:
    ratio = worst_to_best([getattr(row, rate) for row in one.errors])
    return "not finite (the best has none)" if math.isinf(ratio) else f"{ratio:.1f}"
