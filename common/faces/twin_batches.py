"""Training batches of pairs: genuine ones, of strangers, and of twins, with each picture's twin in the batch.

An epoch's pictures are paired so that each is used once (the last of an odd number stays alone). How many pairs are of
each kind follows the ratios in [twins] as far as the pictures allow; what cannot be a genuine or a twins' pair becomes
one of strangers, and what is left of a single family stands side by side all the same.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.faces.batches import augment, num_batches, on_device, to_float
from common.faces.pack import Pictures
from common.settings import AugmentationSettings, TwinSettings

NO_TWIN = -1
Rows = list[int]  # pictures


def twin_batches(
    pictures: Pictures,
    labels: NDArray[np.int64],
    *,
    person: NDArray[np.int64],
    family: NDArray[np.int64],
    chosen: NDArray[np.int64],
    batch_size: int,
    augmentation: AugmentationSettings,
    twins: TwinSettings,
    stream: torch.Generator,
    device: str,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """One epoch, as `batches.training_batches` makes it, but of pairs, and with partners.

    pictures: [N, S, S, 3] uint8.  labels, person, family: [N] int64, of each picture.  chosen: [M] int64 in [0, N).
    stream: of this epoch alone, so that epochs differ and runs repeat.
    Yields ([B, 3, S, S] float32 in [-1, 1], [B] int64 labels, [B] int64 partners) on `device`; partner i is the place
    in the batch of a picture of i's twin, drawn anew each time, or NO_TWIN where the batch has none.
    """
    random = np.random.default_rng(int(torch.randint(2**62, (1,), generator=stream)))
    pairs = pair_up(chosen, person, family, twins, random)
    parts = into_batches(pairs, person, family, twins, num_batches(len(chosen), batch_size), random)
    # in file order, so that reading the memory map moves forward
    in_order = (np.sort(np.array(part, dtype=np.int64)) for part in parts)
    read = ((pictures[rows], labels[rows], partners_in(person[rows], family[rows], random)) for rows in in_order)
    for batch, targets, partners in on_device(read, device):
        yield augment(to_float(batch), augmentation, stream), targets, partners


def partners_in(person: NDArray[np.int64], family: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
    """For each picture of a batch the place of a picture of a sibling, any one of them, or NO_TWIN.  [B] int64.

    person, family: [B] int64.
    """
    siblings = (family[:, None] == family) & (person[:, None] != person)
    chances = np.where(siblings, random.random(siblings.shape), -1.0)
    return np.where(siblings.any(axis=1), chances.argmax(axis=1), NO_TWIN).astype(np.int64)


def pair_up(
    chosen: NDArray[np.int64],
    person: NDArray[np.int64],
    family: NDArray[np.int64],
    twins: TwinSettings,
    random: np.random.Generator,
) -> list[Rows]:
    """Each chosen picture in one pair; the last one alone where their number is odd.  See `twin_batches`."""
    queues: dict[int, Rows] = {}  # person -> pictures
    for row in random.permutation(chosen).tolist():
        queues.setdefault(int(person[row]), []).append(row)
    members: dict[int, list[int]] = {}  # family -> people
    for who, rows in queues.items():
        members.setdefault(int(family[rows[0]]), []).append(who)
    total = twins.genuine + twins.stranger + twins.twin
    num_pairs = len(chosen) // 2
    of_twins = _some([_across(queues, people) for people in members.values()], num_pairs * twins.twin / total, random)
    used = {row for pair in of_twins for row in pair}
    left = {who: [row for row in rows if row not in used] for who, rows in queues.items()}
    own = [[rows[k : k + 2] for k in range(0, len(rows) - 1, 2)] for rows in left.values()]
    genuine = _some(own, num_pairs * twins.genuine / total, random)
    used |= {row for pair in genuine for row in pair}
    rest = [[row for who in people for row in left[who] if row not in used] for people in members.values()]
    return of_twins + genuine + _strangers(rest, random)


def _some(candidates: Sequence[list[Rows]], number: float, random: np.random.Generator) -> list[Rows]:
    """So many pairs (rounded) of all candidates, or all where there are fewer.

    They are taken two by two of one family, for an odd number of twin pairs would leave both siblings a picture without
    a genuine partner.
    """
    twos = [own[k : k + 2] for own in candidates for k in range(0, len(own), 2)]
    return [pair for k in random.permutation(len(twos)).tolist() for pair in twos[k]][: round(number)]


def _across(queues: dict[int, Rows], people: list[int]) -> list[Rows]:
    """As many pairs of two siblings as a family's pictures give, always of the two with most pictures left."""
    left = {who: list(queues[who]) for who in people}
    pairs: list[Rows] = []
    while True:
        one, *others = sorted((who for who in people if left[who]), key=lambda who: -len(left[who])) or [-1]
        if not others:
            return pairs
        pairs.append([left[one].pop(), left[others[0]].pop()])


def _strangers(rest: list[Rows], random: np.random.Generator) -> list[Rows]:
    """Pairs of pictures of different families, each picture once.  rest: the pictures of each family.

    In a row, family by family, each is paired with the one half of the row further on: of another family unless one
    family has more than half of all.
    """
    row = [one for k in random.permutation(len(rest)).tolist() for one in rest[k]]
    half = len(row) // 2
    return [[row[k], row[k + half]] for k in range(half)] + ([row[-1:]] if len(row) % 2 else [])


def into_batches(
    pairs: list[Rows],
    person: NDArray[np.int64],
    family: NDArray[np.int64],
    twins: TwinSettings,
    number: int,
    random: np.random.Generator,
) -> list[Rows]:
    """The pairs in random order in so many batches of nearly equal numbers of pairs; one alone joins a small one.

    No batch is larger than the batch size asked for, but by one picture where that is odd, and as in `num_batches`.
    With twins.hard_negatives a genuine pair stands in one batch with a genuine pair of the twin, where there is one.
    """
    alone = [pair for pair in pairs if len(pair) == 1]
    pairs = [pair for pair in pairs if len(pair) == 2]
    groups = _beside_twins(pairs, person, family) if twins.hard_negatives else [[pair] for pair in pairs]
    queue = [groups[k] for k in random.permutation(len(groups)).tolist()]
    batches: list[Rows] = []
    for size in (len(part) for part in np.array_split(np.arange(len(pairs)), number)):
        batch: list[Rows] = []
        while len(batch) < size:
            room = size - len(batch)
            fits = next((k for k, group in enumerate(queue) if len(group) <= room), None)
            if fits is None:  # only doubles are left and there is room for one pair: divide one
                first, second = queue.pop(0)
                queue.insert(0, [second])
                batch.append(first)
            else:
                batch += queue.pop(fits)
        batches.append([row for pair in batch for row in pair])
    for one in alone:
        min(batches, key=len).extend(one)
    return batches


def _beside_twins(pairs: list[Rows], person: NDArray[np.int64], family: NDArray[np.int64]) -> list[list[Rows]]:
    """The pairs in groups: two genuine pairs of two siblings together, all others alone."""
    waiting: dict[int, list[Rows]] = {}  # family -> genuine pairs of one of its members
    groups: list[list[Rows]] = []
    for pair in pairs:
        if person[pair[0]] != person[pair[1]]:
            groups.append([pair])
            continue
        others = waiting.setdefault(int(family[pair[0]]), [])
        match = next((k for k, other in enumerate(others) if person[other[0]] != person[pair[0]]), None)
        if match is None:
            others.append(pair)
        else:
            groups.append([others.pop(match), pair])
    return groups + [[pair] for others in waiting.values() for pair in others]
