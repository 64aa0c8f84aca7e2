"""Ray for a simulation: one of our own that ends with it, or a running cluster that is joined and left as it was.

Whoever may talk to a Ray runs code as the account that started it, and every account of a machine reaches its ports.
So our own asks for a token, which is made for the run.
"""

import contextlib
import logging
import math
import os
import secrets
import shutil
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import psutil
import ray
from ray._private import services
from ray._private.authentication.grpc_authentication_client_interceptor import _get_authentication_metadata_tuple
from ray._private.state import actors
from ray._private.worker import global_worker
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from common.errors import UserError
from common.system.files import short_private_folder, write_new
from common.system.processes import parse_address
from common.system.runtime import num_cores

ANSWERS_WITHIN_S = 5.0
# The longest path that Ray gives a socket, below the folder that it gets.
SOCKET_OF_RAY = "ray/session_2026-11-28_11-48-16_589870_4194304/sockets/plasma_store"


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one actor takes of its machine: it works for one client at a time."""

    num_cpus: int
    num_gpus: float


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A connected Ray."""

    address: str  # "": our own
    resources: Resources
    num_actors: int

    @property
    def is_ours(self) -> bool:
        """Whether it ends with the run."""
        return not self.address


def resources_of_actor(num_at_once: int, *, num_cpus: int, num_gpus: int) -> Resources:
    """Cores and GPUs divided among as many actors as clients work at once: at least one core each.

    num_at_once: clients that are asked at once, of however many.  A GPU is divided evenly, and no actor has parts of
    two: three actors on two GPUs take half of one each.
    """
    at_once = max(1, min(num_at_once, num_cpus))
    fraction = math.floor(1000 / math.ceil(at_once / num_gpus)) / 1000 if num_gpus else 0.0
    return Resources(num_cpus=max(1, num_cpus // at_once), num_gpus=fraction)


@contextlib.contextmanager
def own_ray(num_at_once: int, *, num_gpus: int) -> Iterator[Cluster]:
    """A Ray of this machine, for us alone.

    num_at_once: the most actors that are needed; there are at most as many as cores.
    """
    cores = num_cores()
    resources = resources_of_actor(num_at_once, num_cpus=cores, num_gpus=num_gpus)
    num_actors = max(1, min(num_at_once, cores // resources.num_cpus))
    with _private_folder() as folder, _with_token(folder / "token"):
        _start_ray(num_actors * resources.num_cpus, num_gpus, folder)
        try:
            yield Cluster(address="", resources=resources, num_actors=num_actors)
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    """A folder of this account alone, which goes with the run; short enough for the sockets in it."""
    folder = short_private_folder("facefed-ray-", SOCKET_OF_RAY)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _with_token(file: Path) -> Iterator[None]:
    """While the block lasts, a Ray that starts asks for a new token, and its processes and ours show it.

    file: to be made, 0600.  Every process of Ray inherits the path; a command line has neither.
    """
    write_new(file, secrets.token_hex(32).encode())
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    former = {name: os.environ.pop(name) for name in names if name in os.environ}
    _read_authentication({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)})
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        _read_authentication(former)


def _read_authentication(variables: Mapping[str, str]) -> None:
    """Ray reads these once, when it is imported, and remembers them."""
    os.environ.update(variables)
    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")


@contextlib.contextmanager
def joined_ray(address: str, num_at_once: int, *, wants_gpus: bool) -> Iterator[Cluster]:
    """A running cluster, which stays as it is when we leave.

    address: HOST:PORT of its head; one of its nodes must be on this machine.  Raises UserError when nobody answers
    there within seconds, or when it is another version's.
    """
    check_address(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"--ray-address {address}: this machine cannot join ({str(error).splitlines()[0]}); start a node of that"
            f" cluster here with: ray start --address={address}"
        ) from None
    try:
        nodes: list[dict[str, Any]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        cpus = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
        gpus = sum(int(node.get("GPU", 0)) for node in nodes) if wants_gpus else 0
        if not cpus:
            raise UserError(f"--ray-address {address}: no node of that cluster has a CPU to give; add a node.")
        resources = resources_of_actor(num_at_once, num_cpus=sum(cpus), num_gpus=gpus)
        resources = Resources(num_cpus=min(resources.num_cpus, *cpus), num_gpus=resources.num_gpus)
        num_actors = sum(number // resources.num_cpus for number in cpus)
        yield Cluster(address=address, resources=resources, num_actors=num_actors)
    finally:
        ray.shutdown()


def check_address(address: str) -> str:
    """Whether the head of a Ray cluster of our version answers at HOST:PORT: raises UserError, or returns a warning.

    Returns "" for a cluster that asks for a token and takes ours, else the line that says what an open one means.
    """
    parse_address(address, "--ray-address")
    warning = (
        f"warning: the Ray cluster at {address} asks for no token: whoever reaches it, and so every account of this"
        " machine, can run code as the account that started it and read the clients' pictures; start its nodes and this"
        " with RAY_AUTH_MODE=token (docs/SCALE.md)"
    )
    try:
        try:
            version = _version_at(address, ())
        except grpc.RpcError as error:
            if _code(error) != "UNAUTHENTICATED":
                raise
            warning, version = "", _version_at(address, _get_authentication_metadata_tuple())
    except grpc.RpcError as error:
        if _code(error) == "UNAUTHENTICATED":
            raise UserError(
                f"--ray-address {address}: that cluster asks for a token and does not take ours; set"
                " RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE, with the token that its nodes were started with."
            ) from None
        raise UserError(
            f"--ray-address {address}: no Ray cluster answers there ({_code(error)});"
            " start its head with: ray start --head"
        ) from None
    if version != ray.__version__:
        raise UserError(
            f"--ray-address {address}: that cluster runs Ray {version}, this is {ray.__version__}; use equal versions."
        )
    return warning


def _version_at(address: str, token: tuple[tuple[str, str], ...]) -> str:
    """Ray's version there.  token: what the request says who asks.  Raises grpc.RpcError."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)  # type: ignore[no-untyped-call]
        request = gcs_service_pb2.CheckAliveRequest()  # type: ignore[attr-defined]
        return str(stub.CheckAlive(request, timeout=ANSWERS_WITHIN_S, metadata=token).ray_version)


def _code(error: grpc.RpcError) -> str:
    return str(error.code().name) if isinstance(error, grpc.Call) else "no answer"


def _start_ray(num_cpus: int, num_gpus: int, folder: Path) -> None:
    """Our own `ray.init`, so that a failure to start is an exception here and not a hang inside the engine.

    folder: this account's alone.  Ray opens the folder that it is given, and all below it, to everybody (0777): it gets
    one inside.

    Ray's processes inherit a blocked SIGTERM: `timeout`, systemd and others send it to a whole process group, and
    without its Ray the engine hangs for a minute and dies before the run's end is recorded. (Ray itself blocks SIGINT.)
    """
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    start_dashboard, services.start_api_server = services.start_api_server, _no_dashboard
    try:
        ray.init(
            address="local",  # else RAY_ADDRESS would have us join another's, which --ray-address is for
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
            resources={"TPU": 0},  # else Ray takes /dev/vfio and /dev/accel for a TPU and asks Google's cloud about it
            _temp_dir=str(folder / "ray"),
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


def end_actors(*, is_ours: bool) -> None:
    """The run is over, and the engine would wait for an actor that still trains, for minutes after Ctrl-C.

    Ray's public `ray.kill` wants handles, which the engine keeps to itself; a killed process would be reported loudly.
    is_ours: whether the Ray is; of another's cluster nothing but our own actors ends.
    """
    core: Any = global_worker.core_worker  # type: ignore[attr-defined]
    for actor_id in actors(job_id=global_worker.current_job_id):
        with contextlib.suppress(ray.exceptions.RayError):
            core.kill_actor(ray.ActorID.from_hex(actor_id), True)  # noqa: FBT003 - for good
    if not is_ours:
        return
    for process in psutil.Process().children():
        # Monitors, for which Ray's shutdown would wait a second each.
        with contextlib.suppress(psutil.Error):
            if process.name() not in ("raylet", "gcs_server"):
                process.kill()
