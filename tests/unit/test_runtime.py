"""Decisions about the machine: silence before imports, independent random streams, devices that are here."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.system import runtime

ROOT = Path(__file__).resolve().parents[2]


def test_silence_overrules_and_patience_yields(monkeypatch):
    for name in (*runtime.SILENCE, *runtime.PATIENCE):
        monkeypatch.setenv(name, "before")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")
    runtime.go_silent()
    assert {name: os.environ[name] for name in runtime.SILENCE} == dict(runtime.SILENCE)
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "before"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "10"


@pytest.mark.parametrize("file", ["server/cli.py", "clients/cli.py", "simulation/cli.py"])
def test_every_door_goes_silent_before_anything_else(file):
    """The first statement of each main() is go_silent(), and nothing at the file's top imports a heavy library."""
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    mains = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("main")]
    assert mains
    for main in mains:
        first = next(line for line in main.body if not isinstance(getattr(line, "value", None), ast.Constant))
        assert ast.unparse(first) == "go_silent()"
    tops = {ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)}
    assert not [line for line in tops if any(word in line for word in ("flwr", "mlflow", "ray", "torch"))]


def test_telemetry_is_off_where_the_libraries_look():
    """Asked in a fresh process: what Flower and MLflow themselves conclude from the environment."""
    code = (
        "from common.system.runtime import go_silent; go_silent()\n"
        "from flwr.supercore import telemetry; from mlflow.telemetry.utils import is_telemetry_disabled\n"
        "print(telemetry.FLWR_TELEMETRY_ENABLED, is_telemetry_disabled())"
    )
    names = (*runtime.SILENCE, *runtime.PATIENCE, "CI", "PYTEST_CURRENT_TEST")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "True"]


def test_streams_are_named_by_all_their_parts():
    names = [(1,), (2,), (1, "celeba"), (1, "vggface2"), (1, "celeba", "epoch", 1), (1, "celeba", "epoch", 2)]
    assert len({runtime.stream_seed(*name) for name in names}) == len(names)
    assert all(0 <= runtime.stream_seed(number) < 2**63 for number in range(200))


def test_a_streams_seed_is_fixed_for_all_time():
    """sha256("1/backbone")'s first 8 bytes, big-endian, without the lowest bit; a change would change every model."""
    import hashlib

    expected = int(hashlib.sha256(b"1/backbone").hexdigest()[:16], 16) // 2
    assert runtime.stream_seed(1, "backbone") == expected


def test_streams_are_independent_of_each_other_and_of_the_global_state():
    before = torch.random.get_rng_state()
    one, other = runtime.random_stream(1, "a"), runtime.random_stream(1, "b")
    first, second = torch.randn(4000, generator=one), torch.randn(4000, generator=other)
    assert torch.equal(torch.random.get_rng_state(), before)
    # the correlation of 4,000 independent pairs has a deviation of 1/sqrt(4000) = 0.016
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.08
    assert torch.equal(torch.randn(4000, generator=runtime.random_stream(1, "a")), first)


def test_auto_takes_the_best_device_here(monkeypatch):
    monkeypatch.setattr(runtime, "may_have_gpu", lambda: True)
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert runtime.resolve_device("auto") == expected


@pytest.mark.parametrize(
    ("system", "drivers", "asks"),
    [("linux", [], False), ("linux", ["/dev/kfd"], True), ("linux", ["/dev/nvidiactl"], True), ("darwin", [], True)],
)
def test_torch_is_asked_only_where_there_may_be_a_gpu(monkeypatch, system, drivers, asks):
    monkeypatch.setattr(runtime.sys, "platform", system)
    monkeypatch.setattr(runtime.os.path, "exists", lambda path: path in drivers)
    assert runtime.may_have_gpu() == asks


def test_a_computer_without_a_gpu_is_known_without_torch():
    code = "from common.system import runtime; runtime.may_have_gpu = lambda: False; import sys; "
    code += "print(runtime.resolve_device('auto'), runtime.resolve_device('cpu'), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "cpu cpu False\n"


def test_a_device_that_is_not_here_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert [runtime.resolve_device(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    for name in ("cuda:2", "cuda:", "cuda:x", "cuda:-1", "mps", "tpu", ""):
        with pytest.raises(UserError, match=r"is not on this machine; here: cpu, cuda, cuda:0, cuda:1\."):
            runtime.resolve_device(name)


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr(runtime, "may_have_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("four_gpus")
def test_several_devices_are_named_with_commas():
    assert runtime.resolve_devices("cuda:2, cuda:0") == ("cuda:2", "cuda:0")
    assert runtime.resolve_devices("cpu,cpu") == ("cpu", "cpu")
    assert runtime.resolve_devices("cuda") == ("cuda",)
    assert runtime.resolve_devices("auto") == ("cuda",)  # outside of Slurm one, as ever


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cuda:0,cuda:4", r"--device cuda:4 is not on this machine; here: cpu, cuda, cuda:0, cuda:1, cuda:2, cuda:3\."),
        ("cuda:1,cuda:1", "names cuda:1 twice"),
        ("cpu,cuda:0", "mixes cpu and cuda"),
        ("cuda,cuda:0", "write several GPUs with their numbers"),
        ("cuda:0,auto", "write several GPUs with their numbers"),
        ("cuda:0,", "is not on this machine"),
    ],
)
def test_devices_that_do_not_go_together_are_one_line(name, words):
    with pytest.raises(UserError, match=words):
        runtime.resolve_devices(name)


@pytest.mark.usefixtures("four_gpus")
def test_a_program_that_computes_on_one_device_says_so():
    with pytest.raises(UserError, match=r"names several devices.* here name one"):
        runtime.resolve_device("cuda:0,cuda:1")


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SLURM_STEP_GPUS": "1,3", "SLURM_JOB_GPUS": "0,1,2,3"}, ("cuda:1", "cuda:3")),  # the machine's own numbers
        ({"SLURM_JOB_GPUS": "2,3"}, ("cuda:2", "cuda:3")),
        ({"SLURM_JOB_GPUS": "4,5,6,7"}, ("cuda:0", "cuda:1", "cuda:2", "cuda:3")),  # fenced: torch counts from 0
        ({"SLURM_JOB_GPUS": "6,7", "CUDA_VISIBLE_DEVICES": "6,7"}, ("cuda:0", "cuda:1", "cuda:2", "cuda:3")),
        ({"SLURM_JOB_GPUS": "3"}, ("cuda",)),
        ({"SLURM_JOB_GPUS": "", "CUDA_VISIBLE_DEVICES": "0,1"}, ("cuda",)),
    ],
)
def test_auto_takes_the_gpus_of_a_slurm_task(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert runtime.resolve_devices("auto") == expected


def test_a_slurm_job_says_when_it_ends(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert runtime.slurm_end(0.0) == ""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1700007500")
    assert runtime.slurm_end(1_700_000_000.0).startswith("Slurm job 77, which ends in 2 h 05 min")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "soon")
    assert runtime.slurm_end(0.0) == ""


def test_threads_are_those_of_torch():
    before = torch.get_num_threads()
    try:
        runtime.use_threads(2)
        assert torch.get_num_threads() == 2
    finally:
        runtime.use_threads(before)


def test_the_machines_digest_tells_nothing():
    digest = runtime.machine_digest()
    assert digest == runtime.machine_digest()
    assert len(digest) == 12
    assert set(digest) <= set("0123456789abcdef")
    assert runtime.num_cores() >= 1


# -- how many cores ----------------------------------------------------------------------------------------------------

TWO, ONE = "/kubepods/pod7", "/docker/abc"
# What stands in /proc/self/cgroup and below /sys/fs/cgroup, and the quotas that it means, in cores.
GROUPS = {
    "version 2": (f"0::{TWO}", {f"{TWO}/cpu.max": "250000 100000"}, [2.5]),
    "version 2, none": (f"0::{TWO}", {f"{TWO}/cpu.max": "max 100000"}, []),
    "version 2, of the group around it": (
        f"0::{TWO}",
        {f"{TWO}/cpu.max": "max 100000", "/kubepods/cpu.max": "150000 100000"},
        [1.5],
    ),
    "version 2, in a container": ("0::/", {"/cpu.max": "200000 100000"}, [2.0]),
    "version 1": (
        f"4:cpu,cpuacct:{ONE}\n3:cpuset:{ONE}",
        {f"/cpu,cpuacct{ONE}/cpu.cfs_quota_us": "300000", f"/cpu,cpuacct{ONE}/cpu.cfs_period_us": "100000"},
        [3.0],
    ),
    "version 1, none": (
        f"4:cpu:{ONE}",
        {f"/cpu{ONE}/cpu.cfs_quota_us": "-1", f"/cpu{ONE}/cpu.cfs_period_us": "100000"},
        [],
    ),
    "version 1, in a container": (  # its path is the host's
        f"4:cpu,cpuacct:{ONE}",
        {"/cpu,cpuacct/cpu.cfs_quota_us": "50000", "/cpu,cpuacct/cpu.cfs_period_us": "100000"},
        [0.5],
    ),
    "nonsense": ("0::/", {"/cpu.max": "many few"}, []),
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_containers_quota_is_read(tmp_path, name):
    groups, files, expected = GROUPS[name]
    for path, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup{k}": v for k, v in files.items()}}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text + "\n")
    assert runtime.cpu_quotas(tmp_path) == expected


def test_a_machine_without_control_groups_has_no_quota(tmp_path):
    assert runtime.cpu_quotas(tmp_path) == []


@pytest.mark.parametrize(
    ("cores", "quotas", "slurm", "expected"),
    [
        (16, [], "", 16),
        (16, [2.5], "", 2),
        (16, [0.5], "", 1),
        (16, [8.0, 3.0], "", 3),
        (16, [], "4", 4),
        (2, [9.0], "8", 2),
    ]
    + [(16, [], text, 16) for text in ("four", "-1")]
    + [(16, [], "0", 1)],
)
def test_the_least_limit_counts(monkeypatch, cores, quotas, slurm, expected):
    """For threads and for processes that decode alike: all ask here."""
    monkeypatch.setattr(runtime.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(runtime, "cpu_quotas", lambda: quotas)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", slurm)
    assert runtime.num_cores() == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    runtime.go_silent()
    assert os.environ.get("OMP_NUM_THREADS") == (str(expected) if expected < cores else None)


def test_nobody_counts_cores_elsewhere():
    counting = ("cpu_count(", "sched_getaffinity(")
    sources = [
        path for top in ("common", "server", "clients", "simulation", "facefed") for path in (ROOT / top).rglob("*.py")
    ]
    found = {str(path.relative_to(ROOT)) for path in sources if any(word in path.read_text() for word in counting)}
    assert found == {"common/system/runtime.py"}


# -- what is printed ---------------------------------------------------------------------------------------------------

PRINTS = """
import sys
from common.system.runtime import go_silent
go_silent()
with open(sys.argv[1], "w") as file:
    print("Zoë \N{CJK UNIFIED IDEOGRAPH-9762}", flush=True)
    print("again", flush=True)
    sys.stderr.write("Zoë\\n")
    file.write("reached, and alone in here")
"""


@pytest.mark.parametrize("how", ["", ">&-", ">&- 2>&-", "| head -c 1", "| true"])
def test_what_cannot_be_printed_ends_no_work(tmp_path, how):
    """A terminal that knows no such character, a stream that is closed, and a reader that has gone."""
    (tmp_path / "prints.py").write_text(PRINTS, encoding="utf-8")
    file = tmp_path / "file"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONPATH": str(ROOT)}
    command = f"set -o pipefail; '{sys.executable}' '{tmp_path}/prints.py' '{file}' {how}"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
    assert file.read_text() == "reached, and alone in here"
    if not how:
        assert done.stdout == "Zo\\xeb \\u9762\nagain\n"
