"""A public set of pairs at the server, such as LFW: the global model's scores on people who are no client's.

The pictures are the server's own, so nothing here is data of a client, and the clients know nothing of it. It is one
more curve beside the test curve: like that one, no choice is made by it.

The list of pairs is that of Labeled Faces in the Wild, pairs.txt: ten folds of 300 genuine and 300 impostor pairs.  Its
first line holds the numbers of folds and of pairs of each kind in a fold ("10 300"), or that of pairs alone when there
is one fold (as in pairsDevTest.txt).  Then each fold gives its genuine pairs, "NAME I J", and its impostor pairs,
"NAME1 I NAME2 J", where picture I of NAME is NAME/NAME_000I.jpg.  http://vis-www.cs.umass.edu/lfw/README.txt
Two other forms are read: the same pairs as pairs.csv, where a heading stands for the numbers, and lists that give two
paths and 1 (genuine) or 0 a line, as InsightFace's do.  Pictures may have any ending and lie deeper in the folder.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from common import config
from common.errors import ConfigError, DataError
from common.faces.account import ending_of, is_picture, walk
from common.faces.batches import evaluation_batches
from common.faces.decode import central_pictures
from common.faces.index import check_paths, malformed, read_lines, require_folder
from common.metrics.figures import AUC, eer, roc_auc
from common.metrics.folds import FoldPairs, pair_scores, ten_fold_accuracy_of_scores
from common.metrics.names import of_split
from common.metrics.pairs import score_histogram
from common.models.recogniser import Recogniser
from common.protocol.parameters import Manifest, load_shared
from common.settings import Settings
from common.system.runtime import resolve_device

_WANTED_FIRST = "the numbers of folds and of pairs of each kind in a fold, such as 10 300"
_WANTED = {
    3: "NAME, I, J for two pictures of one person (this is a genuine pair by its place in the file)",
    4: "NAME1, I, NAME2, J for pictures of two people (this is an impostor pair by its place in the file)",
}
_WANTED_CSV = "NAME,I,J for two pictures of one person, or NAME1,I,NAME2,J for pictures of two people"
_WANTED_PATHS = "two paths of pictures and 1 (genuine) or 0 (impostor), separated by blanks"
_FOLDS_OF_PATHS = 10  # as InsightFace divides such a list, in order
_SHOWN = 3  # missing pictures that are named


@dataclass(frozen=True)
class PairList:
    """Pairs of pictures, as positions in `paths`."""

    paths: tuple[str, ...]  # each picture once, relative to the folder, in the order of the list
    first: NDArray[np.int64]  # [M]
    second: NDArray[np.int64]  # [M]
    genuine: NDArray[np.bool_]  # [M]
    fold: NDArray[np.int64]  # [M] from 0


def read_pair_list(file: Path, suffix: str = ".jpg") -> PairList:
    """The pairs that a list names, in any of the three forms, without looking for the pictures.

    Lines end in LF or CRLF; names and numbers are separated by tabs, or by spaces where a line holds no tab.
    Raises DataError with file and line number: a malformed line, a picture paired with itself, one person in an
    impostor pair, more or fewer lines than the first one says.
    """
    lines = read_lines(file)
    if not lines:
        raise DataError(f"{file}: empty; give LFW's pairs.txt, whose first line holds {_WANTED_FIRST}.")
    if file.suffix.lower() == ".csv":
        return _from_csv(file, lines, suffix)
    if _path_pair(lines[0]) is not None:
        return _from_paths(file, lines)
    num_folds, per_fold = _counts(file, lines[0])
    wanted = 1 + num_folds * 2 * per_fold
    if len(lines) != wanted:
        raise DataError(
            f"{file}, line 1: {lines[0]!r} promises {num_folds} folds of 2 x {per_fold} pairs, {wanted} lines in all, "
            f"but the file has {len(lines)}; fetch it again or correct its first line."
        )
    places: dict[str, int] = {}
    rows = np.empty((len(lines) - 1, 2), dtype=np.int64)
    is_genuine = np.arange(len(rows)) % (2 * per_fold) < per_fold
    for row, line in enumerate(lines[1:]):
        pair = _pictures(file, row + 2, line, num_fields=3 if is_genuine[row] else 4)
        rows[row] = [places.setdefault(f"{name}/{name}_{number:04d}{suffix}", len(places)) for name, number in pair]
    fold = np.arange(len(rows)) // (2 * per_fold)
    return PairList(paths=tuple(places), first=rows[:, 0], second=rows[:, 1], genuine=is_genuine, fold=fold)


def _from_csv(file: Path, lines: Sequence[str], suffix: str) -> PairList:
    """The pairs of a pairs.csv: a fold is a run of genuine pairs and the run of impostor pairs after it."""
    places: dict[str, int] = {}
    rows, is_genuine = [], []
    for number, line in enumerate(lines[1:], start=2):
        fields = [field.strip(' "') for field in line.split(",")]
        while fields and not fields[-1]:
            fields.pop()
        if len(fields) not in _WANTED:
            raise malformed(file, number, line, _WANTED_CSV)
        pair = _pictures(file, number, "\t".join(fields), num_fields=len(fields))
        rows.append([places.setdefault(f"{name}/{name}_{one:04d}{suffix}", len(places)) for name, one in pair])
        is_genuine.append(len(fields) == min(_WANTED))
    genuine = np.array(is_genuine, dtype=np.bool_)
    begins = genuine & ~np.concatenate([[True], genuine[:-1]])
    return _pair_list(file, places, rows, genuine, np.cumsum(begins))


def _from_paths(file: Path, lines: Sequence[str]) -> PairList:
    """The pairs of a list of two paths and 1 or 0 a line, label first or last; ten folds, in order."""
    places: dict[str, int] = {}
    rows, is_genuine = [], []
    for number, line in enumerate(lines, start=1):
        found = _path_pair(line)
        if found is None:
            raise malformed(file, number, line, _WANTED_PATHS)
        first, second, genuine = found
        check_paths(file, [first, second], number)
        if first == second:
            raise malformed(file, number, line, f"two pictures, not {first} twice")
        rows.append([places.setdefault(path, len(places)) for path in (first, second)])
        is_genuine.append(genuine)
    fold = np.arange(len(rows)) * _FOLDS_OF_PATHS // len(rows)
    return _pair_list(file, places, rows, np.array(is_genuine, dtype=np.bool_), fold)


def _pair_list(
    file: Path, places: dict[str, int], rows: list[list[int]], genuine: NDArray[np.bool_], fold: NDArray[np.int64]
) -> PairList:
    both = {(int(one), bool(kind)) for one, kind in zip(fold, genuine, strict=True)}
    if not rows or len(both) != 2 * (int(fold.max()) + 1):
        raise DataError(f"{file}: each fold needs genuine and impostor pairs; fetch the list again.")
    numbers = np.array(rows, dtype=np.int64)
    return PairList(paths=tuple(places), first=numbers[:, 0], second=numbers[:, 1], genuine=genuine, fold=fold)


def _path_pair(line: str) -> tuple[str, str, bool] | None:
    """Two paths and whether they show one person, from a line of a list of paths; None where it is no such line."""
    fields = [field for field in line.replace(",", " ").split() if field]
    if len(fields) != 3:
        return None
    label, paths = (fields[0], fields[1:]) if fields[0] in ("0", "1", "-1") else (fields[2], fields[:2])
    if label not in ("0", "1", "-1") or not all(is_picture(path.rpartition("/")[2]) for path in paths):
        return None
    return paths[0].replace("\\", "/"), paths[1].replace("\\", "/"), label == "1"


def found_below(pairs: PairList, root: Path) -> PairList:
    """The pairs with the paths that their pictures have below `root`: any ending, any number of folders deeper.

    A picture that is not there keeps its path.  Where two places hold it, that with the fewest folders is taken.
    """
    if all((root / path).is_file() for path in pairs.paths):
        return pairs
    listing = walk(root)
    places: dict[tuple[str, str], str] = {}
    for folder in sorted(listing.pictures, key=lambda folder: (-folder.count("/"), folder)):
        for name in listing.pictures[folder]:
            places[folder.rpartition("/")[2], name.rpartition(".")[0]] = f"{folder}/{name}" if folder else name
    found = []
    for path in pairs.paths:
        folder, _, name = path.rpartition("/")
        stem = name.rpartition(".")[0] if ending_of(name) else name
        kept = (root / path).is_file()
        found.append(path if kept else places.get((folder.rpartition("/")[2], stem), path))
    return dataclasses.replace(pairs, paths=tuple(found))


def require_pictures(pairs: PairList, root: Path) -> None:
    """Raise DataError, naming the first few, unless every picture of the pairs is a file below `root`."""
    require_folder(root, "give the folder with one folder a person, such as LFW's")
    missing = [path for path in pairs.paths if not (root / path).is_file()]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise DataError(
            f"{root}: {len(missing)} of {len(pairs.paths)} pictures that the pairs name are not there "
            f"({', '.join(missing[:_SHOWN])}{more}); give the folder that belongs to the list of pairs."
            + _what_lies_in(root)
        )


def _what_lies_in(root: Path) -> str:
    listing = walk(root)
    number = sum(len(names) for names in listing.pictures.values())
    example = next((f"{folder}/{names[0]}" for folder, names in sorted(listing.pictures.items())), "")
    return f" There: {number:,} pictures in {len(listing.pictures):,} folders" + (
        f", such as {example}." if example else "."
    )


def _counts(file: Path, line: str) -> tuple[int, int]:
    fields = line.split()
    if len(fields) not in (1, 2) or not all(_is_count(field) for field in fields):
        raise malformed(file, 1, line, _WANTED_FIRST)
    return (1, int(fields[0])) if len(fields) == 1 else (int(fields[0]), int(fields[1]))


def _is_count(field: str) -> bool:
    return field.isascii() and field.isdigit() and len(field) <= 9 and int(field) > 0


def _pictures(file: Path, number: int, line: str, num_fields: int) -> list[tuple[str, int]]:
    """(name, number) of a line's two pictures.  number: of the line, from 1."""
    fields = [field.strip() for field in line.split("\t")] if "\t" in line else line.split()
    if len(fields) != num_fields:
        raise malformed(file, number, line, _WANTED[num_fields])
    names = [fields[0], fields[0] if num_fields == 3 else fields[2]]
    counts = [fields[1], fields[-1]]
    if not (all(_is_name(name) for name in names) and all(_is_count(count) for count in counts)):
        raise malformed(file, number, line, _WANTED[num_fields])
    if num_fields == 4 and names[0] == names[1]:
        raise malformed(file, number, line, f"two people, not {names[0]} twice")
    if num_fields == 3 and int(counts[0]) == int(counts[1]):
        raise malformed(file, number, line, f"two pictures, not picture {counts[0]} twice")
    return [(name, int(count)) for name, count in zip(names, counts, strict=True)]


def _is_name(name: str) -> bool:
    """Whether the name is one folder's, inside the root."""
    return name not in ("", ".", "..") and not any(character in name for character in "/\\\0")


BATCH = 128


@dataclass(frozen=True, kw_only=True)
class PublicSet:
    """The pictures that a list of pairs names, in memory, and the pairs."""

    pictures: NDArray[np.uint8]  # [N, S, S, 3]
    pairs: FoldPairs


def with_absolute_public_set(settings: Settings, base: Path) -> Settings:
    """The settings with paths of the public set that mean the same in every process of the run.

    verification.public_pairs is looked for in verification.public_dir first, then by its own path.
    Settings without a public set are returned as they are.
    """
    verification = settings.verification
    if verification.public_dir == "none":
        return settings
    root = (base / Path(verification.public_dir).expanduser()).resolve()
    named = Path(verification.public_pairs).expanduser()
    pairs = root / named if (root / named).is_file() else (base / named).resolve()
    named_so = {"verification.public_dir": str(root), "verification.public_pairs": str(pairs)}
    return config.with_values(settings, named_so)


def open_public_set(settings: Settings) -> PublicSet | None:
    """Read the list and every picture it names; None where the settings name no public set.

    Raises ConfigError with private normalisation, DataError for a list or a picture that cannot be used.
    """
    verification = settings.verification
    if verification.public_dir == "none":
        return None
    if settings.model.normalisation == "private":
        raise ConfigError(
            [
                'verification.public_dir scores the global model, and with model.normalisation = "private" there is '
                'no single one; use "shared" or leave verification.public_dir out.'
            ]
        )
    root, file = Path(verification.public_dir), Path(verification.public_pairs)
    require_folder(root, "verification.public_dir is the folder with one folder a person, such as LFW's")
    if not file.is_file():
        raise DataError(
            f"verification.public_pairs: {file.name} is neither in {root} nor at {file}; "
            "give LFW's pairs.txt, by its name in that folder or by its own path."
        )
    return _packed(read_pair_list(file), root, file, settings)


def _packed(listed: PairList, root: Path, file: Path, settings: Settings) -> PublicSet:
    if listed.fold.max() == 0:
        raise DataError(
            f"{file}: one fold of pairs, but a fold's threshold comes from the other folds; "
            "give a list of several, such as LFW's pairs.txt."
        )
    listed = found_below(listed, root)
    require_pictures(listed, root)
    pictures = central_pictures(
        listed.paths,
        root,
        image_size=settings.data.image_size,
        crop=settings.verification.public_crop,
        advice="a public pair names it: replace it, or its lines.",
    )
    return PublicSet(pictures=pictures, pairs=FoldPairs(listed.first, listed.second, listed.genuine, listed.fold))


class PublicScorer:
    """Scores the global model on the public pairs, on this machine's fastest device, in float32."""

    def __init__(self, public: PublicSet, recogniser: Recogniser, manifest: Manifest) -> None:
        """recogniser: any with the manifest's tensors; its values are overwritten at each score."""
        self._public, self._recogniser, self._manifest = public, recogniser, manifest
        self._device = resolve_device("auto")

    @torch.no_grad()
    def scores(self, model: NDArray[np.float32], between: Callable[[], object]) -> dict[str, float]:
        """The ten-fold accuracy, AUC and EER of a global model, by their metrics' names.

        model: [manifest.size] float32.  between: called between batches; it may raise to end the work.
        Raises TrainingFailed when the scores are not finite.
        """
        load_shared(self._recogniser, model, self._manifest)
        self._recogniser.to(self._device).eval()
        pairs = self._public.pairs
        scores = pair_scores(np.concatenate(list(self._embeddings(between))), pairs)
        accuracy, _ = ten_fold_accuracy_of_scores(scores, pairs.genuine, pairs.fold)
        histogram = score_histogram(scores, pairs.genuine)
        return {
            of_split("public", "ten_fold_accuracy"): accuracy,
            of_split("public", AUC): float(roc_auc(histogram)),
            of_split("public", "eer"): float(eer(histogram)),
        }

    def _embeddings(self, between: Callable[[], object]) -> Iterable[NDArray[np.float32]]:
        every = np.arange(len(self._public.pictures))
        for batch in evaluation_batches(self._public.pictures, every, batch_size=BATCH, device=self._device):
            between()
            yield self._recogniser.embed(batch).float().cpu().numpy()


def public_scorer(settings: Settings, recogniser: Recogniser, manifest: Manifest) -> PublicScorer | None:
    """The scorer of the run's public set, or None where the settings name none.  Raises as `open_public_set`."""
    public = open_public_set(settings)
    return None if public is None else PublicScorer(public, recogniser, manifest)
