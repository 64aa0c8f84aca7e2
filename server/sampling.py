"""Which members work in a round, and in which groups all of them are asked: decided by hashes of their names."""

from collections.abc import Iterator, Mapping
from typing import TypeVar

from common.runtime import stream_seed
from common.settings import FederationSettings

T = TypeVar("T")


def sample(members: Mapping[str, T], federation: FederationSettings, *, seed: int, server_round: int) -> dict[str, T]:
    """The members of a round, in order of their names: all, or `federation.clients_per_round` of them.

    Each has a number of its own in the stream (seed, "sample", round, name) and the lowest are taken, so every set of
    that size is equally likely, and one member that comes or goes changes the sample by one at most.
    """
    wanted = federation.clients_per_round
    names = sorted(members)
    if isinstance(wanted, int) and wanted < len(names):
        names = sorted(sorted(names, key=lambda name: stream_seed(seed, "sample", server_round, name))[:wanted])
    return {name: members[name] for name in names}


def is_sampled(members: Mapping[str, T], federation: FederationSettings) -> bool:
    """Whether a round has fewer than all members."""
    wanted = federation.clients_per_round
    return isinstance(wanted, int) and wanted < len(members)


def waves(members: Mapping[str, T], federation: FederationSettings) -> Iterator[dict[str, T]]:
    """All members in order of their names, at most `federation.clients_per_round` at a time; nothing where none are."""
    names = sorted(members)
    wanted = federation.clients_per_round
    size = wanted if isinstance(wanted, int) else max(1, len(names))
    for start in range(0, len(names), size):
        yield {name: members[name] for name in names[start : start + size]}


def replies_needed(federation: FederationSettings) -> int:
    """How many usable replies a round needs: `federation.min_clients`, or all where fewer are asked by choice."""
    wanted = federation.clients_per_round
    return min(federation.min_clients, wanted) if isinstance(wanted, int) else federation.min_clients
