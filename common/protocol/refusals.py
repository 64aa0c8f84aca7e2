"""The words of a site that does not do what its own policy does not allow: fixed, with a setting's name and no data.

Both sides know them: a refusal is an answer, which the server counts as such and not as a failure.
"""

import re
from typing import Final

OF_PRIVACY: Final = "privacy.epsilon"  # what a site names that has spent its people's privacy
_WORDS: Final = "this site's policy does not allow it"
_LINE: Final = re.compile(r"this site's policy does not allow it: ([a-z0-9_.]{1,60}) \(([a-z0-9_]{1,60})\)\.")


def refusal_line(setting: str, limit: str) -> str:
    """The one sentence.  setting: what was asked for.  limit: which line of the site's policy stands against it."""
    return f"{_WORDS}: {setting} ({limit})."


def refused_setting(reason: str) -> str | None:
    """The name of the setting that a client's policy refused, or None for any other reason of a client."""
    found = _LINE.search(reason)
    return found.group(1) if found else None


def is_spent(reason: str) -> bool:
    """Whether a client answers no more, for it has spent its people's privacy: to ask again is of no use."""
    return refused_setting(reason) == OF_PRIVACY
