"""Which pictures a site has: its data set's, or a virtual client's part of them.

A process opens a data set once for all of its virtual clients, and each of these sees its rows of the same mapped
memory.  Which packs a site has because a run asked for them is kept in its state folder: other settings of [data] make
another pack, so the site's policy says how many of those stay.
"""

import functools
import logging
import shutil
import time
from pathlib import Path
from typing import Final

from clients.site import SiteSettings
from common.errors import CheckpointError
from common.faces.pack import FacePack, open_pack
from common.faces.pack_store import MANIFEST, locked_by_nobody
from common.faces.partition import Rows, part_of, partition
from common.settings import DataSettings
from common.system.events import SHOWN
from common.system.files import read_json, write_json
from common.system.progress import PACKING, telling

log = logging.getLogger("facefed.client")

MADE_FOR_RUNS: Final = (
    "packs.json"  # in the state folder: key of each pack that a run had made -> when it was used last
)
MOST_DATA_SETS = 8  # of one simulation's virtual clients; more are opened again


def open_site_pack(site: SiteSettings, data: DataSettings) -> FacePack:
    """The site's pictures; how far their packing is, is told (`common/system/progress.py`).

    Raises DataError and CheckpointError as `open_pack` does, and as `partition`.
    """
    if site.share is None:
        before = {path.name for path in site.cache_dir.glob("*")}
        with telling(0, who=site.name, run="", server_round=0, work=PACKING) as meter:
            pack = open_pack(
                site.dataset, site.data_dir, data, site.cache_dir, workers=site.pack_workers, progress=meter.reach
            )
        _remember(site, pack.key, is_new=pack.key not in before)
        return pack
    share = site.share
    whole = _whole(site.dataset, site.data_dir, data, site.cache_dir, site.pack_workers)
    parts = _parts(
        site.dataset, site.data_dir, data, site.cache_dir, site.pack_workers, share.num_clients, share.alpha, share.seed
    )
    return part_of(whole, parts[share.number])


def _made_for_runs(site: SiteSettings) -> dict[str, float]:
    try:
        return {str(key): float(when) for key, when in read_json(site.state_dir / MADE_FOR_RUNS).items()}
    except (CheckpointError, TypeError, ValueError):  # none yet, or cut by a power failure: then those stay
        return {}


def _remember(site: SiteSettings, key: str, *, is_new: bool) -> None:
    """A pack that a run needs, and whether it was there before."""
    made = _made_for_runs(site)
    if is_new or key in made:
        write_json(site.state_dir / MADE_FOR_RUNS, made | {key: time.time()})


def prune_packs(site: SiteSettings) -> None:
    """Remove what runs had made here and used longest ago, but for as many packs as the policy keeps, and say so.

    A pack that was there before a run asked for it, as `facefed data prepare` makes it, is never removed;
    nor is one that somebody packs.
    """
    made = _made_for_runs(site)
    older = sorted(made, key=lambda key: made[key], reverse=True)[site.policy.keep_packs :]
    for key in older:
        folder = site.cache_dir / key
        if folder.is_dir():
            with locked_by_nobody(site.cache_dir, key) as is_free:
                if not is_free:
                    continue
                freed = sum(path.stat().st_size for path in folder.glob("*") if path.stat().st_nlink == 1)
                (folder / MANIFEST).unlink(missing_ok=True)  # from now on it is no whole pack
                shutil.rmtree(folder, ignore_errors=True)
            words = f"the pack {key[:12]}, which an earlier run had made, is removed: {freed:,} bytes are free again"
            log.info("%s%s: %s (keep_packs = %d)", SHOWN, site.name, words, site.policy.keep_packs)
        del made[key]
    if older:
        write_json(site.state_dir / MADE_FOR_RUNS, made)


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
