"""Hosts of a small network of their own: each a network namespace with an address, all at one switch.

    with Network("server", "relay", "celeba") as network:
        programs.start("flower-server", ..., wrapper=network["server"].wrapper)
        network["celeba"].pull_the_plug()  # nothing arrives, nothing is told
        network["celeba"].plug_in()

They are held by processes of this one and go with them.  It takes root and iproute2's `ip`.
"""

import os
import subprocess
import sys
from typing import Self

from isolation import require

from tests.conftest import skip_or_fail

NETWORK = "10.213.77"
_HOLD = "import sys; print('up', flush=True); sys.stdin.read()"


class _Space:
    """A network namespace, held by a process."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--net", sys.executable, "-c", _HOLD],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if self._holder.stdout.readline() != "up\n":
            skip_or_fail(f"this machine makes no network namespaces: {self._holder.communicate()[1].strip()}")
        self.pid = self._holder.pid
        self.wrapper = ["nsenter", "--target", str(self.pid), "--net", "--"]

    def ip(self, *words: object) -> None:
        """`ip` in there."""
        subprocess.run([*self.wrapper, "ip", *map(str, words)], check=True, capture_output=True, timeout=60)

    def close(self) -> None:
        """End it; what still runs there stays cut off."""
        self._holder.communicate(timeout=60)


class Host(_Space):
    """A host with an address of its own."""

    def __init__(self, switch: _Space, number: int) -> None:
        super().__init__()
        self.address, self._switch, self._port = f"{NETWORK}.{number}", switch, f"port{number}"
        switch.ip("link", "add", self._port, "type", "veth", "peer", "name", "eth0", "netns", self.pid)
        switch.ip("link", "set", self._port, "master", "switch", "up")
        for link in ("lo", "eth0"):
            self.ip("link", "set", link, "up")
        self.ip("address", "add", f"{self.address}/24", "dev", "eth0")

    def pull_the_plug(self) -> None:
        """Nothing gets here or away any more."""
        self._switch.ip("link", "set", self._port, "down")

    def plug_in(self) -> None:
        """It is as it was."""
        self._switch.ip("link", "set", self._port, "up")


class Network:
    """The hosts, by name, while the block lasts."""

    def __init__(self, *names: str) -> None:
        require("unshare", "nsenter", "ip")
        if os.geteuid() != 0:
            skip_or_fail("hosts of their own take root")
        self._names, self._hosts = names, dict[str, Host]()

    def __enter__(self) -> Self:
        self._switch = _Space()
        self._switch.ip("link", "add", "switch", "type", "bridge")
        self._switch.ip("link", "set", "switch", "up")
        for number, name in enumerate(self._names, 1):
            self._hosts[name] = Host(self._switch, number)
        return self

    def __exit__(self, *_: object) -> None:
        for space in (*self._hosts.values(), self._switch):
            space.close()

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]
