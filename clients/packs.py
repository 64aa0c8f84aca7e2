"""Which pictures a site has: its data set's, or a virtual client's part of them.

A process opens a data set once for all of its virtual clients, and each of these sees its rows of the same mapped
memory.
"""

import functools
from pathlib import Path

from clients.site import SiteSettings
from common.faces.pack import FacePack, open_pack
from common.faces.partition import Rows, part_of, partition
from common.settings import DataSettings
from common.system.progress import PACKING, telling

MOST_DATA_SETS = 8  # of one simulation's virtual clients; more are opened again


def open_site_pack(site: SiteSettings, data: DataSettings) -> FacePack:
    """The site's pictures; how far their packing is, is told (`common/system/progress.py`).

    Raises DataError and CheckpointError as `open_pack` does, and as `partition`.
    """
    if site.share is None:
        with telling(0, who=site.name, run="", server_round=0, work=PACKING) as meter:
            return open_pack(
                site.dataset, site.data_dir, data, site.cache_dir, workers=site.pack_workers, progress=meter.reach
            )
    share = site.share
    whole = _whole(site.dataset, site.data_dir, data, site.cache_dir, site.pack_workers)
    parts = _parts(
        site.dataset, site.data_dir, data, site.cache_dir, site.pack_workers, share.num_clients, share.alpha, share.seed
    )
    return part_of(whole, parts[share.number])


@functools.lru_cache(maxsize=MOST_DATA_SETS)
def _whole(dataset: str, data_dir: Path, data: DataSettings, cache_dir: Path, workers: int) -> FacePack:
    return open_pack(dataset, data_dir, data, cache_dir, workers=workers)


@functools.lru_cache(maxsize=MOST_DATA_SETS)
def _parts(
    dataset: str,
    data_dir: Path,
    data: DataSettings,
    cache_dir: Path,
    workers: int,
    num_clients: int,
    alpha: float | None,
    seed: int,
) -> tuple[Rows, ...]:
    whole = _whole(dataset, data_dir, data, cache_dir, workers)
    return partition(whole, num_clients, alpha=alpha, seed=seed)
