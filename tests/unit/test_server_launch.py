"""What `flower-server` refuses at the door, before anything is started."""

import socket

import pytest

import server.cli
from server.launch import Launch, ServerOptions


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

    monkeypatch.setattr("server.launch.start", start)
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


def test_flowers_own_programs_get_the_address_and_no_package_index(tmp_path):
    options = ServerOptions(host="127.0.0.1", port=8123, database=tmp_path / "state.db")
    command = Launch(None, options, tmp_path)._superlink_command()
    assert command[0] == "flower-superlink"
    assert command[command.index("--port") + 1] == "8123"
    assert command[command.index("--database") + 1] == str(tmp_path / "state.db")
    assert "--disable-runtime-dependency-installation" in command
