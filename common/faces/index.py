"""FaceIndex: every picture that a data set's layout names, before anything is decoded; and what its readers share.

First what reads the text files of official layouts: whole files at a time, a fault reported with file and line number.
Last the layout of a data set of one's own: one folder a person, without landmarks, boxes or an official split.
What is on disk beside the pictures of an index is in its account (`account.py`).
"""

import dataclasses
import itertools
import pkgutil
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError, unknown_name
from common.faces.account import NOTHING, PARTS, Account, Listing, account_of, ending_of, is_picture, walk
from common.faces.datasets import DATASETS
from common.system.files import read_text

CHUNK_LINES = 100_000  # numbers are parsed so many lines at a time: memory stays bounded on VGGFace2's 3.1 M lines


@dataclass(frozen=True, kw_only=True)
class Table:
    """How the numbers of one file stand: how many in a line, what separates them, what a line should hold."""

    columns: int
    separator: str | None  # None: any white space
    wanted: str


def require_folder(folder: Path, what: str) -> None:
    """Raise DataError unless `folder` is a folder; `what` says what it is for."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; {what}.")


def malformed(file: Path, number: int, line: str, wanted: str) -> DataError:
    """The error for one bad line.  number: counted from 1."""
    shown = line if len(line) <= 80 else line[:77] + "..."
    return DataError(f"{file}, line {number}: {shown!r} is malformed; expected {wanted}.")


def read_lines(file: Path) -> list[str]:
    """All lines without their ends (LF or CRLF) and without trailing empty lines.  Raises DataError."""
    try:
        text = read_text(file)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text (byte {error.start}); fetch the official file again.") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}.") from None
    lines = text.split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def read_pairs(file: Path, wanted: str) -> tuple[list[str], list[str]]:
    """The two columns of a file whose lines are `name value`, split at white space.

    wanted: what a line should hold, for the message.  Raises DataError naming the first bad line.
    """
    lines = read_lines(file)
    rows = [line.split() for line in lines]
    for number, row in enumerate(rows, start=1):
        if len(row) != 2:
            raise malformed(file, number, lines[number - 1], wanted)
    return [row[0] for row in rows], [row[1] for row in rows]


def check_paths(file: Path, paths: Sequence[str], first_line: int = 1) -> None:
    """Raise DataError for a path that is absolute or leaves the folder; line numbers start at `first_line`."""
    for number, path in enumerate(paths, start=first_line):
        if (".." in path or "\\" in path or path[:1] == "/" or "\0" in path) and _leaves(path):
            raise DataError(f"{file}, line {number}: picture {path!r} leaves the data folder; paths must be relative.")


def _leaves(path: str) -> bool:
    return path.startswith("/") or "\\" in path or "\0" in path or ".." in path.split("/")


def parse_numbers(file: Path, rows: Sequence[str], table: Table, first_line: int) -> NDArray[np.float32]:
    """Numbers of many lines at once.  rows: [M] texts of `table.columns` numbers each.  Returns float32 [M, columns].

    first_line: the line number of rows[0].  Raises DataError naming the first line that holds anything else.
    """
    blocks = [np.zeros((0, table.columns), dtype=np.float32)]
    for start in range(0, len(rows), CHUNK_LINES):
        block = rows[start : start + CHUNK_LINES]
        numbers = _parse_block(block, table)
        if numbers is None:
            bad = next((i for i, row in enumerate(block) if _parse_block([row], table) is None), 0)
            raise malformed(file, first_line + start + bad, block[bad], table.wanted)
        blocks.append(numbers)
    return np.concatenate(blocks)


def _parse_block(block: Sequence[str], table: Table) -> NDArray[np.float32] | None:
    """The numbers, or None when any line is not exactly `table.columns` finite numbers."""
    if not all(row.strip() for row in block):  # loadtxt passes over empty lines
        return None
    try:
        numbers = np.loadtxt(block, dtype=np.float32, delimiter=table.separator, comments=None, ndmin=2)
    except ValueError:
        return None
    return numbers if numbers.shape == (len(block), table.columns) and np.isfinite(numbers).all() else None


def align_rows(wanted: Sequence[str], names: Sequence[str], values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of `values` [M, ...] (one for each of `names`) in the order of `wanted` [N]; NaN where there is none."""
    if len(wanted) == len(names) and all(a == b for a, b in zip(wanted, names, strict=True)):
        return values
    where = {name: i for i, name in enumerate(names)}
    rows = np.fromiter((where.get(name, -1) for name in wanted), dtype=np.int64, count=len(wanted))
    found = np.full((len(wanted), *values.shape[1:]), np.nan, dtype=np.float32)
    found[rows >= 0] = values[rows[rows >= 0]]
    return found


OFFICIAL_TRAIN, OFFICIAL_VALIDATION, OFFICIAL_TEST, OFFICIAL_NONE = 0, 1, 2, -1


@dataclass(frozen=True, kw_only=True)
class FaceIndex:
    """The pictures of one data set, sorted by path, so that the order of lines or folders on disk does not matter.

    root: the folder that paths are relative to.
    paths: [N] POSIX paths.
    person: [N] int64, index into people.
    people: sorted identifiers (CelebA's number, VGGFace2's n000001, the folder's name).
    official_split: [N] int8: 0 train, 1 validation, 2 test, -1 none.
    landmarks: [N, 5, 2] float32, px (x, y) from the centre of the top left pixel: left eye, right eye, nose, left mouth
        corner, right mouth corner, left and right as seen in the picture; a row of NaN is absent.  None: no such file.
    boxes: [N, 4] float32, px x, y, width, height of the face; a row of NaN is absent.  None: no such file.
    names: the people's real names where the data set has them, in the order of people; else None.
    family: [P] int64, for each person the number in people of the first person of their family (its own for one without
        siblings), so that people[family[p]] names the family of person p.  None: every person is their own family.
    account: what became of everything below root; `read_index` fills it in where the reader did not.
    """

    dataset: str
    root: Path
    paths: tuple[str, ...]
    person: NDArray[np.int64]
    people: tuple[str, ...]
    official_split: NDArray[np.int8]
    landmarks: NDArray[np.float32] | None
    boxes: NDArray[np.float32] | None
    names: tuple[str, ...] | None = None
    family: NDArray[np.int64] | None = None
    account: Account = NOTHING

    def __len__(self) -> int:
        """Number of pictures N."""
        return len(self.paths)


def build_index(
    dataset: str,
    root: Path,
    paths: list[str],
    people_of: list[str],
    *,
    official_split: NDArray[np.int8] | None = None,
    landmarks: NDArray[np.float32] | None = None,
    boxes: NDArray[np.float32] | None = None,
    names: dict[str, str] | None = None,
    siblings: Iterable[tuple[str, str]] | None = None,
    listing: Listing | None = None,
    copies: Iterable[str] = (),
    notes: Iterable[str] = (),
) -> FaceIndex:
    """A FaceIndex from parallel columns in any order: sorted by path, people numbered in sorted order.

    people_of: [N] identifier of each picture's person.  names: identifier -> real name.
    siblings: pairs of people of one family, each with pictures; None: the data set knows of no families.
    listing, copies, notes: for the account, from a reader that walked the folder itself; see `account_of`.
    Raises DataError for a picture named twice or a data set without pictures.
    """
    if not paths:
        raise DataError(f"{root}: no pictures found; give the folder that holds the {dataset} layout.")
    order = np.array(sorted(range(len(paths)), key=paths.__getitem__), dtype=np.int64)
    ordered = [paths[i] for i in order.tolist()]
    for first, second in itertools.pairwise(ordered):
        if first == second:
            raise DataError(f"{root}: picture {first} is named twice; each picture needs exactly one line.")
    people = tuple(sorted(set(people_of)))
    number = {name: i for i, name in enumerate(people)}
    person = np.fromiter((number[name] for name in people_of), dtype=np.int64, count=len(paths))
    if official_split is None:
        official_split = np.full(len(paths), OFFICIAL_NONE, dtype=np.int8)
    return FaceIndex(
        dataset=dataset,
        root=root,
        paths=tuple(ordered),
        person=person[order],
        people=people,
        official_split=official_split[order],
        landmarks=None if landmarks is None else landmarks[order],
        boxes=None if boxes is None else boxes[order],
        names=None if names is None else tuple(names.get(identifier, identifier) for identifier in people),
        family=None if siblings is None else _families(len(people), [(number[a], number[b]) for a, b in siblings]),
        account=NOTHING if listing is None else account_of(listing, ordered, copies=copies, notes=notes),
    )


def _families(num_people: int, siblings: list[tuple[int, int]]) -> NDArray[np.int64]:
    """The first member of each person's family, [num_people] int64: families grow together along pairs of siblings."""
    first = np.arange(num_people, dtype=np.int64)
    members = {person: [person] for person in range(num_people)}
    for one, other in siblings:
        kept, gone = sorted((int(first[one]), int(first[other])))
        if kept != gone:
            joined = members.pop(gone)
            first[joined] = kept
            members[kept] += joined
    return first


def read_index(dataset: str, root: Path) -> FaceIndex:
    """Every picture that the layout in `root` names, without opening one.

    dataset: one of DATASETS.  Raises DataError with one line: an unknown data set, a missing folder or metadata file, a
    malformed line (file and line number), a picture path that leaves the folder, a picture named twice, no pictures.
    """
    row = DATASETS.get(dataset)
    if row is None:
        raise DataError(unknown_name("data set", dataset, DATASETS))
    require_folder(root, row.needs)
    reader: Callable[[str, Path], FaceIndex] = pkgutil.resolve_name(row.reader)
    index = reader(dataset, root)
    if index.account != NOTHING:
        return index
    return dataclasses.replace(index, account=account_of(walk(root), index.paths))


def without_missing(index: FaceIndex) -> FaceIndex:
    """The index of the pictures that are there: whatever is chosen is chosen among these."""
    missing = {path for path, _ in index.account.missing}
    if not missing:
        return index
    return take(index, np.array([i for i, path in enumerate(index.paths) if path not in missing], dtype=np.int64))


def take(index: FaceIndex, rows: NDArray[np.int64]) -> FaceIndex:
    """The index of some pictures only; people keep their numbers.  rows: [M] int64, ascending."""
    return dataclasses.replace(
        index,
        paths=tuple(index.paths[i] for i in rows.tolist()),
        person=index.person[rows],
        official_split=index.official_split[rows],
        landmarks=None if index.landmarks is None else index.landmarks[rows],
        boxes=None if index.boxes is None else index.boxes[rows],
    )


SHOWN_ENDINGS = ".jpg, .jpeg, .png, .webp, .bmp"


def resolved(listing: Listing, folder: str, names: Sequence[str]) -> list[str]:
    """The listed names as they stand in the folder: with another ending (.png, .JPG) where that is what is there.

    A name that is there in no form is returned as it is listed.  names may hold folders below `folder`.
    """
    forms: dict[str, dict[str, str]] = {}
    inside: dict[str, set[str]] = {}
    found = []
    for path in names:
        sub, slash, name = path.rpartition("/")
        place = f"{folder}/{sub}" if folder and sub else folder or sub
        if place not in inside:
            inside[place] = set(listing.names.get(place, ()))
        if name in inside[place]:
            found.append(path)
            continue
        if place not in forms:
            there = sorted(filter(is_picture, inside[place]), reverse=True)
            forms[place] = {other.rpartition(".")[0]: other for other in there}
        stem = name.rpartition(".")[0] if ending_of(name) else name
        found.append(f"{sub}{slash}{forms[place].get(stem, name)}")
    return found


def read_folder(dataset: str, root: Path) -> FaceIndex:
    """The index of a folder with one folder a person, pictures any number of folders below.

    Folders train/, val/ and test/ that hold folders of people are parts: people of one name are one person, and what
    serves what is decided by hash. So are two spellings of one name (Unicode's composed and decomposed accents).
    Raises DataError where it is without pictures, or all of them lie below one folder that is no person's.
    """
    listing = walk(root)
    parts = [top for top in listing.children("") if _is_part(listing, top)]
    _require_people_folders(listing, parts)
    depth_of = {top: 1 if top in parts else 0 for top in listing.children("")}
    paths, people_of = [], []
    for folder, names in listing.pictures.items():
        tops = folder.split("/")
        if not folder or len(tops) <= depth_of[tops[0]]:
            continue
        paths += [f"{folder}/{name}" for name in names]
        people_of += [tops[depth_of[tops[0]]]] * len(names)
    notes = []
    if parts:
        where = ", ".join(f"{part}/" for part in parts)
        notes.append(f"{where} taken as parts of one set: people of one name are one person, splits are by hash")
    people_of, note = _one_spelling(people_of)
    return build_index(
        dataset,
        root,
        paths,
        people_of,
        names=dict(zip(people_of, people_of, strict=True)),
        listing=listing,
        notes=[*notes, *note],
    )


def _is_part(listing: Listing, top: str) -> bool:
    """Whether a folder is called train, val or test and holds folders of people, not pictures."""
    return top.lower() in PARTS and top not in listing.pictures and len(listing.children(top)) > 0


def _one_spelling(people_of: list[str]) -> tuple[list[str], list[str]]:
    """The people with names that differ in Unicode's form only made one, and the line that says so."""
    spellings: dict[str, set[str]] = {}
    for name in set(people_of):
        spellings.setdefault(unicodedata.normalize("NFC", name), set()).add(name)
    one = {name: form for form, names in spellings.items() if len(names) > 1 for name in names}
    if not one:
        return people_of, []
    number = len(set(one.values()))
    what = "1 name stands" if number == 1 else f"{number:,} names stand"
    line = f"{what} in two Unicode spellings (NFC, NFD): the folders of one name are one person's"
    return [one.get(name, name) for name in people_of], [line]


def _require_people_folders(listing: Listing, parts: Sequence[str]) -> None:
    """Raise DataError, saying what lies there, unless pictures lie in folders of people."""
    root, tops = listing.root, listing.children("")
    if not tops:
        lies = account_of(listing, ()).words(("data", "odd", "other"))
        if "" in listing.pictures:
            number = len(listing.pictures[""])
            lies = f"{number:,} pictures in the folder itself; put each person's into a folder of their own"
        raise DataError(
            f"{root}: no pictures found; the layout is one folder a person with {SHOWN_ENDINGS} and the like inside "
            f"each. There: {lies or 'nothing'}."
        )
    if len(tops) > 1 or parts or tops[0] in listing.pictures:
        return
    folder = tops[0]
    while len(listing.children(folder)) == 1 and folder not in listing.pictures:
        folder = f"{folder}/{listing.children(folder)[0]}"
    number = len(listing.children(folder))
    if number > 1:
        levels = folder.count("/") + 1
        deeper = "one level" if levels == 1 else f"{levels} levels"
        raise DataError(
            f"{root}: {number:,} folders of pictures {deeper} deeper, in {folder}: give {root / folder}; the layout is "
            "one folder a person."
        )
