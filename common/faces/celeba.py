"""The official CelebA layout: identity and partition files, landmarks, pictures in img_align_celeba/.

The text files may lie in the folder itself, in celeba/ (as torchvision puts them), or in Anno/ and Eval/ (as the
authors' drive has them); line ends may be CRLF.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.faces.index import (
    FaceIndex,
    Table,
    align_rows,
    build_index,
    check_paths,
    malformed,
    parse_numbers,
    read_lines,
    read_pairs,
)

IDENTITY = "identity_CelebA.txt"
PARTITION = "list_eval_partition.txt"
LANDMARKS = "list_landmarks_align_celeba.txt"
_LANDMARK_LINE = Table(columns=10, separator=None, wanted="a file name and ten pixel coordinates")
_PICTURES = ("img_align_celeba", "Img/img_align_celeba", "img_align_celeba/img_align_celeba")

# list_bbox_celeba.txt holds boxes of the pictures in the wild, before the authors turned, scaled and cut them to
# 178 x 218, so it says nothing about the aligned pictures and is not read. These all show the face in one place, and
# the crop of 128 x 128 px around (89, 121) is the one in use for them (Karras et al., arXiv:1710.10196, dataset tool).
ALIGNED_FACE_BOX_PX = (25.0, 57.0, 128.0, 128.0)


def read_celeba(dataset: str, root: Path) -> FaceIndex:
    """The index of an official CelebA folder, by its identity and partition files; no picture is looked at.

    Raises DataError for a missing file, a malformed line, or a path that leaves the folder.
    """
    base = next((folder for folder in (root, root / "celeba") if _find(folder, IDENTITY)), root)
    identity_file = _require(base, IDENTITY)
    names, people_of = read_pairs(identity_file, "a file name and a person's number")
    check_paths(identity_file, names)
    for line, value in enumerate(people_of, start=1):
        if not (value.isascii() and value.isdigit()):
            raise malformed(identity_file, line, f"{names[line - 1]} {value}", "a file name and a person's number")
    pictures = _picture_folder(base, names[0]) if names else ""
    prefix = pictures if base == root else f"celeba/{pictures}"
    return build_index(
        dataset,
        root,
        [f"{prefix}/{name}" for name in names],
        people_of,
        official_split=_partition(_require(base, PARTITION), names),
        landmarks=_landmarks(_find(base, LANDMARKS), names),
        boxes=np.tile(np.array(ALIGNED_FACE_BOX_PX, dtype=np.float32), (len(names), 1)),
    )


def _find(base: Path, name: str) -> Path | None:
    return next((file for sub in ("", "Anno", "Eval") if (file := base / sub / name).is_file()), None)


def _require(base: Path, name: str) -> Path:
    file = _find(base, name)
    if file is None:
        raise DataError(
            f"{base / name}: no such file; the official CelebA layout needs {IDENTITY}, {PARTITION} and "
            "img_align_celeba/ in one folder (or in Anno/, Eval/ and Img/)."
        )
    return file


def _picture_folder(base: Path, first: str) -> str:
    """Where the pictures lie: the first known place that holds the first picture, else the official one."""
    return next((place for place in _PICTURES if (base / place / first).is_file()), _PICTURES[0])


def _partition(file: Path, names: list[str]) -> NDArray[np.int8]:
    wanted = "a file name and 0 (train), 1 (validation) or 2 (test)"
    listed, values = read_pairs(file, wanted)
    codes = {"0": 0.0, "1": 1.0, "2": 2.0}
    for line, value in enumerate(values, start=1):
        if value not in codes:
            raise malformed(file, line, f"{listed[line - 1]} {value}", wanted)
    found = align_rows(names, listed, np.array([codes[value] for value in values], dtype=np.float32))
    return np.where(np.isnan(found), -1, found).astype(np.int8)


def _landmarks(file: Path | None, names: list[str]) -> NDArray[np.float32] | None:
    """[N, 5, 2] from the landmark file: a count, a heading, then a line a picture; None where there is no file."""
    if file is None:
        return None
    lines = read_lines(file)[2:]
    split = [line.split(None, 1) for line in lines]
    for number, row in enumerate(split, start=3):
        if len(row) != 2:
            raise malformed(file, number, lines[number - 3], _LANDMARK_LINE.wanted)
    values = parse_numbers(file, [row[1] for row in split], _LANDMARK_LINE, 3)
    return align_rows(names, [row[0] for row in split], values.reshape(-1, 5, 2))
