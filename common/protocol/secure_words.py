"""What secure aggregation's small messages say, as texts that stand in a task and in its answer.

    keys      KeysAsked      {"advert": text}
    shares    SharesAsked    {peer: text}
    train     WorkAsked      (the masked words, an array)
    evaluate  WorkAsked      (likewise)
    unmask    UnmaskAsked    {"self": {site: text}, "mask": {site: text}}

Bytes are base64.  Both sides read what the other one wrote, and believe neither its form nor its size.
"""

import base64
import binascii
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from common.errors import SecureSumRefused
from common.names import CLIENT_NAME
from common.secagg.keys import FEWEST_MEMBERS, MOST_MEMBERS

KEYS, SHARES, UNMASK = "keys", "shares", "unmask"
SMALL: Final = (KEYS, SHARES, UNMASK)  # kinds of tasks without a model
LONGEST_TEXT: Final = 4096  # of one advert or share; the longest is 400
LARGEST_COUNT: Final = 2**53


@dataclass(frozen=True, kw_only=True)
class KeysAsked:
    """Begin an attempt."""

    attempt: int  # of the run's; each has a larger one than all before it
    members: tuple[str, ...]  # who is asked, in order of names


@dataclass(frozen=True, kw_only=True)
class SharesAsked:
    """Share out the secrets among these."""

    attempt: int
    adverts: Mapping[str, str]  # of all whose keys came


@dataclass(frozen=True, kw_only=True)
class WorkAsked:
    """Train, or score, and mask what comes of it."""

    attempt: int
    members: tuple[str, ...]  # over whom the sum is, in order of names
    shares: Mapping[str, str]  # of each other one of them, sealed for this site
    most_examples: int  # training pictures that a site counts for at most; the largest that one does
    most_pictures: int  # pictures whose scores it counts for at most; 0: all


@dataclass(frozen=True, kw_only=True)
class UnmaskAsked:
    """Show what opens the sum."""

    attempt: int
    survivors: tuple[str, ...]  # whose words arrived, in order of names


Asked = KeysAsked | SharesAsked | WorkAsked | UnmaskAsked
T = TypeVar("T", KeysAsked, SharesAsked, WorkAsked, UnmaskAsked)


def threshold_of(fraction: float, num_members: int) -> int:
    """How many of so many must stay: `secagg.threshold` of them, rounded up, and FEWEST_MEMBERS at least."""
    return max(FEWEST_MEMBERS, math.ceil(fraction * num_members))


def digest_of_work(work: WorkAsked, *, words: Mapping[str, str], model_sha256: str) -> bytes:
    """SHA-256 of all that a site's words follow from; sites that were asked different things share no mask.

    words: of the task, what is the same for all: its kind, settings, splits and manifest.  model_sha256: of the model
    as it was received, in hexadecimal.
    """
    asked = [sorted(words.items()), work.most_examples, work.most_pictures, model_sha256]
    return hashlib.sha256(json.dumps(asked).encode()).digest()


def in_text(data: bytes) -> str:
    """Bytes as base64."""
    return base64.b64encode(data).decode()


def of_text(text: str) -> bytes:
    """The inverse.  Raises SecureSumRefused."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise SecureSumRefused("an advert or a share is not base64.") from None


def write(value: Asked | Mapping[str, Any]) -> str:
    """A message or an answer as JSON."""
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    return json.dumps(plain, sort_keys=True)


def read(kind: type[T], text: str) -> T:
    """The inverse of `write` of a message.  Raises SecureSumRefused for what is none."""
    values = _object(text)
    hints = {one.name: one for one in dataclasses.fields(kind)}
    if values.keys() != hints.keys():
        raise _malformed(f"it has {', '.join(sorted(values)) or 'nothing'}")
    read_as: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("members", "survivors"):
            read_as[name] = tuple(_names(value))
        elif name in ("adverts", "shares"):
            read_as[name] = texts_by_name(value)
        elif type(value) is int and 0 <= value < LARGEST_COUNT:
            read_as[name] = value
        else:
            raise _malformed(f"{name} is no number of ours")
    return kind(**read_as)


def read_answer(text: str) -> dict[str, Any]:
    """The inverse of `write` of an answer.  Raises SecureSumRefused."""
    return _object(text)


def texts_by_name(value: object) -> dict[str, str]:
    """A text for each of some sites.  Raises SecureSumRefused."""
    if not isinstance(value, dict):
        raise _malformed("texts by names are missing")
    _names(list(value))
    if not all(isinstance(text, str) and len(text) <= LONGEST_TEXT for text in value.values()):
        raise _malformed("a text is none, or too long")
    return value


def _names(value: object) -> list[str]:
    if not isinstance(value, list) or len(value) > MOST_MEMBERS:
        raise _malformed("a list of names is none, or too long")
    for name in value:
        if not (isinstance(name, str) and CLIENT_NAME.fullmatch(name)):
            raise _malformed(f"{name!r} is no site's name")
    return value


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError, TypeError):
        raise _malformed("it is no JSON") from None
    if not isinstance(value, dict):
        raise _malformed("it is no object")
    return value


def _malformed(why: str) -> SecureSumRefused:
    return SecureSumRefused(f"a message of secure aggregation is malformed: {why}; use equal versions of FaceFed.")
