"""How busy the machine is while a run trains, under MLflow's own names, from a thread beside the work.

The names are those of `mlflow.system_metrics`, which asks its server before each sample and so needs one; here they go
the way of all metrics. What a GPU does comes from the driver's `nvidia-smi`: no library to import, no CUDA context.
"""

import contextlib
import logging
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from common.settings import TrackingSettings

if TYPE_CHECKING:
    from common.tracking.record import TrackedRun

MB = 1e6
MIB = 2**20
FIRST_AFTER_S = 1.0  # processor time is counted between two looks
STOP_WITHIN_S = 15.0
_ASK_GPU = ("memory.used", "memory.total", "utilization.gpu", "power.draw", "enforced.power.limit")
_GPU_TIMEOUT_S = 10.0

_log = logging.getLogger("facefed.tracking")


class HardwareSampler:
    """Records a sample every so many seconds until it is stopped, and one then: a short run has one too."""

    def __init__(self, record: Callable[[Mapping[str, float]], None], interval_s: float, folder: Path) -> None:
        """record: called in the sampler's thread.  folder: on the disk whose use is told."""
        self._record = record
        self._interval_s = interval_s
        self._folder = folder
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="system-metrics", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Take the last sample and end; it does not wait for a driver that hangs."""
        self._stopped.set()
        self._thread.join(STOP_WITHIN_S)

    def _loop(self) -> None:
        try:
            psutil.cpu_percent()
            sent_before, received_before = _network_bytes()
            has_gpu, pause_s, ending = True, min(FIRST_AFTER_S, self._interval_s), False
            while not ending:
                ending = self._stopped.wait(pause_s)
                pause_s = self._interval_s
                sent, received = _network_bytes()
                sample = _machine(self._folder) | {
                    "system/network_receive_megabytes": (received - received_before) / MB,
                    "system/network_transmit_megabytes": (sent - sent_before) / MB,
                }
                gpus = _gpus() if has_gpu else {}
                has_gpu = bool(gpus)
                self._record({name: round(value, 1) for name, value in (sample | gpus).items()})
        except Exception as error:  # whatever it is: training goes on
            _log.warning("System metrics: no more samples (%s).", error)


def sample_hardware(run: "TrackedRun", tracking: TrackingSettings) -> None:
    """Make how busy this machine is part of a run, every `system_metrics_s`, until it is finished or paused."""
    if isinstance(tracking.system_metrics_s, float):
        sampler = HardwareSampler(run.log_system_metrics, tracking.system_metrics_s, run.folder)
        run.before_finish(sampler.stop)
        sampler.start()


def _network_bytes() -> tuple[int, int]:
    """Sent and received since the machine started; a machine without a network has none."""
    counters = psutil.net_io_counters(pernic=True).values()
    return sum(one.bytes_sent for one in counters), sum(one.bytes_recv for one in counters)


def _machine(folder: Path) -> dict[str, float]:
    """Processor since the last look in this thread, memory, and the disk that holds `folder`."""
    memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(folder))
    return {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / MB,
        "system/system_memory_usage_percentage": 100.0 * memory.used / memory.total,
        "system/disk_usage_percentage": disk.percent,
        "system/disk_usage_megabytes": disk.used / MB,
        "system/disk_available_megabytes": disk.free / MB,
    }


def _asked_driver() -> list[dict[str, float]]:
    """Of each NVIDIA GPU what its driver tells; empty where there is none."""
    query = f"--query-gpu={','.join(_ASK_GPU)}"
    try:
        told = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_GPU_TIMEOUT_S,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    gpus: list[dict[str, float]] = []
    for line in told.strip().splitlines():
        gpus.append({})
        for name, text in zip(_ASK_GPU, line.split(","), strict=False):
            with contextlib.suppress(ValueError):  # "[N/A]": this GPU does not know
                gpus[-1][name] = float(text)
    return gpus


def _gpus() -> dict[str, float]:
    """Each NVIDIA GPU under MLflow's names; `gpu_memory_used` (MB, their sum), `gpu_utilization` (%, their mean)."""
    sample: dict[str, float] = {}
    gpus = _asked_driver()
    for number, gpu in enumerate(gpus):
        own: dict[str, float] = {}
        if "memory.used" in gpu:
            own["memory_usage_megabytes"] = gpu["memory.used"] * MIB / MB
        if gpu.keys() >= {"memory.used", "memory.total"}:
            own["memory_usage_percentage"] = 100.0 * gpu["memory.used"] / gpu["memory.total"]
        if "utilization.gpu" in gpu:
            own["utilization_percentage"] = gpu["utilization.gpu"]
        if "power.draw" in gpu:
            own["power_usage_watts"] = gpu["power.draw"]
        if gpu.keys() >= {"power.draw", "enforced.power.limit"}:
            own["power_usage_percentage"] = 100.0 * gpu["power.draw"] / gpu["enforced.power.limit"]
        sample |= {f"system/gpu_{number}_{name}": value for name, value in own.items()}
    used = [gpu["memory.used"] for gpu in gpus if "memory.used" in gpu]
    busy = [gpu["utilization.gpu"] for gpu in gpus if "utilization.gpu" in gpu]
    if used:
        sample["gpu_memory_used"] = sum(used) * MIB / MB
    if busy:
        sample["gpu_utilization"] = sum(busy) / len(busy)
    return sample


def gpu_type(device: str) -> str:
    """The name of the GPU that a run computes on, "mps" for Apple's, "none" on a CPU.

    device: resolved, such as "cpu" or "cuda:1", and on this machine; of several, as "cuda:0,cuda:1", the first.
    """
    device = device.partition(",")[0]
    if not device.startswith("cuda"):
        return "mps" if device == "mps" else "none"
    import torch

    return torch.cuda.get_device_name(device)
