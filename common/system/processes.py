"""Child processes that end with us: Flower's own programs, started by name from our environment."""

import contextlib
import ctypes
import errno
import ipaddress
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import psutil

from common.errors import UserError
from common.redact import shown_uri

PR_SET_PDEATHSIG = 1  # from linux/prctl.h
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # opened here: between fork and exec it might lock
STOP_GRACE_S = 10.0
STOP_APART_GRACE_S = 2.0
LISTEN_BACKLOG = 2048  # connections that wait to be accepted; uvicorn's
_NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def child_environment(flwr_home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Our environment for Flower's programs: its own home, and our environment's bin folder first on PATH."""
    here = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": f"{here}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_HOME": str(flwr_home),
        "PYTHONUNBUFFERED": "1",
        **(extra or {}),
    }


def _die_with_parent() -> None:
    """Runs in the child before exec: the kernel ends it when our process ends, even by kill -9 (Linux only)."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def be_killed_with_parent() -> None:
    """From now on the kernel kills this process when the one that started it ends (Linux only)."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start(
    command: Sequence[str], *, environment: Mapping[str, str], output: IO[bytes] | int, sockets: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Start a program in a process group of its own, which ends when we end.

    sockets: the numbers of open ones that it gets, under the same numbers.
    """
    return subprocess.Popen(
        list(command),
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=tuple(sockets),
        preexec_fn=_die_with_parent,  # noqa: PLW1509 - prctl is all it does, and it takes no lock
    )


def stop(process: subprocess.Popen[bytes], grace_s: float = STOP_GRACE_S) -> None:
    """End a program and all that it started: SIGTERM to its process group, then SIGKILL after the grace.

    What left the group (Flower gives its apps sessions of their own) follows, with a short grace: it may be hanging
    on a connection to what is gone.
    """
    apart = _outside_group(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=grace_s)
    _await(lambda: not _group_lives(process.pid), grace_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _send(apart, signal.SIGTERM)
    _await(lambda: not any(_lives(other) for other in apart), STOP_APART_GRACE_S)
    _send(apart, signal.SIGKILL)


def _await(look: Callable[[], bool], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not look() and time.monotonic() < deadline:
        time.sleep(0.05)


def _outside_group(pid: int) -> list[psutil.Process]:
    """The descendants of a process that are not in its process group."""
    apart = []
    with contextlib.suppress(psutil.Error):
        for other in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(OSError):
                if os.getpgid(other.pid) != pid:
                    apart.append(other)
    return apart


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _send(processes: Sequence[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def parse_address(text: str, option: str) -> tuple[str, int]:
    """HOST:PORT or [IPV6]:PORT -> (host without brackets, port).  Raises UserError."""
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise UserError(f"{option} {text}: write HOST:PORT with a port from 1 to 65535, for example 127.0.0.1:8000.")
    bare = host.removeprefix("[").removesuffix("]")
    if host not in (bare, f"[{bare}]") or (":" in bare) != (host != bare) or (host != bare and not _is_ipv6(bare)):
        raise UserError(f"{option} {text}: write an IPv6 address in brackets before the port, for example [::1]:8000.")
    return bare, int(port)


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).version == 6
    except ValueError:
        return False


def in_url(host: str) -> str:
    """A host as it stands before a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def host_port(host: str, port: int) -> str:
    """The inverse of `parse_address`."""
    return f"{in_url(host)}:{port}"


def reached_at(host: str) -> str:
    """Where this machine reaches what listens on that host: on all addresses is on loopback too."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared with, not bound


def is_this_machine(host: str) -> bool:
    """Whether that is a name or an address of this machine, as far as can be told without asking anybody."""
    if is_loopback(host) or host.lower() == socket.gethostname().lower():
        return True
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
    except (OSError, ValueError):
        return False
    return True


class Proxy(NamedTuple):
    """A proxy that the environment sends requests through."""

    variable: str
    address: str  # may hold a password

    def __str__(self) -> str:
        """For a line that is shown."""
        return f"the proxy {shown_uri(self.address)} of {self.variable}"


def proxy_before(host: str, scheme: str = "http") -> Proxy | None:
    """The proxy on the way to a host, as Flower and MLflow read the environment; None where there is none."""
    from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

    proxies = getproxies_environment()
    if proxy_bypass_environment(host, proxies):
        return None
    for kind in (scheme, "all"):
        if address := proxies.get(kind):
            name = f"{kind}_proxy"
            whole = address if "://" in address else f"http://{address}"
            return Proxy(name if name in os.environ else name.upper(), whole)
    return None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on that host name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name; one like 127.example.org may lead anywhere
        return host == "localhost"


def require_free_port(host: str, port: int, option: str) -> None:
    """Raises UserError when something listens on that port already, or the address is not this machine's."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise _cannot_be_used(host, port, option, error) from None


def listen(host: str, port: int, option: str) -> list[socket.socket]:
    """Open sockets that listen at each address of a host name, from now on and for nobody else.

    port: 0 for one that is free, at an address that is a number.  Raises UserError as `require_free_port`.
    """
    listeners: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        addresses = dict.fromkeys((family, address[:2]) for family, _, _, _, address in found)
        for family, address in addresses:
            try:
                listeners.append(socket.create_server(address, family=family, backlog=LISTEN_BACKLOG))
            except OSError as error:  # localhost is ::1 as well, where the machine has no such address
                if error.errno not in _NO_SUCH_ADDRESS or len(addresses) == 1:
                    raise
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise _cannot_be_used(host, port, option, error) from None
    if not listeners:
        raise UserError(
            f"{option} {host_port(host, port)} cannot be used (no address of this machine); choose another."
        )
    return listeners


def _cannot_be_used(host: str, port: int, option: str, error: OSError) -> UserError:
    reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
    return UserError(
        f"{option} {host_port(host, port)} cannot be used ({reason}); stop what listens there, or choose another port."
    )


def free_port() -> int:
    """A loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def can_connect(host: str, port: int, timeout_s: float = 2.0) -> bool:
    """Whether something accepts connections there."""
    try:
        with socket.create_connection((host, port), timeout=timeout_s):
            return True
    except OSError:
        return False


def has_address(host: str) -> bool:
    """Whether this machine finds an address for the name."""
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


def status_of(
    host: str,
    port: int,
    path: str,
    *,
    method: str = "GET",
    ca: Path | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 5.0,
    proxy: Proxy | None = None,
) -> int:
    """The status of the answer to one request, without a proxy on the way but the one that is given.

    ca: the one authority to trust, over TLS; None: plain text.  Raises httpx.HTTPError and InvalidURL; with a proxy
    of a kind that httpx cannot use ValueError or ImportError.
    """
    import httpx  # a tenth of a second, and not for --help

    # A context of httpx's own would read the world's authorities, for each request.
    trusted = ssl.create_default_context(cafile=str(ca)) if ca else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    url = f"{'https' if ca else 'http'}://{host_port(host, port)}{path}"
    by = proxy.address if proxy else None
    with httpx.Client(verify=trusted, trust_env=False, timeout=timeout_s, proxy=by) as client:
        return client.request(method, url, headers=headers).status_code


def is_healthy(
    host: str, port: int, *, ca: Path | None = None, timeout_s: float = 5.0, proxy: Proxy | None = None
) -> bool:
    """Whether what listens there says so at /health.  ca, proxy: as for `status_of`."""
    import httpx

    try:
        return status_of(host, port, "/health", ca=ca, timeout_s=timeout_s, proxy=proxy) == httpx.codes.OK
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
    except (ValueError, ImportError):
        if proxy is None:
            raise
        return False
