"""`facefed verify`, `enrol`, `identify` and `gallery`: what each prints, in words or as JSON."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np

from common.errors import DataError, UserError, escaped
from common.faces.index import FaceIndex, read_index
from common.settings import Settings
from common.system.console import PackProgress, table
from common.tracking.address import with_absolute_tracking
from simulation.recognition.asking import FindsFaces, Recognised, Recognition, look_alikes
from simulation.recognition.decision import chosen_threshold, finite
from simulation.recognition.gallery import Added, Gallery, add_people, is_gallery, open_gallery, remove_people
from simulation.recognition.model import FaceModel, load_model, model_of_file
from simulation.recognition.photographs import Photographs, Seen, whose
from simulation.recognition.search import Float32

MOST_SHOWN: Final = 20  # people of two names who may be one; how many more there are is told


@dataclass(frozen=True, kw_only=True)
class Ask:
    """How a model is asked."""

    model: str = ""  # models:/..., a run's id or folder, a file; "": the gallery's own
    far: float | None = None
    anyway: bool = False
    shape: str = "text"  # or "json"
    address: str = field(default="", repr=False)  # of the tracking, with its password; "": the settings' own is whole


def find(settings: Settings, reference: str, address: str) -> FaceModel:
    """The model of that name, as the command's tracking and runs have it."""
    settings, address = with_absolute_tracking(settings, address or settings.tracking.uri, Path.cwd())
    return load_model(reference, settings, address)


# -- verify ------------------------------------------------------------------------------------------------------------


def verify(settings: Settings, ask: Ask, pictures: tuple[Path, Path], out: TextIO) -> int:
    """`facefed verify`: whether two photographs show one person."""
    for path in pictures:
        if not path.exists():  # before a model is loaded
            raise DataError(f"{path}: missing; give another picture.")
    asked = Recognition.of(find(settings, ask.model, ask.address), far=ask.far, anyway=ask.anyway)
    found = asked.compare(*pictures)
    notes = [
        *(_seen_note(path, face, number) for path, face, number in
          zip(pictures, (found.first, found.second), found.num_faces, strict=True)),
        *asked.cautions,
    ]  # fmt: skip
    if ask.shape == "json":
        about = {"same": found.same, "score": found.score, **_asked(asked), "notes": [note for note in notes if note]}
        out.write(f"{json.dumps(finite(about))}\n")
        return 0
    verdict, sign = ("the same person", ">=") if found.same else ("two people", "<")
    out.write(f"{escaped(verdict)}: score {found.score:.3f} {sign} threshold {found.threshold.threshold:.3f}\n")
    out.write(f"threshold: {asked.rate}\n{_about(asked.model, asked)}\n")
    out.writelines(f"{escaped(note)}\n" for note in notes if note)
    return 0


def _asked(asked: Recognition) -> dict[str, Any]:
    threshold, known = asked.threshold, asked.known
    return {
        "threshold": threshold.threshold,
        "far": threshold.far,
        "far_interval": [threshold.far_low, threshold.far_high],
        "eer": known.eer,
        "num_people": known.num_people,
        "num_impostor_pairs": known.num_impostor_pairs,
        "model": asked.model.binding.source,
        "model_sha256": asked.model.binding.sha256,
    }


def _about(model: FaceModel, asked: Recognition) -> str:
    return f"model: {model.binding.words}, EER {asked.known.eer:.1%}"


def _seen_note(path: Path, face: Seen, num_faces: int) -> str:
    """What to know of a picture that was looked at; "" where nothing is special."""
    several = f"{num_faces} faces, of which the largest counts" if num_faces > 1 else ""
    said = "; ".join(filter(None, (several, face.faults)))
    return f"{path}: {said}" if said else ""


# -- enrol -------------------------------------------------------------------------------------------------------------


def enrol(settings: Settings, ask: Ask, folder: Path, people: Path, out: TextIO, err: TextIO, *, mode: str) -> int:
    """`facefed enrol`: templates of the people of a folder, one folder a person, into a gallery."""
    index = read_index("folder", people)
    reference = ask.model
    if not reference:
        if not is_gallery(folder):
            raise UserError(
                f"{folder} is no gallery yet; say of which model it shall be: --model models:/NAME@champion."
            )
        reference = str(open_gallery(folder).model_file)
    model = find(settings, reference, ask.address)
    again = shlex.join(["facefed", "enrol", str(folder), str(people), "--model", reference, "--replace"])
    progress = PackProgress("enrolling", err)
    try:
        templates, left_out = _templates_of(index, model, Photographs(model.image_size), progress)
    finally:
        progress.close()
    _tell_left_out(index, templates, left_out, out)
    added = add_people(folder, model.binding, templates, keep_model=model.keep, again=again, mode=mode)
    _tell_added(added, model, out)
    return 0


def _templates_of(
    index: FaceIndex, model: FaceModel, photographs: FindsFaces, progress: PackProgress
) -> tuple[dict[str, Float32], list[tuple[str, str]]]:
    """Name -> templates of each person's good pictures; and (path, reason) of the others."""
    pictures: dict[str, list[Float32]] = {}
    left_out = []
    for number, (path, person) in enumerate(zip(index.paths, index.person.tolist(), strict=True)):
        progress(number, len(index))
        try:
            face, reason = whose(photographs.faces(index.root / path))
        except DataError as error:
            left_out.append((path, str(error).removeprefix(f"{index.root / path}: ").partition(";")[0]))
            continue
        if face is None:
            left_out.append((path, reason))
        else:
            pictures.setdefault(index.people[person], []).append(model.embed(face.picture[None]))
    progress(len(index), len(index))
    return {name: np.concatenate(rows) for name, rows in pictures.items()}, left_out


def _tell_left_out(
    index: FaceIndex, templates: dict[str, Float32], left_out: Sequence[tuple[str, str]], out: TextIO
) -> None:
    out.writelines(f"left out: {escaped(path)}: {escaped(reason)}\n" for path, reason in left_out)
    if words := index.account.words():
        out.write(f"passed over: {escaped(words)}\n")
    nobody = [name for name in index.people if name not in templates]
    out.writelines(f"not enrolled: {escaped(name)}: no picture of theirs was taken\n" for name in nobody)


def _tell_added(added: Added, model: FaceModel, out: TextIO) -> None:
    known = f", {added.num_known:,} were there already" if added.num_known else ""
    gallery = added.gallery
    out.write(
        f"enrolled: {len(added.new):,} new people, {len(added.extended):,} known ones;"
        f" {added.num_templates:,} templates{known}\n"
        f"{gallery.folder}: {len(gallery.people):,} people, {len(gallery.templates):,} templates of"
        f" {gallery.binding.words}\n"
    )
    if model.caution:
        out.write(f"{model.caution}\n")
    if model.thresholds is None or not model.thresholds.rows:
        out.write("warning: this model carries no thresholds, so nobody is looked for under two names.\n")
        return
    threshold = chosen_threshold(model.thresholds, None)
    pairs = look_alikes(gallery, [*added.new, *added.extended], threshold.threshold)
    out.writelines(
        f"warning: {escaped(one)} and {escaped(other)} may be one person under two names (score {score:.3f} >="
        f" {threshold.threshold:.3f}, FAR {threshold.far:g})\n"
        for one, other, score in pairs[:MOST_SHOWN]
    )
    if len(pairs) > MOST_SHOWN:
        out.write(f"warning: and {len(pairs) - MOST_SHOWN:,} more such pairs\n")


# -- identify ----------------------------------------------------------------------------------------------------------


def identify(ask: Ask, folder: Path, picture: Path, top: int, out: TextIO) -> int:
    """`facefed identify`: who is on a photograph, each face of it."""
    if top < 1:
        raise UserError(f"--top {top}: ask for at least one.")
    gallery = open_gallery(folder)
    asked = Recognition.of(model_of(gallery), far=ask.far, anyway=ask.anyway)
    found = asked.identify(picture, gallery, top)
    if ask.shape == "json":
        faces = [_face_json(one) for one in found]
        about = {"faces": faces, **_asked(asked), "search": asked.search_rate(gallery)}
        out.write(f"{json.dumps(finite(about))}\n")
        return 0
    for number, one in enumerate(found, start=1):
        x, y, width, height = one.face.box
        who = escaped(one.person.name) if one.person else "unknown"
        out.write(f"face {number} of {len(found)} at {x:.0f},{y:.0f}, {width:.0f} x {height:.0f} px: {who}\n")
        rows = [(f"{c.score:.3f}", "yes" if c.score >= asked.threshold.threshold else "no", c.person.name) for c in
                one.candidates]  # fmt: skip
        if rows:
            out.write(f"{table([('score', 'reaches threshold', 'name'), *rows])}\n")
        if one.face.faults:
            out.write(f"note: {one.face.faults}\n")
    out.write(f"threshold {asked.threshold.threshold:.3f}: {asked.rate}\nsearch: {asked.search_rate(gallery)}\n")
    out.write(f"{_about(asked.model, asked)}\n")
    out.writelines(f"{note}\n" for note in asked.cautions)
    return 0


def model_of(gallery: Gallery) -> FaceModel:
    """The model that a gallery keeps, which is that of its templates.  Raises CheckpointError where it is not."""
    model = model_of_file(gallery.model_file)
    if model.binding.sha256 != gallery.binding.sha256:
        raise UserError(f"{gallery.model_file} is not {gallery.binding.words}; restore the folder.")
    return model


def _face_json(one: Recognised) -> dict[str, Any]:
    return {
        "name": one.person.name if one.person else None,
        "box": list(one.face.box),
        "faults": one.face.faults,
        "candidates": [{"name": each.person.name, "score": each.score} for each in one.candidates],
    }


# -- gallery -----------------------------------------------------------------------------------------------------------


def list_people(folder: Path, out: TextIO) -> int:
    """`facefed gallery list`: who is enrolled."""
    gallery = open_gallery(folder)
    if gallery.people:
        rows = [(one.name, f"{one.num_templates}", one.enrolled) for one in gallery.people]
        out.write(f"{table([('name', 'templates', 'enrolled (UTC)'), *rows])}\n")
    out.write(f"{len(gallery.people):,} people, {len(gallery.templates):,} templates of {gallery.binding.words}\n")
    return 0


def remove(folder: Path, names: Sequence[str], out: TextIO) -> int:
    """`facefed gallery remove`: take people out for good."""
    gallery = remove_people(folder, names)
    left = f"{len(gallery.people):,} enrolled"
    out.write(f"removed for good: {', '.join(map(escaped, names))}; {left} in {folder}\n")
    return 0
