"""Virtual clients, and `--ray-address`: a cluster of two nodes on this machine is joined, used and left as it was."""

import functools
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from programs import DONE_WITHIN_S, Programs, assert_one_line, free_port, sha_of

from common.errors import UserError
from common.system.runtime import SILENCE
from simulation.engine.cluster import check_address

pytestmark = pytest.mark.e2e
VIRTUAL = ("--clients", 4, "--set", "federation.clients_per_round=2", "--set", "training.threads=1", "--no-mlflow")


@pytest.fixture(scope="module")
def alone(faces, tmp_path_factory):
    """Four virtual clients in one process of our own Ray."""
    programs = Programs(tmp_path_factory.mktemp("alone"))
    ended = programs.run("flower-simulation", *faces.clients, *faces.bare, *faces.cache, *VIRTUAL, "--actors", 1)
    yield programs.cwd, ended
    programs.close()


def started(start, *arguments, tries_left=2):
    """A node of Ray, which gives itself 30 s to be ready, whatever else the machine does."""
    node = start("ray", "start", *arguments)
    try:
        node.wait_for("Ray runtime started")
    except AssertionError:
        if node.process.poll() is None or not tries_left:
            raise
        node.kill()
        return started(start, *arguments, tries_left=tries_left - 1)
    return node


@pytest.fixture
def cluster(programs, monkeypatch):
    """The address of a Ray head, with a second node beside it: one CPU each. Programs that start from here have its
    token, this process does not.
    """
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    folders = [Path(tempfile.mkdtemp(prefix="ray")) for _ in range(2)]  # paths of sockets must be short
    address = f"127.0.0.1:{free_port()}"
    # With this one Ray looks for no address of its own, but then it refuses a second node; here the address is given.
    silent = {k: v for k, v in {**os.environ, **SILENCE}.items() if k != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"}
    common = ("--block", "--num-cpus", 1, "--disable-usage-stats", "--object-store-memory", 10**8)
    starts = [
        ("--head", "--node-ip-address", "127.0.0.1", "--port", address.rpartition(":")[2], "--include-dashboard=false"),
        ("--address", address, "--node-ip-address", "127.0.0.1"),
    ]
    nodes = []
    for folder, arguments in zip(folders, starts, strict=True):
        start = functools.partial(programs.start, environment=silent)
        nodes.append(started(start, *common, *arguments, "--temp-dir", folder))
    yield address, nodes
    for node in nodes:
        node.kill()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def working_below(node):
    """Whether one of this node's processes is an actor that works for a client now."""
    for process in psutil.Process(node.process.pid).children(recursive=True):
        try:
            if "ClientAppActor.run" in " ".join(process.cmdline()):
                return True
        except psutil.Error:
            continue
    return False


def test_virtual_clients_are_a_few_lines_and_leave_their_heads_on_the_disk(alone):
    cwd, ended = alone
    assert ended.code == 0, ended
    for name in ("celeba", "vggface2"):
        assert re.search(rf"^{name}: 2 virtual clients with \d+ to \d+ people and", ended.out, re.MULTILINE)
    assert len(re.findall(r"^round \d of 2: 2 clients", ended.out, re.MULTILINE)) == 2
    folders = sorted(path.name for path in (cwd / "runs" / "clients").iterdir())
    assert folders == ["celeba-0001", "celeba-0002", "vggface2-0001", "vggface2-0002"]
    heads = [len(list((cwd / "runs" / "clients" / name).rglob("round-*.safetensors"))) for name in folders]
    assert sum(heads) > 0
    assert not list(cwd.rglob("clients/*/runs"))  # virtual clients keep no records of their own


def test_a_cluster_of_two_nodes_gives_the_same_model_and_stays(faces, programs, cluster, alone):
    """One process, or two on two nodes: the same bits. The cluster's nodes live on without our actors."""
    address, nodes = cluster
    running = programs.start(
        "flower-simulation", *faces.clients, *faces.bare, *faces.cache, *VIRTUAL, "--ray-address", address
    )
    worked = [False, False]
    deadline = time.monotonic() + DONE_WITHIN_S
    while running.process.poll() is None and time.monotonic() < deadline:
        worked = [done or working_below(node) for done, node in zip(worked, nodes, strict=True)]
        time.sleep(0.02)
    ended = running.ended()
    assert ended.code == 0, ended
    assert worked == [True, True]
    assert sha_of(ended.out) == sha_of(alone[1].out)
    assert [node.process.poll() for node in nodes] == [None, None]
    assert re.findall(r"^warning: (\w+ \w+)", ended.out, re.MULTILINE) == ["training ended", "fewer than"]  # of figures
    open_to_others = [path for path in (programs.cwd / "runs").rglob("*") if path.stat().st_mode & 0o077]
    assert not open_to_others  # the actors' files too, whose cluster has another umask
    with pytest.raises(UserError, match="asks for a token"):  # it lives
        check_address(address)
    while any(working_below(node) for node in nodes):
        assert time.monotonic() < deadline, "our actors live on"
        time.sleep(0.1)


def test_an_address_that_nobody_answers_ends_within_seconds(faces, programs):
    """A closed port, and one where something else listens and says nothing."""
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        for port in (free_port(), mute.getsockname()[1]):
            ended = programs.run("flower-simulation", *faces.clients, *faces.bare, "--ray-address", f"127.0.0.1:{port}")
            assert_one_line(ended, "flower-simulation", f"127.0.0.1:{port}: no Ray cluster answers", "ray start --head")
            assert not (programs.cwd / "runs").exists()
