"""Bad input: one clear line, exit 2, no traceback, and nothing left behind by a start that was refused."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from programs import BIN, Programs, assert_one_line, run_folder
from warm import WarmPrograms

from simulation.admin.certs import make_folder

pytestmark = pytest.mark.e2e

# Each program that reads run settings, with what it needs besides.
READERS = {
    "flower-server": (),
    "flower-simulation": ("--client", "celeba=data/celeba"),
    "facefed": ("train", "local", "--client", "celeba"),
}
NO_PLACE = "/proc/facefed"  # no folder can be made there, not even by root


@pytest.fixture
def programs(tmp_path, warm):
    """What is refused is refused in a fork; that the programs themselves do so, by name, a few tests show."""
    made = WarmPrograms(tmp_path, warm)
    yield made
    made.close()


@pytest.fixture
def alone(tmp_path):
    made = Programs(tmp_path)
    yield made
    made.close()


@pytest.fixture
def home(faces, programs):
    """A folder with links to the data sets where programs look for them; what is refused leaves nothing else in it."""
    (programs.cwd / "data").mkdir()
    for name in ("celeba", "vggface2"):
        (programs.cwd / "data" / name).symlink_to(faces.folder / "data" / name)
    return programs.cwd


def _start(programs, name, *arguments):
    """A reader of run settings, with its own arguments before these."""
    return programs.run(name, *READERS[name], *arguments)


def _left(home):
    """What a program left in the folder, its captured output aside."""
    return sorted(p.name for p in home.iterdir() if p.suffix not in (".out", ".err") and p.name != "data")


@pytest.mark.parametrize("name", READERS)
def test_all_problems_of_the_settings_at_once(name, home, alone):
    problems = ("--model", "resnet81", "--set", "federation.strategy=fedpro", "--set", "federation.rounds=0",
                "--lr", "-1", "--set", "data.image_sze=3", "--set", "federation.min_clients=-2",
                "--batch-size", "many")  # fmt: skip
    ended = _start(alone, name, *problems)
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err
    assert len(ended.error_lines) == 7, ended.err
    for text in ("'resnet81' is unknown; did you mean 'resnet18'", "'fedpro' is unknown; did you mean 'fedprox'",
                 "federation.rounds = 0 must be at least 1", "training.lr = -1.0 must be greater than 0",
                 "did you mean 'data.image_size'", "federation.min_clients = -2",
                 'training.batch_size = "many"'):  # fmt: skip
        assert sum(text in line for line in ended.error_lines) == 1, (text, ended.err)
    assert all(line.startswith(f"{name}: ") for line in ended.error_lines)
    assert _left(home) == []


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (("--config", "celba"), ("--config celba", "no such file", "celeba_vggface2_fedavg", "demo")),
        (("--tracking-uri", "file:///tmp/mlruns"), ("'file:///tmp/mlruns' is a file store", "sqlite:///mlflow.db")),
        (("--tracking-uri", "mlruns"), ("'mlruns' is a folder", "sqlite:///mlflow.db")),
        (("--set", "rounds=3"), ("write SECTION.KEY=VALUE",)),
    ],
    ids=["config", "file-uri", "bare-folder", "set"],
)
def test_settings_that_every_program_refuses(name, arguments, fragments, home, programs):
    assert_one_line(_start(programs, name, *arguments), name, *fragments)
    assert _left(home) == []


def _certificates(home):
    """A federation's, whose server's key anybody can read."""
    folder = home / "data" / "tls"
    make_folder(folder, ["fl.example.org"], ["celeba"])
    (folder / "server.key").chmod(0o644)
    return folder


def test_what_the_server_refuses(home, programs):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        refused = {
            ("--address", address): (f"{address} cannot be used", "Address already in use", "another port"),
            ("--address", "0.0.0.0:8000"): ("0.0.0.0:8000", "plain text", "--insecure"),
            ("--address", "8000"): ("write HOST:PORT",),
            ("--address", "127.0.0.1:0"): ("a port from 1 to 65535",),
            ("--join-timeout", "0"): ("federation.join_timeout_s = 0.0 must be greater than 0",),
            ("--min-clients", "two"): ('federation.min_clients = "two"', "a whole number"),
            ("--out", NO_PLACE): (f"--out {NO_PLACE}", "no folder can be made"),
            ("--database", "nowhere/state.db"): ("--database", "there is no folder"),
            ("--resume", "data"): ("--resume data: no run is at data",),
            ("--tls", _certificates(home)): ("server.key can be read by others (mode 0644)", "make it 0600"),
        }
        for arguments, fragments in refused.items():
            ended = programs.run("flower-server", *arguments)
            assert_one_line(ended, "flower-server", *fragments)
            assert ended.out == "", arguments
    assert _left(home) == []


def test_what_the_client_refuses(home, programs):
    nobody = ("--dataset", "celeba", "--server", "127.0.0.1:9", "--connect-timeout", "1")
    refused = {
        ("--dataset", "celba"): ("'celba' is unknown; did you mean 'celeba'",),
        ("--dataset", "celeba", "--data-dir", "nowhere"): (f"{home}/nowhere: no such folder", "identity_CelebA.txt"),
        ("--dataset", "celeba", "--device", "tpu"): ("--device tpu is not on this machine", "cpu"),
        ("--dataset", "celeba", "--server", "faces.example.org:8000"): ("plain text", "--insecure"),
        ("--dataset", "celeba", "--connect-timeout", "0"): ("--connect-timeout 0 must be greater than 0",),
        ("--dataset", "celeba", "--name", "../x"): ("--name ../x",),
        ("--dataset", "celeba", "--log-level", "loud"): ("--log-level loud", "debug"),
        (*nobody, "--state-dir", NO_PLACE): (f"--state-dir {NO_PLACE} cannot be written",),
        (*nobody, "--state-dir", "data/state"): ("is of the site 'vggface2'", "Give 'celeba' a folder of its own"),
        (*nobody, "--tls", _certificates(home)): ("is the server's folder", "/NAME"),
    }
    (home / "data" / "state").mkdir()
    (home / "data" / "state" / "site").write_text("vggface2")
    for arguments, fragments in refused.items():
        assert_one_line(programs.run("flower-client", *arguments), "flower-client", *fragments)
    assert _left(home) == []
    ended = programs.run("flower-client", *nobody)
    assert_one_line(ended, "flower-client", "no server at 127.0.0.1:9 within 1 s (--connect-timeout)")
    assert ended.out.startswith("FaceFed 0.1.0, the site celeba of 127.0.0.1:9\nceleba: 12 people, 96 pictures in ")


def test_what_the_simulation_refuses(home, programs):
    celeba = ("--client", "celeba=data/celeba")
    refused = {
        (): ("no clients", "--client celeba=data/celeba"),
        ("--client", "celba=data/celeba"): ("'celba' is unknown; did you mean 'celeba'",),
        ("--client", "celeba=nowhere"): ("nowhere: no such folder",),
        (*celeba, "--client", "celeba:vggface2=data/vggface2"): ("two clients claim the name 'celeba'",),
        (*celeba, "--device", "tpu"): ("--device tpu is not on this machine",),
        (*celeba, "--set", "data.min_pictures_per_person=1000"): ("0 of 12 people", "min_pictures_per_person = 1000"),
    }
    for arguments, fragments in refused.items():
        assert_one_line(programs.run("flower-simulation", *arguments), "flower-simulation", *fragments)
    assert _left(home) == []


def test_weights_that_cannot_be_had(home, faces, programs):
    """Before a run is begun: no run folder, no MLflow database.  `imagenet` is asked of a proxy that is not there."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            patch.setenv(variable, "http://127.0.0.1:9")
        patch.setenv("TORCH_HOME", str(home / "data"))
        patch.delenv("no_proxy", raising=False)
        resnet = ("--model", "resnet18", "--set", "model.width=1.0")
        for value, fragment in (("imagenet", "go online"), ("no.safetensors", "no such file")):
            ended = _start(programs, "flower-simulation", *faces.cache, *resnet, "--set", f"model.pretrained={value}")
            assert_one_line(ended, "flower-simulation", "model.pretrained", fragment)
    assert _left(home) == []


def test_a_checkpoint_of_another_model(home, faces, simulated, programs):
    other = run_folder(simulated.cwd) / "checkpoints" / "round-000002.safetensors"
    for name in ("flower-server", "facefed"):
        arguments = (*faces.small, "--set", "model.embedding_size=64", "--set", f"model.pretrained={other}")
        ended = _start(programs, name, *arguments, *(faces.cache if name == "facefed" else ()))
        assert_one_line(ended, name, str(other), "does not fit model.backbone and model.embedding_size")
    assert _left(home) == []


def test_a_folder_that_no_run_can_be_made_in(home, faces, programs):
    for name in ("flower-simulation", "facefed"):
        ended = _start(programs, name, *faces.small, *faces.cache, "--out", NO_PLACE)
        assert_one_line(ended, name, f"--out {NO_PLACE}: no folder can be made there")
    assert_one_line(_start(programs, "facefed", "--cache-dir", NO_PLACE), "facefed", NO_PLACE, "another cache folder")
    assert _left(home) == []


def _copy_of_celeba(home, faces):
    shutil.copytree(faces.celeba, home / "broken")
    return ("--client", "celeba=broken")


def test_too_many_unreadable_pictures_then_no_metadata(home, faces, programs):
    client = _copy_of_celeba(home, faces)
    for path in sorted((home / "broken").rglob("*.jpg"))[:9]:
        path.write_bytes(path.read_bytes()[:100])
    ended = programs.run("flower-simulation", *client, *faces.small)
    assert_one_line(ended, "flower-simulation", "9 of 96 pictures cannot be used", "max_quarantined_fraction = 0.05")
    (home / "broken" / "identity_CelebA.txt").unlink()
    ended = programs.run("facefed", "train", "local", *client, *faces.small)
    assert_one_line(ended, "facefed", "identity_CelebA.txt: no such file")
    assert not (home / "runs").exists()
    assert not (home / "mlflow.db").exists()
    assert not list((home / ".facefed" / "packs").glob("*/manifest.json")), (
        "half a pack stays to go on with, no whole one"
    )


def test_a_pack_of_another_configuration(home, programs):
    """The pack of 48 px is put where that of 32 px belongs."""
    prepare = ("facefed", "data", "prepare", "--client", "celeba")
    for size in (32, 48):
        assert programs.run(*prepare, "--set", f"data.image_size={size}").code == 0
    first, second = sorted(p for p in (home / ".facefed" / "packs").iterdir() if not p.name.startswith("."))
    shutil.rmtree(first)
    shutil.copytree(second, first)
    size = 32 if _pack_side(second) == 48 else 48
    ended = _start(programs, "flower-simulation", "--set", f"data.image_size={size}", "--model", "cnn")
    assert_one_line(ended, "flower-simulation", str(first.name), "belongs to another configuration")
    assert sorted(p.name for p in second.iterdir()) == sorted(p.name for p in first.iterdir())
    assert _left(home) == [".facefed"]


def _pack_side(pack):
    return json.loads((pack / "manifest.json").read_text())["image_size"]


# Stands in for a full disk where this user may not mount one.
FULL = """
import collections, shutil, sys
usage = collections.namedtuple("usage", "total used free")
shutil.disk_usage = lambda _: usage(10**5, 10**5, 0)
from simulation.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_no_space_left_while_packing(home):
    tiny = home / "data" / "tiny"
    tiny.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(tiny)]
    is_mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    prepare = ("data", "prepare", "--client", "celeba", "--cache-dir", str(tiny))
    try:
        done = subprocess.run(
            [BIN / "facefed", *prepare] if is_mounted else [sys.executable, "-c", FULL, *prepare],
            cwd=home,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 2, done
        assert "no space left: packing needs" in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert not list(tiny.rglob("*.pictures"))
    finally:
        if is_mounted:
            subprocess.run(["umount", str(tiny)], check=True)


@pytest.mark.parametrize(
    "command",
    [
        ("flower-server", "--nonsense"),
        ("flower-client",),
        ("flower-simulation", "--rounds"),
        ("facefed",),
        ("facefed", "train"),
        ("facefed", "data", "synth", "--layout", "celba", "--out", "x"),
    ],
    ids=" ".join,
)
def test_what_the_command_line_cannot_mean(command, home, alone):
    ended = alone.run(*command)
    assert ended.code == 2
    assert ended.err.startswith("usage: ")
    assert ": error: " in ended.error_lines[-1]
    assert _left(home) == []


def test_data_sets_that_cannot_be_drawn(home, programs):
    synth = ("facefed", "data", "synth", "--layout", "celeba", "--pictures", 5)
    assert_one_line(programs.run(*synth, "--people", 0, "--out", "x"), "facefed", "num_people = 0")
    assert_one_line(programs.run(*synth, "--people", 8, "--out", NO_PLACE), "facefed", NO_PLACE, "cannot be written")
    assert_one_line(programs.run("facefed", "data", "audit", "--client", "celeba=x"), "facefed", "x: no such folder")
    assert _left(home) == []
