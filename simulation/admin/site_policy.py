"""`facefed policy`: what a site's policy says, and whether the site would take part in a run."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from clients.policy import (
    DEFAULT,
    Against,
    Policy,
    against_data,
    against_scores,
    against_settings,
    digest_of,
    read_policy,
    rows,
)
from common.errors import EXIT_DONE, EXIT_FAILED
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.settings import Settings
from common.training.evaluation import SPLITS

BUILT_IN = "the built-in policy"


def policy_of(file: str) -> tuple[Policy, str]:
    """The policy of a file, or the built-in one, and what it is called.  Raises ConfigError."""
    return (read_policy(Path(file).expanduser()), file) if file else (DEFAULT, BUILT_IN)


def show(file: str, out: TextIO) -> int:
    """Print every limit as a line of TOML, with its default where it is another and with why it is there."""
    policy, name = policy_of(file)
    out.write(
        f"# {name}, digest {digest_of(policy)}. Save it, change it, and give it to flower-client --policy FILE.\n"
    )
    for limit, value, default, why in rows(policy):
        changed = "" if value == default else f"; default {default}"
        out.write(f"{limit} = {value}  # {why}{changed}\n")
    return EXIT_DONE


def check(settings: Settings, packs: Mapping[str, FacePack], file: str, out: TextIO) -> int:
    """Say of each site whether it would take part in a run of these settings; returns 1 where one would not."""
    policy, name = policy_of(file)
    answers = [_say(client, policy, name, settings, pack, out) for client, pack in packs.items()]
    return EXIT_DONE if all(answers) else EXIT_FAILED


def _say(client: str, policy: Policy, name: str, settings: Settings, pack: FacePack, out: TextIO) -> bool:
    pictures = len(pack.indices(Split.TRAIN))
    against = against_settings(policy, settings)
    against += against_data(policy, num_people=pack.num_classes, num_pictures=pictures)
    out.write(f"{client}: {name} ({digest_of(policy)}): {'takes no part' if against else 'takes part'}\n")
    out.writelines(f"{client}: {line}\n" for line in _lines(against))
    for split, (_, people) in SPLITS.items():
        few = against_scores(policy, *_num_pairs(pack.person[pack.indices(people)]))
        out.writelines(f"{client}: {split} has no score: {line}\n" for line in _lines(few))
    return not against


def _num_pairs(person: NDArray[np.int64]) -> tuple[int, int]:
    """The genuine and the impostor pairs of pictures of these people, [N] int64."""
    each, total = np.bincount(person), len(person)
    genuine = int((each * (each - 1) // 2).sum())
    return genuine, total * (total - 1) // 2 - genuine


def _lines(against: Iterable[Against]) -> list[str]:
    return [f"{one.setting} is {one.asked}; allowed: {one.allowed} ({one.limit})" for one in against]
