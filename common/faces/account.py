"""What lies below a data folder, and what of it a data set uses: the one walk, and the account of everything it met.

A file or folder is *used* (a picture of the index), *left out* with a reason (a picture that the layout names and that
cannot be used), or *passed over*: of a kind that is not read, in a part that the layout does not know, behind a link
whose target is away.  The three together are everything on disk.
"""

import functools
import importlib.util
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import features

from common.errors import DataError
from common.faces.paths import Folders, by_folder

# What Pillow opens as a still picture, by the kind's ending; what must not be there (a program that is started, a
# picture without a mark of its kind at its beginning, which any bytes would pass for) is named in UNREAD.
_ALWAYS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".tif", ".tiff", ".gif")
) | frozenset((".pgm", ".ppm", ".pbm", ".pnm", ".qoi", ".psd", ".ras"))
_WITH_LIBRARY = {"avif": (".avif",), "jpg_2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx")}
_HEIF = (".heic", ".heif", ".hif")
_HEIF_PLUG_INS = ("pillow_heif", "pi_heif")
UNREAD = (
    frozenset(
        (".avif", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".jxl", ".tga", ".pcx", ".dcx", ".sgi", ".rgb", ".bw")
    )
    | frozenset(
        (".dds", ".ico", ".icns", ".dib", ".pfm", ".eps", ".svg", ".xcf", ".exr", ".hdr", ".fits", ".dcm", *_HEIF)
    )
    | frozenset(
        (".raw", ".dng", ".cr2", ".cr3", ".crw", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw", ".x3f")
    )
)
ARCHIVES = frozenset([".zip", ".7z", ".rar", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".001"])
PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_LISTS = frozenset(("anno", "eval", "bb_landmark"))  # folders of text files in the authors' layouts
_SYSTEM = frozenset(("lost+found", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "__MACOSX"))
HIDDEN, SYSTEM, READ_ALREADY = "hidden folders", "folders of the system", "links to folders that are read already"
DATA, ODD, OTHER = "data", "odd", "other"


@functools.cache
def heif_plug_in() -> str:
    """The module that teaches Pillow HEIC, "" where none is installed; it is registered by `register_heif`."""
    return next((name for name in _HEIF_PLUG_INS if importlib.util.find_spec(name) is not None), "")


@functools.cache
def picture_endings() -> frozenset[str]:
    """The endings, lower case with their dot, of the pictures that are read on this machine."""
    more = [ending for name, endings in _WITH_LIBRARY.items() if features.check(name) for ending in endings]
    return _ALWAYS | frozenset(more) | (frozenset(_HEIF) if heif_plug_in() else frozenset())


def ending_of(name: str) -> str:
    """The ending in lower case with its dot, "" where there is none."""
    stem, dot, ending = name.rpartition(".")
    return f".{ending.lower()}" if dot and stem else ""


def is_picture(name: str) -> bool:
    """Whether a file of this name is read as a picture; hidden files are not."""
    return ending_of(name) in picture_endings() and not name.startswith(".")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Everything below a folder.  Paths are POSIX and relative to `root`.

    names: folder ("" is root) -> the names in it of what is no folder.  nowhere: links whose target is away.  special:
    pipes, sockets, devices.  closed: folder that was not entered -> why.
    """

    root: Path
    names: Folders
    nowhere: frozenset[str]
    special: frozenset[str]
    closed: Mapping[str, str]

    @functools.cached_property
    def pictures(self) -> Folders:
        """Folder -> the names of the pictures in it, sorted; folders without one are not there."""
        found = Folders()
        for folder, names in self.names.items():
            if folder in self.with_pictures:
                found.add(folder, sorted(filter(is_picture, names)))
        return found

    @functools.cached_property
    def with_pictures(self) -> frozenset[str]:
        """The folders that hold a picture."""
        return frozenset(folder for folder, names in self.names.items() if any(map(is_picture, names)))

    def below(self, folder: str) -> list[str]:
        """The folders that hold pictures and lie below `folder`, or are it, sorted."""
        return sorted(
            other for other in self.with_pictures if not folder or other == folder or other.startswith(f"{folder}/")
        )

    def children(self, folder: str) -> list[str]:
        """The names of the folders right below `folder` in or below which there are pictures, sorted."""
        start = len(folder) + 1 if folder else 0
        return sorted({other[start:].split("/", 1)[0] for other in self.below(folder) if other != folder})


def walk(root: Path) -> Listing:
    """List everything below `root`.  A folder that cannot be read, or is reached a second time, costs itself only.

    Links to folders are followed after all folders that are none, so that a folder keeps its own place.
    Raises DataError when root itself cannot be read.
    """
    names = Folders()
    closed: dict[str, str] = {}
    seen: set[tuple[int, int]] = set()
    places: dict[str, list[str]] = {kind: [] for kind in ("nowhere", "special", *_FOLDERS)}
    folders, links = places["folder"], places["link"]
    folders.append("")
    while folders or links:
        if not folders:
            links.sort(reverse=True)
            folders.append(links.pop())
        folder = folders.pop()
        try:
            about = os.stat(f"{root}/{folder}")  # noqa: PTH116 - a Path each is slow
            if (about.st_dev, about.st_ino) in seen:
                closed[folder] = READ_ALREADY
                continue
            seen.add((about.st_dev, about.st_ino))
            with os.scandir(f"{root}/{folder}") as found:
                entries = list(found)
        except OSError as error:
            if not folder:
                raise DataError(f"{root}: cannot be read: {error.strerror}; give a folder that you may read.") from None
            closed[folder] = f"folders that cannot be read ({error.strerror})"
            continue
        before = f"{folder}/" if folder else ""
        plain = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
        odd = [] if len(plain) == len(entries) else [(entry.name, _kind(entry)) for entry in entries]
        for name, kind in odd:
            if kind != "file":
                places[kind].append(before + name)
        names.add(folder, [name for name, kind in odd if kind not in _FOLDERS] if odd else plain)
    closed |= dict.fromkeys(places["system"], SYSTEM) | dict.fromkeys(places["hidden"], HIDDEN)
    nowhere, special = frozenset(places["nowhere"]), frozenset(places["special"])
    return Listing(root=root, names=names, nowhere=nowhere, special=special, closed=closed)


_FOLDERS = ("folder", "link", "system", "hidden")


def _kind(entry: "os.DirEntry[str]") -> str:
    """file, special, nowhere (a link to nothing, or to itself), or what of a folder it is (see _FOLDERS)."""
    if entry.is_file(follow_symlinks=False):
        return "file"
    try:
        mode = entry.stat().st_mode
    except OSError:
        return "nowhere" if entry.is_symlink() else "special"
    if not stat.S_ISDIR(mode):
        return "file" if stat.S_ISREG(mode) else "special"
    if entry.name in _SYSTEM or entry.name.startswith("."):
        return "system" if entry.name in _SYSTEM else "hidden"
    return "link" if entry.is_symlink() else "folder"


@dataclass(frozen=True, kw_only=True)
class PassedOver:
    """Things of one kind that were met and not used.

    words: kind and number, for the user.  first: one of them.  weight: DATA where they look like pictures of people;
    ODD where the user should know all the same; OTHER for the rest, such as text files.
    """

    words: str
    number: int
    first: str
    weight: str


@dataclass(frozen=True, kw_only=True)
class Account:
    """What became of everything below a data folder, but for what decoding finds out.

    num_found: files, links, and folders that were not entered or are without pictures.  missing: (path, reason) of
    pictures that the layout names and that are not there.  notes: what was decided about the layout, a line each.
    """

    num_found: int = 0
    missing: tuple[tuple[str, str], ...] = ()
    passed_over: tuple[PassedOver, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def num_unused_data(self) -> int:
        """How much looks like data and was passed over."""
        return sum(one.number for one in self.passed_over if one.weight == DATA)

    @property
    def num_passed_over(self) -> int:
        """How much was passed over in all."""
        return sum(one.number for one in self.passed_over)

    def lines(self) -> list[str]:
        """What whoever trains must know: what looks like data and is not used, and what was decided; often nothing."""
        told = self.words()
        return [*([f"not used: {told}; facefed data audit lists them"] if told else []), *self.notes]

    def words(self, weights: Iterable[str] = (DATA, ODD)) -> str:
        """The kinds and numbers of what was passed over, "" where there is nothing of these weights."""
        return ", ".join(one.words for one in self.passed_over if one.weight in weights)


NOTHING = Account()


def account_of(
    listing: Listing, paths: Iterable[str], *, copies: Iterable[str] = (), notes: Iterable[str] = ()
) -> Account:
    """What an index leaves of everything below its folder.

    paths: the pictures of the index.  copies: folders whose pictures are known to be those of the index again.
    """
    used = Folders()
    for folder, listed in by_folder(paths):
        used.add(folder, listed)
    kinds = _Kinds(listing, used, frozenset(copies))
    missing: list[tuple[str, str]] = []
    for folder, names in used.items():
        before, wanted, inside = f"{folder}/" if folder else "", set(names), listing.names.get(folder, ())
        if not listing.nowhere and len(wanted) == len(inside) and wanted.issuperset(inside):
            continue
        missing += [(before + name, "missing") for name in _absent(listing, folder, wanted.difference(inside))]
        if listing.nowhere:
            nowhere = listing.nowhere.intersection(before + name for name in wanted)
            missing += [(path, "missing: a link to nowhere") for path in nowhere]
        kinds.add_files(folder, set(inside) - wanted)
    for folder in listing.names:
        if folder not in used:
            kinds.add_files(folder, listing.names[folder])
    kinds.add_folders()
    return Account(
        num_found=listing.names.num_names + kinds.num_folders,
        missing=tuple(sorted(missing)),
        passed_over=kinds.passed_over(),
        notes=tuple(notes),
    )


def _absent(listing: Listing, folder: str, unlisted: set[str]) -> set[str]:
    """Which names are not in the folder.  unlisted: those that its listing does not have."""
    if folder in listing.names:
        return unlisted
    place = listing.root / folder  # hidden, behind a second link, or not there
    if not place.is_dir():
        return unlisted
    return {name for name in unlisted if not (place / name).exists()}


@dataclass
class _Kinds:
    """Counts what is passed over, by kind."""

    listing: Listing
    used: Folders
    copies: frozenset[str]
    num_folders: int = 0
    _found: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # (kind, weight) -> number of, first
    _parts: dict[str, list[str]] = field(default_factory=dict)  # a folder without anything used -> pictures

    def __post_init__(self) -> None:
        self._tops = {folder.split("/", 1)[0] for folder in self.used}
        self._parents = {parent for folder in self.used for parent in _above(folder)}

    def _add(self, kind: str, weight: str, path: str) -> None:
        self._found.setdefault((kind, weight), []).append(path)

    def add_files(self, folder: str, names: Iterable[str]) -> None:
        before = f"{folder}/" if folder else ""
        for name in names:
            path, ending = before + name, ending_of(name)
            if path in self.listing.nowhere:
                self._add("links to nowhere", ODD, path)
            elif path in self.listing.special:
                self._add("pipes, sockets or devices", ODD, path)
            elif name.startswith("."):
                self._add("hidden files", OTHER, path)
            elif ending in picture_endings():
                self._add_picture(folder, path)
            elif ending in UNREAD:
                self._add(ending, DATA, path)
            elif ending in ARCHIVES:
                self._add(f"{ending} that is still packed", ODD, path)
            else:
                self._add(ending or "files without an ending", OTHER, path)

    def _add_picture(self, folder: str, path: str) -> None:
        if any(parent in self.copies for parent in _above(folder)):
            self._add("pictures that are there in another folder too", OTHER, path)
        elif not folder:
            self._add("pictures outside a person's folder", DATA, path)
        elif folder in self._parents or folder.split("/", 1)[0] in self._tops:
            self._add("pictures that the layout does not name", DATA, path)
        else:
            self._parts.setdefault(folder.split("/", 1)[0], []).append(path)

    def add_folders(self) -> None:
        listing = self.listing
        for folder, why in listing.closed.items():
            self._add(why, OTHER if why in (HIDDEN, SYSTEM) else ODD, f"{folder}/")
        filled = {parent for folder in (*listing.with_pictures, *listing.closed) for parent in _above(folder)}
        for folder in listing.names:
            if folder not in filled and any(ending_of(name) in UNREAD for name in listing.names[folder]):
                filled.update(_above(folder))
        filled |= self._parents
        for folder in listing.names:
            lists = folder.rpartition("/")[2].lower() in _LISTS and listing.names[folder]
            if folder and folder not in filled and folder.rpartition("/")[0] in {"", *filled} and not lists:
                self._add("folders without pictures", ODD, f"{folder}/")
        self.num_folders = sum(len(paths) for paths in self._found.values() for path in paths[:1] if path[-1] == "/")

    def passed_over(self) -> tuple[PassedOver, ...]:
        counted = [
            PassedOver(
                words=f"{len(paths):,} {_singular(kind, len(paths))}",
                number=len(paths),
                first=min(paths),
                weight=weight,
            )
            for (kind, weight), paths in self._found.items()
        ]
        for top, paths in self._parts.items():
            people = {path.rpartition("/")[0] for path in paths if path.count("/") > 1}
            who = f"{len(people):,} people, " if people else ""
            words = f"{top}/: {who}{len(paths):,} pictures"
            counted.append(PassedOver(words=words, number=len(paths), first=min(paths), weight=DATA))
        order = (DATA, ODD, OTHER)
        return tuple(sorted(counted, key=lambda one: (order.index(one.weight), -one.number, one.words)))


def _above(folder: str) -> Iterable[str]:
    """The folder and those above it, without root."""
    while folder:
        yield folder
        folder = folder.rpartition("/")[0]


_ONE = {
    "links to nowhere": "link to nowhere",
    "folders without pictures": "folder without pictures",
    "pictures outside a person's folder": "picture outside a person's folder",
    "pictures that the layout does not name": "picture that the layout does not name",
    READ_ALREADY: "link to a folder that is read already",
}


def _singular(kind: str, number: int) -> str:
    if number > 1:
        return kind
    return _ONE.get(kind, kind.replace("folders that", "folder that"))
