"""VGGFace2: train/ and test/ with one folder a person, lists, names, loose boxes and landmarks; and its copies.

Copies have the folders in data/, a val/ beside or instead of test/, people without train/ around them, lists with a
label in each line or with the part in front, one file of landmarks for all, pictures of another size, or no lists.
"""

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.errors import DataError
from common.faces.account import PARTS as PART_NAMES
from common.faces.account import Listing, walk
from common.faces.index import (
    OFFICIAL_TEST,
    OFFICIAL_TRAIN,
    OFFICIAL_VALIDATION,
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

PARTS = {"train": OFFICIAL_TRAIN, "val": OFFICIAL_VALIDATION, "test": OFFICIAL_TEST}
META = "identity_meta.csv"
_LANDMARK_LINE = Table(
    columns=10, separator=",", wanted='"n000001/0001_01" and ten pixel coordinates, separated by commas'
)
_BOX_LINE = Table(columns=4, separator=",", wanted='"n000001/0001_01" and x, y, width, height in pixels')
_PERSON = re.compile(r"n\d{6}")
_SAMPLED = 16  # pictures whose size is compared with their landmarks


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where a copy has its parts.  base: the folder of lists.  folders: part -> folder of people, both below root."""

    base: str
    folders: Mapping[str, str]


def read_vggface2(dataset: str, root: Path) -> FaceIndex:
    """The index of a VGGFace2 folder, from train_list.txt and test_list.txt, or by walking without them.

    A folder without test/ is taken as training people only. A part whose people are those of train/ is a part of their
    pictures, and splits of pictures are by hash here. Raises DataError where there are no people, for a malformed line,
    or a path that leaves the folder.
    """
    listing = walk(root)
    layout = _layout(listing)
    paths: list[str] = []
    people: list[str] = []
    parts: list[str] = []
    for part, folder in layout.folders.items():
        inside = _pictures(listing, layout.base, part, folder)
        before = f"{folder}/" if folder else ""
        paths += [before + path for path in inside]
        people += [path.split("/", 1)[0] for path in inside]
        parts += [part] * len(inside)
    keys = [
        f"{person}/{path.rpartition('/')[2].rpartition('.')[0]}" for person, path in zip(people, paths, strict=True)
    ]
    notes = _layout_notes(layout)
    split = np.array([PARTS[part] for part in parts], dtype=np.int8)
    for part in ("val", "test"):
        of_part = {person for person, own in zip(people, parts, strict=True) if own == part}
        if of_part and of_part <= {person for person, own in zip(people, parts, strict=True) if own == "train"}:
            split[np.array(parts) == part] = OFFICIAL_TRAIN
            notes.append(f"{layout.folders[part]}/ holds more pictures of the people of train/: taken as theirs")
    points = _table(listing, layout.base, "landmark", keys, parts, _LANDMARK_LINE)
    boxes = _table(listing, layout.base, "bb", keys, parts, _BOX_LINE)
    side = _side_of_copies(root, paths, points if points is not None else boxes)
    if side:
        points = boxes = None
        notes.append(f"copies of {side} x {side} px, which the lists of landmarks and boxes are not of: not used")
    meta = root / layout.base / META
    return build_index(
        dataset,
        root,
        paths,
        people,
        official_split=split,
        landmarks=None if points is None else points.reshape(-1, 5, 2),
        boxes=boxes,
        names=read_names(meta) if meta.is_file() else None,
        listing=listing,
        notes=notes,
    )


def _layout(listing: Listing) -> _Layout:
    """The parts of a copy: train/, val/ and test/ in root or one folder, or the people in root.  Raises DataError."""
    holders = [folder for folder in (*listing.names, *listing.closed) if folder.rpartition("/")[2] == "train"]
    holders.sort(key=lambda folder: (folder.count("/"), folder))
    if holders:
        base = holders[0].rpartition("/")[0]
        before = f"{base}/" if base else ""
        parts = {"train": f"{before}train"}
        for folder in sorted(listing.names):
            above, _, name = folder.rpartition("/")
            if above == base and name != "train" and PART_NAMES.get(name, "train") != "train":
                parts.setdefault(PART_NAMES[name], folder)
        for part in ("test",):
            if part not in parts and _list_of(listing, base, part):
                parts[part] = before + part
        return _Layout(base=base, folders={part: parts[part] for part in PARTS if part in parts})
    alone = {folder.rpartition("/")[0] for folder in listing.pictures if _PERSON.fullmatch(folder.rpartition("/")[2])}
    if len(alone) == 1:
        [folder] = alone
        part = PART_NAMES.get(folder.rpartition("/")[2], "train")
        return _Layout(base=folder if part == "train" else folder.rpartition("/")[0], folders={"train": folder})
    tops = listing.children("")
    lies = ", ".join(f"{top}/" for top in tops[:6]) + (f" and {len(tops) - 6:,} more" if len(tops) > 6 else "")
    raise DataError(
        f"{listing.root / 'train'}: no such folder; the official VGGFace2 layout needs train/ (and test/) with one "
        f"folder a person. There: {lies or 'no folders of pictures'}. A folder with one folder a person is read with "
        "--client NAME:folder."
    )


def _layout_notes(layout: _Layout) -> list[str]:
    folders = layout.folders
    if folders["train"].rpartition("/")[2] != "train":
        return [f"no train/ here: the people in {folders['train'] or 'the folder itself'} are taken as training people"]
    notes = [f"taken from {layout.base}/"] if layout.base else []
    return [*notes, f"{folders['val']}/ taken as people of validation"] if "val" in folders else notes


def _side_of_copies(root: Path, paths: list[str], points: NDArray[np.float32] | None) -> int:
    """The side in px of pictures that are all of one square size and smaller than their landmarks or boxes say; else 0.

    points: [N, 10] or [N, 4].  Only a few pictures, spread over the data set, are opened.
    """
    if points is None or not paths:
        return 0
    sides: set[tuple[int, int]] = set()
    outside = False
    for row in np.unique(np.linspace(0, len(paths) - 1, _SAMPLED).astype(np.int64)).tolist():
        try:
            with Image.open(root / paths[row]) as picture:
                sides.add(picture.size)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
        reach = points[row].copy()
        if len(reach) == _BOX_LINE.columns:
            reach = reach[:2] + reach[2:] / 2
        outside |= bool(np.nanmax(reach, initial=0.0) > max(*sides.copy().pop(), 1))
        if len(sides) > 1:
            return 0
    width, height = next(iter(sides), (0, 1))
    return width if outside and width == height else 0


def read_names(file: Path) -> dict[str, str]:
    """Identifier -> name from identity_meta.csv, as the authors quote it or as a spreadsheet re-quoted it.

    The authors write `n000001, "14th_Dalai_Lama", 424, 0, m`; saved by a spreadsheet, the blank and the quotes became
    part of a quoted field, and where the count was lost the later fields slid. Only the first two fields are read.
    """
    names: dict[str, str] = {}
    lines = read_lines(file)
    for number, row in enumerate(_rows(file, lines), start=1):
        if number == 1 and row[:1] == ["Class_ID"]:
            continue
        if len(row) < 2 or not row[0].strip():
            raise malformed(file, number, lines[number - 1], 'n000001, "Name", count, flag, gender')
        names[row[0].strip()] = row[1].strip(' "')
    return names


def _rows(file: Path, lines: list[str]) -> Iterator[list[str]]:
    try:
        yield from csv.reader(lines, skipinitialspace=True)
    except csv.Error as error:  # a field of more than 128 KiB, as a quote that is never closed makes
        raise DataError(f"{file}: is malformed ({error}); fetch the official file again.") from None


def _list_of(listing: Listing, base: str, part: str) -> Path | None:
    """The list of a part's pictures, with the lists' folder, or None."""
    file = listing.root / base / f"{part}_list.txt"
    return file if file.is_file() else None


def _pictures(listing: Listing, base: str, part: str, folder: str) -> list[str]:
    """Paths `person/picture` below a part's folder, by its list or by walking."""
    file = _list_of(listing, base, part)
    if file is None:
        start = len(folder) + 1 if folder else 0
        inside = (found for found in listing.below(folder) if found != folder)
        people = ((found[start:], listing.pictures[found]) for found in inside)
        anyone = folder.rpartition("/")[2] in PART_NAMES
        return [f"{one}/{name}" for one, names in people if anyone or _PERSON.match(one) for name in names]
    paths = [_listed(line, part) for line in read_lines(file)]
    for number, path in enumerate(paths, start=1):
        if path.count("/") != 1:
            raise malformed(file, number, path, "person/picture.jpg")
    check_paths(file, paths)
    if paths and folder not in listing.names:
        raise DataError(
            f"{listing.root / folder}: no such folder; {file.name} names pictures in it, and the official VGGFace2 "
            "layout needs it."
        )
    return resolved(listing, folder, paths)


def _listed(line: str, part: str) -> str:
    """The path in a line of a list, without the label behind it and the part before it, where a copy has them."""
    path, _, label = line.strip().rpartition(" ")
    path = path.strip() if path and label.isdigit() else line.strip()
    return path.removeprefix("./").removeprefix(f"{part}/")


def _table(
    listing: Listing, base: str, kind: str, keys: list[str], parts: list[str], table: Table
) -> NDArray[np.float32] | None:
    """[N, columns] numbers of the files loose_KIND*.csv, in the order of keys `person/stem`; NaN where there is no row.

    parts: [N] the part of each key.  None where there is no file, or a part has no row at all in any.
    """
    places = [f"{base}/bb_landmark".lstrip("/"), base]
    files = [
        listing.root / place / name
        for place in places
        for name in sorted(listing.names.get(place, ()))
        if name.startswith(f"loose_{kind}") and name.endswith(".csv")
    ]
    names: list[str] = []
    blocks = [np.zeros((0, table.columns), dtype=np.float32)]
    for file in files:
        more, numbers = _read_table(file, table)
        names += more
        blocks.append(numbers)
    if not files:
        return None
    found = align_rows(keys, names, np.concatenate(blocks))
    known: NDArray[np.bool_] = ~np.isnan(found[:, 0])
    lacking = [part for part in set(parts) if not known[np.array(parts) == part].any()]
    return None if lacking else found


def _read_table(file: Path, table: Table) -> tuple[list[str], NDArray[np.float32]]:
    """The names [M] and numbers [M, columns] of one file of bb_landmark/, with or without its heading."""
    lines = read_lines(file)
    skipped = 0 if lines and _is_row(lines[0], table) else 1
    names, rests = [], []
    for number, line in enumerate(lines[skipped:], start=skipped + 1):
        name, comma, rest = line.partition(",")
        if not comma:
            raise malformed(file, number, line, table.wanted)
        names.append(name.strip(' "'))
        rests.append(rest)
    return names, parse_numbers(file, rests, table, skipped + 1)


def _is_row(line: str, table: Table) -> bool:
    """Whether a first line is no heading: a path and numbers."""
    name, *numbers = line.split(",")
    return "/" in name and len(numbers) == table.columns
