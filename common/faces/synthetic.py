"""Synthetic face data sets on disk, in the layouts of CelebA, VGGFace2 and ND-TWINS: `facefed data synth`.

The people do not exist; the pictures may be shown, copied and trained on freely. One data set is one folder of JPEGs
with its list files and a manifest, written last, that says which settings made it.
"""

import dataclasses
import errno
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.errors import DataError, unknown_name
from common.faces.synth_camera import STYLES, sample_quality, sample_size, sample_view
from common.faces.synth_layouts import (
    Member,
    Record,
    attributes_of,
    plan_celeba,
    plan_vggface2,
    write_celeba_lists,
    write_vggface2_lists,
)
from common.faces.synth_people import person_latent, picture_generator, read_traits
from common.faces.synth_portrait import render_face
from common.faces.synth_twins import CLOSENESS, plan_twins, twin_latent, write_twins_lists

MANIFEST = "synthetic.json"
_UNFINISHED_MANIFEST = f"{MANIFEST}.tmp"
_DRAWING = 1  # raise it whenever the same settings would give other pictures
_MIN_PEOPLE, _MAX_PEOPLE = 6, 100_000  # two for each split; six digits name a person
_MIN_FAMILIES, _MAX_FAMILIES = 6, 5_000  # likewise; five digits name a twin
_MIN_PICTURES, _MAX_PICTURES = 2, 9_999  # a genuine pair; four digits name a VGGFace2 picture
_MAX_FILES = 999_999  # six digits name a CelebA picture
_FULL = (errno.ENOSPC, errno.EDQUOT)

_PLANS = {"celeba": plan_celeba, "vggface2": plan_vggface2, "twins": plan_twins}
_LISTS = {"celeba": write_celeba_lists, "vggface2": write_vggface2_lists, "twins": write_twins_lists}
LAYOUTS = tuple(_PLANS)


@dataclass(frozen=True, kw_only=True)
class SynthSettings:
    """Which data set to draw.  The same settings give the same bytes."""

    layout: str = "celeba"  # of LAYOUTS
    num_people: int = 80  # twins: two of each family
    pictures_per_person: int = 24
    seed: int = 1  # other seeds make other people; so do other layouts with the same seed
    closeness: float = CLOSENESS  # of twins, in [0, 1]: the correlation of two siblings' latents


@dataclass(frozen=True, kw_only=True)
class SynthSummary:
    """What lies in the folder now."""

    num_people: int
    num_pictures: int
    drawn: bool  # False: the same data set was there already


def write_dataset(
    settings: SynthSettings,
    out: Path,
    *,
    num_processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> SynthSummary:
    """Draw a data set into the folder `out`; nothing is done when the same one is there already.

    num_processes: they share the drawing; the bytes do not depend on it.
    progress: called with (pictures done, pictures in all) after each person.
    An interrupted folder has no list files and is drawn again by the same call.
    Raises DataError for bad settings, a folder that holds something else, or a disk that is full or read-only.
    """
    _check(settings, num_processes)
    members = _PLANS[settings.layout](settings.seed, settings.num_people, settings.pictures_per_person)
    total = settings.num_people * settings.pictures_per_person
    summary = SynthSummary(num_people=settings.num_people, num_pictures=total, drawn=True)
    try:
        if _is_complete(settings, out):
            return dataclasses.replace(summary, drawn=False)
        _write_manifest(settings, out, complete=False)
        records: dict[str, Record] = {}
        for drawn in _drawn_people(settings, members, out, num_processes):
            records |= {record.path: record for record in drawn}
            if progress is not None:
                progress(len(records), total)
        _LISTS[settings.layout](out, members, records)
        _write_manifest(settings, out, complete=True)
    except OSError as error:
        raise DataError(_disk_problem(error, out, total)) from error
    return summary


def _check(settings: SynthSettings, num_processes: int) -> None:
    if settings.layout not in LAYOUTS:
        raise DataError(unknown_name("layout", settings.layout, LAYOUTS))
    of_twins = settings.layout == "twins"
    if of_twins and settings.num_people % 2:
        raise DataError(f"num_people = {settings.num_people} cannot be drawn; twins come in pairs: choose an even one.")
    if of_twins and not 0.0 <= settings.closeness <= 1.0:
        raise DataError(f"closeness = {settings.closeness:g} cannot be drawn; choose a number from 0 to 1.")
    for name, value, low, high in (
        ("num_families", settings.num_people // 2, _MIN_FAMILIES, _MAX_FAMILIES)
        if of_twins
        else ("num_people", settings.num_people, _MIN_PEOPLE, _MAX_PEOPLE),
        ("pictures_per_person", settings.pictures_per_person, _MIN_PICTURES, _MAX_PICTURES),
        ("num_people x pictures_per_person", settings.num_people * settings.pictures_per_person, 1, _MAX_FILES),
        ("seed", settings.seed, 0, 2**63 - 1),
        ("num_processes", num_processes, 1, 256),
    ):
        if not low <= value <= high:
            raise DataError(f"{name} = {value} cannot be drawn; choose a number from {low} to {high}.")


def _identity(settings: SynthSettings) -> dict[str, object]:
    chosen = dataclasses.asdict(settings)
    if settings.layout != "twins":
        del chosen["closeness"]
    return {"drawing": _DRAWING, **chosen}


def _is_complete(settings: SynthSettings, out: Path) -> bool:
    """Whether `out` already holds this very data set; False when it may be drawn there; DataError otherwise."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file; choose a folder for the synthetic data set.")
    if not out.is_dir() or all(path.name == _UNFINISHED_MANIFEST for path in out.iterdir()):
        return False
    try:
        found = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or "complete" not in found:
        raise DataError(f"{out}: holds files that are no synthetic data set; choose an empty or new folder.")
    complete = bool(found.pop("complete"))
    if found != _identity(settings):
        raise DataError(
            f"{out}: holds a synthetic data set made with other settings ({_told(found)}), not the ones asked for"
            f" ({_told(_identity(settings))}); choose another folder or delete this one."
        )
    return complete


def _told(identity: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in identity.items())


def _write_manifest(settings: SynthSettings, out: Path, *, complete: bool) -> None:
    """Replace the manifest in one step, so that it is never seen half-written."""
    out.mkdir(parents=True, exist_ok=True)
    fresh = out / _UNFINISHED_MANIFEST
    fresh.write_text(json.dumps({**_identity(settings), "complete": complete}, indent=2) + "\n", encoding="utf-8")
    fresh.replace(out / MANIFEST)


def _drawn_people(
    settings: SynthSettings, members: Sequence[Member], out: Path, num_processes: int
) -> Iterator[list[Record]]:
    for folder in sorted({(out / path).parent for member in members for path in member.paths}):
        folder.mkdir(parents=True, exist_ok=True)
    draw = partial(_draw_person, settings, out)
    if num_processes == 1:
        yield from map(draw, members)
        return
    # Started afresh, not forked: the caller may hold threads and open trackers.
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(draw, members)


def _latent(settings: SynthSettings, person: int) -> NDArray[np.float64]:
    if settings.layout == "twins":
        return twin_latent(settings.seed, person, settings.closeness)
    return person_latent(settings.seed, settings.layout, person)


def _draw_person(settings: SynthSettings, out: Path, member: Member) -> list[Record]:
    """Draw and write all pictures of one person."""
    layout, seed = settings.layout, settings.seed
    style, latent = STYLES[layout], _latent(settings, member.person)
    traits = read_traits(latent)
    records = []
    for number, path in enumerate(member.paths):
        rng = picture_generator(seed, layout, member.person, number)
        view, size, quality = sample_view(rng, style), sample_size(rng, style), sample_quality(rng, style)
        portrait = render_face(latent, view, style, size)
        Image.fromarray(portrait.picture).save(out / path, format="JPEG", quality=quality)
        landmarks = tuple((float(x), float(y)) for x, y in portrait.landmarks)
        records.append(
            Record(
                path=path, landmarks=landmarks, box=portrait.box, attributes=attributes_of(traits, view),
                masculine=traits["masculine"] > 0.5,
            )
        )  # fmt: skip
    return records


def _disk_problem(error: OSError, out: Path, total: int) -> str:
    if error.errno in _FULL:
        return f"{out}: no space left on the disk for {total} pictures (about 8 kB each); free some or choose another."
    return f"{out}: cannot be written: {error.strerror or error}; choose a folder you may write to."
