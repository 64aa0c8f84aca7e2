"""The two official layouts: which person's picture gets which name, and the list files around the pictures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.faces.synth_camera import View
from common.faces.synth_people import Traits, order_generator

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


def plan_celeba(seed: int, num_people: int, pictures_per_person: int) -> list[Member]:
    """Numbered pictures: train, valid and test one after another, people shuffled inside each, as in the original."""
    rng = order_generator(seed, "celeba")
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


def plan_vggface2(seed: int, num_people: int, pictures_per_person: int) -> list[Member]:
    """One folder a person under train/ or test/; numbers are shuffled over both. There is no validation split."""
    rng = order_generator(seed, "vggface2")
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
    _write(root / "identity_CelebA.txt", [f"{short[p]} {owners[p].number}" for p in names], crlf)
    _write(root / "list_eval_partition.txt", [f"{short[p]} {owners[p].partition}" for p in names], crlf)
    points = (
        "lefteye_x lefteye_y righteye_x righteye_y nose_x nose_y leftmouth_x leftmouth_y rightmouth_x rightmouth_y "
    )
    rows = [short[p] + "".join(f" {round(v):4d}" for point in records[p].landmarks for v in point) for p in names]
    _write(root / "list_landmarks_align_celeba.txt", [str(len(names)), points, *rows])
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
    _write(root / "identity_meta.csv", people)
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
