"""Ray for a simulation: one of our own that ends with it, or a running cluster that is joined and left as it was."""

import contextlib
import logging
import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc  # type: ignore[import-untyped]
import psutil
import ray
from ray._private import services
from ray._private.state import actors
from ray._private.worker import global_worker
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from common.errors import UserError
from common.system.runtime import num_cores

ANSWERS_WITHIN_S = 5.0


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
    _start_ray(num_actors * resources.num_cpus, num_gpus)
    try:
        yield Cluster(address="", resources=resources, num_actors=num_actors)
    finally:
        ray.shutdown()


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


def check_address(address: str) -> None:
    """Raises UserError unless the head of a Ray cluster of our version answers at HOST:PORT."""
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise UserError(f"--ray-address {address}: write HOST:PORT, for example 127.0.0.1:6379.")
    advice = "start its head with: ray start --head"
    try:
        with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)  # type: ignore[no-untyped-call]
            request = gcs_service_pb2.CheckAliveRequest()  # type: ignore[attr-defined]
            answer = stub.CheckAlive(request, timeout=ANSWERS_WITHIN_S)
    except grpc.RpcError as error:
        code = error.code().name if isinstance(error, grpc.Call) else "no answer"
        raise UserError(f"--ray-address {address}: no Ray cluster answers there ({code}); {advice}") from None
    if answer.ray_version != ray.__version__:
        raise UserError(
            f"--ray-address {address}: that cluster runs Ray {answer.ray_version}, this is {ray.__version__};"
            " use equal versions."
        )


def _start_ray(num_cpus: int, num_gpus: int) -> None:
    """Our own `ray.init`, so that a failure to start is an exception here and not a hang inside the engine.

    Ray's processes inherit a blocked SIGTERM: `timeout`, systemd and others send it to a whole process group, and
    without its Ray the engine hangs for a minute and dies before the run's end is recorded. (Ray itself blocks SIGINT.)
    """
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    start_dashboard, services.start_api_server = services.start_api_server, _no_dashboard
    try:
        ray.init(
            num_cpus=num_cpus,
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
