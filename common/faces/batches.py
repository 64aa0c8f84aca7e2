"""Augmented training batches and plain evaluation batches from a pack, made on the training device.

Training batches are of single pictures, or of pairs where the data set knows families: genuine ones, of strangers, and
of twins, with each picture's twin in the batch. Then an epoch's pictures are paired so that each is used once (the last
of an odd number stays alone). How many pairs are of each kind follows the ratios in [twins] as far as the pictures
allow; what cannot be a genuine or a twins' pair becomes one of strangers, and what is left of a single family stands
side by side all the same.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from common.faces.pack import FacePack, Pictures
from common.faces.splits import Split
from common.settings import AugmentationSettings, Settings, TwinSettings
from common.system.runtime import random_stream

Item = TypeVar("Item")
POLL_S = 0.1  # how soon the thread notices that nobody takes any more


def prefetched(items: Iterable[Item], *, depth: int) -> Iterator[Item]:
    """The items in their order, at most `depth` of them made ahead by a thread, while the device works on its own.

    What the making raises is raised here, after the items before it. The thread ends with the items, or when this
    generator is closed.
    """
    ready: queue.Queue[tuple[Item] | BaseException] = queue.Queue(maxsize=depth)
    stop = threading.Event()
    thread = threading.Thread(target=_make, args=(items, ready, stop), name="facefed-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            made = ready.get()
            if isinstance(made, StopIteration):
                return
            if isinstance(made, BaseException):
                raise made
            yield made[0]
    finally:
        stop.set()
        thread.join()


def _make(items: Iterable[Item], ready: "queue.Queue[tuple[Item] | BaseException]", stop: threading.Event) -> None:
    try:
        for item in items:
            if not _hand_over(ready, (item,), stop):
                return
    except BaseException as error:
        _hand_over(ready, error, stop)
    else:
        _hand_over(ready, StopIteration(), stop)


def _hand_over(
    ready: "queue.Queue[tuple[Item] | BaseException]", made: tuple[Item] | BaseException, stop: threading.Event
) -> bool:
    """Whether it was taken into the queue before the taker left."""
    while not stop.is_set():
        try:
            ready.put(made, timeout=POLL_S)
        except queue.Full:
            continue
        return True
    return False


class Batch(NamedTuple):
    """One optimiser step's pictures; where several processes divide it, their labels and this one's pictures."""

    pictures: Tensor  # [B, 3, S, S] float32 in [-1, 1], or [b, 3, S, S]
    labels: Tensor  # [B] int64
    twins: Tensor | None  # [B] int64, the place in the batch of a picture of each one's twin, or NO_TWIN


# Of a batch of so many pictures the places of those that are read and changed here, ascending, [b] int64; the numbers
# by which a picture is changed do not depend on which others are.
Own = Callable[[int], NDArray[np.int64]]
READ_AHEAD = 3  # batches


def all_of(num_pictures: int) -> NDArray[np.int64]:
    """Every picture of a batch: [num_pictures] int64."""
    return np.arange(num_pictures, dtype=np.int64)


LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601 weights of R, G, B


def to_float(pictures: Tensor) -> Tensor:
    """[B, S, S, 3] uint8 -> [B, 3, S, S] float32 in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def _uniform(count: int, low: float, high: float, stream: torch.Generator) -> Tensor:
    return torch.rand(count, generator=stream) * (high - low) + low


def random_affine(count: int, augmentation: AugmentationSettings, stream: torch.Generator) -> Tensor:
    """Random flips, turns, zooms and shifts.

    Returns [count, 2, 3] float32, the map from output to input coordinates that `affine_grid` takes.
    """
    flip = torch.where(torch.rand(count, generator=stream) < augmentation.flip, -1.0, 1.0)
    angle = _uniform(count, -augmentation.rotation_rad, augmentation.rotation_rad, stream)
    zoom = 1.0 + _uniform(count, -augmentation.crop, augmentation.crop, stream)
    shift = _uniform(2 * count, -augmentation.crop, augmentation.crop, stream).view(count, 2, 1)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    turn = torch.stack([torch.stack([cos * flip, -sin], 1), torch.stack([sin * flip, cos], 1)], 1)
    return torch.cat([turn, shift], 2)


def sampling_grid(affine: Tensor, side: int) -> Tensor:
    """Where each pixel's centre comes from, as `affine_grid` says it, an eighth of its time: without a product.

    affine: [B, 2, 3] float32.  Returns [B, side, side, 2] float32, the coordinates in planes of their own, which
    `grid_sample` reads fastest.
    """
    centres = (torch.arange(side, device=affine.device) * 2 + 1) / side - 1.0
    across = affine[:, :, 0, None] * centres
    down = affine[:, :, 1, None] * centres + affine[:, :, 2, None]
    return (down[:, :, :, None] + across[:, :, None, :]).permute(0, 2, 3, 1)


def random_colour(
    pictures: Tensor, strength: float, stream: torch.Generator, rows: Tensor | None = None, count: int = 0
) -> Tensor:
    """Random brightness, contrast and saturation, each by a factor in [1 - strength, 1 + strength] per picture.

    With black at 0: x b, then grey + (x - grey) s, then mean + (x - mean) c. All three are linear, so a picture's
    channels go through one 3 x 3 matrix.

    pictures: [B, 3, S, S] float32 in [-1, 1].  Returns the same shape and range.
    rows, count: as for `augment`.
    """
    whole = len(pictures) if rows is None else count
    factors = _uniform(3 * whole, 1.0 - strength, 1.0 + strength, stream).view(3, whole, 1, 1)
    count, device = len(pictures), pictures.device
    factors = (factors if rows is None else factors[:, rows]).to(device)
    brightness, contrast, saturation = factors[0], factors[1], factors[2]
    greys = torch.tensor(LUMA, device=device).expand(3, 3)
    matrix = brightness * (saturation * torch.eye(3, device=device) + (1.0 - saturation) * greys)
    flat = pictures.reshape(count, 3, -1)
    mean = (matrix @ flat.mean(2, keepdim=True)).mean(1, keepdim=True) + brightness - 1.0  # after the first two
    offset = (contrast * (brightness - 1.0) + (1.0 - contrast) * mean).expand(count, 3, 1)
    return torch.baddbmm(offset, contrast * matrix, flat).clamp_(-1.0, 1.0).view_as(pictures)


def augment(
    pictures: Tensor,
    augmentation: AugmentationSettings,
    stream: torch.Generator,
    rows: Tensor | None = None,
    count: int = 0,
) -> Tensor:
    """All random changes of a training batch.

    pictures: [B, 3, S, S] float32 in [-1, 1].  Returns the same shape and range, on the same device.
    rows: [B] int64, which of a batch of `count` they are; None: all.  Each is changed as it would be among all.
    """
    drawn = random_affine(len(pictures) if rows is None else count, augmentation, stream)
    affine = (drawn if rows is None else drawn[rows]).to(pictures.device)
    grid = sampling_grid(affine, pictures.shape[-1])
    pictures = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    if augmentation.colour > 0.0:
        pictures = random_colour(pictures, augmentation.colour, stream, rows, count)
    return pictures


def _changed(
    pictures: Tensor, own: Own, count: int, augmentation: AugmentationSettings, stream: torch.Generator
) -> Tensor:
    """`augment` of the pictures as they were read, [b, S, S, 3] uint8, of a batch of `count`."""
    rows = None if own is all_of else torch.from_numpy(own(count))
    return augment(to_float(pictures), augmentation, stream, rows, count)


def num_batches(num_pictures: int, batch_size: int) -> int:
    """How many batches one epoch has; no batch is larger than `batch_size`, but for one of three where that is two.

    (In batches of two an odd picture would be left alone, and batch normalisation cannot train on one.)
    """
    return max(1, min(-(-num_pictures // batch_size), num_pictures // 2))


def on_device(parts: Iterable[tuple[NDArray[Any], ...]], device: str) -> Iterator[tuple[Tensor, ...]]:
    """Arrays as tensors on the device, in their order.

    For CUDA a thread reads ahead into pinned memory, from which copies do not hold up this one; `parts` is then
    iterated there, so what it draws from must be its own.
    """
    tensors = (tuple(map(torch.from_numpy, part)) for part in parts)
    if not device.startswith("cuda"):
        for part in tensors:
            yield tuple(tensor.to(device) for tensor in part)
        return
    pinned = (tuple(tensor.pin_memory() for tensor in part) for part in tensors)
    for part in prefetched(pinned, depth=READ_AHEAD):
        yield tuple(tensor.to(device, non_blocking=True) for tensor in part)


def training_batches(
    pictures: Pictures,
    labels: NDArray[np.int64],
    *,
    chosen: NDArray[np.int64],
    batch_size: int,
    augmentation: AugmentationSettings,
    stream: torch.Generator,
    device: str,
    steps: range | None = None,
    own: Own = all_of,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch: each chosen picture once, in random order, in batches of nearly equal size.

    steps: which of the epoch's batches; None: all.  own: which pictures of a batch; the labels are all of them.

    Equal sizes instead of a small last batch keep batch normalisation away from batches of one.
    pictures: [N, S, S, 3] uint8.  labels: [N] int64.  chosen: [M] int64 in [0, N).
    Yields ([B, 3, S, S] float32 in [-1, 1], [B] int64) on `device`.
    """
    order = chosen[torch.randperm(len(chosen), generator=stream).numpy()]
    if steps is not None and steps.start > 0:  # later batches are changed by other random numbers than the first
        stream.manual_seed(int(torch.randint(2**62, (1,), generator=stream)) + steps.start)
    parts = _some_of(np.array_split(order, num_batches(len(chosen), batch_size)), steps)
    # in file order, so that reading moves forward
    read = ((pictures[rows[own(len(rows))]], labels[rows]) for rows in map(np.sort, parts))
    for batch, targets in on_device(read, device):
        yield _changed(batch, own, len(targets), augmentation, stream), targets


def evaluation_batches(pictures: Pictures, indices: NDArray[Any], *, batch_size: int, device: str) -> Iterator[Tensor]:
    """The chosen pictures in order, unchanged: [B, 3, S, S] float32 in [-1, 1] on `device`."""
    read = ((pictures[indices[start : start + batch_size]],) for start in range(0, len(indices), batch_size))
    for (batch,) in on_device(read, device):
        yield to_float(batch)


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
    steps: range | None = None,
    own: Own = all_of,
) -> Iterator[Batch]:
    """One epoch, as `training_batches` makes it, but of pairs, and with partners.

    pictures: [N, S, S, 3] uint8.  labels, person, family: [N] int64, of each picture.  chosen: [M] int64 in [0, N).
    stream: of this epoch alone, so that epochs differ and runs repeat.  own: as there.
    Yields batches on `device`; the picture of a twin is drawn anew each time.
    """
    random = np.random.default_rng(int(torch.randint(2**62, (1,), generator=stream)))
    pairs = pair_up(chosen, person, family, twins, random)
    parts = _some_of(into_batches(pairs, person, family, num_batches(len(chosen), batch_size), random), steps)
    # in file order, so that reading moves forward
    in_order = (np.sort(np.array(part, dtype=np.int64)) for part in parts)
    read = (
        (pictures[rows[own(len(rows))]], labels[rows], partners_in(person[rows], family[rows], random))
        for rows in in_order
    )
    for batch, targets, partners in on_device(read, device):
        yield Batch(_changed(batch, own, len(targets), augmentation, stream), targets, partners)


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
    number: int,
    random: np.random.Generator,
) -> list[Rows]:
    """The pairs in random order in so many batches of nearly equal numbers of pairs; one alone joins a small one.

    No batch is larger than the batch size asked for, but by one picture where that is odd, and as in `num_batches`.
    A genuine pair stands in one batch with a genuine pair of the twin, where there is one: hard negatives.
    """
    alone = [pair for pair in pairs if len(pair) == 1]
    pairs = [pair for pair in pairs if len(pair) == 2]
    groups = _beside_twins(pairs, person, family)
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


def _some_of(parts: list[Item], steps: range | None) -> list[Item]:
    return parts if steps is None else parts[steps.start : steps.stop]


def epoch_batches(
    pack: FacePack,
    settings: Settings,
    *,
    device: str,
    stream_name: str,
    epoch: int,
    steps: range | None = None,
    own: Own = all_of,
) -> Generator[Batch]:
    """The training batches of one epoch; the same (seed, stream_name, epoch) gives the same batches anywhere.

    steps: which of them, counted from 0; None: all.  own: which pictures of each.  What is not asked for is not read.

    Each training picture is used once, whichever kind of batches it is: see `training_batches` and `twin_batches`.
    """
    chosen, stream = pack.indices(Split.TRAIN), random_stream(settings.run.seed, stream_name, "epoch", epoch)
    if pack.family is None:
        for pictures, labels in training_batches(
            pack.pictures,
            pack.training_labels,
            chosen=chosen,
            batch_size=settings.training.batch_size,
            augmentation=settings.augmentation,
            stream=stream,
            device=device,
            steps=steps,
            own=own,
        ):
            yield Batch(pictures, labels, None)
        return
    yield from twin_batches(
        pack.pictures,
        pack.training_labels,
        person=pack.person,
        family=pack.family[pack.person],
        chosen=chosen,
        batch_size=settings.training.batch_size,
        augmentation=settings.augmentation,
        twins=settings.twins,
        stream=stream,
        device=device,
        steps=steps,
        own=own,
    )
