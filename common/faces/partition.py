"""A data set divided among many virtual clients: which rows of its pack are each client's, decided by hashes.

By identity each client has people of its own, with all their pictures. By Dirichlet each training person's pictures are
divided among the clients in proportions drawn from Dirichlet(alpha) (arXiv:1909.06335): the smaller alpha, the fewer
clients share a person. Either way nobody of an open set is trained on anywhere, families stay whole where they are
dealt, and no picture is used twice.

Open sets are dealt two families at least, so that each client that has one has impostor pairs. Where that is not enough
for all, the others have none, and their empty sets add zeros to the sums.
"""

import dataclasses
import hashlib
import itertools

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.faces.pack import FacePack, Pictures
from common.faces.splits import Split
from common.system.runtime import stream_seed

MIN_TRAINING_PEOPLE = 2  # of a client: one alone is no choice
MIN_TRAINING_PICTURES = 4  # of a client, by Dirichlet
OPEN_FAMILIES = 2  # of a client that has an open set


Rows = NDArray[np.int64]  # of one client, ascending


class ChosenPictures:
    """Some rows of a pack's pictures; nothing is copied but what is asked for."""

    def __init__(self, pictures: Pictures, rows: NDArray[np.int64]) -> None:
        """pictures: [N, S, S, 3] uint8.  rows: [n] int64 in [0, N)."""
        self._pictures, self._rows = pictures, rows

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, S, S, 3)."""
        return (len(self._rows), *self._pictures.shape[1:])

    def __getitem__(self, rows: NDArray[np.int64], /) -> NDArray[np.uint8]:
        """The pictures of these rows of the choice, [len(rows), S, S, 3] uint8."""
        return self._pictures[self._rows[rows]]


def part_of(pack: FacePack, rows: Rows) -> FacePack:
    """One client's pack: a view of these rows, with the same people, under a key of its own."""
    digest = hashlib.sha256(pack.key.encode())
    digest.update(rows.tobytes())
    return dataclasses.replace(
        pack,
        pictures=ChosenPictures(pack.pictures, rows),
        person=pack.person[rows],
        split=pack.split[rows],
        key=digest.hexdigest(),
        quarantined=(),
    )


def most_clients(pack: FacePack, alpha: float | None) -> int:
    """Among how many clients the pack can be divided at most.  alpha: of Dirichlet; None: by identity."""
    if alpha is None:
        return len(_dealt_families(pack, Split.TRAIN)) // MIN_TRAINING_PEOPLE
    return len(pack.indices(Split.TRAIN)) // MIN_TRAINING_PICTURES


def partition(pack: FacePack, num_clients: int, *, alpha: float | None, seed: int) -> tuple[Rows, ...]:
    """The rows of each of `num_clients`; the same pack, number, alpha and seed give the same parts anywhere.

    alpha: of Dirichlet, > 0; None: by identity.  Raises DataError when they are more than `most_clients`.
    """
    most = most_clients(pack, alpha)
    if not 1 <= num_clients <= most:
        raise DataError(_too_many(pack, num_clients, most, alpha))
    owner = np.full(len(pack), -1, dtype=np.int64)
    if alpha is None:
        _deal_people(owner, pack, num_clients, seed)
    else:
        _deal_pictures(owner, pack, num_clients, alpha, seed)
    for code in (Split.VAL_PEOPLE, Split.TEST_PEOPLE):
        _deal_open_set(owner, pack, code, num_clients, seed)
    order = np.argsort(owner, kind="stable")
    starts = np.searchsorted(owner[order], np.arange(num_clients + 1))
    return tuple(order[a:b] for a, b in itertools.pairwise(starts.tolist()))


def _too_many(pack: FacePack, num_clients: int, most: int, alpha: float | None) -> str:
    if alpha is None:
        held = f"{pack.num_classes} people to train on, {MIN_TRAINING_PEOPLE} for each client"
        advice = "take fewer clients or people shared by --partition dirichlet:ALPHA"
    else:
        held = f"{len(pack.indices(Split.TRAIN))} training pictures, {MIN_TRAINING_PICTURES} for each client"
        advice = "take fewer clients or more pictures"
    return f"{pack.dataset}: {held}, are too few for {num_clients} clients (at most {most}); {advice}."


def _ranks(names: list[str], *stream: str | int) -> NDArray[np.int64]:
    """The places 0..n-1 that hashes of the names give them."""
    numbers = np.array([stream_seed(*stream, name) for name in names], dtype=np.int64)
    return np.argsort(np.argsort(numbers, kind="stable"), kind="stable").astype(np.int64)


def _dealt_families(pack: FacePack, code: Split) -> NDArray[np.int64]:
    """The families with pictures of this split, by their first member, ascending."""
    return np.unique(pack.families[pack.person[pack.split == code]])


def _deal_people(owner: NDArray[np.int64], pack: FacePack, num_clients: int, seed: int) -> None:
    """Training families one by one to the clients in turn; the closed sets' pictures go with their people."""
    families = _dealt_families(pack, Split.TRAIN)
    rank = _ranks([pack.people[f] for f in families.tolist()], seed, "partition", pack.dataset, "people")
    of_family = np.full(len(pack.people), -1, dtype=np.int64)
    of_family[families] = rank % num_clients
    closed = np.isin(pack.split, (Split.TRAIN, Split.VAL_PICTURES, Split.TEST_PICTURES))
    owner[closed] = of_family[pack.families[pack.person[closed]]]


def _deal_open_set(owner: NDArray[np.int64], pack: FacePack, code: Split, num_clients: int, seed: int) -> None:
    """The open set's families to as many clients as can have two each; which clients, is one hash for both sets."""
    families = _dealt_families(pack, code)
    num_holders = min(num_clients, len(families) // OPEN_FAMILIES)
    if num_holders == 0:
        return
    lots = [stream_seed(seed, "partition", pack.dataset, "open", number) for number in range(num_clients)]
    holders = np.argsort(np.array(lots, dtype=np.int64), kind="stable")[:num_holders]
    rank = _ranks([pack.people[f] for f in families.tolist()], seed, "partition", pack.dataset, str(code))
    of_family = np.full(len(pack.people), -1, dtype=np.int64)
    of_family[families] = holders[rank % num_holders]
    rows = pack.indices(code)
    owner[rows] = of_family[pack.families[pack.person[rows]]]


def _deal_pictures(owner: NDArray[np.int64], pack: FacePack, num_clients: int, alpha: float, seed: int) -> None:
    """Each training person's pictures in Dirichlet proportions; then who has too little is given from who has most."""
    training = pack.indices(Split.TRAIN)
    order = training[np.argsort(pack.person[training], kind="stable")]
    ends = np.searchsorted(pack.person[order], pack.training_people, side="right")
    for person, theirs in zip(pack.training_people.tolist(), np.split(order, ends[:-1]), strict=True):
        random = np.random.default_rng(stream_seed(seed, "partition", pack.dataset, pack.people[person]))
        rows = random.permutation(theirs)
        shares = random.dirichlet(np.full(num_clients, alpha))
        owner[rows] = np.searchsorted(np.cumsum(shares), (np.arange(len(rows)) + 0.5) / len(rows)).clip(
            max=num_clients - 1
        )
    _help_the_poor(owner, pack.person, training, num_clients)
    for code in (Split.VAL_PICTURES, Split.TEST_PICTURES):
        _follow_training(owner, pack, code)


def _help_the_poor(
    owner: NDArray[np.int64], person: NDArray[np.int64], training: NDArray[np.int64], num_clients: int
) -> None:
    """Move single pictures until every client has enough pictures, of enough people."""
    count = np.bincount(owner[training], minlength=num_clients)
    for poor in range(num_clients):
        while True:
            mine = training[owner[training] == poor]
            known = np.unique(person[mine])
            needs_people = len(known) < MIN_TRAINING_PEOPLE
            if not needs_people and len(mine) >= MIN_TRAINING_PICTURES:
                break
            row = _gift(owner, person, training, count, poor, known if needs_people else None)
            count[owner[row]] -= 1
            count[poor] += 1
            owner[row] = poor


def _gift(
    owner: NDArray[np.int64],
    person: NDArray[np.int64],
    training: NDArray[np.int64],
    count: NDArray[np.int64],
    poor: int,
    known: NDArray[np.int64] | None,
) -> int:
    """A training picture that the richest client with a fit one can spare.  known: people that would not help."""
    for rich in np.argsort(-count, kind="stable").tolist():
        if rich == poor or count[rich] <= MIN_TRAINING_PICTURES:
            continue
        theirs = training[owner[training] == rich]
        who, first, held = np.unique(person[theirs], return_index=True, return_counts=True)
        fit = np.ones(len(who), dtype=bool) if known is None else ~np.isin(who, known)
        if len(who) <= MIN_TRAINING_PEOPLE:
            fit &= held > 1
        if fit.any():
            best = int(np.argmax(np.where(fit, held, 0)))
            return int(theirs[first[best]])
    raise DataError(
        f"the pictures cannot be divided so that each of {len(count)} clients has {MIN_TRAINING_PICTURES} of"
        f" {MIN_TRAINING_PEOPLE} people; take fewer clients or a larger ALPHA."
    )


def _follow_training(owner: NDArray[np.int64], pack: FacePack, code: Split) -> None:
    """A person's pictures of a closed set go in turn to the clients that train on them, who has most first."""
    training, rows = pack.indices(Split.TRAIN), pack.indices(code)
    order = training[np.argsort(pack.person[training], kind="stable")]
    starts = np.searchsorted(pack.person[order], np.arange(len(pack.people) + 1))
    place: dict[int, int] = {}
    for row, person in zip(rows.tolist(), pack.person[rows].tolist(), strict=True):
        holders, held = np.unique(owner[order[starts[person] : starts[person + 1]]], return_counts=True)
        if len(holders):
            turn = place.get(person, 0)
            place[person] = turn + 1
            owner[row] = holders[np.argsort(-held, kind="stable")[turn % len(holders)]]
