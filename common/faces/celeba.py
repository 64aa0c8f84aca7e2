"""CelebA: identity and partition lists, landmarks, pictures in img_align_celeba/, as it is handed out.

The lists may lie in the folder itself, in celeba/ (as torchvision puts them), in Anno/ and Eval/ (as the authors' drive
has them) or one folder deeper; as text or, in Kaggle's copy, as comma-separated values.  Pictures may be the authors'
JPEG or PNG files, in a folder in a folder of the same name.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError, unknown_name
from common.faces.account import ARCHIVES, Listing, ending_of, walk
from common.faces.index import (
    FaceIndex,
    Table,
    align_rows,
    build_index,
    check_paths,
    malformed,
    parse_numbers,
    read_lines,
    resolved,
)

IDENTITY = "identity_CelebA.txt"
PARTITION = "list_eval_partition.txt"
LANDMARKS = "list_landmarks_align_celeba.txt"
ATTRIBUTES = "list_attr_celeba.txt"
_LANDMARK_LINE = Table(columns=10, separator=None, wanted="a file name and ten pixel coordinates")
_PICTURES = ("img_align_celeba", "Img/img_align_celeba", "img_align_celeba/img_align_celeba", "img_align_celeba_png")
_HEADINGS = 2  # the authors' landmark list has a count and the columns' names; copies have one of them, or none

# list_bbox_celeba.txt holds boxes of the pictures in the wild, before the authors turned, scaled and cut them to
# 178 x 218, so it says nothing about the aligned pictures and is not read. These all show the face in one place, and
# the crop of 128 x 128 px around (89, 121) is the one in use for them (Karras et al., arXiv:1710.10196, dataset tool).
ALIGNED_FACE_BOX_PX = (25.0, 57.0, 128.0, 128.0)


def read_celeba(dataset: str, root: Path) -> FaceIndex:
    """The index of a CelebA folder, by its identity and partition lists; no picture is opened.

    Raises DataError for a missing list, a malformed line, a path that leaves the folder, or pictures still packed.
    """
    listing = walk(root)
    base = _base(listing)
    identity_file = _require(listing, base, IDENTITY)
    wanted = "a file name and a person's number"
    rows = _pairs(identity_file, wanted)
    names, people_of = [row[1] for row in rows], [row[2] for row in rows]
    check_paths(identity_file, names, rows[0][0] if rows else 1)
    for line, name, value in rows:
        if not (value.isascii() and value.isdigit()):
            raise malformed(identity_file, line, f"{name} {value}", wanted)
    partition = _partition(_require(listing, base, PARTITION), names)
    landmarks = _landmarks(_find(listing, base, LANDMARKS), names)
    place = _picture_folder(listing, base, names)
    found = [f"{sub}/{name}" if sub else name for sub, inside in resolved(listing, place, names) for name in inside]
    copies = [folder for folder in listing.pictures if folder != place and _of_celeba(folder)]
    notes = [] if place.rpartition("/")[2] == "img_align_celeba" else [f"the pictures are those of {place or '.'}/"]
    if any(one != other for one, other in zip(names, found, strict=True)):
        different = sum(one != other for one, other in zip(names, found, strict=True))
        notes.append(f"{different:,} pictures have another ending than their list says: taken as the same")
    return build_index(
        dataset,
        root,
        [f"{place}/{name}" if place else name for name in found],
        people_of,
        official_split=partition,
        landmarks=landmarks,
        boxes=np.tile(np.array(ALIGNED_FACE_BOX_PX, dtype=np.float32), (len(names), 1)),
        listing=listing,
        copies=copies,
        notes=notes,
    )


def _of_celeba(folder: str) -> bool:
    """Whether a folder holds the authors' pictures in another form: aligned to PNG, or in the wild."""
    return any(part.startswith(("img_align_celeba", "img_celeba")) for part in folder.split("/"))


def _forms(name: str) -> tuple[str, str]:
    return name, f"{name.rpartition('.')[0]}.csv"


def _base(listing: Listing) -> str:
    """The folder that the lists belong to: root, celeba/, or the first other one that has one of them."""
    for base in ("", "celeba"):
        if _find(listing, base, IDENTITY) is not None:
            return base
    known = {form for name in (IDENTITY, PARTITION) for form in _forms(name)}
    others = [folder for folder, inside in listing.names.items() if not known.isdisjoint(inside)]
    first = min(others, key=lambda folder: (folder.count("/"), folder), default="")
    above, _, last = first.rpartition("/")
    return above if last in ("Anno", "Eval") else first


def _find(listing: Listing, base: str, name: str) -> Path | None:
    """The list of this name, as text or comma-separated; a list that is a link to nowhere is none."""
    for sub in ("", "Anno", "Eval"):
        folder = "/".join(filter(None, (base, sub)))
        for form in _forms(name):
            if form in listing.names.get(folder, ()) and (listing.root / folder / form).is_file():
                return listing.root / folder / form
    return None


def _require(listing: Listing, base: str, name: str) -> Path:
    file = _find(listing, base, name)
    if file is None:
        lies = ", ".join(sorted(listing.names.get(base, ()))[:8] + [f"{one}/" for one in listing.children(base)][:4])
        missing = ""
        if name == IDENTITY and lies:
            missing = (
                " Copies such as Kaggle's come without it: it is in the authors' drive, folder Anno/, from "
                "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html."
            )
        raise DataError(
            f"{listing.root / base / name}: no such file; the official CelebA layout needs {IDENTITY}, {PARTITION} and "
            f"img_align_celeba/ in one folder (or in Anno/, Eval/ and Img/).{missing} There: {lies or 'nothing'}. A "
            "folder with one folder a person is read with --client NAME:folder."
        )
    return file


def _picture_folder(listing: Listing, base: str, names: list[str]) -> str:
    """The folder that holds most of the listed pictures, the known ones first; the official one where none does."""
    stems = {name.rpartition(".")[0] for name in names}
    known = ["/".join(filter(None, (base, place))) for place in _PICTURES]
    best, most = known[0], 0
    for folder in [*(place for place in known if place in listing.names), *listing.below("")]:
        inside = {name.rpartition(".")[0] for name in listing.names[folder]}
        number = len(inside & stems) if folder in known or most < len(stems) else 0
        if number > most:
            best, most = folder, number
    if not most and names:
        _require_unpacked(listing)
    return best


def _require_unpacked(listing: Listing) -> None:
    """Raise DataError when no picture is there but an archive of them is."""
    for folder, inside in sorted(listing.names.items()):
        packed = sorted(name for name in inside if ending_of(name) in ARCHIVES and "celeba" in name.lower())
        if packed:
            file = listing.root / folder / packed[0]
            raise DataError(
                f"{file}: is still packed, and img_align_celeba/ is not there; unpack it in {listing.root / folder}."
            )


def _rows(file: Path, columns: int, wanted: str) -> Iterator[tuple[int, list[str], str]]:
    """(line number, fields, line) of each line: separated by white space, in a .csv by commas."""
    for number, line in enumerate(read_lines(file), start=1):
        comma = file.suffix == ".csv"
        row = [field.strip(' "') for field in line.split(",")] if comma else line.split()
        if len(row) != columns:
            raise malformed(file, number, line, wanted)
        yield number, row, line


def _pairs(file: Path, wanted: str) -> list[tuple[int, str, str]]:
    """(line number, name, value) of each line; the heading of a .csv is passed over."""
    rows = [(number, row[0], row[1]) for number, row, _ in _rows(file, 2, wanted)]
    return rows[1:] if file.suffix == ".csv" and rows and not rows[0][2].isdigit() else rows


def _partition(file: Path, names: list[str]) -> NDArray[np.int8]:
    wanted = "a file name and 0 (train), 1 (validation) or 2 (test)"
    rows = _pairs(file, wanted)
    codes = {"0": 0.0, "1": 1.0, "2": 2.0}
    for line, name, value in rows:
        if value not in codes:
            raise malformed(file, line, f"{name} {value}", wanted)
    values = np.array([codes[value] for _, _, value in rows], dtype=np.float32)
    found = align_rows(names, [name for _, name, _ in rows], values)
    return np.where(np.isnan(found), -1, found).astype(np.int8)


def _landmarks(file: Path | None, names: list[str]) -> NDArray[np.float32] | None:
    """[N, 5, 2] from the landmark list: at most two lines of heading, then a line a picture; None without a file."""
    if file is None:
        return None
    lines = read_lines(file)
    if file.suffix == ".csv":
        lines = [line.replace(",", " ").replace('"', " ") for line in lines]
    skipped = 0
    while skipped < min(_HEADINGS, len(lines)) and not _is_points(lines[skipped]):
        skipped += 1
    lines = lines[skipped:]
    split = [line.split(None, 1) for line in lines]
    for number, row in enumerate(split, start=skipped + 1):
        if len(row) != 2:
            raise malformed(file, number, lines[number - skipped - 1], _LANDMARK_LINE.wanted)
    values = parse_numbers(file, [row[1] for row in split], _LANDMARK_LINE, skipped + 1)
    return align_rows(names, [row[0] for row in split], values.reshape(-1, 5, 2))


def _is_points(line: str) -> bool:
    row = line.split()
    return len(row) == 1 + _LANDMARK_LINE.columns and all(_is_number(field) for field in row[1:])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_attributes(root: Path, wanted: Sequence[str]) -> dict[str, dict[str, bool]]:
    """Attribute -> person -> whether most of that person's pictures have it; people with as many of both are left out.

    wanted: names of list_attr_celeba.txt's columns.  Raises DataError: no such list or column, a malformed line.
    """
    listing = walk(root)
    base = _base(listing)
    file = _find(listing, base, ATTRIBUTES)
    if file is None:
        raise DataError(f"{root}: no {ATTRIBUTES} there, so nothing is known of its people; add it, or leave --by out.")
    person_of = {
        name: person for _, name, person in _pairs(_require(listing, base, IDENTITY), "a file name and a number")
    }
    lines = [line.replace(",", " ").replace('"', " ").split() for line in read_lines(file)]
    heading = 1 if lines and len(lines[0]) == 1 else 0  # the authors' list begins with a count
    names = [name for name in lines[heading] if name != "image_id"] if len(lines) > heading else []
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise DataError(unknown_name("attribute", unknown[0], names))
    columns = {name: names.index(name) + 1 for name in wanted}
    votes: dict[str, Counter[str]] = {name: Counter() for name in wanted}
    for number, row in enumerate(lines[heading + 1 :], start=heading + 2):
        if len(row) != len(names) + 1:
            raise malformed(file, number, " ".join(row), f"a file name and {len(names)} numbers, 1 or -1")
        for name, column in columns.items():
            if row[0] in person_of:
                votes[name][person_of[row[0]]] += 1 if row[column] == "1" else -1
    return {name: {person: vote > 0 for person, vote in own.items() if vote} for name, own in votes.items()}
