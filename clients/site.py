"""What belongs to a client and never comes from the server."""

from dataclasses import dataclass
from pathlib import Path


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
