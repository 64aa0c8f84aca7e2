"""The federation under Ray on one machine: the same ServerApp and ClientApp, in one command.

Flower's public `run_simulation` warns that it is deprecated; the engine behind it does not. docs/adr says why it is
used, and a test pins it.
"""

import contextlib
import logging
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation.run_simulation import _run_simulation
from flwr.supercore.telemetry import EventType
from ray._private import services
from ray._private.state import actors
from ray._private.worker import global_worker

from clients.answer import build_client_app
from clients.site import SiteSettings
from common.checkpoints import read_json
from common.console import stopping_on_signals
from common.errors import EXIT_FAILED, CheckpointError
from common.events import OUTCOME_FILE
from common.processes import be_killed_with_parent
from common.runtime import num_cores
from common.settings import Settings
from common.version import git_commit
from server.app import Surroundings, federate
from server.mailbox import GridMailbox


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one virtual client takes of the machine."""

    num_cpus: int
    num_gpus: float


def resources_of_client(num_clients: int, *, num_gpus: int) -> Resources:
    """The machine divided among the clients: at least one core each, fractions of a GPU where there is one."""
    at_once = max(1, min(num_clients, num_cores()))
    return Resources(
        num_cpus=max(1, num_cores() // at_once), num_gpus=round(num_gpus / at_once, 3) if num_gpus else 0.0
    )


def _start_ray(num_gpus: int) -> None:
    """Our own `ray.init`, so that a failure to start is an exception here and not a hang inside the engine.

    Ray's processes inherit a blocked SIGTERM: `timeout`, systemd and others send it to a whole process group, and
    without its Ray the engine hangs for a minute and dies before the run's end is recorded. (Ray itself blocks SIGINT.)
    """
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    start_dashboard, services.start_api_server = services.start_api_server, _no_dashboard
    try:
        ray.init(
            num_cpus=num_cores(),
            num_gpus=num_gpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
            resources={"TPU": 0},  # else Ray takes /dev/vfio and /dev/accel for a TPU and asks Google's cloud about it
            _system_config={"worker_niceness": 0},  # the clients are the work, not something beside it
        )
    finally:
        services.start_api_server = start_dashboard
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _no_dashboard(*_: object, **__: object) -> tuple[None, None]:
    """Stands in for Ray's, which says so too when its dashboard does not start.

    Ray's starts that process with `include_dashboard=False` also, for its reports of usage, and with these off it still
    asks 169.254.169.254 and the DNS which cloud this machine is in.
    """
    return None, None


def _server_app(
    settings: Settings, run_folder: Path, num_clients: int, stop: threading.Event, processes: list[psutil.Process]
) -> ServerApp:
    """processes: filled with Ray's when the run is over."""
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, _: Context) -> None:
        mailbox = GridMailbox(grid)
        federate(
            settings,
            mailbox,
            Surroundings(
                run_folder=run_folder,
                stopped=stop.is_set,
                all_nodes_are_here=lambda: len(mailbox.node_ids()) >= num_clients,
                git_commit=git_commit(),
            ),
        )
        processes.extend(psutil.Process().children(recursive=True))
        _end_actors()

    return server_app


def _end_actors() -> None:
    """The run is over, and the engine would wait for an actor that still trains, for minutes after Ctrl-C.

    Ray's public `ray.kill` wants handles, which the engine keeps to itself; a killed process would be reported loudly.
    """
    core: Any = global_worker.core_worker  # type: ignore[attr-defined]
    for actor_id in actors():
        with contextlib.suppress(ray.exceptions.RayError):
            core.kill_actor(ray.ActorID.from_hex(actor_id), True)  # noqa: FBT003 - for good
    for process in psutil.Process().children():
        # Monitors, for which Ray's shutdown would wait a second each.
        with contextlib.suppress(psutil.Error):
            if process.name() not in ("raylet", "gcs_server"):
                process.kill()


def _run_engine(server_app: ServerApp, sites: Sequence[SiteSettings], resources: Resources) -> None:
    table = tuple(sites)

    def find_site(context: Context) -> SiteSettings:  # runs in Ray's actors
        be_killed_with_parent()  # an actor that trains outlives Ray's shutdown by minutes
        return table[int(context.node_config["partition-id"])]

    config: dict[str, Any] = {"client_resources": {"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus}}
    _run_simulation(
        num_supernodes=len(table),
        client_app=build_client_app(find_site),
        server_app=server_app,
        backend_config=config,
        exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
    )


def simulate(settings: Settings, sites: Sequence[SiteSettings], run_folder: Path) -> int:
    """Run the whole federation; returns the exit code. RUN/outcome.json holds the line to show when it is not 0."""
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # it would repeat every client's error with a traceback
    num_gpus = 0 if all(site.device == "cpu" for site in sites) else _num_gpus()
    stop = threading.Event()
    processes: list[psutil.Process] = []
    _start_ray(num_gpus)
    try:
        with stopping_on_signals(stop.set):
            resources = resources_of_client(len(sites), num_gpus=num_gpus)
            _run_engine(_server_app(settings, run_folder, len(sites), stop, processes), sites, resources)
    finally:
        ray.shutdown()
        for process in processes:  # idle workers outlive their Ray by seconds
            with contextlib.suppress(psutil.Error):
                process.kill()
    try:
        return int(read_json(run_folder / OUTCOME_FILE)["exit_code"])
    except CheckpointError:
        return EXIT_FAILED


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()
