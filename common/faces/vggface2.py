"""VGGFace2: train/ and test/ with one folder a person, lists, names, loose boxes and landmarks; and its copies.

Copies have the folders in data/, a val/ beside or instead of test/, people without train/ around them, lists with a
label in each line or with the part in front, one file of landmarks for all, pictures of another size, or no lists.
"""

import csv
import functools
import itertools
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.errors import DataError, unknown_name
from common.faces.account import PARTS as PART_NAMES
from common.faces.account import Listing, walk
from common.faces.index import (
    OFFICIAL_TEST,
    OFFICIAL_TRAIN,
    OFFICIAL_VALIDATION,
    FaceIndex,
    Numbers,
    Owners,
    Table,
    build_index,
    check_paths,
    line_blocks,
    malformed,
    parse_numbers,
    read_lines,
    resolved,
)
from common.faces.paths import Paths, by_folder

PARTS = {"train": OFFICIAL_TRAIN, "val": OFFICIAL_VALIDATION, "test": OFFICIAL_TEST}
META = "identity_meta.csv"
_MALE = "Male"  # as CelebA calls it
_LANDMARK_LINE = Table(
    columns=10, separator=",", wanted='"n000001/0001_01" and ten pixel coordinates, separated by commas'
)
_BOX_LINE = Table(columns=4, separator=",", wanted='"n000001/0001_01" and x, y, width, height in pixels')
_PERSON = re.compile(r"n\d{6}")
_LOOKED_UP = 2**19  # rows of tables in no order that are in memory at once
_SAMPLED = 16  # pictures whose size is compared with their landmarks


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where a copy has its parts.  base: the folder of lists.  folders: part -> folder of people, both below root."""

    base: str
    folders: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class _Pictures:
    """The pictures of all parts, sorted by path: of tables and the index alike, so that neither is copied to be sorted.

    person: [N] int64, index into people (folders' names in any order).  part: [N] int8, of PARTS.
    """

    paths: Paths
    people: Sequence[str]
    person: NDArray[np.int64]
    part: NDArray[np.int8]

    @staticmethod
    def of(listing: Listing, layout: _Layout) -> "_Pictures":
        """By the lists, or the walk, of each part."""
        numbers, person, part = Numbers(), array("q"), array("b")

        def found() -> Iterator[list[str]]:
            for name, folder in sorted(layout.folders.items(), key=lambda item: f"{item[1]}/"):
                before = f"{folder}/" if folder else ""
                for one, pictures in _pictures(listing, layout.base, name, folder):
                    person.extend([numbers[one.partition("/")[0]]] * len(pictures))
                    part.extend([PARTS[name]] * len(pictures))
                    yield [f"{before}{one}/{picture}" for picture in pictures]

        paths = Paths.of(itertools.chain.from_iterable(found()))
        order = paths.order()
        return _Pictures(
            paths=paths.take(order),
            people=list(numbers),
            person=np.array(person, dtype=np.int64)[order],
            part=np.array(part, dtype=np.int8)[order],
        )

    @functools.cached_property
    def _of_person(self) -> list[NDArray[np.int64]]:
        """The rows of each person, in the order of people."""
        return np.split(
            np.argsort(self.person, kind="stable"), np.cumsum(np.bincount(self.person, minlength=len(self.people)))[:-1]
        )

    @functools.cached_property
    def _number(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.people)}

    def rows_of(self, names: Iterable[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which rows have which names `person/stem`: (rows, places in names), [M] each.

        A name may be of no row, or of two; of names that are equal the last counts.
        """
        listed: dict[str, dict[str, int]] = {}
        at = 0
        for one, stems in by_folder(names):
            listed.setdefault(one, {}).update(zip(stems, range(at, at + len(stems)), strict=True))
            at += len(stems)
        rows, places = array("q"), array("q")
        for one, where in listed.items():
            if one in self._number:
                own = self._of_person[self._number[one]]
                for row, path in zip(own.tolist(), self.paths.at(own), strict=True):
                    place = where.get(path.rpartition("/")[2].rpartition(".")[0])
                    if place is not None:
                        rows.append(row)
                        places.append(place)
        return np.array(rows, dtype=np.int64), np.array(places, dtype=np.int64)

    @functools.cached_property
    def _in_one_piece(self) -> NDArray[np.bool_]:
        """Whether the rows of each person follow each other, in one part."""
        ends = [(int(own[0]), int(own[-1]), len(own)) for own in self._of_person]
        return np.array(
            [last - first == number - 1 and self.part[first] == self.part[last] for first, last, number in ends]
        )

    def _key(self, row: int) -> str:
        """What tables call a picture."""
        stem = self.paths[row].rpartition("/")[2].rpartition(".")[0]
        return f"{self.people[self.person[row]]}/{stem}"

    def run_of(self, lines: Sequence[str], guess: int) -> slice | None:
        """The rows that these lines of a table name, one after the other; None where they are to be looked up by name.

        As the authors' files have them: found by comparing all at once, a tenth of the work of looking each up.
        guess: where the first may be.  No other rows have names of these lines.
        """
        name, last = _name(lines[0]), _name(lines[-1])
        person = name.partition("/")[0]
        own = self._of_person[self._number[person]].tolist() if person in self._number else []
        likely = [guess] if guess in own else []
        first = next((row for row in (*likely, *own) if self._key(row) == name), None)
        if first is None or first + len(lines) > len(self.paths):
            return None
        end = first + len(lines)
        if (first and self._key(first - 1) == name) or (end < len(self.paths) and self._key(end) == last):
            return None
        if not self._in_one_piece[np.unique(self.person[first:end])].all():
            return None
        return slice(first, end) if _name_each(lines, name, self.paths[first:end]) else None


def _name_each(lines: Sequence[str], name: str, paths: Sequence[str]) -> bool:
    """Whether each line begins with the name of its path, as the first does, which has this name."""
    before, _, ending = paths[0].partition(name)
    opening, _, closing = lines[0].partition(",")[0].partition(name)
    text, number = "\n".join(("", *paths, "")), len(lines)
    are_alike = (
        text.count("\n") == number + 1
        and text.count(f"\n{before}") == number + (not before)
        and text.count(f"{ending}\n") == number
        and text.count("/") == number * (before.count("/") + 1)
        and (ending.rfind("."), ending.find("/")) == (0, -1)
        and not any(sign in text for sign in ', "')  # a name would be cut there
    )
    if not are_alike:
        return False
    begins = text.replace(f"\n{before}", f"\n{opening}").replace(f"{ending}\n", f"{closing},\n")
    return all(map(str.startswith, lines, begins.split("\n")[1:]))


def _name(line: str) -> str:
    """What a line of a table is of: `person/stem`."""
    return line.partition(",")[0].strip(' "')


def read_vggface2(dataset: str, root: Path) -> FaceIndex:
    """The index of a VGGFace2 folder, from train_list.txt and test_list.txt, or by walking without them.

    A folder without test/ is taken as training people only. A part whose people are those of train/ is a part of their
    pictures, and splits of pictures are by hash here. Raises DataError where there are no people, for a malformed line,
    or a path that leaves the folder.
    """
    listing = walk(root)
    layout = _layout(listing)
    pictures = _Pictures.of(listing, layout)
    notes, split = _layout_notes(layout), pictures.part.copy()
    for part in (OFFICIAL_VALIDATION, OFFICIAL_TEST):
        people = np.unique(pictures.person[pictures.part == part])
        if len(people) and np.isin(people, pictures.person[pictures.part == OFFICIAL_TRAIN]).all():
            split[pictures.part == part] = OFFICIAL_TRAIN
            folder = next(layout.folders[name] for name, code in PARTS.items() if code == part)
            notes.append(f"{folder}/ holds more pictures of the people of train/: taken as theirs")
    points = _table(listing, layout.base, "landmark", pictures, _LANDMARK_LINE)
    boxes = _table(listing, layout.base, "bb", pictures, _BOX_LINE)
    side = _side_of_copies(root, pictures.paths, points if points is not None else boxes)
    if side:
        points = boxes = None
        notes.append(f"copies of {side} x {side} px, which the lists of landmarks and boxes are not of: not used")
    meta = root / layout.base / META
    return build_index(
        dataset,
        root,
        pictures.paths,
        Owners(pictures.people, pictures.person),
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


def _side_of_copies(root: Path, paths: Paths, points: NDArray[np.float32] | None) -> int:
    """The side in px of pictures that are all of one square size and smaller than their landmarks or boxes say; else 0.

    points: [N, 10] or [N, 4].  Only a few pictures, spread over the data set, are opened.
    """
    if points is None or not len(paths):
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


def read_attributes(root: Path, wanted: Sequence[str]) -> dict[str, dict[str, bool]]:
    """Attribute -> person -> whether they have it, of identity_meta.csv: "Male" is all that it says.

    Raises DataError: no such list, another attribute.  People without m or f there are left out.
    """
    file = root / META
    if not file.is_file():
        raise DataError(f"{root}: no {META} there, so nothing is known of its people; add it, or leave --by out.")
    for name in wanted:
        if name != _MALE:
            raise DataError(unknown_name("attribute", name, [_MALE]))
    genders = {row[0].strip(): row[-1].strip(' "') for row in _rows(file, read_lines(file)) if len(row) > 1}
    known = {person: gender == "m" for person, gender in genders.items() if gender in ("m", "f")}
    return dict.fromkeys(wanted, known)


def _rows(file: Path, lines: list[str]) -> Iterator[list[str]]:
    try:
        yield from csv.reader(lines, skipinitialspace=True)
    except csv.Error as error:  # a field of more than 128 KiB, as a quote that is never closed makes
        raise DataError(f"{file}: is malformed ({error}); fetch the official file again.") from None


def _list_of(listing: Listing, base: str, part: str) -> Path | None:
    """The list of a part's pictures, with the lists' folder, or None."""
    file = listing.root / base / f"{part}_list.txt"
    return file if file.is_file() else None


def _pictures(listing: Listing, base: str, part: str, folder: str) -> Iterator[tuple[str, Sequence[str]]]:
    """(person's folder, pictures in it) below a part's folder, by its list or by walking; a folder may come again."""
    file = _list_of(listing, base, part)
    if file is None:
        start = len(folder) + 1 if folder else 0
        anyone = folder.rpartition("/")[2] in PART_NAMES
        for found in listing.below(folder):
            if found != folder and (anyone or _PERSON.match(found[start:])):
                yield found[start:], listing.pictures[found]
        return
    yield from resolved(listing, folder, _names_in(file, listing, part, folder))


def _names_in(file: Path, listing: Listing, part: str, folder: str) -> Iterator[str]:
    """The paths `person/picture` of a list.  Raises DataError."""
    for first, lines in line_blocks(file):
        paths = _listed(lines, part)
        slashes = list(map(str.count, paths, itertools.repeat("/")))
        if slashes.count(1) < len(paths):
            bad = next(place for place, number in enumerate(slashes) if number != 1)
            raise malformed(file, first + bad, paths[bad], "person/picture.jpg")
        check_paths(file, paths, first)
        if folder not in listing.names:
            raise DataError(
                f"{listing.root / folder}: no such folder; {file.name} names pictures in it, and the official VGGFace2 "
                "layout needs it."
            )
        yield from paths


def _listed(lines: Sequence[str], part: str) -> list[str]:
    """The paths in lines of a list, without the labels behind them and the part before, where a copy has them."""
    paths = [line.strip() for line in lines]
    text = "\n".join(("", *paths))
    if " " in text:
        split = (path.rpartition(" ") for path in paths)
        paths = [
            before.strip() if before and label.isdigit() else path
            for (before, _, label), path in zip(split, paths, strict=True)
        ]
    if "\n./" in text or f"\n{part}/" in text:
        paths = [path.removeprefix("./").removeprefix(f"{part}/") for path in paths]
    return paths


def _table(listing: Listing, base: str, kind: str, pictures: _Pictures, table: Table) -> NDArray[np.float32] | None:
    """[N, columns] numbers of the files loose_KIND*.csv for the pictures; NaN where there is no row.

    None where there is no file, or a part has no row at all in any.
    """
    places = [f"{base}/bb_landmark".lstrip("/"), base]
    files = [
        listing.root / place / name
        for place in places
        for name in sorted(listing.names.get(place, ()))
        if name.startswith(f"loose_{kind}") and name.endswith(".csv")
    ]
    if not files:
        return None
    found = np.full((len(pictures.paths), table.columns), np.nan, dtype=np.float32)
    for file in files:
        _read_table(file, table, pictures, found)
    known: NDArray[np.bool_] = ~np.isnan(found[:, 0])
    lacking = [part for part in np.unique(pictures.part) if not known[pictures.part == part].any()]
    return None if lacking else found


def _read_table(file: Path, table: Table, pictures: _Pictures, found: NDArray[np.float32]) -> None:
    """Write the numbers of one file of bb_landmark/ into `found` [N, columns], the rows of pictures."""
    late_names, late_numbers = list[str](), [np.zeros((0, table.columns), dtype=np.float32)]

    def look_up() -> None:
        if late_names:
            rows, places = pictures.rows_of(late_names)
            found[rows] = np.concatenate(late_numbers)[places]
            late_names.clear()
            del late_numbers[1:]

    guess = 0
    for lines, numbers in _rows_of_table(file, table):
        run = pictures.run_of(lines, guess)
        if run is not None:
            look_up()  # of two rows of one name the last counts
            found[run] = numbers
            guess = run.stop
            continue
        late_names.extend(map(_name, lines))
        late_numbers.append(numbers)
        if len(late_names) >= _LOOKED_UP:
            look_up()
    look_up()


def _rows_of_table(file: Path, table: Table) -> Iterator[tuple[list[str], NDArray[np.float32]]]:
    """The lines [M] and numbers [M, columns] of a file with or without its heading, some at a time."""
    for first, block in line_blocks(file):
        skipped = 0 if first > 1 or _is_row(block[0], table) else 1
        lines = block[skipped:]
        rests = [line.partition(",")[2] for line in lines]
        if not all(rests):
            for number, line in enumerate(lines, start=first + skipped):
                if "," not in line:
                    raise malformed(file, number, line, table.wanted)
        if lines:
            yield lines, parse_numbers(file, rests, table, first + skipped)


def _is_row(line: str, table: Table) -> bool:
    """Whether a first line is no heading: a path and numbers."""
    name, *numbers = line.split(",")
    return "/" in name and len(numbers) == table.columns
