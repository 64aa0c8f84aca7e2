"""`facefed evaluate --by ATTRIBUTE,...`: each model's errors at its own threshold, group by group."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from clients.own_machine import ClientOption
from common.faces.attributes import people_of_groups
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.metrics.groups import ByGroup, GroupPairs, pairs_of_groups
from common.metrics.pairs import pair_counts, pair_histogram
from common.metrics.thresholds import Threshold, thresholds_from
from common.training.evaluation import embed
from common.training.loop import Compute
from simulation.compare.model_loading import ModelFiles
from simulation.compare.model_lookup import FoundModel


def read_groups(options: Sequence[ClientOption], wanted: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Client -> group -> its people's identifiers: of each attribute who has it ("Male") and who has not ("not Male").

    Raises UserError where a client's layout says nothing of its people, DataError as its reader does.
    """
    return {option.name: people_of_groups(option.dataset, option.data_dir, wanted, option.name) for option in options}


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
    return ByGroup.at(model.name, _threshold(validation), by_client, least_people)


def _threshold(validation: Sequence[NDArray[np.int64]]) -> Threshold | None:
    """At USUAL_FAR, or at the strictest FAR above it that the validation pairs support."""
    return thresholds_from(validation).usual if validation else None
