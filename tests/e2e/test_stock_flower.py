"""`flwr run` on unmodified Flower: failing is seen, and stopping and going on gives the simulation's model.

One site is a stock SuperNode and the other a `flower-client`: both kinds can be in one run.
"""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from programs import BIN, Programs, free_port, run_folder, sha_of

from common.system.processes import is_healthy

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]  # more than its own waits add up to
ROOT = Path(__file__).resolve().parents[2]
CONNECTION = "here"
WITHIN_S = 400.0
ROUNDS = 2  # of the configuration
ASK_EVERY_S = 5.0  # each asking is a start of `flwr`: two seconds of a core


class Stock:
    """A SuperLink and its SuperNodes as Flower ships them, and `flwr` beside them."""

    def __init__(self, programs, faces):
        self.programs, self.faces, self.port = programs, faces, free_port()
        home = programs.cwd / "home"
        home.mkdir()
        connection = f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        (home / "config.toml").write_text(connection)
        silent = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"  # flwr starts its other programs by bare name
        self.environment = dict(os.environ) | silent | {"FLWR_HOME": str(home), "PATH": path}
        self._link = self._start(
            "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", self.port,
            "--disable-runtime-dependency-installation",
        )  # fmt: skip

    def _start(self, name, *arguments):
        # Program takes FLWR_HOME out of what it inherits: `env` puts it back.
        wrapper = ("env", f"FLWR_HOME={self.environment['FLWR_HOME']}")
        return self.programs.start(name, *arguments, wrapper=wrapper, environment=self.environment)

    def wait(self):
        deadline = time.monotonic() + WITHIN_S
        while not is_healthy("127.0.0.1", self.port, ca=None):
            assert self._link.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def node(self, name):
        site = {
            "dataset": name, "data-dir": str(self.faces.folder / "data" / name), "device": "cpu",
            "cache-dir": str(self.faces.folder / "packs"),
        }  # fmt: skip
        given = " ".join([*(f'{key}="{value}"' for key, value in site.items()), "site-seed=1"])
        link = ("--superlink", f"127.0.0.1:{self.port}", "--port", free_port())
        return self._start("flower-supernode", "--insecure", *link, "--node-config", given)

    def client(self, name):
        """The same site by `flower-client`, which one run may have beside stock SuperNodes."""
        return self.programs.start(
            "flower-client", "--dataset", name, "--data-dir", self.faces.folder / "data" / name, "--device", "cpu",
            "--site-seed", 1, "--server", f"127.0.0.1:{self.port}", *self.faces.cache,
        )  # fmt: skip

    def flwr(self, *arguments):
        """What `flwr` says."""
        ended = subprocess.run(
            [str(BIN / "flwr"), *map(str, arguments)], cwd=self.programs.cwd, env=self.environment, text=True,
            capture_output=True, timeout=WITHIN_S,
        )  # fmt: skip
        assert ended.returncode == 0, ended
        return ended.stdout

    def run(self, app, **given):
        """Flower's id of a new run."""
        texts = (f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in given.items())
        return json.loads(self.flwr("run", app, CONNECTION, "--format", "json", "--run-config", " ".join(texts)))[
            "run-id"
        ]

    def status(self, run):
        [found] = json.loads(self.flwr("ls", "--run-id", run, CONNECTION, "--format", "json"))["runs"]
        return found["status"]

    def ended(self, run):
        """Its status, once it has ended."""
        deadline = time.monotonic() + WITHIN_S
        while not (status := self.status(run)).startswith("finished"):
            assert time.monotonic() < deadline, self._link.out
            time.sleep(ASK_EVERY_S)
        return status

    def log(self, run):
        return self.flwr("log", run, CONNECTION, "--show")


@pytest.fixture(scope="module")
def stock(faces, tmp_path_factory):
    programs = Programs(tmp_path_factory.mktemp("stock"))
    yield Stock(programs, faces)
    programs.close()


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The app as a checkout has it, with nothing beside it that Flower would have to look through."""
    folder = tmp_path_factory.mktemp("app") / "facefed"
    for package in ("common", "server", "clients", "configs"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def given(faces):
    """What a run is asked for."""
    bare = faces.folder / "bare.toml"
    return {"config": str(bare), "tracking__enabled": False, "federation__join_timeout_s": WITHIN_S}


def test_a_failing_run_is_seen_as_failing_with_one_line(stock, app, given):
    stock.wait()
    failing = stock.run(app, **given, federation__rounds=0)
    assert stock.ended(failing) == "finished:failed"
    said = stock.log(failing)
    assert "--run-config: federation.rounds = 0 must be at least 1." in said
    assert "Traceback" not in said


def test_it_is_stopped_and_goes_on_to_the_simulations_model(stock, app, given, simulated):
    cwd = stock.programs.cwd
    nodes = [stock.node("celeba"), stock.client("vggface2")]
    first = stock.run(app, **given)
    state, deadline = Path(), time.monotonic() + WITHIN_S
    while not (state.is_file() and json.loads(state.read_text())["round"] >= 1):
        assert time.monotonic() < deadline, stock.log(first)
        assert not list(cwd.glob("runs/*/outcome.json")), stock.log(first)  # nor is it over
        time.sleep(0.2)
        if (cwd / "runs").is_dir():
            state = run_folder(cwd) / "checkpoints" / "state.json"
    stock.flwr("stop", first, CONNECTION)
    assert stock.ended(first) == "finished:stopped"

    again = stock.run(app, resume=str(run_folder(cwd)))
    deadline = time.monotonic() + WITHIN_S
    while json.loads(state.read_text())["round"] < ROUNDS and time.monotonic() < deadline:
        time.sleep(0.2)
    assert stock.ended(again) == "finished:completed", stock.log(again)
    assert sha_of(stock.log(again)) == sha_of(simulated.ended.out)
    for name in ("celeba", "vggface2"):
        [ledger] = (cwd / ".facefed" / "clients" / name / "egress").glob("*.jsonl")
        assert [json.loads(line)["answer_to"] for line in ledger.read_text().splitlines()].count("train") >= 2
    assert all(node.process.poll() is None for node in nodes)
