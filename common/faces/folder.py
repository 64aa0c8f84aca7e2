"""A data set of one's own: one folder a person, pictures inside; no landmarks, no boxes, no official split."""

import os
from collections.abc import Iterator
from pathlib import Path

from common.errors import DataError
from common.faces.index import FaceIndex, build_index
from common.faces.metadata import require_folder

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")  # in any case


def read_folder(root: Path) -> FaceIndex:
    """The index of a folder with one folder a person.  Raises DataError where it is missing or without pictures."""
    require_folder(root, "give the folder that holds one folder a person")
    found = list(walk_people(root))
    if not found:
        raise DataError(
            f"{root}: no pictures found; the layout is one folder a person with {', '.join(SUFFIXES)} inside each."
        )
    people_of = [person for person, _ in found]
    return build_index(
        "folder",
        root,
        [f"{person}/{name}" for person, name in found],
        people_of,
        names=dict(zip(people_of, people_of, strict=True)),
    )


def walk_people(root: Path) -> Iterator[tuple[str, str]]:
    """(person, file name) of each picture one level below root; hidden folders and files are passed over."""
    with os.scandir(root) as people:
        folders = sorted(entry.name for entry in people if entry.is_dir() and not entry.name.startswith("."))
    for person in folders:
        with os.scandir(root / person) as pictures:
            names = [entry.name for entry in pictures if entry.name.lower().endswith(SUFFIXES)]
        yield from ((person, name) for name in sorted(names) if not name.startswith("."))
