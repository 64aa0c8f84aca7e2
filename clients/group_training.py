"""A round's training of which one person moves a bounded part: in groups of people that know nothing of each other.

Each group starts from the received model with heads of its own that are freshly drawn, and nothing of its training but
its change of the shared parameters is kept.  So one person touches the change of one group.  A head that stayed from
round to round would carry everybody's earlier gradients into everybody's later ones, and no clipping of pictures or
people would bound what one person moves (docs/adr/0027-privacy-of-people.md).
"""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import TrainingFailed
from common.faces.pack import FacePack
from common.faces.partition import part_of
from common.faces.splits import Split
from common.models.recogniser import Recogniser, with_new_heads
from common.privacy.mechanism import Buffer, add_clipped
from common.protocol.parameters import Manifest, flatten, load_shared
from common.settings import Settings
from common.system.events import SHOWN
from common.system.progress import Tick, no_tick
from common.system.runtime import stream_seed
from common.system.site_secret import keyed_seed
from common.training.loop import Compute, TrainSums, make_optimiser, train_round, warm_up_head

log = logging.getLogger("facefed.client")

CLOSED_SET = (Split.TRAIN, Split.VAL_PICTURES, Split.TEST_PICTURES)


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The people of one round's training, divided."""

    packs: Mapping[int, FacePack]  # by the group's number, of those that can be trained: two families at least
    number: int  # of all groups, those that are empty too


def divide(pack: FacePack, *, number: int, secret: bytes, stream: str) -> Groups:
    """Deal each training family to a group by a hash that nobody without the secret knows.

    Where somebody goes depends on nobody else, so whoever leaves or comes changes one group.  All their pictures are
    trained on, for no closed set is scored, and which of them would be held out depends on the others.
    stream: a name of its own for each round.
    """
    owner = np.full(len(pack.people), -1, dtype=np.int64)
    for person in pack.training_people.tolist():
        family = pack.people[int(pack.families[person])]
        owner[person] = keyed_seed(secret, "privacy groups", f"{stream}\n{family}") % number
    closed = np.isin(pack.split, CLOSED_SET)
    packs = {}
    for group in range(number):
        rows = np.flatnonzero(closed & (owner[pack.person] == group))
        if len(np.unique(pack.families[pack.person[rows]])) >= 2:
            chosen = part_of(pack, rows)
            packs[group] = dataclasses.replace(chosen, split=np.full(len(rows), Split.TRAIN, dtype=np.int8))
    return Groups(packs=packs, number=number)


def summed_changes(
    recogniser: Recogniser,
    manifest: Manifest,
    received: Buffer,
    groups: Groups,
    *,
    settings: Settings,
    compute: Compute,
    server_round: int,
    stream_name: str,
    head_seed: int,
    tick: Tick = no_tick,
) -> tuple[NDArray[np.float64], TrainSums]:
    """The sum of the groups' changes, each clipped to privacy.clip: [size] float64; and what training took.

    recogniser: its backbone does the work and holds the received model again afterwards; its heads are not used.
    head_seed: of the site; each group's heads follow from it.
    A group whose loss or gradient is not finite adds nothing: to answer with its failure would tell of its people.
    """
    total, all_sums = np.zeros(manifest.size, dtype=np.float64), TrainSums()
    # Each group has heads of other shapes, and a graph for each would not pay back; it is small for several devices.
    compute = dataclasses.replace(compute, compiled=False, others=())
    for group, pack in groups.packs.items():
        own = f"{stream_name}/group-{group}"  # its own number: nobody else's group may change when one is empty
        learner = with_new_heads(
            recogniser,
            settings.model,
            num_people=pack.num_classes,
            head_seed=stream_seed(head_seed, own, server_round),
        )
        learner.keeps_statistics = True
        load_shared(learner, received, manifest)
        compute.place(learner)
        try:
            warmed = warm_up_head(learner, pack, settings=settings, compute=compute, stream_name=own)
            sums = train_round(
                learner,
                make_optimiser(learner, settings.training),
                pack,
                settings=settings,
                compute=compute,
                server_round=server_round,
                stream_name=own,
                shared=[entry.name for entry in manifest.entries],
                tick=tick,
            )
        except TrainingFailed as error:
            log.warning("%sgroup %d of round %d adds nothing: %s", SHOWN, group, server_round, error)
            continue
        change = flatten(learner.state_dict(), manifest)
        change -= received
        add_clipped(total, change, settings.privacy.clip)
        all_sums.num_pictures += sums.num_pictures
        all_sums.num_steps += sums.num_steps
        all_sums.num_halvings += sums.num_halvings + warmed.num_halvings
    load_shared(recogniser, received, manifest)
    return total, all_sums
