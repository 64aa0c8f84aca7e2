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
from common.secagg.keys import MOST_MEMBERS

KEYS, SHARES, UNMASK = "keys", "shares", "unmask"
SMALL: Final = (KEYS, SHARES, UNMASK)  # kinds of tasks without a model
LONGEST_TEXT: Final = 4096  # of one advert or share; the longest is 400
LARGEST_COUNT: Final = 2**53
MOST_SHIFTS: Final = 2**24  # of a change of eight billion elements


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
    sensitivity: float = 0.0  # of noise that is shared out: how far one person at any site moves the sum; 0: none is
    noises: int = 0  # how many sites' noises are the planned one
    shifts: str = ""  # of the change's blocks, a digit each, where it goes in lanes of 16 bits (`secure_vector.Layout`)


@dataclass(frozen=True, kw_only=True)
class UnmaskAsked:
    """Show what opens the sum."""

    attempt: int
    survivors: tuple[str, ...]  # whose words arrived, in order of names


Asked = KeysAsked | SharesAsked | WorkAsked | UnmaskAsked
T = TypeVar("T", KeysAsked, SharesAsked, WorkAsked, UnmaskAsked)


def share_of(num_examples: int, work: WorkAsked) -> float:
    """A site's weight in the sum, in (0, 1].  num_examples: its pictures to train on, 1 or more.

    Raises SecureSumRefused for a limit of no picture, by which nobody can be weighted.
    """
    if work.most_examples < 1:
        raise SecureSumRefused("a site is to count for no picture at most; use equal versions of FaceFed.")
    return min(1.0, num_examples / work.most_examples)


def digest_of_work(work: WorkAsked, *, words: Mapping[str, str], model_sha256: str) -> bytes:
    """SHA-256 of all that a site's words follow from; sites that were asked different things share no mask.

    words: of the task, what is the same for all: its kind, settings, splits and manifest.  model_sha256: of the model
    as it was received, in hexadecimal.
    """
    limits = [work.most_examples, work.most_pictures, work.sensitivity, work.noises]
    asked = [sorted(words.items()), *limits, work.shifts, model_sha256]
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
        elif name == "shifts":
            read_as[name] = _digits(value)
        else:
            read_as[name] = _number(name, value)
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


def _number(name: str, value: object) -> float:
    """A number of 0 or more: whole, but for one.  Raises SecureSumRefused."""
    if name == "sensitivity":
        if type(value) is float and 0.0 <= value < math.inf:
            return value
    elif type(value) is int and 0 <= value < LARGEST_COUNT:
        return value
    raise _malformed(f"{name} is no number of ours")


def _digits(value: object) -> str:
    if not (isinstance(value, str) and value.isascii() and len(value) <= MOST_SHIFTS):
        raise _malformed("its steps are no text of ours, or too long")
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
