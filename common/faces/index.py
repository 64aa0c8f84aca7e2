"""FaceIndex: every picture that a data set's layout names, before anything is decoded; and what its readers share.

First what reads the text files of official layouts: whole files at a time, a fault reported with file and line number.
Last the layout of a data set of one's own: one folder a person, without landmarks, boxes or an official split.
What is on disk beside the pictures of an index is in its account (`account.py`).
"""

import dataclasses
import functools
import itertools
import pkgutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError, unknown_name
from common.faces.account import NOTHING, PARTS, Account, Listing, account_of, ending_of, is_picture, walk
from common.faces.datasets import DATASETS
from common.faces.paths import Paths, by_folder
from common.system.files import text_decoder

_BLOCK_BYTES = 2**17  # of a text file at once: with its lines it stays in what a processor has near by
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
    return [line for _, lines in line_blocks(file) for line in lines]


def line_blocks(file: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines of `read_lines`, some at a time: (line number of the first, lines).  Raises DataError."""
    number, rest, empty = 1, "", list[str]()
    for text in _texts(file):
        lines = (rest + text).split("\n")
        rest = lines.pop()
        if lines := _filled(empty, lines):
            yield number, lines
            number += len(lines)
    if lines := _filled(empty, [rest]):
        yield number, lines


def _texts(file: Path) -> Iterator[str]:
    """The text of a file, some at a time, lines ending in LF.  Raises DataError."""
    size = 0
    try:
        with file.open("rb") as opened:
            blocks = iter(functools.partial(opened.read, _BLOCK_BYTES), b"")
            first = next(blocks, b"")
            decoder = text_decoder(first)
            for block in itertools.chain((first,), blocks, (b"",)):
                size += len(block)
                yield decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        bad = size - len(error.object) + error.start
        raise DataError(f"{file}: not UTF-8 text (byte {bad}); fetch the official file again.") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}.") from None


def _filled(empty: list[str], lines: list[str]) -> list[str]:
    """The lines after those in `empty`, where the empty ones at the end are left for later."""
    end = len(lines)
    while end and not lines[end - 1].strip():
        end -= 1
    if not end:
        empty += lines
        return []
    filled, empty[:] = [*empty, *lines[:end]], lines[end:]
    return filled


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
    text = "\n".join(["", *paths])
    if not any(sign in text for sign in ("..", "\\", "\0", "\n/")):
        return
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
    if not all(map(str.strip, block)):  # loadtxt passes over empty lines
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
    paths: [N] POSIX paths, strings when they are asked for.
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
    paths: Paths
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


@dataclass(frozen=True)
class Owners:
    """Whose each of many pictures is.  names: [P] identifiers in any order.  number: [N] int64, index into names."""

    names: Sequence[str]
    number: NDArray[np.int64]

    @staticmethod
    def of(people_of: Iterable[str]) -> "Owners":
        """From an identifier for each picture."""
        numbers = Numbers()
        number = np.fromiter((numbers[name] for name in people_of), dtype=np.int64)
        return Owners(list(numbers), number)


class Numbers(dict[str, int]):
    """Numbers names as they are asked for, from 0 on."""

    def __missing__(self, name: str) -> int:
        return self.setdefault(name, len(self))


def build_index(
    dataset: str,
    root: Path,
    paths: Sequence[str],
    people_of: Sequence[str] | Owners,
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
    if not len(paths):
        raise DataError(f"{root}: no pictures found; give the folder that holds the {dataset} layout.")
    owners = people_of if isinstance(people_of, Owners) else Owners.of(people_of)
    ordered, number_of = Paths.of(paths), owners.number
    if not ordered.is_ascending:
        order = ordered.order()
        ordered, number_of = ordered.take(order), number_of[order]
        official_split = None if official_split is None else official_split[order]
        landmarks = None if landmarks is None else landmarks[order]
        boxes = None if boxes is None else boxes[order]
    for first, second in itertools.pairwise(() if ordered.is_ascending else ordered):
        if first == second:
            raise DataError(f"{root}: picture {first} is named twice; each picture needs exactly one line.")
    people = tuple(sorted(set(owners.names)))
    number = {name: i for i, name in enumerate(people)}
    numbers = np.array([number[name] for name in owners.names], dtype=np.int64)

    if official_split is None:
        official_split = np.full(len(paths), OFFICIAL_NONE, dtype=np.int8)
    return FaceIndex(
        dataset=dataset,
        root=root,
        paths=ordered,
        person=numbers[number_of],
        people=people,
        official_split=official_split,
        landmarks=landmarks,
        boxes=boxes,
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
    return take(index, np.flatnonzero([path not in missing for path in index.paths]))


def take(index: FaceIndex, rows: NDArray[np.int64]) -> FaceIndex:
    """The index of some pictures only; people keep their numbers.  rows: [M] int64, ascending."""
    if len(rows) == len(index):
        return index
    return dataclasses.replace(
        index,
        paths=index.paths.take(rows),
        person=index.person[rows],
        official_split=index.official_split[rows],
        landmarks=None if index.landmarks is None else index.landmarks[rows],
        boxes=None if index.boxes is None else index.boxes[rows],
    )


_MOST_KEPT = 2**19  # names of folders that are looked up, of lists in no order
SHOWN_ENDINGS = ".jpg, .jpeg, .png, .webp, .bmp"


def resolved(listing: Listing, folder: str, names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """The listed names as they stand in the folder: with another ending (.png, .JPG) where that is what is there.

    names may hold folders below `folder`.  Yields (such a folder or "", names in it), in the order of names.  A name
    that is there in no form is given as it is listed.
    """
    forms: dict[str, dict[str, str]] = {}
    inside: dict[str, frozenset[str]] = {}
    kept = 0
    for sub, listed in by_folder(names):
        place = f"{folder}/{sub}" if folder and sub else folder or sub
        if place not in inside:
            if kept > _MOST_KEPT:
                inside.clear()
                kept = 0
            inside[place] = frozenset(listing.names.get(place, ()))
            kept += len(inside[place])
        if inside[place].issuperset(listed):
            yield sub, listed
            continue
        if place not in forms:
            there = sorted(filter(is_picture, inside[place]), reverse=True)
            forms[place] = {other.rpartition(".")[0]: other for other in there}
        yield sub, [_form(name, inside[place], forms[place]) for name in listed]


def _form(name: str, inside: frozenset[str], forms: Mapping[str, str]) -> str:
    """A listed name as it stands in its folder.  forms: stem -> name in the folder."""
    stem = name.rpartition(".")[0] if ending_of(name) else name
    return name if name in inside else forms.get(stem, name)


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
    numbers, number, folders = Numbers(), list[int](), list[str]()
    for folder in sorted(listing.with_pictures):
        tops = folder.split("/")
        if folder and len(tops) > depth_of[tops[0]]:
            folders.append(folder)
            number.append(numbers[tops[depth_of[tops[0]]]])
    notes = []
    if parts:
        where = ", ".join(f"{part}/" for part in parts)
        notes.append(f"{where} taken as parts of one set: people of one name are one person, splits are by hash")
    people, note = _one_spelling(list(numbers))
    of_folder = [len(listing.pictures[folder]) for folder in folders]
    return build_index(
        dataset,
        root,
        Paths.of(f"{folder}/{name}" for folder in folders for name in listing.pictures[folder]),
        Owners(people, np.repeat(np.array(number, dtype=np.int64), of_folder)),
        names={person: person for person in people},
        listing=listing,
        notes=[*notes, *note],
    )


def _is_part(listing: Listing, top: str) -> bool:
    """Whether a folder is called train, val or test and holds folders of people, not pictures."""
    return top.lower() in PARTS and top not in listing.pictures and len(listing.children(top)) > 0


def _one_spelling(people: list[str]) -> tuple[list[str], list[str]]:
    """The people with names that differ in Unicode's form only made one, and the line that says so."""
    spellings: dict[str, set[str]] = {}
    for name in people:
        spellings.setdefault(unicodedata.normalize("NFC", name), set()).add(name)
    one = {name: form for form, names in spellings.items() if len(names) > 1 for name in names}
    if not one:
        return people, []
    number = len(set(one.values()))
    what = "1 name stands" if number == 1 else f"{number:,} names stand"
    line = f"{what} in two Unicode spellings (NFC, NFD): the folders of one name are one person's"
    return [one.get(name, name) for name in people], [line]


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
