"""`facefed data align`: photographs of people -> their faces, aligned, in a folder that training takes as `folder`.

Each photograph's outcome is a line of OUT/aligned.jsonl as soon as it is known, so that a stopped call is gone on with
by the same call, and a later one looks at new and changed photographs only.  Two lists are made of it at the end: of
the faces with their landmarks, and of what was left out with the reason.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from common.errors import DataError
from common.faces.account import is_picture
from common.faces.decode import ALIGNED, UnusablePicture, coded_jpeg, detector, in_processes, open_upright, read_picture
from common.faces.detect import Face, subject
from common.faces.index import FaceIndex, read_index
from common.faces.packing import stamps_of
from common.faces.photos import aligned
from common.models.mtcnn import weights_digest
from common.system.files import write_bytes

FACES_LIST: Final = "landmarks.csv"
LEFT_OUT_LIST: Final = "left_out.csv"
_JOB_PHOTOS: Final = 16
_NUMBER: Final = re.compile(r"\.[0-9]+$")  # at the end of a further face's name
_POINTS: Final = ("left_eye", "right_eye", "nose", "left_mouth", "right_mouth")
_QUALITY: Final = ("size_px", "blur", "yaw_deg", "pitch_deg", "roll_deg")


@dataclass(frozen=True, kw_only=True)
class AlignSettings:
    """How photographs become faces.

    image_size: px, width and height of the aligned face.  min_size_px: the shorter side of a face's box in the
    photograph; smaller ones are left out.  every_face: not only the one that a photograph is of (`detect.subject`).
    """

    image_size: int = 112
    min_size_px: int = 40
    every_face: bool = False


@dataclass(frozen=True, kw_only=True)
class AlignSummary:
    """What lies in OUT now.

    num_photos, num_aligned: photographs there are, and those that gave a face.  num_faces: pictures written.
    num_with_several: photographs with more than one face that is large enough.
    left_out: kind of reason -> photographs.  num_new: photographs that this call looked at.
    num_gone: faces in OUT whose photograph is not there any more.
    """

    num_photos: int
    num_aligned: int
    num_faces: int
    num_with_several: int
    left_out: Mapping[str, int]
    num_new: int
    num_gone: int


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A few photographs for one process.  stems: where their faces go, relative to out, without the ending."""

    root: Path
    out: Path
    paths: tuple[str, ...]
    stems: tuple[str, ...]
    settings: AlignSettings


def align_photos(
    photos: Path,
    out: Path,
    settings: AlignSettings,
    *,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
) -> AlignSummary:
    """Align every photograph below `photos`, one folder a person, into the same folders of `out`.

    progress: called with (photographs done, photographs in all).
    Raises DataError: what `read_index` says of photos; `out` inside it, with something else in it, or aligned with
    other settings; a disk that is full or read-only.
    """
    _check(settings, workers)
    _check_apart(photos, out)
    index = read_index("folder", photos)
    try:
        known = _begin(out, settings)
        entries = _gone_on_with(index, out, settings, known, workers=workers, progress=progress)
        _write_lists(out, entries)
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written: {error.strerror}; make room there, then run the same command again: what is"
            " done is kept."
        ) from None
    return _summary(entries, num_new=sum("new" in entry for entry in entries.values()), known=known)


def _check(settings: AlignSettings, workers: int) -> None:
    if not 32 <= settings.image_size <= 512:
        raise DataError(f"--size {settings.image_size}: give 32 to 512 px.")
    if settings.min_size_px < 1:
        raise DataError(f"--min-size {settings.min_size_px}: give 1 px or more.")
    if workers < 1:
        raise DataError(f"--jobs {workers}: give 1 or more.")


def _check_apart(photos: Path, out: Path) -> None:
    inside, outside = out.resolve(), photos.resolve()
    if inside == outside or outside in inside.parents:
        raise DataError(f"{out}: lies in {photos}, so its pictures would be read as photographs; give another folder.")


def _begin(out: Path, settings: AlignSettings) -> dict[str, dict[str, Any]]:
    """Make OUT, or read what its journal says: photograph -> its line."""
    head = {"format": 1, "detector": weights_digest(), **asdict(settings)}
    journal = out / ALIGNED
    if not journal.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DataError(f"{out}: holds something else than aligned faces; give a folder that is new or empty.")
        out.mkdir(parents=True, exist_ok=True)
        write_bytes(journal, (json.dumps(head) + "\n").encode())
        return {}
    first, *lines = [*_lines(journal)] or [{}]  # an empty file has no head
    if first != head:
        differing = ", ".join(f"{name} {first.get(name)}" for name in head if first.get(name) != head[name])
        raise DataError(f"{out}: was aligned otherwise ({differing}); give the same options, or another folder.")
    return {line["photo"]: line for line in lines}


def _lines(journal: Path) -> Iterator[dict[str, Any]]:
    """The journal's lines; a last one that a killed process left half is none."""
    for text in journal.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            value = json.loads(text)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def _gone_on_with(
    index: FaceIndex,
    out: Path,
    settings: AlignSettings,
    known: Mapping[str, dict[str, Any]],
    *,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, dict[str, Any]]:
    """Photograph -> its line, of every photograph there is, in the index's order."""
    stamps = stamps_of(index).tolist()
    paths = list(index.paths)
    found: dict[str, dict[str, Any]] = {}
    for path, stamp in zip(paths, stamps, strict=True):
        entry = known.get(path)
        if entry is not None and entry["stamp"] == stamp and _are_there(out, entry):
            found[path] = entry
    todo = [path for path in paths if path not in found]
    for path in todo:  # what a changed photograph showed earlier is none of its faces
        for face in known.get(path, {}).get("faces", ()):
            (out / face["file"]).unlink(missing_ok=True)
    stamp_of, stem_of = dict(zip(paths, stamps, strict=True)), _stems(paths)
    jobs = [
        _Job(
            root=index.root, out=out, paths=tuple(part), stems=tuple(stem_of[path] for path in part), settings=settings
        )
        for part in (todo[start : start + _JOB_PHOTOS] for start in range(0, len(todo), _JOB_PHOTOS))
    ]
    workers = min(workers, len(jobs))
    if progress is not None:
        progress(len(found), len(paths))
    with (out / ALIGNED).open("a", encoding="utf-8") as journal:
        for lines in in_processes(_align, jobs, workers) if workers > 1 else map(_align, jobs):
            for line in lines:
                line["stamp"] = stamp_of[line["photo"]]
                found[line["photo"]] = line | {"new": True}
                journal.write("\n" + json.dumps(line))  # a half line before it stays alone
            journal.flush()
            if progress is not None:
                progress(len(found), len(paths))
    return {path: found[path] for path in paths}


def _are_there(out: Path, entry: Mapping[str, Any]) -> bool:
    """Whether the faces of a photograph are still as large as they were written."""
    try:
        return all((out / face["file"]).stat().st_size == face["bytes"] for face in entry["faces"])
    except OSError:
        return False


def _stems(paths: Sequence[str]) -> dict[str, str]:
    """Where the faces of each photograph go: its own path without the ending, with it where two would be one.

    A further face of a.jpg goes to a.jpg.2, so a photograph a.jpg.2.png keeps its ending, as a.jpg.png does.
    """
    bare = {path: path.rpartition(".")[0] or path for path in paths}
    number = Counter(stem.casefold() for stem in bare.values())
    return {
        path: path if number[stem.casefold()] > 1 or is_picture(_NUMBER.sub("", stem)) else stem
        for path, stem in bare.items()
    }


def _align(job: _Job) -> list[dict[str, Any]]:
    """What became of each photograph of a job, whose faces are written; no photograph can make it fail."""
    found = []
    for path, stem in zip(job.paths, job.stems, strict=True):
        line: dict[str, Any] = {"photo": path, "faces": [], "num_large": 0, "reason": ""}
        try:
            _align_one(job, path, stem, line)
        except UnusablePicture as error:
            line["reason"] = str(error)
        found.append(line)
    return found


def _align_one(job: _Job, path: str, stem: str, line: dict[str, Any]) -> None:
    settings = job.settings
    image = open_upright(read_picture(job.root / path))[0]
    faces = detector().detect(image)
    if not faces:
        raise UnusablePicture("no face found")
    large = [face for face in faces if face.quality.size_px >= settings.min_size_px]
    if not large:
        raise UnusablePicture(f"face too small: {faces[0].quality.size_px:.0f} px, at least {settings.min_size_px}")
    line["num_large"] = len(large)
    one = subject(large, image.shape[1], image.shape[0])
    others = [face for face in large if face is not one] if settings.every_face else []
    for number, face in enumerate([one, *others] if one else others):
        file = f"{stem}.jpg" if number == 0 else f"{path}.{number + 1}.jpg"
        content = coded_jpeg(aligned(image, face, settings.image_size))
        (job.out / file).parent.mkdir(parents=True, exist_ok=True)
        (job.out / file).write_bytes(content)
        line["faces"].append({"file": file, "bytes": len(content), **_told(face)})


def _told(face: Face) -> dict[str, Any]:
    quality = asdict(face.quality)
    return {
        "box": [round(float(value), 2) for value in face.box],
        "landmarks": [[round(float(value), 2) for value in point] for point in face.landmarks],
        "score": round(face.score, 4),
        **{name: round(quality[name], 3) for name in _QUALITY},
    }


def _write_lists(out: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    points = [f"{name}_{axis}" for name in _POINTS for axis in "xy"]
    faces = [["file", "photo", "x", "y", "width", "height", *points, "score", *_QUALITY]]
    left_out = [["photo", "reason"]]
    for photo, entry in entries.items():
        for face in entry["faces"]:
            numbers = [*face["box"], *(value for point in face["landmarks"] for value in point)]
            faces.append([face["file"], photo, *numbers, face["score"], *(face[name] for name in _QUALITY)])
        if entry["reason"]:
            left_out.append([photo, entry["reason"]])
    for name, rows in ((FACES_LIST, faces), (LEFT_OUT_LIST, left_out)):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_bytes(out / name, text.getvalue().encode("utf-8", "surrogateescape"))


def _summary(
    entries: Mapping[str, Mapping[str, Any]], *, num_new: int, known: Mapping[str, Mapping[str, Any]]
) -> AlignSummary:
    reasons = Counter(entry["reason"].split(":")[0] for entry in entries.values() if entry["reason"])
    return AlignSummary(
        num_photos=len(entries),
        num_aligned=sum(not entry["reason"] for entry in entries.values()),
        num_faces=sum(len(entry["faces"]) for entry in entries.values()),
        num_with_several=sum(entry["num_large"] > 1 for entry in entries.values()),
        left_out=dict(reasons.most_common()),
        num_new=num_new,
        num_gone=sum(len(entry["faces"]) for photo, entry in known.items() if photo not in entries),
    )


def summary_lines(out: Path, summary: AlignSummary, settings: AlignSettings) -> list[str]:
    """What is told at the end, a line each."""
    of = f"{summary.num_aligned:,} of {summary.num_photos:,} photographs"
    earlier = summary.num_photos - summary.num_new
    lines = [f"{out}: {summary.num_faces:,} faces of {of}" + (f"; {earlier:,} were done earlier" if earlier else "")]
    if summary.left_out:
        counts = ", ".join(f"{kind} {number:,}" for kind, number in summary.left_out.items())
        lines.append(f"left out: {counts}; each with its reason in {out / LEFT_OUT_LIST}")
    if summary.num_with_several:
        what = "each was taken" if settings.every_face else "the large one near the middle was taken (--all takes each)"
        lines.append(f"{summary.num_with_several:,} photographs show several faces: {what}")
    if summary.num_gone:
        lines.append(f"{summary.num_gone:,} faces lie there whose photographs are gone")
    return lines
