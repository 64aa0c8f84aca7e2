"""What belongs to a client and never comes from the server."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from clients.policy import DEFAULT, Policy

OF_SITE: Final = "own"  # heads begin as the site's own secret says, which no server knows
MIDWAY: Final = "midway.safetensors"  # beside a run's private states: of the round that is trained now
OF_RUN: Final = "run"  # as run.seed says, where whoever runs the server holds the pictures


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of a data set a virtual client of a simulation has; see common/faces/partition.py."""

    number: int  # from 0
    num_clients: int  # among whom the data set is divided
    alpha: float | None  # of Dirichlet; None: by identity
    seed: int


@dataclass(frozen=True, kw_only=True)
class MadeKeys:
    """Keys of secure aggregation that were made for one simulation: one program has them all, so they hide nothing."""

    own: bytes = field(repr=False)  # the site's P-384 key, DER
    peers: Mapping[str, bytes]  # of every site by name the public one, DER


@dataclass(frozen=True, kw_only=True)
class SiteSettings:
    """A site's name, data, device and folders."""

    name: str  # unique in the federation
    dataset: str
    data_dir: Path
    device: str
    state_dir: Path  # private heads, the egress ledger, Flower's own files
    cache_dir: Path  # packs and trials; several sites of one machine may share it
    pack_workers: int = 1  # processes that decode pictures
    tracking_uri: str = ""  # an MLflow of the site's own; none where empty
    policy: Policy = DEFAULT  # what it lets itself be asked
    seed: int | str = OF_SITE  # of the first weights of heads: OF_SITE, OF_RUN or a number of one's own
    share: Share | None = None  # None: all of the data set; a site of its own always has that
    keys: Path | MadeKeys | None = None  # of secure aggregation: the folder of `facefed certs`; None: there are none
