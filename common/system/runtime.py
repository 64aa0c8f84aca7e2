"""Decisions about the machine, each made here only: silence, proxies, device, threads, random streams, who we are.

Torch is imported inside the functions that need it, so that `--help` stays quick.
"""

import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib.metadata
import io
import math
import os
import platform
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError

if TYPE_CHECKING:
    import torch

TESTED_FLOWER = (("1", "41"), ("1", "42"))  # docs/adr/0032-on-stock-flower.md says how
UNKNOWN = "unknown"  # a version

# Read by the libraries when they are imported and by every child process; MLflow takes the word "true" only.
SILENCE: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Whatever its name says: without it Ray looks for a way to 8.8.8.8, takes the address of that network card and
    # listens there; with "0" it is 127.0.0.1 on Linux too.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
# What keeps MLflow quiet and quick to give up (its own retries block for minutes); a user's own value wins.
PATIENCE: Mapping[str, str] = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "120",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING": "false",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
}

# This machine's names for itself, where no proxy can bring anybody.  One of those who read it (httpx) knows no ranges.
LOOPBACK = ("localhost", "127.0.0.1", "::1", "127.0.0.0/8")
_NO_PROXY = ("no_proxy", "NO_PROXY")  # some read the one first, some the other

# NVIDIA's driver, in containers too; on Jetson; on Windows' Linux; AMD's.
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/nvmap", "/dev/dxg", "/dev/kfd")

_MMAP_THRESHOLD = -3  # mallopt(3); blocks from so many bytes on are the system's own, and go back to it when freed
_LEAST_GIVEN_BACK_BYTES = 2**20


def go_silent() -> None:
    """Turn off the telemetry of Flower, Ray and MLflow; every door calls it before it imports any of them.

    From then on this machine is reached without a proxy, libraries start no more threads than may run at once, and
    whatever is printed can be: none of it ends the work.
    """
    _keep_streams()
    quiet_libraries()


def quiet_libraries() -> None:
    """The same in a process of Flower's, whose standard streams are its own: it may listen to what is written there."""
    os.environ.update(SILENCE)
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    reach_directly(*LOOPBACK)
    if (cores := num_cores()) < _cores_of_affinity():  # which is what libraries look at
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


class _KeptStream(io.FileIO):
    """Goes on into nothing once whoever read it has gone: a training does not end with `| head`."""

    def write(self, content: Any, /) -> int:  # noqa: ANN401 - whatever holds bytes
        """As a file's."""
        try:
            return super().write(content)
        except BrokenPipeError:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.fileno())
            os.close(nothing)
            return super().write(content)


def give_back_what_is_freed() -> None:
    """Let the pieces of models that this process frees be the machine's again at once; not for one that trains.

    Else glibc keeps blocks of up to 32 MiB for later, in every thread a place of its own, and a process that passes a
    model on holds one or two models more than it uses.  Where there is no glibc nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LEAST_GIVEN_BACK_BYTES)


def briefly(work: Callable[[], int]) -> int:
    """The work of a program that answers once and ends: no garbage is looked for in it, nor when it ends.

    Importing torch makes a million objects that stay, and each look for cycles of garbage, also the ones at a process's
    end, goes through all of them: a third of the CPU time of `import torch` and the end of the process.  Not for a
    process that goes on: what it would have collected stays.
    """
    gc.disable()
    try:
        return work()
    finally:
        gc.freeze()


def _keep_streams() -> None:
    """Standard streams that take every line: closed ones lead into nothing, a character unknown there is escaped."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number: else the next file would, and get our output
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue  # a test's
        raw = io.BufferedWriter(_KeptStream(number, "w", closefd=False))
        kept = io.TextIOWrapper(
            raw,
            encoding=stream.encoding if stream else "utf-8",
            errors="backslashreplace",
            line_buffering=name == "stderr" or raw.raw.isatty(),
            write_through=bool(stream and stream.write_through),
        )
        if stream:
            stream.flush()
        setattr(sys, name, kept)


def reach_directly(*hosts: str) -> None:
    """From now on no request to these hosts goes through a proxy, in this process and in what it starts."""
    listed = [part.strip() for name in _NO_PROXY for part in os.environ.get(name, "").split(",") if part.strip()]
    # A star stands for everything, with some only where it stands alone.
    text = "*" if "*" in listed else ",".join(dict.fromkeys([*listed, *hosts]))
    os.environ.update(dict.fromkeys(_NO_PROXY, text))


def tracking_uri_of_environment() -> str:
    """MLflow's own variable MLFLOW_TRACKING_URI, or "" where it is not set."""
    return os.environ.get("MLFLOW_TRACKING_URI", "")


def num_cores() -> int:
    """How many CPU cores this process may use: of its affinity, its container's quota and its Slurm task the least."""
    slurm = os.environ.get("SLURM_CPUS_PER_TASK", "")
    limits = [_cores_of_affinity(), *([int(slurm)] if slurm.isascii() and slurm.isdigit() else [])]
    return max(1, min([*limits, *(math.floor(quota) for quota in cpu_quotas())]))


def _cores_of_affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quotas(root: Path = Path("/")) -> list[float]:
    """The limits on this process's CPU time, in cores: of its control group and of each that this one is in.

    Version 2 writes "QUOTA PERIOD" into cpu.max, version 1 each into a file, both in microseconds; "max" and -1 are
    no limit.  root: where /proc and /sys/fs/cgroup are.
    """
    quotas = []
    for folder in _cpu_groups(root):
        try:
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            else:
                quota, period = (
                    (folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip() for name in ("quota", "period")
                )
            if quota not in ("max", "-1"):
                quotas.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):  # no limit is written there
            continue
    return quotas


def _cpu_groups(root: Path) -> list[Path]:
    """The folders of the control groups that give this process CPU time, innermost first.

    In a container its own group is mounted where the outermost one would be, and the path is the host's: a folder that
    is not there is passed over.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    mounted = root / "sys/fs/cgroup"
    folders: dict[Path, None] = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for top in [mounted / name for name in (controllers, "cpu", "cpu,cpuacct")] if controllers else [mounted]:
            inner = top / path.lstrip("/")
            folders.update(dict.fromkeys(place for place in (inner, *inner.parents) if place.is_relative_to(top)))
    return list(folders)


def machine_digest() -> str:
    """Twelve hexadecimal digits that are equal for two clients on one machine and say nothing else about it."""
    return hashlib.sha256(f"{platform.node()}/{uuid.getnode()}".encode()).hexdigest()[:12]


def stream_seed(*parts: str | int) -> int:
    """A seed in [0, 2**63) of the random stream with this name; different names give independent streams."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def random_stream(*parts: str | int) -> "torch.Generator":
    """A CPU generator for the stream named by `parts`, for example (seed, "celeba", "epoch", 3)."""
    import torch

    return torch.Generator().manual_seed(stream_seed(*parts))


def may_have_gpu() -> bool:
    """Whether it is worth asking torch, whose import takes seconds: on Linux a GPU's driver has one of these files."""
    return sys.platform != "linux" or any(os.path.exists(path) for path in _GPU_DRIVERS)  # noqa: PTH110


def resolve_device(name: str) -> str:
    """`auto` -> cuda, mps or cpu, whichever is here first.  Raises UserError for a device that is not here.

    Imports torch only where it has something to say.
    """
    if name == "cpu" or (name == "auto" and not may_have_gpu()):
        return "cpu"
    if "," in name:
        raise UserError(
            f"--device {name} names several devices, which flower-client and facefed train local, centralized and twins"
            " use to train one model; here name one."
        )
    import torch

    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if present[device])
    kind, colon, number = name.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    is_numbered = number.isascii() and number.isdigit() and int(number) < count
    if not present.get(kind, False) or (colon and not is_numbered):
        raise UserError(f"--device {name} is not on this machine; here: {_devices_here(present)}.")
    return name


def _devices_here(present: Mapping[str, bool]) -> str:
    import torch

    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if present["cuda"] else []
    kinds = {"cpu": ["cpu"], "cuda": ["cuda", *(gpus if len(gpus) > 1 else [])], "mps": ["mps"]}
    return ", ".join(name for kind, names in kinds.items() if present[kind] for name in names)


def resolve_devices(name: str) -> tuple[str, ...]:
    """All devices that train one model: those of "cuda:0,cuda:1", or the one that `resolve_device` gives.

    `auto` is every GPU of a Slurm task, where this is one with several.  "cpu,cpu" is two processes on the CPU.
    Raises UserError: one that is not here, GPUs named twice or without a number, a mixture of kinds, several of mps.
    """
    if name == "auto":
        gpus = _gpus_of_slurm_task()
        return gpus if len(gpus) > 1 else (resolve_device(name),)
    if "," not in name:
        return (resolve_device(name),)
    devices = tuple(resolve_device(one.strip()) for one in name.split(","))
    kinds = {device.partition(":")[0] for device in devices}
    twice = sorted({device for device in devices if device.startswith("cuda") and devices.count(device) > 1})
    if len(kinds) > 1:
        raise UserError(f"--device {name} mixes {' and '.join(sorted(kinds))}; name GPUs alone, or the CPU alone.")
    if "auto" in name or kinds == {"mps"} or "cuda" in devices:
        raise UserError(f"--device {name}: write several GPUs with their numbers, for example cuda:0,cuda:1.")
    if twice:
        raise UserError(f"--device {name} names {twice[0]} twice; name each GPU once.")
    return devices


def _gpus_of_slurm_task() -> tuple[str, ...]:
    """The GPUs that Slurm gave this task, by torch's numbers; none outside of Slurm, or where it gave none.

    Slurm sets CUDA_VISIBLE_DEVICES or fences the task in, and then all that torch sees are the task's; else the
    numbers that it names are the machine's.
    """
    named = os.environ.get("SLURM_STEP_GPUS") or os.environ.get("SLURM_JOB_GPUS") or ""
    numbers = [text for text in named.split(",") if text.isascii() and text.isdigit()]
    if not numbers or not may_have_gpu():
        return ()
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    fenced = "CUDA_VISIBLE_DEVICES" in os.environ or seen <= len(numbers)
    chosen = range(seen) if fenced else [int(number) for number in numbers if int(number) < seen]
    return tuple(f"cuda:{number}" for number in chosen)


def slurm_end(now: float) -> str:
    """Of a Slurm job what its time limit means, as words for a program's header; "" outside of one.

    now: seconds since 1970, as SLURM_JOB_END_TIME is, which Slurm sets from version 22.05 on.
    """
    job, end = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_JOB_END_TIME", "")
    if not (job and end.isascii() and end.isdigit()):
        return ""
    minutes = max(0, int(int(end) - now) // 60)
    return f"Slurm job {job}, which ends in {minutes // 60} h {minutes % 60:02} min; what was done by then is kept"


def meet_on_loopback() -> None:
    """Let torch.distributed's processes on this machine reach each other over the loopback interface only."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ.update({"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback})


def use_threads(num_threads: int) -> None:
    """Let torch use so many CPU threads in this process; equal counts are needed for equal bits."""
    import torch

    torch.set_num_threads(num_threads)


@functools.cache
def facefed_version() -> str:
    """The version of this code: of the project file beside it, as in a checkout and in a bundle, else as installed.

    "unknown" where neither is there.
    """
    try:
        project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        if project["name"] == "facefed":
            return str(project["version"])
    except (OSError, ValueError, KeyError, TypeError):  # none, or another project's
        pass
    return installed_version()


def installed_version() -> str:
    """The version of FaceFed that is installed here, whatever code runs, or "unknown"."""
    try:
        return importlib.metadata.version("facefed")
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN


def require_one_version(where: str) -> None:
    """Raise UserError where a run brought other code than is installed here.  where: who this is, such as "this node".

    Each version is right with the packages that it asks for, and those here are of the installed one.
    """
    code, installed = facefed_version(), installed_version()
    if UNKNOWN not in (code, installed) and code != installed:
        raise UserError(
            f"the run's bundle is facefed {code}, and {where} has facefed {installed} installed; install equal versions"
            " on the server and at every site."
        )


def require_tested_flower(*, any_flower: bool, flag: str = "--any-flower") -> str:
    """A line of warning, or "" with a Flower that FaceFed was tested with.  flag: what accepts another one.

    Raises UserError with another Flower that nobody accepted.
    """
    found = importlib.metadata.version("flwr")
    if tuple(found.split(".")[:2]) in TESTED_FLOWER:
        return ""
    tested = " and ".join(".".join(pair) for pair in TESTED_FLOWER)
    line = f"Flower {found} is none of the versions that FaceFed was tested with ({tested})"
    if not any_flower:
        raise UserError(f"{line}; install one of those, or give {flag} to go on all the same.")
    return f"{line}; it goes on, as {flag} asks"


def user_name() -> str:
    """The account that runs this process; its number where this machine has no name for it, as in containers."""
    import pwd

    number = os.geteuid()
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


@functools.cache  # each round of a client asks
def git_commit() -> str:
    """The commit of the checkout that this file is in, or "unknown" outside one."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip()
