"""What `flower-server` refuses at the door, before anything is started."""

import os
import socket
import sys

import pytest

import server.cli
from common.errors import FaceFedError
from common.system.certs import ServerFiles
from server.flower.launch import Launch, ServerOptions
from server.flower.superlink import Superlink, forget_secrets, write_secret


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


def launch(folder, **options):
    return Launch(None, ServerOptions(**{"host": "127.0.0.1", "port": 8123, **options}), folder)


def test_flowers_own_programs_get_the_address_and_no_package_index(tmp_path):
    command = launch(tmp_path, database=tmp_path / "state.db")._superlink.command(tmp_path / "secret")
    assert command[1:4] == ["-P", "-m", "server.flower.redelivery"]
    assert command[command.index("--port") + 1] == "8123"
    assert command[command.index("--database") + 1] == str(tmp_path / "state.db")
    assert "--disable-runtime-dependency-installation" in command


def test_whoever_takes_a_task_must_know_a_secret(tmp_path):
    command = launch(tmp_path)._superlink.command(tmp_path / "secret")
    assert command[command.index("--isolation") + 1] == "process"
    assert command[command.index("--superexec-auth-secret-file") + 1] == str(tmp_path / "secret")


def test_with_tls_sites_must_prove_who_they_are(tmp_path):
    files = {name: tmp_path / name for name in ("ca", "certificate", "key", "clients")}
    made = launch(tmp_path, tls=ServerFiles(**files))
    command = made._superlink.command(tmp_path / "secret")
    assert "--enable-supernode-auth" in command
    assert "--insecure" not in command
    for option, name in (("--ssl-ca-certfile", "ca"), ("--ssl-certfile", "certificate"), ("--ssl-keyfile", "key")):
        assert command[command.index(option) + 1] == str(files[name])
    assert made._superexec_command()[-2:] == [str(files["ca"]), str(files["clients"])]


def test_behind_a_front_door_the_superlink_is_on_loopback_at_a_port_of_its_own(tmp_path):
    command = launch(tmp_path, host="0.0.0.0", front_door=True)._superlink.command(tmp_path / "secret")  # noqa: S104
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--port") + 1] != "8123"


def test_secrets_are_this_users_and_go_with_the_superlink(tmp_path):
    path = write_secret(tmp_path)
    assert (path.stat().st_mode & 0o777, path.stat().st_size) == (0o600, 32)
    first = path.read_bytes()
    assert write_secret(tmp_path).read_bytes() != first
    (tmp_path / "task-7.token").write_text("token")
    forget_secrets(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def flwr(tmp_path, monkeypatch):
    """A stand-in for Flower's command line; returns the function that writes its text."""

    def write(text):
        program = tmp_path / "bin" / "flwr"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!{sys.executable} -I\nimport os, sys\n{text}\n")
        program.chmod(0o755)
        monkeypatch.setattr("server.flower.superlink.child_environment", lambda _home: {"PATH": str(program.parent)})
        return Superlink(host="127.0.0.1", port=1, home=tmp_path)

    return write


def test_ctrl_c_in_a_terminal_does_not_cut_flowers_command_line_short(flwr):
    answer = flwr("""print('{"group": %d}' % os.getpgrp())""").flwr("ls")
    assert answer["group"] != os.getpgrp()


def test_a_failure_of_flowers_command_line_is_one_line(flwr):
    with pytest.raises(FaceFedError, match=r"^flwr ls failed: two lines$"):
        flwr("sys.exit('two\\nlines')").flwr("ls")


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
    assert link.command(tmp_path / "key")[link.command(tmp_path / "key").index("--host") + 1] == host
    link.write_connection()
    assert f'address = "{where}"' in (tmp_path / "config.toml").read_text()
