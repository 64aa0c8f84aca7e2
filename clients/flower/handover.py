"""From the executor beside the SuperNode to the site's resident trainer and back, over a local socket.

The folder that both know is the user's own (0700) and holds the socket (0600) and a key, with which either side proves
itself (HMAC, `multiprocessing.connection`).  Nothing is pickled: a content travels as one JSON header, and then the
bytes of each array.  This file imports neither torch nor anything that reads data.
"""

import json
import time
from collections.abc import Mapping
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

CLIENT_FAILED = 500  # as in common.wire, which would bring torch along
SOCKET, KEY, SITE = "socket", "key", "site.json"
THERE_WITHIN_S = 120.0  # a trainer that was started again imports torch first
LOOK_EVERY_S = 0.05
_KINDS: Mapping[str, type[ConfigRecord] | type[MetricRecord]] = {"config": ConfigRecord, "metrics": MetricRecord}


class TrainerGone(Exception):
    """The trainer is not there, or went in the middle of its work."""


def send_content(connection: Connection, content: RecordDict | str) -> None:
    """Send a content, or a refusal's one line.  Raises OSError when the other side is gone."""
    if isinstance(content, str):
        connection.send_bytes(json.dumps({"refusal": content}).encode())
        return
    header: list[dict[str, Any]] = []
    arrays: list[Array] = []
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            arrays += record.values()
            layout = {key: [one.dtype, list(one.shape), one.stype] for key, one in record.items()}
            header.append({"name": name, "kind": "arrays", "arrays": layout})
        else:
            kind = "config" if isinstance(record, ConfigRecord) else "metrics"
            header.append({"name": name, "kind": kind, "values": dict(record)})
    connection.send_bytes(json.dumps({"records": header}).encode())
    for array in arrays:
        connection.send_bytes(array.data)


def receive_content(connection: Connection) -> RecordDict | str:
    """The inverse of `send_content`.  Raises EOFError when the other side is gone."""
    header = json.loads(connection.recv_bytes())
    if "refusal" in header:
        return str(header["refusal"])
    content = RecordDict()
    for record in header["records"]:
        if record["kind"] == "arrays":
            content[record["name"]] = ArrayRecord(
                {
                    key: Array(dtype=dtype, shape=tuple(shape), stype=stype, data=connection.recv_bytes())
                    for key, (dtype, shape, stype) in record["arrays"].items()
                }
            )
        else:
            content[record["name"]] = _KINDS[record["kind"]](record["values"])
    return content


def hand_over(folder: Path, content: RecordDict, *, there_within_s: float = THERE_WITHIN_S) -> RecordDict | str:
    """Have the trainer of `folder` answer a message's content; returns the reply's content or the line of a refusal.

    Raises TrainerGone.
    """
    deadline = time.monotonic() + there_within_s
    while True:
        try:
            connection = Client(str(folder / SOCKET), family="AF_UNIX", authkey=(folder / KEY).read_bytes())
            break
        except AuthenticationError:
            raise TrainerGone("the trainer does not know this client's key; restart flower-client.") from None
        except (OSError, EOFError):  # it is starting, or has just gone
            if time.monotonic() > deadline or not folder.is_dir():
                raise TrainerGone("the trainer is not there; its flower-client's output says why.") from None
            time.sleep(LOOK_EVERY_S)
    with connection:
        try:
            send_content(connection, content)
            return receive_content(connection)
        except (OSError, EOFError):
            raise TrainerGone("the trainer went in the middle of its work; it is started again.") from None
