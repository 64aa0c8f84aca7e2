"""Programs in an environment that others made: a proxy, a long TMPDIR, IPv6 only, another's Ray, an odd terminal."""

import os
import re
import socket

import pytest
from programs import free_port

pytestmark = pytest.mark.e2e
LONG = "slurm_jobdir/1355700/scratch/net/home/a-user-with-a-long-name/job.t0016/tmp-of-this-step/and-a-bit-more"


def has_ipv6():
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return False
    return True


@pytest.fixture
def environment(tmp_path):
    """A batch system's folder, a proxy that is not there, and the address of a Ray that is not ours."""
    folder = tmp_path / LONG
    folder.mkdir(parents=True)
    proxy = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    bare = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    return bare | proxy | {"TMPDIR": str(folder), "RAY_ADDRESS": "127.0.0.1:9"}


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_processes_meet_at_an_ipv6_address_past_the_proxy(faces, programs, environment):
    where = f"[::1]:{free_port()}"
    server = programs.start(
        "flower-server", "--address", where, *faces.small, "--rounds", 1, "--no-mlflow", environment=environment
    )
    clients = [
        programs.start(
            "flower-client", "--dataset", dataset, "--data-dir", faces.folder / "data" / dataset, *faces.cache,
            "--server", where, "--once", environment=environment,
        )
        for dataset in ("celeba", "vggface2")
    ]  # fmt: skip
    ended = server.ended()
    assert ended.code == 0, ended
    assert f"server at {where}; waiting for 2 clients" in ended.out
    for client in clients:
        assert client.ended(60).code == 0
        assert f"connected to {where}" in client.out
    server.assert_nothing_left()


def test_a_simulation_starts_a_ray_of_its_own(faces, programs, environment):
    ended = programs.start(
        "flower-simulation", *faces.clients, *faces.small, *faces.cache, "--rounds", 1, "--no-mlflow",
        environment=environment | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
    ).ended()  # fmt: skip
    assert ended.code == 0, ended
    assert re.search(r"model SHA-256 [0-9a-f]{64}", ended.out)
