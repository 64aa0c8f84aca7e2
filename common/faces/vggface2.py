"""The official VGGFace2 layout: train/ and test/ with one folder a person, lists, names, loose boxes and landmarks."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.faces.index import (
    OFFICIAL_TEST,
    OFFICIAL_TRAIN,
    FaceIndex,
    Table,
    align_rows,
    build_index,
    check_paths,
    malformed,
    parse_numbers,
    read_lines,
    require_folder,
    walk_people,
)

PARTS = {"train": OFFICIAL_TRAIN, "test": OFFICIAL_TEST}
META = "identity_meta.csv"
_LANDMARK_LINE = Table(
    columns=10, separator=",", wanted='"n000001/0001_01" and ten pixel coordinates, separated by commas'
)
_BOX_LINE = Table(columns=4, separator=",", wanted='"n000001/0001_01" and x, y, width, height in pixels')


def read_vggface2(dataset: str, root: Path) -> FaceIndex:
    """The index of an official VGGFace2 folder, from train_list.txt and test_list.txt, or by walking without them.

    A folder without test/ is taken as training people only. Raises DataError for a missing train/, a malformed line, or
    a path that leaves the folder.
    """
    require_folder(root / "train", "the official VGGFace2 layout needs train/ (and test/) with one folder a person")
    paths: list[str] = []
    split: list[int] = []
    landmarks: list[NDArray[np.float32] | None] = []
    boxes: list[NDArray[np.float32] | None] = []
    for part, code in PARTS.items():
        inside = _pictures(root, part)
        stems = [path.rsplit(".", 1)[0] for path in inside]
        paths += [f"{part}/{path}" for path in inside]
        split += [code] * len(inside)
        landmarks.append(_table(root / "bb_landmark" / f"loose_landmark_{part}.csv", stems, _LANDMARK_LINE))
        boxes.append(_table(root / "bb_landmark" / f"loose_bb_{part}.csv", stems, _BOX_LINE))
    points = _joined(landmarks)
    return build_index(
        dataset,
        root,
        paths,
        [path.split("/", 2)[1] for path in paths],
        official_split=np.array(split, dtype=np.int8),
        landmarks=None if points is None else points.reshape(-1, 5, 2),
        boxes=_joined(boxes),
        names=read_names(root / META) if (root / META).is_file() else None,
    )


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


def _pictures(root: Path, part: str) -> list[str]:
    """Paths `person/picture` below root/part, by its list or by walking."""
    file = root / f"{part}_list.txt"
    if not file.is_file():
        return [f"{person}/{name}" for person, name in walk_people(root / part)] if (root / part).is_dir() else []
    paths = [line.strip() for line in read_lines(file)]
    for number, path in enumerate(paths, start=1):
        if path.count("/") != 1:
            raise malformed(file, number, path, "person/picture.jpg")
    check_paths(file, paths)
    if paths:
        require_folder(root / part, f"{file.name} names pictures in it, and the official VGGFace2 layout needs it")
    return paths


def _table(file: Path, stems: list[str], table: Table) -> NDArray[np.float32] | None:
    """[N, columns] numbers of a bb_landmark file in the order of stems; None without the file or pictures."""
    if not file.is_file():
        return np.zeros((0, table.columns), dtype=np.float32) if not stems else None
    lines = read_lines(file)[1:]
    names, rests = [], []
    for number, line in enumerate(lines, start=2):
        name, comma, rest = line.partition(",")
        if not comma:
            raise malformed(file, number, line, table.wanted)
        names.append(name.strip(' "'))
        rests.append(rest)
    return align_rows(stems, names, parse_numbers(file, rests, table, 2))


def _joined(parts: Iterable[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
    """Both parts in one array; None when a part that has pictures lacks its file."""
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if len(present) == len(PARTS) else None
