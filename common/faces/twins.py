"""The layout of ND-TWINS-2009-2010: a folder for each person, and JSON lists of pictures and of pairs of twins.

    <id>/<id>d13.jpg                 the pictures
    train_dataset_infor.json         {"<id>": ["<id>/<id>d13.jpg", ...], ...}, and test_dataset_infor.json
    train_twin_pairs.json            [["<id>", "<id>"], ...], and test_twin_pairs.json

Public work writes the lists with the prefixes of its own machines, so of each path only the last two parts count.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError
from common.faces.index import OFFICIAL_TEST, OFFICIAL_TRAIN, FaceIndex, build_index
from common.system.files import read_text

PICTURES_FILE, PAIRS_FILE = "{part}_dataset_infor.json", "{part}_twin_pairs.json"
PARTS = {"train": OFFICIAL_TRAIN, "test": OFFICIAL_TEST}
_WANTED_PICTURES = 'one object of the form {"90004": ["90004/90004d13.jpg", ...], ...}'
_WANTED_PAIRS = 'one list of the form [["90004", "90005"], ...]'


def read_twins(dataset: str, root: Path) -> FaceIndex:
    """The index of a folder in this layout, with its families; the official split is that of the files.

    A folder without both test files is taken as training people only. People in no pair are families of their own;
    chains of pairs (triplets) are one family.
    Raises DataError with one line: a missing file, JSON that is malformed or of another form, a person in
    both files, without pictures, or with a picture in another person's folder, a pair that names an unknown person or
    one person twice, a family whose members stand in different files.
    """
    parts = [part for part in PARTS if part == "train" or _has_part(root, part)]
    part_of: dict[str, str] = {}
    paths: list[str] = []
    people_of: list[str] = []
    split: list[int] = []
    for part in parts:
        for person, pictures in _read_pictures(root / PICTURES_FILE.format(part=part)).items():
            if person in part_of:
                raise DataError(
                    f"{root / PICTURES_FILE.format(part=part)}: person {person!r} stands in "
                    f"{PICTURES_FILE.format(part=part_of[person])} too; leave each person in one of the two files."
                )
            part_of[person] = part
            paths += pictures
            people_of += [person] * len(pictures)
            split += [PARTS[part]] * len(pictures)
    for path, person in zip(paths, people_of, strict=True):
        owner = path.split("/", 1)[0]
        if owner != person and owner in part_of:
            raise DataError(
                f"{root}: picture {path!r} is listed for person {person!r} but lies in the folder of person {owner!r}; "
                "correct the list, for one of the two is wrong."
            )
    siblings = [pair for part in parts for pair in _read_pairs(root / PAIRS_FILE.format(part=part), part_of)]
    return build_index(
        dataset, root, paths, people_of, official_split=np.array(split, dtype=np.int8), siblings=siblings
    )


def _has_part(root: Path, part: str) -> bool:
    return any((root / file.format(part=part)).exists() for file in (PICTURES_FILE, PAIRS_FILE))


def _read_pictures(file: Path) -> dict[str, list[str]]:
    """Person -> pictures as folder/file, relative to the root."""
    content = _read_json(file, _WANTED_PICTURES)
    if not isinstance(content, dict) or not content:
        raise DataError(f"{file}: holds {_shown(content)}, not {_WANTED_PICTURES}.")
    return {person: _pictures_of(file, person, listed) for person, listed in content.items()}


def _pictures_of(file: Path, person: str, listed: object) -> list[str]:
    if not isinstance(listed, list) or not all(isinstance(path, str) for path in listed):
        raise DataError(f"{file}: person {person!r} has {_shown(listed)}, not a list of paths of pictures.")
    if not listed:
        raise DataError(f"{file}: person {person!r} is without pictures; list some, or leave the person out.")
    return [_last_two(file, person, path) for path in listed]


def _last_two(file: Path, person: str, path: str) -> str:
    """The folder and the file of a path that may have any prefix, of either kind of machine."""
    parts = path.replace("\\", "/").split("/")[-2:]
    if len(parts) < 2 or any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise DataError(
            f"{file}: picture {_shown(path)} of person {person!r} is no path of a picture in a person's folder; write "
            f"{person}/{person}d1.jpg, with or without folders before it."
        )
    return "/".join(parts)


def _read_pairs(file: Path, part_of: dict[str, str]) -> list[tuple[str, str]]:
    """The pairs of siblings of one file.  part_of: person -> the part that lists them."""
    content = _read_json(file, _WANTED_PAIRS)
    if not isinstance(content, list):
        raise DataError(f"{file}: holds {_shown(content)}, not {_WANTED_PAIRS}.")
    return [_checked_pair(file, number, pair, part_of) for number, pair in enumerate(content, start=1)]


def _checked_pair(file: Path, number: int, pair: object, part_of: dict[str, str]) -> tuple[str, str]:
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(one, str | int) for one in pair):
        raise DataError(
            f"{file}, pair {number}: {_shown(pair)} is malformed; expected two people, as in {_WANTED_PAIRS}."
        )
    first, second = str(pair[0]), str(pair[1])
    for person in (first, second):
        if person not in part_of:
            raise DataError(
                f"{file}, pair {number}: person {person!r} is unknown; list the person's pictures in a "
                f"{PICTURES_FILE.format(part='{train,test}')}, or remove the pair."
            )
    if first == second:
        raise DataError(f"{file}, pair {number}: pairs person {first!r} with itself; name two people.")
    if part_of[first] != part_of[second]:
        raise DataError(
            f"{file}, pair {number}: the family of {first!r} and {second!r} is split over {part_of[first]} and "
            f"{part_of[second]}, so scores would be of faces trained on; list both in one "
            f"{PICTURES_FILE.format(part='{train,test}')}."
        )
    return first, second


def _read_json(file: Path, wanted: str) -> Any:  # noqa: ANN401 - whatever the file holds
    try:
        return json.loads(read_text(file), object_pairs_hook=_each_once)
    except FileNotFoundError:
        raise DataError(f"{file}: no such file; the twins' layout needs it, {wanted}.") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}.") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}: not valid JSON ({error.msg}); expected {wanted}.") from None
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8
        raise DataError(f"{file}: not valid JSON ({error}); expected {wanted}.") from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON keeps the last of two equal names silently; here the first one's pictures would be lost."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} stands twice in one object")
    return content


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
