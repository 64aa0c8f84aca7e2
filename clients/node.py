"""A site's connection to the federation: Flower's SuperNode and, beside it in one process, our executor.

    flower-client --starts--> this process --hands each message over--> the resident trainer (clients/trainer.py)

Started as `python -m clients.node MEETING NAME PORT ARGUMENT...`; the arguments are flower-supernode's.
"""

import sys
import threading
from pathlib import Path
from typing import Any

from clients.handover import KEY
from clients.pace import Pace
from common.runtime import go_silent

QUICK_RETRY_S = 0.1  # of an object that the other side is still sending; Flower's own is a second


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


def main(meeting: Path, name: str, port: int, arguments: list[str]) -> None:
    """Serve until the SuperNode ends."""
    go_silent()
    from flwr.supernode.cli.flower_supernode import flower_supernode

    from clients.executor import Executor

    pace = Pace()
    quicken(pace)
    executor = Executor(meeting, name=name, port=port, pace=pace)
    threading.Thread(target=executor.serve, name="executor", daemon=True).start()
    sys.argv = ["flower-supernode", *own_arguments(meeting, port), *arguments]
    flower_supernode()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
