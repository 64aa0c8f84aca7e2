"""What `flower-simulation` does between its flags and the work."""

from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from common import config
from common.checkpoints import read_json
from common.console import Follower, RunView, summary_lines, tracking_line
from common.errors import CheckpointError
from common.events import OUTCOME_FILE, EventReader
from common.settings import Settings
from common.tracking.settings import with_absolute_uri
from server.public_set import open_public_set, with_absolute_public_set
from server.run_folder import new_run_folder
from simulation.sites import pack_at_the_door, parse_clients, site_of


def federate_here(
    settings: Settings, clients: Sequence[str], *, device: str, cache_dir: Path, out: TextIO, err: TextIO
) -> int:
    """`flower-simulation`: check and pack every client's data, then federate them under Ray."""
    options = parse_clients(clients)
    settings = with_absolute_public_set(with_absolute_uri(settings, Path.cwd()), Path.cwd())
    settings = config.with_value(settings, "federation", "min_clients", len(options))
    open_public_set(settings)  # what it refuses is told before a run is begun
    state = Path(settings.run.out).expanduser() / "clients"
    sites = [site_of(option, device=device, cache_dir=cache_dir, state_dir=state) for option in options]
    for site in sites:
        pack_at_the_door(site, settings, out)
    check_pretrained(settings)
    run_folder = new_run_folder(settings)
    from simulation.run import simulate

    with RunView(out) as view, Follower(EventReader(run_folder), view) as follower:
        exit_code = simulate(settings, sites, run_folder)
    if exit_code == 0:
        lines = summary_lines(follower.summary, folder=str(run_folder), tracking=tracking_line(settings))
        out.write("\n".join(lines) + "\n")
    else:
        err.write(f"flower-simulation: {_failure(run_folder)}\n")
    return exit_code


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
