"""Clients of this machine by name, `NAME=DIR` -> site settings: whoever asks is whoever holds the pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clients.policy import OWN_MACHINE, Policy
from clients.site import OF_RUN, SiteSettings
from common.errors import UserError, unknown_name
from common.faces.datasets import DATASETS
from common.names import CLIENT_NAME
from common.system.runtime import num_cores, resolve_device


@dataclass(frozen=True, kw_only=True)
class ClientOption:
    """One `--client`: a name, which data set it holds, and where."""

    name: str
    dataset: str
    data_dir: Path


def parse_client(text: str, flag: str = "--client") -> ClientOption:
    """NAME=DIR (the name is the data set's) or NAME:DATASET=DIR.  flag: what it was given by.  Raises UserError."""
    label, equals, folder = text.partition("=")
    name, colon, dataset = label.partition(":")
    if not (equals and name and folder):
        raise UserError(f"{flag} {text}: write NAME=DIR or NAME:DATASET=DIR, for example celeba=data/celeba.")
    if not CLIENT_NAME.fullmatch(name):
        raise UserError(f"{flag} {text}: the name {name!r} may hold letters, digits, '_', '-' and '.' only.")
    dataset = dataset if colon else name
    if dataset not in DATASETS:
        raise UserError(
            unknown_name(f"{flag} {text}: the data set", dataset, DATASETS)
            + (" With a name of your own write NAME:DATASET=DIR." if not colon else "")
        )
    return ClientOption(name=name, dataset=dataset, data_dir=Path(folder).expanduser())


def parse_clients(texts: Sequence[str], flag: str = "--client") -> list[ClientOption]:
    """All clients in order of their names.  Raises UserError for none, or for a name that comes twice."""
    if not texts:
        raise UserError(f"no clients: give at least one {flag} NAME=DIR, for example {flag} celeba=data/celeba.")
    options = [parse_client(text, flag) for text in texts]
    names = [option.name for option in options]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two clients claim the name {twice[0]!r}; name one of them NAME:DATASET=DIR.")
    return sorted(options, key=lambda option: option.name)


def site_of(
    option: ClientOption, *, device: str, cache_dir: Path, state_dir: Path, policy: Policy = OWN_MACHINE
) -> SiteSettings:
    """The site settings of a client on this machine, folders absolute (Ray's workers run elsewhere)."""
    return SiteSettings(
        name=option.name,
        dataset=option.dataset,
        data_dir=option.data_dir.resolve(),
        device=resolve_device(device),
        state_dir=state_dir.resolve() / option.name,
        cache_dir=cache_dir.resolve(),
        pack_workers=num_cores(),
        policy=policy,
        seed=OF_RUN,
    )
