"""A site's connection to the federation: Flower's SuperNode and, beside it in one process, our executor.

    flower-client --starts--> this process --hands each message over--> the resident trainer (clients/flower/trainer.py)

Started as `python -m clients.flower.supernode MEETING NAME PORT LAST ARGUMENT...`; LAST is the file with the node id of
the site's last connection, beside which the egress ledger lies, and the arguments are flower-supernode's.
"""

import argparse
import logging
import sys
import threading
import time
from pathlib import Path
from typing import Any

from clients.egress import LEDGER
from clients.flower.handover import KEY
from clients.flower.lifeline import hold_on
from clients.flower.pace import Pace
from common.runtime import go_silent

log = logging.getLogger("facefed.client")

QUICK_RETRY_S = 0.1  # of an object that the other side is still sending; Flower's own is a second
GOODBYES, BETWEEN_GOODBYES_S = 10, 1.0


def own_arguments(meeting: Path, port: int) -> list[str]:
    """What flower-supernode is told beside what its caller says: whoever takes a message from it must know the key."""
    return [
        "--isolation", "process",
        "--superexec-auth-secret-file", str(meeting / KEY),
        "--host", "127.0.0.1",
        "--port", str(port),
    ]  # fmt: skip


def quicken(pace: Pace) -> None:
    """Put our pace into Flower's loop, and have it ask soon for what is on its way."""
    from flwr.supercore.inflatable import inflatable_utils
    from flwr.supernode import start_client_internal

    loop: Any = start_client_internal
    loop.time = pace
    defaults: Any = inflatable_utils.pull_objects.__kwdefaults__
    defaults["initial_backoff"] = QUICK_RETRY_S


def leave_last(last: Path, arguments: list[str]) -> None:
    """Tell the server that this site's last connection is over, where it ended without a word.

    The server takes a node for connected until it has missed its heartbeats for a minute.  So long it would wait for
    the answer of one that was killed, and let nobody in with its key.  A site without a key (plain text) cannot say
    it: each of its connections signs with a key that Flower makes in the process, and that is gone.
    """
    parser = argparse.ArgumentParser(add_help=False)
    for option in ("--superlink", "--root-certificates", "--auth-supernode-private-key"):
        parser.add_argument(option)
    known, _ = parser.parse_known_args(arguments)
    if not (known.auth_supernode_private_key and last.exists()):
        return
    import httpx
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest
    from flwr.supernode.fleet_http_client import FleetHttpClient

    with FleetHttpClient.from_server_address(
        known.superlink,
        insecure=False,
        root_certificates=Path(known.root_certificates).read_bytes(),
        interceptors=_interceptors(known.auth_supernode_private_key),
    ) as fleet:
        for _ in range(GOODBYES):
            try:
                fleet.DeactivateNode(DeactivateNodeRequest(node_id=int(last.read_text(encoding="utf-8"))))
            except httpx.TransportError:  # not heard, or heard and the answer lost
                time.sleep(BETWEEN_GOODBYES_S)
                continue
            except (httpx.HTTPError, ValueError) as error:  # it left in order, or the server is another
                log.debug("the last connection needs no end (%s)", error)
            return


def _interceptors(private_key: str) -> list[Any]:
    """What the requests of a site with a key carry: Flower's version, and its signature."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    version = RuntimeVersionHttpInterceptor(component_name="SuperNode")
    key = load_ssh_private_key(Path(private_key).read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("the key is of another kind")  # noqa: TRY004 - like one that cannot be read
    return [version, NodeAuthHttpInterceptor(key, key.public_key())]


def main(meeting: Path, name: str, port: int, last: Path, arguments: list[str]) -> None:
    """Serve until the SuperNode ends."""
    go_silent()
    hold_on()
    leave_last(last, arguments)
    from flwr.supernode.cli.flower_supernode import flower_supernode

    from clients.flower.executor import Executor

    pace = Pace()
    quicken(pace)
    executor = Executor(meeting, name=name, port=port, pace=pace, ledger=last.parent / LEDGER)
    threading.Thread(target=executor.serve, name="executor", daemon=True).start()
    sys.argv = ["flower-supernode", *own_arguments(meeting, port), *arguments]
    flower_supernode()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:])
