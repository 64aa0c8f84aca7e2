"""What a data set says of its people: who has an attribute, and who has not."""

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from common.errors import UserError
from common.faces.datasets import DATASETS
from common.metrics.group_names import group_names


def people_of_groups(dataset: str, root: Path, attributes: Sequence[str], named: str) -> dict[str, list[str]]:
    """Group -> its people's identifiers: of each attribute who has it ("Male") and who has not ("not Male").

    named: how the user knows the data set, for the line of an error.
    Raises UserError where its layout says nothing of its people, DataError as its reader does.
    """
    reader = DATASETS[dataset].attributes
    if not reader:
        known = ", ".join(name for name, row in DATASETS.items() if row.attributes)
        raise UserError(f"--by: {named} ({dataset}) says nothing of its people; {known} do.")
    read: Callable[[Path, Sequence[str]], Mapping[str, Mapping[str, bool]]] = pkgutil.resolve_name(reader)
    return {
        group: [person for person, has in people.items() if has is wants]
        for name, people in read(root, attributes).items()
        for group, wants in zip(group_names([name]), (True, False), strict=True)
    }
