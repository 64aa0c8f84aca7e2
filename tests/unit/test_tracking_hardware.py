"""Samples of the machine: MLflow's own names, one in a short run, none after its end, and nothing that holds it up."""

import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_federation import settings_with, site_named

from common.errors import ConfigError
from common.runs import RunKind, begin_tracking
from common.tracking import hardware
from common.tracking.hardware import HardwareSampler, gpu_type
from server.record.tell import _data_tags

ROOT = Path(__file__).resolve().parents[2]
PLAIN = {
    "system/cpu_utilization_percentage",
    "system/system_memory_usage_megabytes",
    "system/system_memory_usage_percentage",
    "system/disk_usage_percentage",
    "system/disk_usage_megabytes",
    "system/disk_available_megabytes",
    "system/network_receive_megabytes",
    "system/network_transmit_megabytes",
}


def sampled(folder, interval_s=10.0, work=lambda: None):
    """The samples taken while `work` runs."""
    samples = []
    sampler = HardwareSampler(samples.append, interval_s, folder)
    sampler.start()
    work()
    sampler.stop()
    return samples


def driver(folder, monkeypatch, script):
    """Put an nvidia-smi of ours before any other."""
    folder.mkdir()
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.fixture
def no_gpu(tmp_path, monkeypatch):
    driver(tmp_path / "none", monkeypatch, "exit 9")


@pytest.mark.usefixtures("no_gpu")
def test_the_names_are_mlflows_own(tmp_path):
    """Those that MLflow's own monitors gather, here and now."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    theirs = set()
    for monitor in (CPUMonitor(), DiskMonitor(), NetworkMonitor()):
        monitor.collect_metrics()
        theirs |= {f"system/{name}" for name in monitor.aggregate_metrics()}
    (sample,) = sampled(tmp_path)
    assert sample.keys() == theirs == PLAIN


@pytest.mark.usefixtures("no_gpu")
def test_the_figures_are_this_machines(tmp_path):
    import psutil

    def work():
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            pass

    (sample,) = sampled(tmp_path, work=work)
    assert 0 < sample["system/cpu_utilization_percentage"] <= 100
    assert 0 < sample["system/system_memory_usage_percentage"] < 100
    assert sample["system/system_memory_usage_megabytes"] == pytest.approx(psutil.virtual_memory().used / 1e6, rel=0.3)
    disk = psutil.disk_usage(str(tmp_path))
    assert sample["system/disk_available_megabytes"] == pytest.approx(disk.free / 1e6, rel=0.1)
    assert sample["system/disk_usage_percentage"] == pytest.approx(disk.percent, abs=1)
    assert sample["system/network_receive_megabytes"] >= 0


@pytest.mark.usefixtures("no_gpu")
def test_samples_follow_the_interval_and_end_with_the_run(tmp_path):
    samples = sampled(tmp_path, interval_s=0.05, work=lambda: time.sleep(1.0))
    taken = len(samples)
    time.sleep(0.2)
    assert len(samples) == taken >= 3
    assert "system-metrics" not in {thread.name for thread in threading.enumerate()}


def test_gpus_have_mlflows_names_and_the_guides(tmp_path, monkeypatch):
    """1,000 MiB of memory are 1,048.576 MB; the second GPU tells less, as a partition of one does."""
    driver(tmp_path / "bin", monkeypatch, "echo '1000, 4000, 30, 150.5, 300.0'\necho '500, 4000, [N/A], [N/A], [N/A]'")
    (sample,) = sampled(tmp_path)
    assert {name: value for name, value in sample.items() if name not in PLAIN} == {
        "system/gpu_0_memory_usage_megabytes": 1048.6,
        "system/gpu_0_memory_usage_percentage": 25.0,
        "system/gpu_0_utilization_percentage": 30.0,
        "system/gpu_0_power_usage_watts": 150.5,
        "system/gpu_0_power_usage_percentage": 50.2,
        "system/gpu_1_memory_usage_megabytes": 524.3,
        "system/gpu_1_memory_usage_percentage": 12.5,
        "gpu_memory_used": 1572.9,
        "gpu_utilization": 30.0,
    }


def test_every_name_stands_in_the_metrics_page():
    page = (ROOT / "docs" / "METRICS.md").read_text(encoding="utf-8")
    of_gpus = re.findall(r'"(\w+)"\] = ', Path(hardware.__file__).read_text(encoding="utf-8"))
    names = {name if name.startswith("gpu_") else f"system/gpu_N_{name}" for name in of_gpus} | PLAIN
    assert len(names) == 15
    assert not sorted(name for name in names if f"`{name}`" not in page)


def test_the_names_of_a_gpu_are_those_of_mlflows_monitor():
    import mlflow.system_metrics.metrics.gpu_monitor as theirs

    source = Path(theirs.__file__).read_text(encoding="utf-8")
    ours = ("memory_usage_percentage", "memory_usage_megabytes", "utilization_percentage", "power_usage_watts")
    assert all(f'f"gpu_{{i}}_{name}"' in source for name in (*ours, "power_usage_percentage"))


def test_a_machine_without_a_gpu_is_asked_once(tmp_path, monkeypatch):
    asked = tmp_path / "asked"
    driver(tmp_path / "bin", monkeypatch, f"echo x >> {asked}; exit 9")
    samples = sampled(tmp_path, interval_s=0.05, work=lambda: time.sleep(0.5))
    assert len(samples) > 1
    assert asked.read_text() == "x\n"


def test_trouble_ends_the_samples_with_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(hardware, "_machine", lambda _: 1 / 0)
    assert sampled(tmp_path) == []
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [
        (logging.WARNING, "System metrics: no more samples (division by zero).")
    ]


def test_a_driver_that_hangs_does_not_hold_the_run_up(tmp_path, monkeypatch):
    driver(tmp_path / "bin", monkeypatch, "exec sleep 30")
    monkeypatch.setattr(hardware, "STOP_WITHIN_S", 0.2)
    monkeypatch.setattr(hardware, "_GPU_TIMEOUT_S", 1.0)
    started = time.monotonic()
    sampled(tmp_path)
    assert time.monotonic() - started < 20.0
    deadline = time.monotonic() + 60.0
    while "system-metrics" in {thread.name for thread in threading.enumerate()} and time.monotonic() < deadline:
        time.sleep(0.05)  # or it would write into the next test
    assert "system-metrics" not in {thread.name for thread in threading.enumerate()}


def test_a_process_that_never_finishes_its_run_ends_all_the_same(tmp_path):
    program = """
import sys
from pathlib import Path
from common.tracking.hardware import HardwareSampler
HardwareSampler(print, 600.0, Path(sys.argv[1])).start()
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, timeout=60)
    assert done.returncode == 0


KIND = RunKind(mode="local", experiment="e", label="l", tags={"device": "cpu"})


def spool(folder):
    return [json.loads(line) for line in (folder / "spool.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.usefixtures("no_gpu")
def test_every_run_that_trains_has_samples_and_a_resumed_one_counts_on(tmp_path):
    settings = settings_with(tracking__system_metrics_s=10.0)
    for status in ("KILLED", "FINISHED"):
        begin_tracking(settings, tmp_path / "r", "commit", KIND).finish(status)
    entries = spool(tmp_path / "r")
    assert [e["step"] for e in entries if e.get("key") == "system/cpu_utilization_percentage"] == [0, 1]
    assert {e["key"] for e in entries if "key" in e} == PLAIN
    assert entries[-1]["event"] == "finish", "the last sample comes before the end"


def test_off_takes_no_sample(tmp_path):
    before = threading.active_count()
    tracked = begin_tracking(settings_with(tracking__system_metrics_s="off"), tmp_path / "r", "commit", KIND)
    assert threading.active_count() == before + 1  # the spool's
    tracked.finish("FINISHED")
    assert not [e for e in spool(tmp_path / "r") if "key" in e]


@pytest.mark.parametrize("value", [0, -1.0, "sometimes", True])
def test_an_interval_is_a_number_above_zero_or_off(value):
    with pytest.raises(ConfigError, match=r"tracking\.system_metrics_s = "):
        settings_with(tracking__system_metrics_s=value)


def test_a_run_on_a_cpu_has_no_gpu_type(tmp_path):
    begin_tracking(settings_with(), tmp_path / "r", "commit", KIND).finish("FINISHED")
    tags = spool(tmp_path / "r")[0]["tags"]
    assert tags.keys() >= {"model_type", "device", "mode", "facefed_version", "git_commit"}
    assert tags["gpu_type"] == "none"


def test_a_gpu_is_named_by_its_driver(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"name of {device}")
    assert [gpu_type(device) for device in ("cuda:1", "cpu", "mps")] == ["name of cuda:1", "none", "mps"]
    sites = [site_named("alpha", device="cuda"), site_named("beta", device="cpu")]
    assert _data_tags(sites, are_here=True)["gpu_type"] == "name of cuda+none"
    assert _data_tags(sites, are_here=False)["gpu_type"] == "none+unknown"  # a site tells no more than "cuda"
