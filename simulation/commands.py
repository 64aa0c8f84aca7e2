"""What `flower-simulation` does between its flags and the work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from clients.site import SiteSettings
from common import config
from common.console import Follower, RunView, summary_lines, tracking_line
from common.errors import CheckpointError, UserError
from common.events import OUTCOME_FILE, EventReader
from common.faces.pack import FacePack
from common.faces.partition import part_of, partition
from common.faces.splits import Split
from common.files import read_json
from common.settings import Settings
from common.tracking.settings import with_absolute_uri
from server.public_set import open_public_set, with_absolute_public_set
from server.run_folder import new_run_folder
from simulation.engine.virtual import IDENTITY, VirtualSites, divide, parse_partition
from simulation.sites import pack_at_the_door, parse_clients, site_of


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How the clients are simulated."""

    num_virtual: int | None = None  # --clients: the data sets are divided among so many; None: one client each
    partition: str = IDENTITY
    ray_address: str = ""  # HOST:PORT of a running cluster; empty: a Ray of our own
    num_actors: int | None = None  # processes that work for the clients; None: as many as cores


def federate_here(
    settings: Settings,
    clients: Sequence[str],
    *,
    device: str,
    cache_dir: Path,
    out: TextIO,
    err: TextIO,
    engine: Engine = Engine(),
) -> int:
    """`flower-simulation`: check and pack every client's data, then federate them under Ray."""
    _check_engine(engine)
    options = parse_clients(clients)
    settings = with_absolute_public_set(with_absolute_uri(settings, Path.cwd()), Path.cwd())
    open_public_set(settings)  # what it refuses is told before a run is begun
    state = Path(settings.run.out).expanduser() / "clients"
    held = [site_of(option, device=device, cache_dir=cache_dir, state_dir=state) for option in options]
    packs = {site.name: pack_at_the_door(site, settings, out) for site in held}
    sites = _virtual_sites(settings, held, packs, engine, out) if engine.num_virtual else held
    del packs
    settings = config.with_value(settings, "federation", "min_clients", len(sites))
    check_pretrained(settings)
    run_folder = new_run_folder(settings)
    from simulation.engine.run import simulate

    with RunView(out) as view, Follower(EventReader(run_folder), view) as follower:
        exit_code = simulate(settings, sites, run_folder, ray_address=engine.ray_address, num_actors=engine.num_actors)
    if exit_code == 0:
        lines = summary_lines(follower.summary, folder=str(run_folder), tracking=tracking_line(settings))
        out.write("\n".join(lines) + "\n")
    else:
        err.write(f"flower-simulation: {_failure(run_folder)}\n")
    return exit_code


def _check_engine(engine: Engine) -> None:
    """Raises UserError: also for a cluster that does not answer, before anything is packed."""
    parse_partition(engine.partition)
    if engine.partition != IDENTITY and not engine.num_virtual:
        raise UserError(f"--partition {engine.partition}: give --clients N too, among whom the pictures are divided.")
    for flag, number in (("--clients", engine.num_virtual), ("--actors", engine.num_actors)):
        if number is not None and number < 1:
            raise UserError(f"{flag} {number}: give a whole number, 1 or more.")
    if engine.ray_address and engine.num_actors:
        raise UserError("--actors: a cluster's nodes say how many actors there are; leave out --ray-address or this.")
    if engine.ray_address:
        from simulation.engine.cluster import check_address

        check_address(engine.ray_address)


def _virtual_sites(
    settings: Settings, held: Sequence[SiteSettings], packs: Mapping[str, FacePack], engine: Engine, out: TextIO
) -> VirtualSites:
    """Who the virtual clients are; says in a line for each data set how many, and how few people they have at least."""
    alpha = parse_partition(engine.partition)
    numbers = divide(packs, engine.num_virtual or 0, alpha)
    sites = VirtualSites(held, numbers, alpha=alpha, seed=settings.run.seed)
    for name, number in numbers.items():
        parts = [part_of(packs[name], rows) for rows in partition(packs[name], number, alpha=alpha, seed=sites.seed)]
        people, pictures = zip(*((part.num_classes, len(part.indices(Split.TRAIN))) for part in parts), strict=True)
        open_sets = sum(len(part.indices(Split.TEST_PEOPLE)) > 0 for part in parts)
        out.write(
            f"{name}: {number:,} virtual clients with {min(people):,} to {max(people):,} people and {min(pictures):,}"
            f" to {max(pictures):,} pictures to train on; {open_sets:,} of them test on unseen people\n"
        )
    out.flush()
    return sites


def check_pretrained(settings: Settings) -> None:
    """Weights that cannot be had are told before a run is begun that would be left behind.  Raises UserError."""
    if settings.model.pretrained != "none":
        from server.app import initial_model

        initial_model(settings)


def _failure(run_folder: Path) -> str:
    try:
        return str(read_json(run_folder / OUTCOME_FILE)["line"])
    except CheckpointError:
        return f"the run ended without a word; see {run_folder}."
