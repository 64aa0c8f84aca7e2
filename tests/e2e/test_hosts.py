"""A federation of hosts with addresses of their own, over a bad network: it ends, with the model of a good one.

The clients reach the server through a relay alone: 50 ms each way, connections cut at random.  In the middle one
client's host is cut off without a word and the other client's processes are frozen.
"""

import json
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DISTURBED, DISTURBED_ROUNDS
from network_spaces import Network
from programs import Programs, run_folder, sha_of, state_of

from common.errors import UserError
from server.flower.front_door import find_nginx
from tests.conftest import skip_or_fail
from tests.relay import RelayProcess

pytestmark = pytest.mark.e2e
DOOR, OUTSIDE, MLFLOW = 443, 8443, 5000  # ports; in a network of one's own all are free
CUT_S = 12.0  # longer than the site's own checks of the wire take; to be gone for the server takes 60 s
CUTS_PER_S = 0.5
# What is asked of the SuperLink through the door; 415: it got the question, and wants a signed one of its own kind.
PATHS = {"/health": 200, "/v1/fleet/pull-messages": 415, "/v1/control/start-run": 404, "/v1/runtime/acquire-task": 404}

# What a stranger at a client's host can try.
SCAN = """
import json, socket, sys
host, ports = json.loads(sys.argv[1])
def is_open(port):
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError:
        return False
    return True
print(json.dumps([port for port in ports if is_open(port)]))
"""
ASK = """
import http.client, json, ssl, sys
host, port, ca, paths = json.loads(sys.argv[1])
def status(path):
    line = http.client.HTTPSConnection(host, port, context=ssl.create_default_context(cafile=ca), timeout=60)
    line.request("GET" if path == "/health" else "POST", path, body=b"")
    return line.getresponse().status
def asked(path):
    for _ in range(20):  # connections are cut here
        try:
            return status(path)
        except OSError:
            continue
print(json.dumps({path: asked(path) for path in paths}))
"""


def try_from(host, program, *what):
    done = subprocess.run(
        [*host.wrapper, sys.executable, "-c", program, json.dumps(what)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done
    return json.loads(done.stdout)


def listening(host):
    """The ports that anything listens on, on whatever address of the host's."""
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/{host.pid}/net/{name}").read_text().splitlines()[1:]
    ]
    return sorted({int(line[1].rpartition(":")[2], 16) for line in lines if line[3] == "0A"})


@pytest.fixture
def network():
    try:
        find_nginx()
    except UserError as error:
        skip_or_fail(str(error))
    with Network("server", "relay", "celeba", "vggface2") as made:
        yield made


@pytest.fixture
def relay(network):
    to = (network["server"].address, DOOR)
    with RelayProcess(
        wrapper=network["relay"].wrapper, host=network["relay"].address, port=OUTSIDE, to=to,
        cuts_per_s=CUTS_PER_S, seed=7,
    ) as made:  # fmt: skip
        yield made


@pytest.fixture
def here(network, tmp_path):  # noqa: ARG001 - programs end before their network
    programs = Programs(tmp_path)
    yield programs
    programs.close()


def send_to_all(program, number):
    for process in program.processes():
        process.send_signal(number)


def assert_each_point_once(database):
    with sqlite3.connect(database) as opened:
        points = opened.execute("select key, run_uuid, step, count(*) from metrics group by 1, 2, 3").fetchall()
        statuses = opened.execute("select status from runs").fetchall()
    opened.close()
    assert [point for point in points if point[3] != 1] == []
    assert {step for key, _, step, _ in points if key == "train_loss"} == set(range(1, DISTURBED_ROUNDS + 1))
    assert {step for key, _, step, _ in points if key == "val_roc_auc"} == set(range(DISTURBED_ROUNDS + 1))
    assert statuses == [("FINISHED",)] * 3  # the run and its clients


def test_a_bad_network_costs_time_and_nothing_else(faces, undisturbed, network, relay, here, with_tables):
    with_tables(here.cwd)
    (here.cwd / "disturbed.toml").write_text(DISTURBED)
    names = [word for name in ("server", "relay") for word in ("--server-name", network[name].address)]
    made = here.run("facefed", "certs", "init", "tls", *names, "--client", "celeba", "--client", "vggface2")
    assert made.code == 0, made
    inside = network["server"].wrapper
    here.start("facefed", "tracking", "serve", "--no-auth", "--port", MLFLOW, wrapper=inside)
    server = here.start(
        "flower-server", "--address", f"{network['server'].address}:{DOOR}", "--tls", "tls",
        "--config", "disturbed.toml", "--tracking-uri", f"http://127.0.0.1:{MLFLOW}", wrapper=inside,
    )  # fmt: skip
    clients = {
        name: here.start(
            "flower-client", "--dataset", name, "--data-dir", faces.folder / "data" / name, "--server", relay.address,
            "--tls", f"tls/{name}", "--site-seed", 1, *faces.cache, wrapper=network[name].wrapper,
        )
        for name in ("celeba", "vggface2")
    }  # fmt: skip
    server.wait_for("round 1 of")
    assert_only_the_door_is_open(network, relay, here)
    clients["celeba"].wait_for("round 2: training")
    network["celeba"].pull_the_plug()
    send_to_all(clients["vggface2"], signal.SIGSTOP)
    time.sleep(CUT_S)
    network["celeba"].plug_in()
    send_to_all(clients["vggface2"], signal.SIGCONT)
    ended = server.ended()
    assert ended.code == 0, ended
    assert "left out" not in ended.out
    assert sha_of(ended.out) == undisturbed
    assert state_of(run_folder(here.cwd))["round"] == DISTURBED_ROUNDS
    assert_each_point_once(here.cwd / "mlflow.db")
    assert relay.counts()["cut"] > 3
    assert re.search("cannot be reached; trying again\n(.+\n)*?.*is reached again", clients["celeba"].out)
    for name, client in clients.items():
        client.wait_for("the run is over")
        assert client.out.count("connected to") == 1, (name, client.out)


def assert_only_the_door_is_open(network, relay, here):
    """All that the server's host listens on, tried from a client's: the front door, and behind it Fleet and health."""
    server, client = network["server"], network["celeba"]
    ports = listening(server)
    assert {DOOR, MLFLOW} < set(ports)
    assert len(ports) >= 3  # the SuperLink's
    assert try_from(client, SCAN, server.address, ports) == [DOOR]
    assert try_from(client, ASK, relay.host, relay.port, str(here.cwd / "tls" / "ca.crt"), list(PATHS)) == PATHS
