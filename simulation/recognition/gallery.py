"""A gallery: templates of the people who are enrolled, in a folder of one account, bound to the model that made them.

    GALLERY/gallery.json              who is enrolled, of which model; names the two files below and is written last
    GALLERY/templates-ID.safetensors  float32 [N, D] of length 1, one person's after the other's
    GALLERY/model-SHA.safetensors     the model itself (`recognition/model.py`): a gallery answers without a registry
    GALLERY/lock                      held while the gallery changes
    GALLERY/decisions.jsonl           what `facefed serve` decided (`recognition/service.py`)

A change is whole or did not happen: new files first, then gallery.json in one step, then the old files are deleted.  No
file keeps what was removed.  All are 0600.  No picture is kept, and neither names nor templates are told to anybody.
"""

import dataclasses
import datetime as dt
import difflib
import hashlib
import json
import logging
import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.errors import CheckpointError, UserError, escaped
from common.system.files import SEAL, InUse, lock, read_sealed_json, seal_of, write_bytes, write_parts
from simulation.recognition.search import Float32, Int64

FORMAT: Final = 1
INDEX: Final = "gallery.json"
LOCK: Final = "lock"
LONGEST_NAME: Final = 200  # characters
SAME_PICTURE: Final = 1.0 - 1e-5  # from this cosine on two templates of a person are of one picture
_TEMPLATES, _MODEL = "templates-", "model-"
_LOCKED_FOR_S: Final = 30.0  # a gallery of a million templates is written in less
_HASHED_ROWS: Final = 65_536  # at once
_UNIT: Final = 1e-3  # how far a template's length may be from 1
_LOOKS: Final = 5  # at a gallery that changes while it is opened

_log = logging.getLogger("facefed.gallery")

State = tuple[int, int, int]  # inode, time of its last change, ns, and bytes of gallery.json


@dataclass(frozen=True, kw_only=True)
class Binding:
    """The model whose templates a gallery holds."""

    sha256: str  # of its weights, as a run prints it
    source: str  # where it came from when it was bound: a run's id, models:/NAME/VERSION, a file

    @property
    def words(self) -> str:
        """For a line."""
        return f"{self.source} (SHA-256 {self.sha256[:12]})"


@dataclass(frozen=True, kw_only=True)
class Enrolled:
    """One person of a gallery."""

    key: str  # says nothing of the person: what an audit line has, and leads nowhere once the person is removed
    name: str
    num_templates: int
    enrolled: str  # when first, UTC, ISO 8601


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """What a gallery held when it was opened; it is not changed by what happens to the folder later."""

    folder: Path
    binding: Binding
    people: tuple[Enrolled, ...]
    templates: Float32  # [N, D] of length 1, mapped from the file
    first_rows: Int64  # [P], where each person's templates begin
    state: State  # of the folder before it was read: what changed since has another

    @property
    def model_file(self) -> Path:
        """The model that made the templates."""
        return self.folder / _model_name(self.binding)

    def templates_of(self, person: int) -> Float32:
        """The templates [k, D] of the person of that number."""
        begin = int(self.first_rows[person])
        return self.templates[begin : begin + self.people[person].num_templates]


@dataclass(frozen=True, kw_only=True)
class Added:
    """What became of an enrolment."""

    gallery: Gallery
    new: tuple[str, ...]  # people who were not there
    extended: tuple[str, ...]  # who got further templates, or others
    num_templates: int  # added
    num_known: int  # left out: the person had them already


# -- opened ------------------------------------------------------------------------------------------------------------


def is_gallery(folder: Path) -> bool:
    """Whether there is one."""
    return (folder / INDEX).is_file()


def open_gallery(folder: Path) -> Gallery:
    """The gallery as it is now.  Raises UserError where there is none, CheckpointError where it is damaged."""
    if not is_gallery(folder):
        raise UserError(
            f"{folder} is no gallery (it has no {INDEX}); make one: facefed enrol {folder} PEOPLE --model MODEL."
        )
    for _ in range(_LOOKS):
        state = state_of(folder)  # first: of a change in between the next look finds another one
        index = read_sealed_json(folder / INDEX)
        try:
            return _opened(folder, index, state)
        except FileNotFoundError:  # it was changed in between: then the new index names other files
            continue
        except OSError as error:
            raise CheckpointError(f"{folder}: {error.strerror}: its files cannot be read.") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{folder / INDEX} is no index of a gallery ({error}); restore the folder.") from None
    raise CheckpointError(f"{folder / INDEX} names a file that is not there; restore the folder.")


def _opened(folder: Path, index: Mapping[str, Any], state: State) -> Gallery:
    if index["format"] != FORMAT:
        raise ValueError(f"format {index['format']}, known is {FORMAT}")
    people = tuple(Enrolled(key=k, name=n, num_templates=int(c), enrolled=t) for k, n, c, t in index["people"])
    counts = np.array([one.num_templates for one in people], dtype=np.int64)
    about = index["templates"]
    templates = _mapped(folder / str(about["file"]), int(counts.sum()), int(about["width"]))
    if (counts < 1).any() or _digest([templates]) != about["sha256"]:
        raise ValueError("its templates are not those that were written")
    return Gallery(
        folder=folder,
        binding=Binding(sha256=str(index["model"]["sha256"]), source=str(index["model"]["source"])),
        people=people,
        templates=templates,
        first_rows=np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)[: len(people)],
        state=state,
    )


def state_of(folder: Path) -> State:
    """Another one after each change, found without reading the gallery.  Raises UserError where there is none."""
    try:
        about = (folder / INDEX).stat()
    except OSError:
        raise UserError(f"{folder} is no gallery any more (it has no {INDEX}).") from None
    return about.st_ino, about.st_mtime_ns, about.st_size


def _mapped(path: Path, num_rows: int, width: int) -> Float32:
    """The one tensor of a file of `_template_parts`, not read yet.  Raises FileNotFoundError and ValueError."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, 65_536)))
    if header["templates"]["shape"] != [num_rows, width] or header["templates"]["dtype"] != "F32":
        raise ValueError(f"{path.name} holds {header['templates']['shape']}, not [{num_rows}, {width}]")
    if path.stat().st_size != 8 + length + 4 * num_rows * width:
        raise ValueError(f"{path.name} is cut short")
    if not num_rows:
        return np.zeros((0, width), dtype=np.float32)
    return np.memmap(path, dtype="<f4", mode="r", offset=8 + length, shape=(num_rows, width))


def _digest(parts: Iterable[Float32]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for begin in range(0, len(part), _HASHED_ROWS):
            digest.update(np.ascontiguousarray(part[begin : begin + _HASHED_ROWS], dtype="<f4").data)
    return digest.hexdigest()


# -- changed -----------------------------------------------------------------------------------------------------------


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else changes the gallery while the block lasts.  Raises UserError where somebody does for long."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / LOCK).open("ab") as file:
        (folder / LOCK).chmod(0o600)
        try:
            if without := lock(file, _LOCKED_FOR_S):
                _log.warning("%s: nobody is kept from changing it meanwhile (%s)", folder, without.strerror)
        except InUse:
            raise UserError(f"{folder} is being changed by another program; try again when that is done.") from None
        yield


def require_binding(gallery: Gallery, binding: Binding, again: str) -> None:
    """Raise UserError where the gallery is of another model.  again: the command that enrols everybody anew."""
    if gallery.binding.sha256 != binding.sha256:
        raise UserError(
            f"{gallery.folder} holds templates of {gallery.binding.words}, and those of {binding.words} cannot be"
            f" compared with them; enrol everybody again: {again}"
        )


def add_people(
    folder: Path,
    binding: Binding,
    added: Mapping[str, Float32],
    *,
    keep_model: Callable[[Path], None],
    again: str,
    mode: str = "add",
) -> Added:
    """Enrol people, in a new gallery where there is none.

    added: name -> templates [k, D] float32 of length 1, k > 0.  keep_model: writes the model's file.
    mode: "add": a person who is known gets further templates.  "replace": these instead of the former; where the
    gallery is of another model it becomes one of this, if everybody in it is among `added`.
    again: the command that does so, for the line of an error.
    Raises UserError: another model, somebody missing, a name that cannot be one, a gallery in use.
    """
    if not added:
        raise UserError("nobody can be enrolled: no picture of anybody was taken.")
    checked = {checked_name(name): _checked(rows) for name, rows in added.items()}
    _require_new_folder_is_free(folder)
    with _alone(folder):
        known = open_gallery(folder) if is_gallery(folder) else None
        if known and known.binding.sha256 != binding.sha256:
            if mode != "replace":
                require_binding(known, binding, again)
            _require_everybody(known, checked, binding)
        before = {one.name: number for number, one in enumerate(known.people)} if known else {}
        num_known = 0
        if known and mode == "add":
            for name in before.keys() & checked.keys():
                fresh = _not_in(checked[name], known.templates_of(before[name]))
                num_known += len(checked[name]) - len(fresh)
                checked[name] = fresh
        extended = tuple(name for name in checked if name in before and len(checked[name]))
        new = tuple(name for name in checked if name not in before)
        if new or extended:
            model = folder / _model_name(binding)
            if not model.is_file():
                keep_model(model)
                model.chmod(0o600)
            people, pieces = _merged(known, checked, keep_former=mode == "add")
            width = next(iter(checked.values())).shape[1]
            former = known.templates if known else np.zeros((0, width), dtype=np.float32)
            _write(folder, binding, people, _joined(former, pieces), width)
        return Added(
            gallery=open_gallery(folder),
            new=new,
            extended=extended,
            num_templates=sum(map(len, checked.values())),
            num_known=num_known,
        )


def remove_people(folder: Path, names: Sequence[str]) -> Gallery:
    """Take people out for good: when this returns, no file of the gallery holds their names or templates.

    Raises UserError for a name that is not enrolled; nobody is removed then.
    """
    open_gallery(folder)  # a folder that is none gets no lock either
    with _alone(folder):
        known = open_gallery(folder)
        there = [one.name for one in known.people]
        for name in names:
            if name not in there:
                near = difflib.get_close_matches(name, there, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"facefed gallery list {folder} shows who is."
                raise UserError(escaped(f"{name!r} is not enrolled in {folder}; {hint}"))
        gone = set(names)
        rows = dict(zip(known.people, known.first_rows.tolist(), strict=True))
        kept = [one for one in known.people if one.name not in gone]
        parts = _joined(known.templates, [slice(rows[one], rows[one] + one.num_templates) for one in kept])
        _write(folder, known.binding, kept, parts, int(known.templates.shape[1]))
        return open_gallery(folder)


def checked_name(name: str) -> str:
    """A name that can be enrolled.  Raises UserError."""
    if not name.strip() or len(name) > LONGEST_NAME or not name.isprintable():
        shown = escaped(name if len(name) <= 80 else f"{name[:77]}...")
        raise UserError(
            f"{shown!r} cannot be a name: 1 to {LONGEST_NAME} characters that can be shown are; rename the person."
        )
    return name


def _checked(rows: NDArray[np.floating]) -> Float32:
    templates = np.ascontiguousarray(rows, dtype=np.float32)
    if templates.ndim != 2 or not len(templates):
        raise ValueError(f"templates {templates.shape} must be [k, D] with k > 0")
    if not (np.abs(np.linalg.norm(templates, axis=1) - 1.0) < _UNIT).all():  # NaN is not below either
        raise ValueError("templates must be of length 1")
    return templates


def _require_new_folder_is_free(folder: Path) -> None:
    """Raise UserError where a folder holds something else: no gallery shall be made in somebody's home by mistake."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder for the gallery.")
    if folder.is_dir() and not is_gallery(folder) and any(path.name != LOCK for path in folder.iterdir()):
        raise UserError(f"{folder} is no gallery and not empty; name a new folder for the gallery.")


def _require_everybody(known: Gallery, checked: Mapping[str, Float32], binding: Binding) -> None:
    missing = [one.name for one in known.people if one.name not in checked]
    if missing:
        first = ", ".join(missing[:5]) + (f" and {len(missing) - 5:,} more" if len(missing) > 5 else "")
        raise UserError(
            escaped(
                f"{known.folder} cannot become one of {binding.words}: {len(missing):,} of the people enrolled got no"
                f" template ({first}); add pictures of them, or take them out: facefed gallery remove."
            )
        )


def _not_in(rows: Float32, former: Float32) -> Float32:
    """The rows that are not among the former ones."""
    fresh: Float32 = rows[(rows @ former.T).max(axis=1) < SAME_PICTURE]
    return fresh


Piece = slice | Float32  # rows of the former file, or new ones


def _merged(
    known: Gallery | None, checked: Mapping[str, Float32], *, keep_former: bool
) -> tuple[list[Enrolled], list[Piece]]:
    """Everybody after an enrolment, and their templates in the same order."""
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    people: list[Enrolled] = []
    pieces: list[Piece] = []
    for one, row in zip(known.people, known.first_rows.tolist(), strict=True) if known else ():
        rows = checked.get(one.name)
        is_changed = rows is not None and len(rows) > 0
        if keep_former or not is_changed:
            pieces.append(slice(row, row + one.num_templates))
        number = one.num_templates
        if rows is not None and is_changed:
            pieces.append(rows)
            number = len(rows) + (number if keep_former else 0)
        people.append(dataclasses.replace(one, num_templates=number))
    there = {one.name for one in people}
    for name, rows in checked.items():
        if name not in there:
            people.append(Enrolled(key=secrets.token_hex(8), name=name, num_templates=len(rows), enrolled=now))
            pieces.append(rows)
    return people, pieces


def _joined(former: Float32, pieces: Iterable[Piece]) -> list[Float32]:
    """The templates in parts, neighbours in the former file as one: a part for each of a million people takes long."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, slice) and isinstance(last, slice) and last.stop == piece.start:
            joined[-1] = slice(last.start, piece.stop)
        else:
            joined.append(piece)
    return [former[piece] if isinstance(piece, slice) else piece for piece in joined]


def _write(folder: Path, binding: Binding, people: Sequence[Enrolled], parts: Sequence[Float32], width: int) -> None:
    """Write a gallery's new state, and delete every file that is not of it."""
    num_rows = sum(map(len, parts))
    if num_rows != sum(one.num_templates for one in people):
        raise ValueError(f"{num_rows} templates of people who have {sum(one.num_templates for one in people)}")
    name = f"{_TEMPLATES}{secrets.token_hex(8)}.safetensors"
    digest = hashlib.sha256()
    write_parts(folder / name, _template_parts(parts, num_rows, width, digest.update), mode=0o600)
    index = {
        "format": FORMAT,
        "model": {"sha256": binding.sha256, "source": binding.source},
        "templates": {"file": name, "sha256": digest.hexdigest(), "width": width},
        "people": [[one.key, one.name, one.num_templates, one.enrolled] for one in people],
    }
    text = json.dumps({**index, SEAL: seal_of(index)}, separators=(",", ":"), ensure_ascii=False)
    write_bytes(folder / INDEX, f"{text}\n".encode(), mode=0o600)
    for path in [*folder.glob(f"{_TEMPLATES}*"), *folder.glob(f"{_MODEL}*"), *folder.glob(".*.tmp")]:
        if path.name not in (name, _model_name(binding)):
            path.unlink(missing_ok=True)


def _template_parts(
    parts: Sequence[Float32], num_rows: int, width: int, seen: Callable[[memoryview], object]
) -> Iterator[bytes | memoryview]:
    """A safetensors file of one tensor, a block at a time.  seen: gets the data as they pass."""
    about = {"dtype": "F32", "shape": [num_rows, width], "data_offsets": [0, 4 * math.prod((num_rows, width))]}
    text = json.dumps({"templates": about}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for part in parts:
        for begin in range(0, len(part), _HASHED_ROWS):
            block = np.ascontiguousarray(part[begin : begin + _HASHED_ROWS], dtype="<f4").reshape(-1).view(np.uint8)
            seen(block.data)
            yield block.data


def _model_name(binding: Binding) -> str:
    return f"{_MODEL}{binding.sha256[:16]}.safetensors"
