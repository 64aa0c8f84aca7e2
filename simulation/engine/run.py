"""The federation under Ray: the same ServerApp and ClientApp, in one command.

Flower's public `run_simulation` warns that it is deprecated; the engine behind it does not. docs/adr says why it is
used, and a test pins it.
"""

import contextlib
import dataclasses
import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from cryptography.hazmat.primitives import serialization
from flwr.app import Context
from flwr.common import EventType
from flwr.serverapp import Grid, ServerApp
from flwr.simulation.run_simulation import _run_simulation

from clients.message_handler import build_client_app
from clients.site import MadeKeys, SiteSettings
from common import config
from common.errors import EXIT_FAILED, CheckpointError
from common.secagg.keys import Identity
from common.settings import Settings
from common.system.console import stopping_on_signals
from common.system.events import OUTCOME_FILE, EventLog
from common.system.files import read_json
from common.system.processes import be_killed_with_parent
from common.system.progress import FOLDER as PROGRESS
from common.system.progress import Amount, read_amounts, tell_into
from common.system.runtime import git_commit
from server.app import Surroundings, federate
from server.flower.grid import GridMailbox
from simulation.engine.cluster import Cluster, Resources, end_actors, joined_ray, own_ray
from simulation.engine.flow import WindowedMailbox, handing_out, share_buffers
from simulation.engine.virtual import VirtualSites

# Messages with a model on their way for each actor: with one waiting beside the one that is worked on, no actor idles
# while a reply is taken; a third bridges a client that takes three times as long as the others.
MESSAGES_PER_ACTOR = 3


def _server_app(
    settings: Settings,
    run_folder: Path,
    sites: Sequence[SiteSettings],
    cluster: Cluster,
    stop: threading.Event,
    processes: list[psutil.Process],
) -> ServerApp:
    """processes: filled with Ray's when the run is over, where it is our own."""
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, _: Context) -> None:
        over_grid = GridMailbox(grid)
        mailbox = WindowedMailbox(over_grid, MESSAGES_PER_ACTOR * cluster.num_actors)
        federate(
            settings,
            mailbox,
            Surroundings(
                run_folder=run_folder,
                stopped=stop.is_set,
                all_nodes_are_here=lambda: len(mailbox.node_ids()) >= len(sites),
                simulated=True,
                git_commit=git_commit(),
                program="flower-simulation",
                clients_keep_the_model=sites[0].share is None,
                expect=over_grid.expect,
                moves=movement_in(run_folder / PROGRESS),
            ),
        )
        if cluster.is_ours:
            processes.extend(psutil.Process().children(recursive=True))
        end_actors(is_ours=cluster.is_ours)

    return server_app


def movement_in(folder: Path) -> Callable[[], bool]:
    """Whether an actor that tells into that folder has moved since the last call."""
    seen: list[Amount] = []

    def moves() -> bool:
        nonlocal seen
        before, seen = seen, read_amounts(folder)
        return bool(seen) and seen != before

    return moves


def made_keys(names: Sequence[str]) -> dict[str, MadeKeys]:
    """Keys of secure aggregation for one simulation, in memory only: a run shows the protocol, and hides nothing."""
    identities = {name: Identity.in_memory(name) for name in names}
    form, public = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    peers = {name: one.public_key.public_bytes(form, public) for name, one in identities.items()}
    private, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return {
        name: MadeKeys(own=one.key.private_bytes(form, private, plain), peers=peers) for name, one in identities.items()
    }


def _run_engine(
    server_app: ServerApp,
    sites: Sequence[SiteSettings],
    resources: Resources,
    progress: Path,
    keys: Mapping[str, MadeKeys],
) -> None:
    """progress: the folder into which each actor tells how far it is, where it is on this machine.

    keys: by site, of a run with secure aggregation.
    """
    table = sites if isinstance(sites, VirtualSites) else tuple(sites)
    umask = os.umask(0o077)
    os.umask(umask)

    def find_site(context: Context) -> SiteSettings:  # runs in Ray's actors
        os.umask(umask)  # of this program, and not of whoever started the cluster that was joined
        share_buffers()
        tell_into(progress / f"{os.getpid()}.json")
        be_killed_with_parent()  # an actor that trains outlives Ray's shutdown by minutes
        site = table[int(context.node_config["partition-id"])]
        return dataclasses.replace(site, keys=keys.get(site.name))

    backend: dict[str, Any] = {"client_resources": {"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus}}
    with handing_out():
        _run_simulation(
            num_supernodes=len(table),
            client_app=build_client_app(find_site),
            server_app=server_app,
            backend_config=backend,
            exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
        )


def clients_at_once(settings: Settings, num_clients: int) -> int:
    """How many clients are asked at once."""
    wanted = settings.federation.clients_per_round
    return min(num_clients, wanted) if isinstance(wanted, int) else num_clients


def simulate(
    settings: Settings,
    sites: Sequence[SiteSettings],
    run_folder: Path,
    *,
    ray_address: str = "",
    num_actors: int | None = None,
) -> int:
    """Run the whole federation; returns the exit code. RUN/outcome.json holds the line to show when it is not 0.

    ray_address: HOST:PORT of a running cluster; empty: a Ray of our own.  num_actors: the most of these; None: as many
    as cores.  Raises UserError when the cluster cannot be joined.
    """
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # it would repeat every client's error with a traceback
    wants_gpus = any(site.device != "cpu" for site in sites)
    stop = threading.Event()
    processes: list[psutil.Process] = []
    at_once = clients_at_once(settings, len(sites))
    opened = (
        joined_ray(ray_address, at_once, wants_gpus=wants_gpus)
        if ray_address
        else own_ray(min(at_once, num_actors or at_once), num_gpus=_num_gpus() if wants_gpus else 0)
    )
    try:
        with opened as cluster, stopping_on_signals(stop.set):
            settings = _with_threads(settings, cluster)
            progress = run_folder / PROGRESS
            progress.mkdir(exist_ok=True)
            EventLog(run_folder).emit("starting", actors=cluster.num_actors)
            server_app = _server_app(settings, run_folder, sites, cluster, stop, processes)
            keys = made_keys([site.name for site in sites]) if settings.secagg.enabled else {}
            _run_engine(server_app, sites, cluster.resources, progress, keys)
    finally:
        shutil.rmtree(run_folder / PROGRESS, ignore_errors=True)
        for process in processes:  # idle workers outlive their Ray by seconds
            with contextlib.suppress(psutil.Error):
                process.kill()
    try:
        return int(read_json(run_folder / OUTCOME_FILE)["exit_code"])
    except CheckpointError:
        return EXIT_FAILED


def _with_threads(settings: Settings, cluster: Cluster) -> Settings:
    """On a cluster, `auto` threads are an actor's cores: which node a client is on is chance, the bits must not be."""
    if cluster.is_ours or settings.training.threads != "auto":
        return settings
    return config.with_value(settings, "training", "threads", cluster.resources.num_cpus)


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()
