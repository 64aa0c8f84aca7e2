"""Cuts programs off from the outside, and writes down each address that they ask for.

An `Island` is a network namespace that has loopback only.  `recorder` is strace as a wrapper of a program: it follows
all its children, whatever they are written in; `asked` reads what it wrote.
"""

import ipaddress
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from common.system.runtime import PATIENCE, SILENCE
from tests.conftest import skip_or_fail

OUTSIDE = "198.51.100.1"  # TEST-NET-2, RFC 5737: nobody's
DNS_PORT = 53
# By any of these (and by CI's own below) a library falls silent without our doing.
_WORDS = ("TELEMETRY", "DO_NOT_TRACK", "PYTEST", "USAGE_STATS", "UPDATE_CHECK", "PROXY", "proxy")
_OF_CI = (
    "CI", "GITHUB_ACTIONS", "CIRCLECI", "GITLAB_CI", "JENKINS_URL", "TRAVIS", "TF_BUILD", "BITBUCKET_BUILD_NUMBER",
    "CODEBUILD_BUILD_ARN", "BUILDKITE", "TEAMCITY_VERSION", "CLOUD_RUN_EXECUTION",
)  # fmt: skip

_HOLD = """
import fcntl, socket, struct, sys
with socket.socket() as probe:  # what `ip link set lo up` does
    fcntl.ioctl(probe, 0x8914, struct.pack("16sH22x", b"lo", 1))
print("up", flush=True)
sys.stdin.read()
"""
_WAYS = (("-rn", ("--user", "--preserve-credentials", "--net")), ("-n", ("--net",)))  # a user's way, and root's

_CALLS = ("connect", "bind", "sendto", "sendmsg", "sendmmsg")
_CALL = re.compile(r"^\d+ +(\w+)\(")
_ADDRESS = re.compile(r'sin6?_port=htons\((\d+)\).*?(?:inet_addr\("([^"]+)"|inet_pton\(AF_INET6, "([^"]+)")')
_FAMILY = re.compile(r"sa_family=(\w+)")
_RESOLVER = 'sun_path="/run/systemd/resolve'  # a question to the DNS that takes another way


def bare_environment(**values: str) -> dict[str, str]:
    """This process's environment without all that keeps a library quiet, and with `values`."""
    quiet = {*SILENCE, *PATIENCE, *_OF_CI}
    kept = {k: v for k, v in os.environ.items() if k not in quiet and not any(word in k for word in _WORDS)}
    return kept | values


class Island:
    """A network namespace with loopback only; it goes with the process that holds it."""

    def __init__(self) -> None:
        require("unshare", "nsenter")
        refused = []
        for way, entry in _WAYS:
            self._holder = subprocess.Popen(
                ["unshare", way, sys.executable, "-c", _HOLD],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            if self._holder.stdout.readline() == "up\n":
                self.wrapper = ["nsenter", "--target", str(self._holder.pid), *entry, "--"]
                return
            refused.append(f"unshare {way}: {self._holder.communicate()[1].strip()}")
        skip_or_fail(f"this machine makes no network namespaces: {'; '.join(refused)}")

    def close(self) -> None:
        """End it; what still runs there stays cut off."""
        self._holder.communicate(timeout=60)


def require(*programs: str) -> None:
    """Skip the test where a program is missing."""
    for program in programs:
        if not shutil.which(program):
            skip_or_fail(f"{program} is not installed")


def recorder(log: Path) -> list[str]:
    """The wrapper that records.

    -D: the program itself stays our child, so its exit code and signals are its own.
    """
    calls = f"trace={','.join(_CALLS)}"
    return ["strace", "-D", "-f", "--seccomp-bpf", "-qq", "-s", "0", "-e", "signal=none", "-e", calls, "-o", str(log)]


class Asked(NamedTuple):
    """One address that a process named to the kernel, whether or not the kernel took it."""

    call: str
    address: str
    port: int
    line: str


def asked(log: Path) -> list[Asked]:
    """Each Internet address of a record, in its order; a question to the system's resolver counts as one."""
    found = []
    for line in log.read_text().splitlines():
        call = _CALL.match(line)
        if not call:
            continue
        found += [Asked(call[1], ipv4 or ipv6, int(port), line) for port, ipv4, ipv6 in _ADDRESS.findall(line)]
        if _RESOLVER in line:
            found.append(Asked(call[1], "resolver", DNS_PORT, line))
        elif "AF_INET" in line and not _ADDRESS.search(line):
            found.append(Asked(call[1], "unreadable", 0, line))
    return found


def families(log: Path) -> set[str]:
    """Each kind of address of a record."""
    return set(_FAMILY.findall(log.read_text()))


def outside(found: Iterable[Asked]) -> list[str]:
    """The lines that lead to another machine, that ask the DNS, or that let another machine in."""
    return [one.line for one in found if not _is_here(one)]


def _is_here(one: Asked) -> bool:
    try:
        address = ipaddress.ip_address(one.address)
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    if one.call == "bind":
        return address.is_loopback
    return (address.is_loopback or address.is_unspecified) and one.port != DNS_PORT
