"""Two small synthetic data sets, a small configuration, and one simulated federation that many tests look at."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
from programs import Ended, Programs, sha_of
from warm import Warm, WarmPrograms

# The files that take longest, longest first: none of them shall be begun when the others are done.
LONGEST = (
    "test_privacy.py", "test_tracking_guide.py", "test_deployment.py", "test_tracking_servers.py", "test_evaluate.py",
    "test_baselines.py", "test_chaos.py", "test_waiting.py", "test_model_serving.py", "test_signals.py",
    "test_twins.py", "test_hosts.py", "test_resume.py", "test_simulation.py", "test_bad_input.py",
    "test_strangers.py", "test_tracking_faults.py", "test_ray_cluster.py", "test_local.py",
)  # fmt: skip

SMALL = """\
[data]
image_size = 32

[model]
backbone = "cnn"
embedding_size = 32

[training]
precision = "float32"
memory_format = "contiguous"
batch_size = 8

[federation]
rounds = 2
local_epochs = 1
silence_s = 12000
"""  # so that no site says how far it is, which is a line in its ledger, however slow the machine is


# Of runs whose pictures nobody looks at: drawing them takes as long as a round.
BARE = (
    SMALL
    + """
[tracking]
plots = "none"
tensorboard = "none"
"""
)
PROX = ("--proximal-mu", 1.0, "--set", "training.precision=bfloat16")
TABLES = "import sys, mlflow; mlflow.MlflowClient(tracking_uri=sys.argv[1]).search_experiments()"


def pytest_collection_modifyitems(items):
    """Whole programs last, the longest files of theirs first."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)) if item.path.parent.name == "e2e" else -1)


@dataclass(frozen=True)
class Faces:
    """The data sets, the configuration and a cache of packs for tests that are not about packing.

    The pictures are drawn once for all workers; each has packs of its own, as nobody waits for another's then.
    """

    folder: Path
    synth: tuple[Ended, ...]  # how the programs that drew them ended

    @property
    def celeba(self) -> Path:
        return self.folder / "data" / "celeba"

    @property
    def vggface2(self) -> Path:
        return self.folder / "data" / "vggface2"

    @property
    def clients(self) -> tuple[str, ...]:
        return "--client", f"celeba={self.celeba}", "--client", f"vggface2={self.vggface2}"

    @property
    def small(self) -> tuple[object, ...]:
        return "--config", self.folder / "small.toml"

    @property
    def bare(self) -> tuple[object, ...]:
        """The same configuration, without pictures and TensorBoard."""
        return "--config", self.folder / "bare.toml"

    @property
    def cache(self) -> tuple[object, ...]:
        return "--cache-dir", self.folder / "packs"


@pytest.fixture(scope="module", autouse=True)
def _own_environment():
    """MLflow writes the addresses that it is told into the environment; the next file's programs would find them."""
    with patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Makes a folder by programs: the first worker that wants it does, and the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    common = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, run: Callable[[Programs], list[Ended]]) -> tuple[Path, tuple[Ended, ...]]:
        """The folder, and how its programs ended."""
        folder = common / name
        with (common / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            kept = common / f"{name}.json"
            if not kept.exists():
                folder.mkdir(exist_ok=True)
                with contextlib.closing(Programs(folder)) as programs:
                    kept.write_text(json.dumps([asdict(ended) for ended in run(programs)]))
        return folder, tuple(Ended(**ended) for ended in json.loads(kept.read_text()))

    return made


@pytest.fixture(scope="session")
def faces(made_once, tmp_path_factory):
    def draw(programs: Programs) -> list[Ended]:
        return [
            programs.run("facefed", "data", "synth", "--layout", name, "--people", 12, "--pictures", 8, "--out", out)
            for name, out in (("celeba", "data/celeba"), ("vggface2", "data/vggface2"))
        ]

    drawn, synth = made_once("drawn", draw)
    assert [ended.code for ended in synth] == [0, 0], synth
    folder = tmp_path_factory.mktemp("faces")
    (folder / "small.toml").write_text(SMALL)
    (folder / "bare.toml").write_text(BARE)
    (folder / "data").symlink_to(drawn / "data")
    return Faces(folder, synth)


@pytest.fixture(scope="session")
def with_tables(made_once):
    """Puts MLflow's database, with its tables and nothing in it, into a folder: making it anew takes 2 s each time."""

    def migrate(programs: Programs) -> list[Ended]:
        return [programs.run("python", "-c", TABLES, "sqlite:///mlflow.db")]

    folder, [made] = made_once("migrated", migrate)
    assert made.code == 0, made

    def put(into: Path) -> Path:
        database = Path(shutil.copy(folder / "mlflow.db", into))
        database.chmod(0o600)
        return database

    return put


@pytest.fixture(scope="session")
def warm():
    """Where programs that end by themselves are forked."""
    with contextlib.closing(Warm()) as made:
        yield made


@pytest.fixture
def programs(tmp_path, warm):
    """Of this test's folder: what is started is a process as a user's, a `facefed` that is run to its end a fork.

    Federations are always processes of their own: Ray and gRPC want no fork of others' threads.
    """
    made = WarmPrograms(tmp_path, warm, names=("facefed",))
    yield made
    made.close()


@dataclass(frozen=True)
class Simulated:
    """A simulated federation that has ended."""

    cwd: Path
    ended: Ended
    left: tuple[str, ...]  # the processes that it left behind


@pytest.fixture(scope="session")
def simulated(faces, made_once):
    """FedAvg over both data sets in float32, two rounds, tracked; packs anew."""

    def simulate(programs: Programs) -> list[Ended]:
        usual = os.umask(0o022)  # of most accounts
        program = programs.start("flower-simulation", *faces.clients, *faces.small)
        os.umask(usual)
        ended = program.ended()
        (programs.cwd / "left.json").write_text(json.dumps(program.left()))
        return [ended]

    cwd, [ended] = made_once("simulated", simulate)
    return Simulated(cwd, ended, tuple(json.loads((cwd / "left.json").read_text())))


# A federation that things befall: one thread for each client, in whatever process it works, and each epoch is kept.
DISTURBED_ROUNDS = 5
DISTURBED = (
    BARE.replace("rounds = 2", f"rounds = {DISTURBED_ROUNDS}")
    .replace("local_epochs = 1", "local_epochs = 5")
    .replace("batch_size = 8", "batch_size = 8\nthreads = 1\ncheckpoint_minutes = 1e-6")
)


@pytest.fixture(scope="session")
def undisturbed(faces, made_once):
    """The SHA-256 that a federation as of `DISTURBED` comes to, whatever befalls it: a simulation's."""

    def simulate(programs: Programs) -> list[Ended]:
        config = programs.cwd / "disturbed.toml"
        config.write_text(DISTURBED)
        few = ("--no-mlflow", "--actors", 1)
        return [programs.run("flower-simulation", "--config", config, *faces.clients, *faces.cache, *few)]

    _, [ended] = made_once("undisturbed", simulate)
    assert ended.code == 0, ended
    return sha_of(ended.out)


LONG = "slurm_jobdir/1355700/scratch/net/home/a-user-with-a-long-name/job.t0016/tmp-of-this-step/and-a-bit-more"


def others_environment(folder: Path) -> dict[str, str]:
    """As others made it: a batch system's long TMPDIR, a proxy that is not there, the address of a Ray not ours."""
    (folder / LONG).mkdir(parents=True)
    proxy = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    bare = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    return bare | proxy | {"TMPDIR": str(folder / LONG), "RAY_ADDRESS": "127.0.0.1:9"}


# In a mount namespace of its own, as Docker gives a container by default; a file tells that it was so.
SMALL_SHM = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && df -B1 --output=size /dev/shm'
             ' > shm.txt && exec "$@"', "sh")  # fmt: skip


def can_mount() -> bool:
    """Whether this account may mount what only its own programs see."""
    command = [*SMALL_SHM[:4], "mount -t tmpfs -o size=64m tmpfs /dev/shm"]
    return shutil.which("unshare") is not None and not subprocess.run(command, capture_output=True).returncode


@pytest.fixture(scope="session")
def again(faces, simulated, made_once):
    """A second federation over the same data sets: by the guide's name, FedProx in bfloat16, with the first's packs.

    Without MLflow, in an environment that others made, on a terminal that shows ASCII only, with a /dev/shm of 64 MB
    where one may be mounted.
    """
    packs = simulated.cwd / ".facefed" / "packs"

    def federate(programs: Programs) -> list[Ended]:
        times = {str(path): path.stat().st_mtime_ns for path in packs.rglob("*.pictures")}
        (programs.cwd / "packs.json").write_text(json.dumps(times))
        folders = [
            word for name in ("celeba", "vggface2") for word in ("--data-dir", f"{name}={faces.folder}/data/{name}")
        ]
        environment = others_environment(programs.cwd) | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
        program = programs.start(
            "facefed", "train", "federated", "--method", "fedprox", *folders, *faces.small, *PROX, "--cache-dir", packs,
            "--no-mlflow", "--set", "tracking.plots=final", wrapper=SMALL_SHM if can_mount() else (),
            environment=environment,
        )  # fmt: skip
        return [program.ended()]

    cwd, [ended] = made_once("again", federate)
    return Simulated(cwd, ended, ())
