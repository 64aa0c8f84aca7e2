"""docker-compose.yml: what it promises can be read from it, and what its commands start is really there."""

import asyncio
import importlib.util
import re
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

import clients.cli
import server.cli
import simulation.cli
from common.system.certs import read_client_folder, read_server_folder
from common.system.processes import can_connect, free_port
from server.flower.front_door import Door, door_config
from tests.conftest import skip_or_fail

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docker-compose.yml"
VARIABLE = re.compile(r"\$\{(\w+)(:-([^}]*))?\}")
ONCE = ("certs", "data", "data-twins")
PROFILES = ("twins", "postgres", "gpu")
SITES = ("celeba", "vggface2", "twins", "celeba-gpu", "vggface2-gpu")


def _with_defaults(value):
    """The file as it is without any variable set."""
    if isinstance(value, dict):
        return {key: _with_defaults(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_defaults(one) for one in value]
    return VARIABLE.sub(lambda found: found[3] or "", value) if isinstance(value, str) else value


COMPOSE = _with_defaults(yaml.safe_load(FILE.read_text(encoding="utf-8")))
SERVICES = COMPOSE["services"]
EACH = pytest.mark.parametrize("name", SERVICES)


def program(name):
    """A file of docker/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docker_{name}", ROOT / "docker" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(name):
    return shlex.split(SERVICES[name]["command"])


def mounts(name):
    """Mount point -> (volume, mode)."""
    parts = [volume.split(":") for volume in SERVICES[name].get("volumes", [])]
    return {part[1]: (part[0], part[2] if len(part) > 2 else "rw") for part in parts}


@pytest.mark.parametrize("profile", [None, *PROFILES])
def test_docker_compose_takes_the_file_without_an_env_file(profile, tmp_path):
    compose = shutil.which("docker-compose")
    if not compose:
        skip_or_fail("docker-compose is not installed")
    (tmp_path / "empty").touch()
    command = [compose, "-f", FILE, "--env-file", "empty", *(["--profile", profile] if profile else [])]
    done = subprocess.run(
        [*command, "config", "-q"], cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "not set" not in done.stderr  # a variable without a default is a warning and an empty text


def test_every_variable_has_a_default():
    text = "\n".join(line.partition(" #")[0] for line in FILE.read_text(encoding="utf-8").splitlines())
    found = list(VARIABLE.finditer(text))
    assert len(found) > 10
    assert [one[1] for one in found if one[2] is None] == []
    assert text.count("$") == len(found)


def test_every_image_is_pinned():
    for name, service in SERVICES.items():
        image, _, tag = service["image"].rpartition(":")
        assert image, name
        assert re.fullmatch(r"\d+\.\d+\.\d+", tag), name
    for path in (ROOT / "docker").glob("*ockerfile"):
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"${PYTHON_IMAGE}"}, path
        assert "ARG PYTHON_IMAGE=python:3.11-slim" in text, path


@EACH
def test_a_service_may_do_little_and_take_little(name):
    service = SERVICES[name]
    assert service["user"] == "10001:10001"
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"]
    assert service["init"]
    assert not {"privileged", "cap_add", "devices", "pid", "ipc"} & service.keys()
    assert service["mem_limit"]
    assert service["cpus"]
    assert service["pids_limit"]
    assert "docker.sock" not in str(service)


@EACH
def test_a_service_is_watched_and_restarted_as_befits_it(name):
    service = SERVICES[name]
    if name in ONCE:
        assert service["restart"] == "no"
        assert service["healthcheck"] == {"disable": True}
        assert service["network_mode"] == "none"
    else:
        assert service["restart"] == ("on-failure" if name == "server" else "unless-stopped")
        assert service["healthcheck"]["test"][0].startswith("CMD")
    for needed, how in service.get("depends_on", {}).items():
        assert how == {"condition": "service_completed_successfully" if needed in ONCE else "service_healthy"}


@EACH
def test_health_checks_and_commands_start_what_is_there(name):
    service = SERVICES[name]
    lines = [shlex.split(service.get("command", "")), service["healthcheck"].get("test", [])]
    for line in lines:
        for word in line:
            if word.startswith("/opt/facefed/docker/"):
                assert (ROOT / "docker" / Path(word).name).is_file()
    if "health.py" in str(lines[1]):
        assert lines[1][-1] in program("health").CHECKS


@EACH
def test_no_secret_stands_in_the_environment_or_a_command(name):
    service = SERVICES[name]
    assert not [key for key in service.get("environment", {}) if re.search("PASS|SECRET|TOKEN|KEY", key, re.IGNORECASE)]
    assert not re.search(r"://[^/\s]+:[^/\s]+@", str(service))


def test_only_the_door_and_on_this_machine_mlflow_are_published():
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"proxy": ["8443:8443"], "mlflow-port": ["127.0.0.1:5000:5000"]}


NETWORKS = {name: set(service.get("networks", ())) for name, service in SERVICES.items()}


def _in(network):
    return [name for name in SERVICES if network in NETWORKS[name]]


def test_a_site_reaches_the_door_alone_and_no_other_site():
    assert _in("inner") == ["server", "proxy"]
    for name in SITES:
        own = name.removesuffix("-gpu")
        assert NETWORKS[name] == {own}
        assert set(_in(own)) - {f"{own}-gpu"} == {"proxy", own}
    assert SERVICES["server"]["networks"]["inner"] == {"aliases": ["superlink"]}


def test_only_the_published_ports_have_a_way_out():
    """Docker routes nothing out of an internal network, and publishes no port of a container that is in no other."""
    ways_out = {name for name, network in COMPOSE["networks"].items() if network != {"internal": True}}
    assert ways_out == {"outside"}
    assert [name for name in SERVICES if NETWORKS[name] & ways_out] == ["mlflow-port", "proxy"]
    assert {name for name, service in SERVICES.items() if "ports" in service} == {"mlflow-port", "proxy"}
    assert not mounts("mlflow-port")


def test_mlflow_asks_for_a_password_that_only_it_and_the_server_read():
    assert "--no-auth" not in words("mlflow")
    assert mounts("mlflow")["/tracking-key"] == ("tracking-key", "rw")
    assert mounts("server")["/tracking-key"] == ("tracking-key", "ro")
    assert [name for name in SERVICES if "/tracking-key" in mounts(name)] == ["mlflow", "server"]
    password = str(program("run_server").PASSWORD)
    assert words("mlflow")[4] == password == str(program("health").PASSWORD)


def test_each_sees_its_own_keys_and_pictures_only():
    for name in SITES:
        own = name.removesuffix("-gpu")
        assert mounts(name) == {
            "/var/lib/facefed": (f"site-{own}", "rw"),
            f"/certs/{own}": (f"certs-{own}", "ro"),
            f"/data/{own}": (f"data-{own}", "ro"),
        }
    assert [name for name in SERVICES if "authority" in str(mounts(name))] == ["certs"]
    assert [name for name in SERVICES if "/certs/server" in mounts(name)] == ["certs", "server", "proxy"]
    assert [name for name in SERVICES if "/database-key" in mounts(name)] == ["postgres", "mlflow"]


def test_every_volume_is_named_and_its_mount_point_belongs_to_the_images_user():
    """Docker gives a new volume the owner of the folder that it covers; without one it is root's, and unwritable."""
    made = {
        path.name: set(
            re.findall(r"(/(?:var/lib/facefed|certs|database-key|tracking-key|data)[\w/]*)", path.read_text("utf-8"))
        )
        for path in (ROOT / "docker").glob("*ockerfile")
    }
    used = set()
    for name in SERVICES:
        image = "postgres.Dockerfile" if name == "postgres" else "Dockerfile"
        assert set(mounts(name)) <= made[image], name
        used |= {volume for volume, _ in mounts(name).values()}
    assert used == set(COMPOSE["volumes"])


def test_the_programs_know_their_flags():
    for name in SITES:
        assert words(name)[0] == "flower-client"
        given = clients.cli.parser().parse_args(words(name)[1:])
        assert given.server == "proxy:8443"
        assert given.tls == f"/certs/{given.dataset}"
    line = words("server")
    started = program("run_server").command(line[3:], runs=ROOT / "tests" / "docker")
    given = server.cli.parser().parse_args(started[1:])
    assert (given.address, given.front_door, given.tls) == ("superlink:8000", False, "/certs/server")
    assert given.config == "demo"
    line = words("mlflow")
    given = simulation.cli.facefed_parser().parse_args(["tracking", "serve", *line[5:]])
    assert given.auth
    with pytest.raises(SystemExit):
        simulation.cli.facefed_parser().parse_args(["tracking", "serve", *line[5:], "--no-such-flag"])


# -- the files of docker/ ----------------------------------------------------------------------------------------------


def _run_folder(runs, name, *files):
    for file in ("run.json", *files):
        path = runs / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"mode": "federated"}')


def test_the_server_goes_on_with_the_newest_run_only_where_it_is_unfinished(tmp_path):
    run_server = program("run_server")
    arguments = ["--tls", "T", "--", "--config", "demo"]
    new = ["flower-server", "--tls", "T", "--config", "demo"]
    assert run_server.command(arguments, tmp_path) == new
    _run_folder(tmp_path, "20260101-a", "checkpoints/state.json")
    assert run_server.command(arguments, tmp_path) == ["flower-server", "--tls", "T", "--resume", "20260101-a"]
    _run_folder(tmp_path, "20260101-a", "metrics.json")  # its models may not be registered yet
    assert run_server.command(arguments, tmp_path)[-1] == "20260101-a"
    (tmp_path / "20260101-a" / "outcome.json").write_text('{"exit_code": 0, "line": ""}')
    assert run_server.command(arguments, tmp_path) == new
    _run_folder(tmp_path, "20260102-b", "checkpoints/state.json")
    assert run_server.command(arguments, tmp_path)[-1] == "20260102-b"
    _run_folder(tmp_path, "20260103-c")  # no checkpoint: nothing to go on from, and what is older is not dug out
    assert run_server.command(arguments, tmp_path) == new


@pytest.fixture
def certificates(tmp_path):
    for name in ("authority", "server", "celeba", "vggface2"):
        (tmp_path / name).mkdir(mode=0o700)
    program("make_certs").main(tmp_path, ["fl.example.org"])
    return tmp_path


def test_each_volume_gets_what_its_service_needs_and_no_more(certificates):
    assert sorted(path.name for path in (certificates / "server").iterdir()) == [
        "ca.crt", "clients", "server.crt", "server.key",
    ]  # fmt: skip
    for name in ("superlink", "proxy", "fl.example.org"):
        read_server_folder(certificates / "server", name)
    parts = ["ca.crt", "client.key", "name", "peers"]
    assert sorted(path.name for path in (certificates / "celeba").iterdir()) == parts
    peers = ["celeba.pub", "vggface2.pub"]
    assert sorted(path.name for path in (certificates / "celeba" / "peers").iterdir()) == peers
    keys = {read_client_folder(certificates / name).fingerprint for name in ("celeba", "vggface2")}
    assert len(keys) == 2


def test_certificates_stay_and_a_revoked_key_goes(certificates, capsys):
    before = {path: path.read_bytes() for path in certificates.rglob("*") if path.is_file()}
    program("make_certs").main(certificates, [])
    assert {path: path.read_bytes() for path in certificates.rglob("*") if path.is_file()} == before
    authority = certificates / "authority" / "federation"
    assert simulation.cli.main(["certs", "revoke", str(authority), "vggface2"]) == 0
    program("make_certs").main(certificates, [])
    for place in ("server/clients", "celeba/peers"):
        assert [path.name for path in (certificates / place).iterdir()] == ["celeba.pub"]
    assert capsys.readouterr().out.count("are in their volumes") == 2


def test_pictures_that_are_there_are_left_alone(tmp_path, capsys):
    (tmp_path / "celeba").mkdir()
    (tmp_path / "celeba" / "mine.jpg").touch()
    program("make_data").main(tmp_path, "2", "2", ["celeba"])  # it would fail to draw two people
    assert [path.name for path in (tmp_path / "celeba").iterdir()] == ["mine.jpg"]
    assert "nothing is drawn" in capsys.readouterr().out


def test_mlflow_uses_postgres_where_its_key_is(tmp_path):
    uses = program("run_tracking").uses_postgres
    key, sqlite = tmp_path / "pgpass", tmp_path / "mlflow.db"
    sqlite.touch()
    assert not uses(key, sqlite)
    key.touch()
    assert uses(key, sqlite)


def test_mlflows_password_is_made_once_and_is_how_the_server_logs_in(tmp_path):
    file = tmp_path / "password"
    assert program("run_server").login(file) == {}
    password = program("run_tracking").password_in(file)
    assert len(password) >= 12
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert program("run_tracking").password_in(file) == password
    assert program("run_server").login(file) == {
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": password,
    }


def test_the_relay_hands_on_both_ways_and_both_ends():
    """What is sent, then what is answered once the end has come; and an address at which nothing listens."""
    relay = program("run_relay")

    async def echo(reader, writer):
        writer.write((await reader.read())[::-1])
        writer.close()

    async def ask(port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"abc" * 100_000)
        writer.write_eof()
        try:
            return await reader.read()
        except ConnectionResetError:  # what was sent lies there unread
            return b""
        finally:
            writer.close()

    async def both():
        answers = []
        for behind in (free_port(), free_port()):
            port = free_port()
            task = asyncio.ensure_future(relay.serve(port, ("127.0.0.1", behind), "127.0.0.1"))
            async with await asyncio.start_server(echo, "127.0.0.1", behind) as server:
                if answers:
                    server.close()
                    await server.wait_closed()
                while not can_connect("127.0.0.1", port):
                    await asyncio.sleep(0.01)
                answers.append(await ask(port))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return answers

    assert asyncio.run(both()) == [b"cba" * 100_000, b""]


def test_the_door_leads_to_a_superlink_elsewhere():
    door = Door(host="0.0.0.0", port=8443, superlink_host="superlink", superlink_port=8000, tls=None)  # noqa: S104
    assert "server superlink:8000;" in door_config(door)
