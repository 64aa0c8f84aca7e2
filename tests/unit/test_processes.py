"""Child processes end with us, however we end; addresses and ports are checked at the door."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.errors import UserError
from common.system import processes

ROOT = Path(__file__).resolve().parents[2]
# A parent that starts a child through `start`, prints its id, and then works for ever.
PARENT = """
import subprocess, sys, time
from pathlib import Path
from common.system.processes import child_environment, start
child = start([sys.executable, "-c", {child!r}], environment=child_environment(Path("/nowhere")),
              output=subprocess.DEVNULL)
print(child.pid, flush=True)
time.sleep(120)
"""
SLEEP = "import time; time.sleep(120)"
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")


def lives(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody reaps in a container counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition, within_s: float = 20.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


@linux_only
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_child_ends_when_its_parent_is_ended(number):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(child=SLEEP)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        child = int(parent.stdout.readline())
        assert lives(child)
        parent.send_signal(number)
        parent.wait(timeout=20)
        assert wait_for(lambda: not lives(child)), "the child outlived its parent"
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()


def started(code: str, tmp_path: Path) -> subprocess.Popen[bytes]:
    environment = processes.child_environment(tmp_path)
    return processes.start([sys.executable, "-c", code], environment=environment, output=subprocess.PIPE)


def test_stop_ends_the_program_and_what_it_started(tmp_path):
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {SLEEP!r}])\n"
        "print(child.pid, flush=True)\ntime.sleep(120)"
    )
    process = started(code, tmp_path)
    with process.stdout:
        grandchild = int(process.stdout.readline())
    assert lives(grandchild)
    processes.stop(process)
    assert process.returncode == -signal.SIGTERM
    assert wait_for(lambda: not lives(grandchild))
    processes.stop(process)  # a second time does nothing


def test_stop_kills_what_does_not_listen(tmp_path):
    code = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(1, flush=True)\ntime.sleep(120)"
    process = started(code, tmp_path)
    with process.stdout:
        process.stdout.readline()
    processes.stop(process, grace_s=0.2)
    assert process.returncode == -signal.SIGKILL


def test_children_are_in_a_group_of_their_own_without_our_input(tmp_path):
    """So Ctrl-C on a terminal reaches us only, and we decide in which order things end."""
    process = started("import os, sys; print(os.getpgid(0) == os.getpid(), repr(sys.stdin.read()))", tmp_path)
    out, _ = process.communicate(timeout=30)
    assert out.decode().split() == ["True", "''"]
    assert os.getpgid(0) != process.pid


def test_flowers_programs_are_those_of_our_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/somewhere")
    environment = processes.child_environment(tmp_path, {"EXTRA": "1"})
    assert environment["PATH"] == f"{Path(sys.executable).parent}{os.pathsep}/somewhere"
    assert environment["FLWR_HOME"] == str(tmp_path)
    assert environment["EXTRA"] == "1"
    monkeypatch.delenv("PATH")
    assert processes.child_environment(tmp_path)["PATH"].startswith(str(Path(sys.executable).parent))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:8000", ("127.0.0.1", 8000)),
        ("example.org:1", ("example.org", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("localhost:080", ("localhost", 80)),
    ],
)
def test_addresses(text, expected):
    assert processes.parse_address(text, "--server") == expected


@pytest.mark.parametrize(
    "text", ["", "8000", ":8000", "host", "host:", "host:0", "host:65536", "host:-1", "host:8o", "host:²", "h:1.5"]
)
def test_addresses_that_are_none(text):
    with pytest.raises(UserError, match=r"^--server .*write HOST:PORT") as caught:
        processes.parse_address(text, "--server")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["::1:8402", "[::1:8402", "::1]:8402", "[localhost]:8402", "[]:8402", "[[::1]]:8402"])
def test_an_ipv6_address_stands_in_brackets(text):
    """Without them its last group might be the port."""
    with pytest.raises(UserError, match=r"^--address .*write an IPv6 address in brackets .* \[::1\]:8000"):
        processes.parse_address(text, "--address")


@pytest.mark.parametrize("text", ["127.0.0.1:8000", "example.org:1", "[::1]:65535", "[fe80::1%eth0]:8000"])
def test_an_address_is_written_as_it_is_read(text):
    assert processes.host_port(*processes.parse_address(text, "--server")) == text


def test_what_is_this_machine():
    here = ("127.0.0.1", "127.0.0.9", "::1", "localhost", socket.gethostname())
    assert [host for host in here if not processes.is_this_machine(host)] == []
    assert not any(processes.is_this_machine(host) for host in ("203.0.113.1", "2001:db8::1", "example.org", ""))


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),  # noqa: S104
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
        ("127.example.org", False),
        ("localhost.example.org", False),
    ],
)
def test_what_only_this_machine_can_reach(host, expected):
    """Plain text is allowed to these without a word, so a name that merely begins like one must not count."""
    assert processes.is_loopback(host) is expected


def test_a_port_in_use_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--address 127.0.0.1:{port} cannot be used \(Address already in use\)"):
            processes.require_free_port("127.0.0.1", port, "--address")
        assert processes.can_connect("127.0.0.1", port)
    processes.require_free_port("127.0.0.1", port, "--address")
    assert not processes.can_connect("127.0.0.1", port, timeout_s=0.5)


def test_an_address_of_another_machine_cannot_be_listened_on():
    with pytest.raises(UserError, match="cannot be used"):
        processes.require_free_port("192.0.2.1", 8000, "--address")  # TEST-NET-1, RFC 5737


def test_a_free_port_is_free():
    processes.require_free_port("127.0.0.1", processes.free_port(), "--address")


def test_who_listens_accepts_at_once_and_nobody_else_can():
    [listener] = processes.listen("127.0.0.1", 0, "--address")
    with listener:
        host, port = listener.getsockname()
        assert processes.can_connect(host, port)
        with pytest.raises(UserError, match=rf"^--address 127.0.0.1:{port} cannot be used \(Address already in use\)"):
            processes.listen("127.0.0.1", port, "--address")


def test_a_name_is_listened_for_at_each_of_its_addresses(monkeypatch):
    found = [(socket.AF_INET6, 1, 6, "", ("2001:db8::1", 0, 0, 0)), (socket.AF_INET, 1, 6, "", ("127.0.0.1", 0))]
    monkeypatch.setattr("common.system.processes.socket.getaddrinfo", lambda *_, **__: found)
    [listener] = processes.listen("localhost", 0, "--address")  # the first is no address of this machine
    listener.close()
    monkeypatch.setattr("common.system.processes.socket.getaddrinfo", lambda *_, **__: found[:1])
    with pytest.raises(UserError, match="--address localhost:9 cannot be used"):
        processes.listen("localhost", 9, "--address")


def test_a_program_gets_the_sockets_that_it_is_given(tmp_path):
    [listener] = processes.listen("127.0.0.1", 0, "--address")
    with listener:
        code = f"import socket; print(socket.socket(fileno={listener.fileno()}).getsockname()[1])"
        child = processes.start(
            [sys.executable, "-c", code],
            environment=processes.child_environment(tmp_path),
            output=subprocess.PIPE,
            sockets=[listener.fileno()],
        )
        assert int(child.communicate(timeout=60)[0]) == listener.getsockname()[1]
