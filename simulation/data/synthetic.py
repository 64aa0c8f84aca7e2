"""Synthetic face data sets on disk, in the layouts of CelebA, VGGFace2 and ND-TWINS: `facefed data synth`.

The people do not exist; the pictures may be shown, copied and trained on freely. One data set is one folder of JPEGs
with its list files and a manifest, written last, that says which settings made it. First what each layout is made of:
which person's picture gets which name, and the list files around the pictures.
"""

import dataclasses
import errno
import json
import multiprocessing
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.errors import DataError, unknown_name
from common.faces import celeba, vggface2
from common.faces.datasets import DATASETS, DRAWN, OF_FAMILIES
from common.faces.twins import PAIRS_FILE, PICTURES_FILE
from simulation.data.synth_camera import (
    FOUND_PICTURES,
    PRESS_PICTURES,
    STUDY_PORTRAITS,
    Style,
    View,
    sample_quality,
    sample_size,
    sample_view,
)
from simulation.data.synth_people import (
    TRAITS,
    Traits,
    family_latent,
    order_generator,
    person_latent,
    picture_generator,
    read_traits,
)
from simulation.data.synth_portrait import render_face

_TRAIN, _VALID, _TEST = 0, 1, 2  # CelebA's partition numbers
_FRACTION_VALID_PEOPLE, _FRACTION_TEST_PEOPLE = 0.12, 0.2
_MIN_PEOPLE_OF_A_SPLIT = 2  # one person alone makes no impostor pair


@dataclass(frozen=True, kw_only=True)
class Member:
    """One person of a data set: their number in it, split, and the pictures to be drawn, relative to its root."""

    person: int  # names the latent
    number: int  # names the person in the files, from 1
    partition: int
    paths: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Record:
    """What the lists say about one drawn picture; landmarks and box in px, as in `Portrait`."""

    path: str
    landmarks: tuple[tuple[float, float], ...]
    box: tuple[int, int, int, int]
    attributes: frozenset[str]
    masculine: bool


_ATTRIBUTE_NAMES = (
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips", "Big_Nose",
    "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses",
    "Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache",
    "Narrow_Eyes", "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks",
    "Sideburns", "Smiling", "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick",
    "Wearing_Necklace", "Wearing_Necktie", "Young",
)  # fmt: skip
# The attributes that the drawing knows; the others are always absent.
_ATTRIBUTES: dict[str, Callable[[Traits, View], bool]] = {
    "Arched_Eyebrows": lambda t, _: t["brow_arch"] > 0.09,
    "Bangs": lambda t, _: t["fringe"] > 0.75,
    "Big_Lips": lambda t, _: t["upper_lip"] + t["lower_lip"] > 0.21,
    "Big_Nose": lambda t, _: t["nose_width"] > 0.24,
    "Black_Hair": lambda t, _: t["age"] < 0.8 and t["hair_tone"] < 0.2,
    "Blond_Hair": lambda t, _: t["age"] < 0.8 and t["hair_tone"] > 0.85,
    "Blurry": lambda _, v: v.blur_px > 1.0,
    "Brown_Hair": lambda t, _: t["age"] < 0.8 and 0.2 <= t["hair_tone"] < 0.6,
    "Bushy_Eyebrows": lambda t, _: t["brow_thickness"] > 0.075,
    "Eyeglasses": lambda _, v: bool(v.extras & {"glasses", "sunglasses"}),
    "Gray_Hair": lambda t, _: t["age"] > 0.85,
    "Male": lambda t, _: t["masculine"] > 0.5,
    "Mouth_Slightly_Open": lambda _, v: v.mouth_opening > 0.0,
    "Mustache": lambda t, _: t["moustache"] > 0.1,
    "Narrow_Eyes": lambda t, _: t["eye_opening"] < 0.085,
    "No_Beard": lambda t, _: t["beard"] <= 0.02,
    "Pale_Skin": lambda t, _: t["skin_tone"] > 0.85,
    "Receding_Hairline": lambda t, _: t["hairline"] < -0.98,
    "Rosy_Cheeks": lambda t, _: t["cheek_colour"] > 0.8,
    "Smiling": lambda _, v: v.smile > 0.35,
    "Wavy_Hair": lambda t, _: t["hair_wave"] > 0.6,
    "Wearing_Hat": lambda _, v: bool(v.extras & {"cap", "hat"}),
    "Young": lambda t, _: t["age"] < 0.65,
}


def attributes_of(traits: Traits, view: View) -> frozenset[str]:
    """The CelebA attributes that a person has in a picture."""
    return frozenset(name for name, holds in _ATTRIBUTES.items() if holds(traits, view))


def num_test_people(num_people: int) -> int:
    """How many of so many people (or families) the official test split has."""
    return max(_MIN_PEOPLE_OF_A_SPLIT, round(_FRACTION_TEST_PEOPLE * num_people))


def _partitions(num_people: int) -> list[int]:
    """How many people of each split, as a partition number for each."""
    num_test = num_test_people(num_people)
    num_valid = max(_MIN_PEOPLE_OF_A_SPLIT, round(_FRACTION_VALID_PEOPLE * num_people))
    return [_TRAIN] * (num_people - num_test - num_valid) + [_VALID] * num_valid + [_TEST] * num_test


def plan_celeba(rng: np.random.Generator, num_people: int, pictures_per_person: int) -> list[Member]:
    """Numbered pictures: train, valid and test one after another, people shuffled inside each, as in the original."""
    numbers = (rng.permutation(num_people) + 1).tolist()
    partitions = _partitions(num_people)
    paths: list[list[str]] = [[] for _ in range(num_people)]
    next_file = 1
    for partition in (_TRAIN, _VALID, _TEST):
        slots = [p for p in range(num_people) if partitions[p] == partition for _ in range(pictures_per_person)]
        for slot in rng.permutation(len(slots)).tolist():
            paths[slots[slot]].append(f"img_align_celeba/{next_file:06d}.jpg")
            next_file += 1
    return [
        Member(person=p, number=numbers[p], partition=partitions[p], paths=tuple(paths[p])) for p in range(num_people)
    ]


def plan_vggface2(rng: np.random.Generator, num_people: int, pictures_per_person: int) -> list[Member]:
    """One folder a person under train/ or test/; numbers are shuffled over both. There is no validation split."""
    numbers = (rng.permutation(num_people) + 1).tolist()
    members = []
    for person, partition in enumerate(_partitions(num_people)):
        folder = f"{'test' if partition == _TEST else 'train'}/n{numbers[person]:06d}"
        paths = tuple(f"{folder}/{picture + 1:04d}_01.jpg" for picture in range(pictures_per_person))
        members.append(Member(person=person, number=numbers[person], partition=partition, paths=paths))
    return members


def _write(path: Path, lines: Sequence[str], end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines).encode())


def write_celeba_lists(root: Path, members: Sequence[Member], records: Mapping[str, Record]) -> None:
    """Identity, partition (both with CRLF, like the official ones), landmarks, boxes and attributes.

    The official boxes belong to the pictures before alignment; here there are no others, so they fit these.
    """
    owners = {path: member for member in members for path in member.paths}
    names = sorted(owners)
    short = {path: Path(path).name for path in names}
    crlf = "\r\n"
    _write(root / celeba.IDENTITY, [f"{short[p]} {owners[p].number}" for p in names], crlf)
    _write(root / celeba.PARTITION, [f"{short[p]} {owners[p].partition}" for p in names], crlf)
    points = (
        "lefteye_x lefteye_y righteye_x righteye_y nose_x nose_y leftmouth_x leftmouth_y rightmouth_x rightmouth_y "
    )
    rows = [short[p] + "".join(f" {round(v):4d}" for point in records[p].landmarks for v in point) for p in names]
    _write(root / celeba.LANDMARKS, [str(len(names)), points, *rows])
    rows = [short[p] + "  " + "".join(f" {v:3d}" for v in records[p].box) for p in names]
    _write(root / "list_bbox_celeba.txt", [str(len(names)), "image_id x_1 y_1 width height ", *rows])
    rows = [
        short[p] + "".join(f" {1 if name in records[p].attributes else -1:2d}" for name in _ATTRIBUTE_NAMES)
        for p in names
    ]
    _write(root / "list_attr_celeba.txt", [str(len(names)), " ".join(_ATTRIBUTE_NAMES) + " ", *rows])


def write_vggface2_lists(root: Path, members: Sequence[Member], records: Mapping[str, Record]) -> None:
    """Lists of pictures, people, boxes and landmarks, for train and test."""
    people = ["Class_ID, Name, Sample_Num, Flag, Gender"]
    for member in sorted(members, key=lambda m: m.number):
        flag, gender = int(member.partition != _TEST), "m" if records[member.paths[0]].masculine else "f"
        name = f"Made_Up_Person_{member.number}"
        people.append(f'n{member.number:06d}, "{name}", {len(member.paths)}, {flag}, {gender}')
    _write(root / vggface2.META, people)
    for split in ("train", "test"):
        paths = sorted(path for path in records if path.startswith(f"{split}/"))
        short = {path: path.removeprefix(f"{split}/") for path in paths}
        _write(root / f"{split}_list.txt", [short[p] for p in paths])
        stem = {path: short[path].removesuffix(".jpg") for path in paths}
        boxes = [f'"{stem[p]}",' + ",".join(str(v) for v in records[p].box) for p in paths]
        _write(root / "bb_landmark" / f"loose_bb_{split}.csv", ["NAME_ID,X,Y,W,H", *boxes])
        header = "NAME_ID," + ",".join(f"P{i}{axis}" for i in range(1, 6) for axis in "XY")
        rows = [f'"{stem[p]}",' + ",".join(f"{v:.6f}" for point in records[p].landmarks for v in point) for p in paths]
        _write(root / "bb_landmark" / f"loose_landmark_{split}.csv", [header, *rows])


CLOSENESS = 0.9  # siblings differ by a third (sqrt(1 - 0.9)) of what strangers differ by
_SHARED = [list(TRAITS).index(name) for name in ("masculine", "age")]
_TWIN_STREAM = 303
_FIRST_TWIN = 90_001


def twin_latent(seed: int, person: int, closeness: float) -> NDArray[np.float64]:
    """The latent of one twin, float64 [LATENT_SIZE]; people 2 f and 2 f + 1 are family f.  closeness: in [0, 1].

    Each entry is sqrt(closeness) times the family's and sqrt(1 - closeness) times the twin's own, so it stays standard
    normal, and closeness is the correlation of the two: 0 makes strangers, 1 one and the same face. Sex and age, which
    twins cannot differ in, are the family's alone.
    """
    family = family_latent(seed, _TWIN_STREAM, person // 2)
    latent: NDArray[np.float64] = np.sqrt(closeness) * family + np.sqrt(1.0 - closeness) * person_latent(
        seed, _TWIN_STREAM, person
    )
    latent[_SHARED] = family[_SHARED]
    return latent


def plan_twins(rng: np.random.Generator, num_people: int, pictures_per_person: int) -> list[Member]:
    """One folder a person, numbers shuffled over all; a fifth of the families are test people. People come in pairs."""
    numbers = (rng.permutation(num_people) + _FIRST_TWIN).tolist()
    num_families = num_people // 2
    num_test = num_test_people(num_families)
    members = []
    for person in range(num_people):
        number = numbers[person]
        paths = tuple(f"{number}/{number}d{picture + 1}.jpg" for picture in range(pictures_per_person))
        partition = _TEST if person // 2 >= num_families - num_test else _TRAIN
        members.append(Member(person=person, number=number, partition=partition, paths=paths))
    return members


def write_twins_lists(root: Path, members: Sequence[Member], records: Mapping[str, Record]) -> None:
    """For train and test: the pictures of each person, and the pairs."""
    for part, partition in (("train", _TRAIN), ("test", _TEST)):
        inside = sorted((member for member in members if member.partition == partition), key=lambda one: one.number)
        listed = {str(member.number): [path for path in member.paths if path in records] for member in inside}
        families: dict[int, list[str]] = {}
        for member in inside:
            families.setdefault(member.person // 2, []).append(str(member.number))
        _write_json(root / PICTURES_FILE.format(part=part), listed)
        _write_json(root / PAIRS_FILE.format(part=part), sorted(families.values()))


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


MANIFEST = "synthetic.json"
_UNFINISHED_MANIFEST = f"{MANIFEST}.tmp"
_DRAWING = 1  # raise it whenever the same settings would give other pictures
_MIN_PEOPLE, _MAX_PEOPLE = 6, 100_000  # two for each split; six digits name a person
_MIN_FAMILIES, _MAX_FAMILIES = 6, 5_000  # likewise; five digits name a twin
_MIN_PICTURES, _MAX_PICTURES = 2, 9_999  # a genuine pair; four digits name a VGGFace2 picture
_MAX_FILES = 999_999  # six digits name a CelebA picture
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one data set is drawn.

    stream: names its random numbers: the same seed never makes the same person in two data sets.
    plan: (random numbers, people, pictures of each) -> who gets which pictures.  write_lists: (root, members, records
    by path) writes what stands around the pictures.
    """

    stream: int
    style: Style
    plan: Callable[[np.random.Generator, int, int], list[Member]]
    write_lists: Callable[[Path, Sequence[Member], Mapping[str, Record]], None]


CELEBA = Layout(stream=101, style=PRESS_PICTURES, plan=plan_celeba, write_lists=write_celeba_lists)
VGGFACE2 = Layout(stream=202, style=FOUND_PICTURES, plan=plan_vggface2, write_lists=write_vggface2_lists)
TWINS = Layout(stream=_TWIN_STREAM, style=STUDY_PORTRAITS, plan=plan_twins, write_lists=write_twins_lists)


def layout_of(dataset: str) -> Layout:
    """How the data set is drawn, as its row in DATASETS says.  Raises DataError for one that cannot be."""
    if dataset not in DRAWN:
        raise DataError(unknown_name("layout", dataset, DRAWN))
    layout: Layout = pkgutil.resolve_name(DATASETS[dataset].drawing)
    return layout


@dataclass(frozen=True, kw_only=True)
class SynthSettings:
    """Which data set to draw.  The same settings give the same bytes."""

    layout: str = DRAWN[0]
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
    layout = layout_of(settings.layout)
    rng = order_generator(settings.seed, layout.stream)
    members = layout.plan(rng, settings.num_people, settings.pictures_per_person)
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
        layout.write_lists(out, members, records)
        _write_manifest(settings, out, complete=True)
    except OSError as error:
        raise DataError(_disk_problem(error, out, total)) from error
    return summary


def _check(settings: SynthSettings, num_processes: int) -> None:
    layout_of(settings.layout)
    of_twins = settings.layout in OF_FAMILIES
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
    if settings.layout not in OF_FAMILIES:
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
    if settings.layout in OF_FAMILIES:
        return twin_latent(settings.seed, person, settings.closeness)
    return person_latent(settings.seed, layout_of(settings.layout).stream, person)


def _draw_person(settings: SynthSettings, out: Path, member: Member) -> list[Record]:
    """Draw and write all pictures of one person."""
    layout, latent = layout_of(settings.layout), _latent(settings, member.person)
    style = layout.style
    traits = read_traits(latent)
    records = []
    for number, path in enumerate(member.paths):
        rng = picture_generator(settings.seed, layout.stream, member.person, number)
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
