"""Which groups of people errors are told of: the two of each attribute in `verification.by`.

Only the standard library: settings are checked before anything heavy is imported.
"""

import re
from collections.abc import Sequence
from typing import Final

from common.errors import UserError

GROUPS: Final = "groups"  # among a task's splits: it asks for the sums of groups of test people, and of nothing else
NO_ATTRIBUTE: Final = "none"
MOST_ATTRIBUTES: Final = 16
_ATTRIBUTE: Final = re.compile(r"[A-Za-z0-9_]{1,40}")


def attributes_of(text: str) -> tuple[str, ...]:
    """The attributes of `verification.by`, such as "Male,Young"; of "none" none.  Raises UserError."""
    if text == NO_ATTRIBUTE:
        return ()
    names = tuple(name.strip() for name in text.split(","))
    if len(set(names)) != len(names) or len(names) > MOST_ATTRIBUTES or not all(map(_ATTRIBUTE.fullmatch, names)):
        raise UserError(
            f"verification.by = {text[:200]!r}: give 1 to {MOST_ATTRIBUTES} attributes, each once, of letters, digits"
            ' and _, such as "Male,Young"; or "none".'
        )
    return names


def group_names(attributes: Sequence[str]) -> tuple[str, ...]:
    """The two groups of each attribute: who has it, and who has not."""
    return tuple(group for name in attributes for group in (name, f"not {name}"))
