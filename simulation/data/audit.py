"""What a data set really holds: people and pictures of each split, what cannot be used, what occurs twice."""

import dataclasses
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.faces.account import Account
from common.faces.decode import (
    NO_PICTURES,
    Done,
    alignment_note,
    check_quarantine,
    plan,
    quarantine,
    same_files,
    scan,
    with_duplicates,
)
from common.faces.index import OFFICIAL_NONE, FaceIndex, read_index, take, without_missing
from common.faces.pack import value_notes
from common.faces.splits import Split, assign_splits
from common.settings import DataSettings

_LeftOut = Sequence[tuple[str, str]]  # (path, reason)
# The closed set's parts are of the people trained on.
_SIDES = {"train": Split.TRAIN, "val_people": Split.VAL_PEOPLE, "test_people": Split.TEST_PEOPLE}


@dataclass(frozen=True, kw_only=True)
class Families:
    """Who belongs together; somebody in no pair is a family of one.

    number, by_size (members -> families), people_without_sibling: of all people that the layout names.
    by_split: side -> families with pictures there.  with_siblings: side -> those of which two or more members have
    pictures there, so that there are pairs of twins.
    """

    number: int
    by_size: dict[int, int]
    people_without_sibling: int
    by_split: dict[str, int]
    with_siblings: dict[str, int]

    def plain(self) -> dict[str, Any]:
        """For JSON, whose keys are text."""
        return dataclasses.asdict(self) | {"by_size": {str(size): number for size, number in self.by_size.items()}}

    def lines(self) -> list[str]:
        """For a terminal."""
        sizes = ", ".join(f"{size}: {number}" for size, number in self.by_size.items())
        sides = ", ".join(f"{side} {number}" for side, number in self.by_split.items())
        twins = ", ".join(f"{side} {number}" for side, number in self.with_siblings.items())
        return [
            f"  families: {self.number}, by members: {sizes}; people without a sibling: {self.people_without_sibling}",
            f"  families by split: {sides}",
            f"    with two siblings or more: {twins}",
        ]


def count_families(named: FaceIndex, used: FaceIndex, split: NDArray[np.int8]) -> Families | None:
    """The families of a data set; None where it knows of none.

    named: all that the layout names.  used: what is left of it.  split: [N] int8 `Split` codes of the pictures in use.
    """
    if named.family is None:
        return None
    people = np.unique(named.person)
    sizes = np.unique(named.family[people], return_counts=True)[1]
    members, number = np.unique(sizes, return_counts=True)
    by_size = dict(zip(members.tolist(), number.tolist(), strict=True))
    sides = {
        side: np.unique(named.family[np.unique(used.person[split == code])], return_counts=True)[1]
        for side, code in _SIDES.items()
    }
    return Families(
        number=len(sizes),
        by_size=by_size,
        people_without_sibling=by_size.get(1, 0),
        by_split={side: len(there) for side, there in sides.items()},
        with_siblings={side: int((there > 1).sum()) for side, there in sides.items()},
    )


_BINS = ((1, 1), (2, 4), (5, 9), (10, 19), (20, 49), (50, 99), (100, None))  # pictures of a person, both ends included
_SHOWN = 10  # lines of one kind on the terminal; the JSON has all


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Pictures whose files are equal byte for byte, with the person and the split of each."""

    paths: tuple[str, ...]
    people: tuple[str, ...]
    splits: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """The findings on one data set.

    num_people, num_pictures: what the layout names.  people, pictures: counts by split, as a pack would have them.
    pictures_per_person: min, median, max over all people named; histogram: (range, people).  quarantined: (path,
    reason).  people_in_two_splits: those whom the official lists put in more than one part.  copies: exact duplicates.
    families: None where the data set knows of none.  account: what became of everything below root.
    problem: why it cannot be packed with these settings, "" where it can.  names and hashes (path -> SHA-256 hex) are
    what `audit_overlap` compares; they are not printed.
    """

    dataset: str
    root: str
    num_people: int
    num_pictures: int
    people: dict[str, int]
    pictures: dict[str, int]
    pictures_per_person: dict[str, float]
    histogram: tuple[tuple[str, int], ...]
    quarantined: tuple[tuple[str, str], ...]
    max_quarantined_fraction: float
    people_in_two_splits: tuple[str, ...]
    copies: tuple[Copies, ...]
    families: Families | None
    account: Account
    problem: str
    names: tuple[str, ...] = field(repr=False)
    hashes: dict[str, str] = field(repr=False)

    @property
    def fraction_quarantined(self) -> float:
        """What looks like data and is left out or passed over, as a fraction of that and of what the settings use."""
        unused = len(self.quarantined) + self.account.num_unused_data
        return unused / max(unused + sum(self.pictures.values()) - self.pictures["unused"], 1)

    @property
    def copies_across_splits(self) -> tuple[Copies, ...]:
        """The exact duplicates that stand in more than one split."""
        return tuple(copies for copies in self.copies if len(set(copies.splits)) > 1)

    def to_json(self) -> str:
        """All findings as JSON, one object."""
        hidden = ("names", "hashes", "copies")
        plain: dict[str, Any] = {key: value for key, value in vars(self).items() if key not in hidden}
        plain["fraction_quarantined"] = self.fraction_quarantined
        plain["quarantined"] = [{"path": path, "reason": reason} for path, reason in self.quarantined]
        plain["families"] = None if self.families is None else self.families.plain()
        plain["copies"] = [vars(copies) for copies in self.copies]
        plain["account"] = {
            "num_found": self.account.num_found,
            "passed_over": [vars(one) for one in self.account.passed_over],
            "notes": list(self.account.notes),
        }
        return json.dumps(plain, indent=2, sort_keys=True)

    def lines(self) -> list[str]:
        """The findings for a terminal; long lists are cut."""
        spread = self.pictures_per_person
        kinds = Counter(reason.split(":")[0] for _, reason in self.quarantined)
        across = self.copies_across_splits
        return [
            f"{self.dataset} in {self.root}: {self.num_people} people, {self.num_pictures} pictures",
            f"  {'split':<14}{'people':>8}{'pictures':>10}",
            *(f"  {name:<14}{self.people[name]:>8}{self.pictures[name]:>10}" for name in self.pictures),
            f"  pictures a person: min {spread['min']:g}, median {spread['median']:g}, max {spread['max']:g}",
            "  people by number of pictures: " + ", ".join(f"{label}: {number}" for label, number in self.histogram),
            *([] if self.families is None else self.families.lines()),
            f"  quarantined: {len(self.quarantined)} ({self.fraction_quarantined:.2%} of the pictures in use; "
            f"{self.max_quarantined_fraction:.2%} allowed)"
            + "".join(f"; {kind} {n}" for kind, n in sorted(kinds.items())),
            *_cut(f"    {path}: {reason}" for path, reason in self.quarantined),
            f"  passed over: {self.account.num_passed_over} of {self.account.num_found} things below the folder",
            *_cut(f"    {one.words}, such as {one.first}" for one in self.account.passed_over),
            *(f"  note: {note}" for note in self.account.notes),
            f"  people in two official parts: {len(self.people_in_two_splits)}",
            *_cut(f"    {name}" for name in self.people_in_two_splits),
            f"  exact duplicates: {len(self.copies)} groups, {len(across)} of them across splits",
            *_cut(f"    {', '.join(group.paths)} ({', '.join(group.splits)})" for group in (*across, *self._within())),
            *([f"  cannot be used: {self.problem}"] if self.problem else []),
        ]

    def _within(self) -> tuple[Copies, ...]:
        return tuple(copies for copies in self.copies if len(set(copies.splits)) == 1)


@dataclass(frozen=True, kw_only=True)
class OverlapReport:
    """What occurs in two data sets: people of one name, and pictures of equal bytes as (data set, path) pairs."""

    people: tuple[tuple[str, str, str], ...]  # name, data set, data set
    pictures: tuple[tuple[str, str, str, str], ...]  # data set, path, data set, path

    def to_json(self) -> str:
        """All findings as JSON, one object."""
        return json.dumps(vars(self), indent=2, sort_keys=True)

    def lines(self) -> list[str]:
        """The findings for a terminal; long lists are cut."""
        return [
            f"people of one name in two data sets: {len(self.people)}",
            *_cut(f"  {name} ({first} and {second})" for name, first, second in self.people),
            f"equal pictures in two data sets: {len(self.pictures)}",
            *_cut(f"  {a}: {path_a} = {b}: {path_b}" for a, path_a, b, path_b in self.pictures),
        ]


def _told(scanned: Iterable[Done], total: int) -> tuple[dict[int, str], NDArray[np.uint8], Counter[str]]:
    """Reasons by row, digests [total, 32] (zeros where nothing was read), and how often each note fell."""
    reasons: dict[int, str] = {}
    digests = np.zeros((total, 32), dtype=np.uint8)
    values: Counter[str] = Counter()
    row = 0
    for done in scanned:
        for reason, digest in zip(done.reasons, done.digests, strict=True):
            if reason:
                reasons[row] = reason
            if digest:
                digests[row] = np.frombuffer(digest, dtype=np.uint8)
            row += 1
        values.update(note for note in done.notes if note)
    return reasons, digests, values


def _excess(index: FaceIndex, quarantined: _LeftOut, missing: _LeftOut, num_named: int, data: DataSettings) -> str:
    """Why more is left out than `data.max_quarantined_fraction` allows, or nothing.  missing: of the num_named."""
    try:
        check_quarantine(index, missing, num_named, data.max_quarantined_fraction)
        check_quarantine(index, quarantined, len(index) + len(missing), data.max_quarantined_fraction)
    except DataError as error:
        return str(error)
    return ""


def _by_split(index: FaceIndex, split: NDArray[np.int8]) -> tuple[dict[str, int], dict[str, int]]:
    """How many people and how many pictures each split has, by its name.  split: [N], one for each picture."""
    chosen = {code.name.lower(): split == code for code in Split}
    people = {name: len(np.unique(index.person[rows])) for name, rows in chosen.items()}
    return people, {name: int(rows.sum()) for name, rows in chosen.items()}


def audit(
    dataset: str,
    root: Path,
    data: DataSettings,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> AuditReport:
    """Read every picture in use, as packing does, and report; nothing is written.

    What would stop packing (too many quarantined, too few people) is reported as the `problem`, not raised.

    progress: called with (pictures done, pictures in all).  Raises DataError as read_index, and where the alignment
    needs a file that is not there.
    """
    named = read_index(dataset, root)
    missing = named.account.missing
    there = without_missing(named)
    split, problem = _splits(there, data)
    rows = np.arange(len(there)) if problem else np.flatnonzero(split != Split.UNUSED)
    index, split = take(there, rows), split[rows]
    recipe, points = plan(index, data)
    looked_at = dataclasses.replace(recipe, coding=NO_PICTURES)
    reasons, digests, values = _told(scan(index, looked_at, points, workers=workers, progress=progress), len(index))
    copies = _copies(index, split, digests)
    read = np.flatnonzero(digests.any(axis=1)).tolist()
    hashes = {index.paths[row]: digests[row].tobytes().hex() for row in read}
    kept, unusable = quarantine(index, with_duplicates(index, split, reasons, digests))
    quarantined = tuple(sorted((*unusable, *missing)))
    if (excess := _excess(index, quarantined, missing, len(named), data)) and (missing or not problem):
        problem = excess
    unused = len(there) - len(index)
    if unusable:
        index = take(index, np.flatnonzero(kept))
        split, fewer = _splits(index, data)
        problem = problem or fewer
    count = np.bincount(named.person, minlength=len(named.people))
    people, pictures = _by_split(index, split)
    return AuditReport(
        dataset=dataset,
        root=str(root),
        num_people=len(named.people),
        num_pictures=len(named),
        people=people | {"unused": len(named.people) - len(np.unique(index.person[split != Split.UNUSED]))},
        pictures=pictures | {"unused": pictures["unused"] + unused},
        pictures_per_person={"min": int(count.min()), "median": float(np.median(count)), "max": int(count.max())},
        histogram=_histogram(count),
        quarantined=quarantined,
        max_quarantined_fraction=data.max_quarantined_fraction,
        people_in_two_splits=_in_two_parts(named),
        copies=copies,
        families=count_families(named, index, split),
        account=dataclasses.replace(
            named.account,
            notes=(*named.account.notes, *alignment_note(index, recipe, data), *value_notes(values)),
        ),
        names=named.names or tuple(f"{dataset} {person}" for person in named.people),
        hashes=hashes,
        problem=problem,
    )


def audit_overlap(reports: Sequence[AuditReport]) -> OverlapReport:
    """People and pictures that occur in two of the data sets.

    Names are compared without regard to case, blanks and underscores; where a data set has only numbers for its people
    (CelebA), they are compared with the same data set only. Pictures are compared byte for byte.
    """
    people: list[tuple[str, str, str]] = []
    pictures: list[tuple[str, str, str, str]] = []
    for place, one in enumerate(reports):
        own_names = {_plain(name): name for name in one.names}
        own_hashes = {value: path for path, value in one.hashes.items()}
        for other in reports[place + 1 :]:
            a, b = (one.dataset, other.dataset) if one.dataset != other.dataset else (one.root, other.root)
            shared = sorted({_plain(name) for name in other.names} & own_names.keys())
            people += [(own_names[name], a, b) for name in shared]
            pictures += [(a, own_hashes[v], b, path) for path, v in other.hashes.items() if v in own_hashes]
    return OverlapReport(people=tuple(people), pictures=tuple(pictures))


def _splits(index: FaceIndex, data: DataSettings) -> tuple[NDArray[np.int8], str]:
    """The splits, or all UNUSED and the reason why there are none."""
    try:
        return assign_splits(index, data), ""
    except DataError as error:
        return np.full(len(index), Split.UNUSED, dtype=np.int8), str(error)


def _plain(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split()).casefold()


def _cut(lines: Iterable[str]) -> list[str]:
    every = list(lines)
    return every if len(every) <= _SHOWN else [*every[:_SHOWN], f"    ... and {len(every) - _SHOWN} more"]


def _histogram(count: NDArray[np.int64]) -> tuple[tuple[str, int], ...]:
    found = []
    for low, high in _BINS:
        label = str(low) if low == high else f"{low}-{high}" if high else f"{low} or more"
        found.append((label, int(((count >= low) & (count <= (high or count.max()))).sum())))
    return tuple(found)


def _in_two_parts(index: FaceIndex) -> tuple[str, ...]:
    parts = np.unique(np.stack([index.person, index.official_split.astype(np.int64)]), axis=1)
    parts = parts[:, parts[1] != OFFICIAL_NONE]
    people, number = np.unique(parts[0], return_counts=True)
    return tuple(index.people[i] for i in people[number > 1].tolist())


def _copies(index: FaceIndex, split: NDArray[np.int8], digests: NDArray[np.uint8]) -> tuple[Copies, ...]:
    """Groups of equal files, by the splits they would have if all were used."""
    return tuple(
        Copies(
            paths=tuple(index.paths[row] for row in rows),
            people=tuple(index.people[index.person[row]] for row in rows),
            splits=tuple(Split(int(split[row])).name.lower() for row in rows),
        )
        for rows in same_files(digests)
    )
