"""Made-up twins: two people who share almost all of what they look like, in the layout of ND-TWINS-2009-2010.

Each entry of a twin's latent is sqrt(closeness) times the family's and sqrt(1 - closeness) times the twin's own, so it
stays standard normal, and closeness is the correlation of the two: 0 makes strangers, 1 one and the same face. Sex and
age, which twins cannot differ in, are the family's alone.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.faces.synth_layouts import Member, Record, num_test_people
from common.faces.synth_people import TRAITS, family_latent, order_generator, person_latent
from common.faces.twins import PAIRS_FILE, PICTURES_FILE

LAYOUT = "twins"
CLOSENESS = 0.9  # siblings differ by a third (sqrt(1 - 0.9)) of what strangers differ by
_SHARED = [list(TRAITS).index(name) for name in ("masculine", "age")]
_TRAIN, _TEST = 0, 2
_FIRST_NUMBER = 90_001


def twin_latent(seed: int, person: int, closeness: float) -> NDArray[np.float64]:
    """The latent of one twin, float64 [LATENT_SIZE]; people 2 f and 2 f + 1 are family f.  closeness: in [0, 1]."""
    family = family_latent(seed, LAYOUT, person // 2)
    latent: NDArray[np.float64] = np.sqrt(closeness) * family + np.sqrt(1.0 - closeness) * person_latent(
        seed, LAYOUT, person
    )
    latent[_SHARED] = family[_SHARED]
    return latent


def plan_twins(seed: int, num_people: int, pictures_per_person: int) -> list[Member]:
    """One folder a person, numbers shuffled over all; a fifth of the families are test people. People come in pairs."""
    rng = order_generator(seed, LAYOUT)
    numbers = (rng.permutation(num_people) + _FIRST_NUMBER).tolist()
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
