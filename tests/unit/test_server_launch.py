"""What `flower-server` refuses at the door, before anything is started."""

import socket
from contextlib import ExitStack

import pytest

import server.cli
from common.system.certs import ServerFiles
from common.system.processes import free_port
from server.flower.launch import Launch, ServerOptions, superexec_command
from server.flower.superlink import SECRET, Superlink, forget_secrets, write_secret


@pytest.fixture
def listener():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


@pytest.fixture
def nothing_starts(monkeypatch, tmp_path):
    def start(*_arguments, **_named):
        raise AssertionError("a program was started")

    monkeypatch.setattr("server.flower.launch.start", start)
    monkeypatch.setattr("server.cli.set_up_logging", lambda _level: None)  # its handlers would outlive the test
    monkeypatch.chdir(tmp_path)
    return tmp_path


def serve(*arguments):
    return server.cli.main(["--config", "celeba_vggface2_fedavg", "--no-mlflow", *arguments])


def test_a_port_in_use_is_one_line_and_exit_2(nothing_starts, listener, capsys):
    out = str(nothing_starts / "runs")
    assert serve("--address", f"127.0.0.1:{listener}", "--out", out) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"flower-server: --address 127.0.0.1:{listener} cannot be used (Address already in use)")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "example.org"])  # noqa: S104
def test_an_address_that_others_reach_needs_insecure(nothing_starts, capsys, host):
    assert serve("--address", f"{host}:8000") == 2
    said = capsys.readouterr().err
    assert f"--address {host}:8000 can be reached from other machines" in said
    assert "--insecure" in said
    assert not list(nothing_starts.iterdir())


@pytest.mark.parametrize("address", ["8000", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", ":8000", "127.0.0.1:http"])
def test_an_address_without_host_or_port_is_refused(nothing_starts, capsys, address):
    assert serve("--address", address) == 2
    assert f"--address {address}: write HOST:PORT" in capsys.readouterr().err
    assert not list(nothing_starts.iterdir())


@pytest.mark.parametrize(("option", "value"), [("--min-clients", "0"), ("--join-timeout", "0"), ("--rounds", "-1")])
def test_a_zero_or_negative_setting_is_refused_by_name(nothing_starts, capsys, option, value):
    assert serve(option, value) == 2
    assert option.removeprefix("--").replace("-", "_") in capsys.readouterr().err
    assert not list(nothing_starts.iterdir())


def test_an_address_that_others_reach_gets_a_front_door_or_nothing(nothing_starts, capsys, monkeypatch):
    monkeypatch.setattr("server.flower.front_door.shutil.which", lambda *_, **__: None)
    assert serve("--address", "0.0.0.0:8000", "--insecure") == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "nginx is not installed" in said
    assert "--no-front-door" in said
    assert not list(nothing_starts.iterdir())


@pytest.mark.usefixtures("nothing_starts")
def test_tls_and_insecure_exclude_each_other(capsys):
    assert serve("--tls", "tls", "--insecure") == 2
    assert "--tls and --insecure contradict each other" in capsys.readouterr().err


def test_a_folder_that_is_none_of_ours_is_refused(nothing_starts, capsys):
    assert serve("--tls", str(nothing_starts)) == 2
    said = capsys.readouterr().err
    assert "is not a folder that `facefed certs init` made: ca.crt is missing" in said
    assert len(said.splitlines()) == 1


class Started:
    """A launch of which nothing really starts: the commands, by the name of what they would start."""

    def __init__(self, folder, **options):
        self.commands, self.look = {}, lambda *_: None
        self.launch = Launch(None, ServerOptions(**{"host": "127.0.0.1", "port": free_port(), **options}), folder)
        self.launch._add = self._add

    def _add(self, _started, name, command, _output, sockets=()):
        self.commands[name] = command
        self.look(command, sockets)

    def __call__(self):
        with ExitStack() as started:
            self.link = self.launch._start_superlink(started, None)
        return self.commands["the SuperLink"]


def commanded(folder, **options):
    return Started(folder, **options)()


def test_flowers_own_programs_get_the_address_and_no_package_index(tmp_path):
    port = free_port()
    command = commanded(tmp_path, port=port, database=tmp_path / "state.db")
    assert command[1:4] == ["-P", "-m", "server.flower.redelivery"]
    assert command[command.index("--port") + 1] == str(port)
    assert command[command.index("--database") + 1] == str(tmp_path / "state.db")
    assert "--disable-runtime-dependency-installation" in command


def test_whoever_takes_a_task_must_know_a_secret(tmp_path):
    command = commanded(tmp_path)
    secret = tmp_path / "flwr" / SECRET
    assert command[command.index("--isolation") + 1] == "process"
    assert command[command.index("--superexec-auth-secret-file") + 1] == str(secret)
    assert command[4] == str(secret.parent)  # where it lies for whoever asks anything of Control
    assert secret.stat().st_mode & 0o777 == 0o600
    assert secret.parent.stat().st_mode & 0o777 == 0o700


def test_with_tls_sites_must_prove_who_they_are(tmp_path):
    files = {name: tmp_path / name for name in ("ca", "certificate", "key", "clients")}
    made = Started(tmp_path, tls=ServerFiles(**files))
    command = made()
    assert "--enable-supernode-auth" in command
    assert "--insecure" not in command
    for option, name in (("--ssl-ca-certfile", "ca"), ("--ssl-certfile", "certificate"), ("--ssl-keyfile", "key")):
        assert command[command.index(option) + 1] == str(files[name])
    assert superexec_command(made.link)[-2:] == [str(files["ca"]), str(files["clients"])]


def test_behind_a_front_door_the_superlink_is_on_loopback_at_a_port_of_its_own(tmp_path):
    port = free_port()
    command = commanded(tmp_path, host="0.0.0.0", port=port, front_door=True)  # noqa: S104
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--port") + 1] not in (str(port), "0")


@pytest.mark.parametrize("front_door", [True, False])
def test_a_port_is_taken_before_a_command_line_tells_it(tmp_path, front_door):
    """Any account of the machine reads it there; it takes seconds until the SuperLink serves."""
    made, refused = Started(tmp_path, front_door=front_door), []

    def squat(command, sockets):
        port = int(command[command.index("--port") + 1])
        assert command[5] == ",".join(map(str, sockets))
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            with pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", port))
            refused.append(port)
        socket.create_connection(("127.0.0.1", port), timeout=60).close()  # it waits for the SuperLink

    made.look = squat
    made()
    assert len(refused) == 1


def test_secrets_are_this_users_and_go_with_the_superlink(tmp_path):
    path = write_secret(tmp_path)
    assert (path.stat().st_mode & 0o777, path.stat().st_size) == (0o600, 32)
    first = path.read_bytes()
    assert write_secret(tmp_path).read_bytes() != first
    (tmp_path / "task-7.token").write_text("token")
    forget_secrets(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("host", "where"),
    [
        ("127.0.0.1", "127.0.0.1:8402"),
        ("0.0.0.0", "127.0.0.1:8402"),  # noqa: S104
        ("::1", "[::1]:8402"),
        ("::", "[::1]:8402"),
        ("faces.example.org", "faces.example.org:8402"),
    ],
)
def test_flowers_programs_reach_the_superlink_as_flower_writes_addresses(tmp_path, host, where):
    """Without brackets Flower takes the last groups of an IPv6 address for a port."""
    from flwr.supercore.address import parse_address

    link = Superlink(host=host, port=8402, home=tmp_path)
    assert link.address == where
    assert parse_address(link.address)[1] == 8402
    command = link.command(tmp_path / "key", [3])
    assert command[command.index("--host") + 1] == host
    assert superexec_command(link)[-1] == where
