"""Which key is whose: the steward writes it down, and the roster lets nobody take the name of another's key."""

from collections.abc import Mapping
from pathlib import Path

from common.errors import ReplyRefused
from common.files import read_json, write_json

NODES_FILE = Path("flwr") / "nodes.json"  # in the run's folder


def write_nodes(path: Path, names: Mapping[int, str]) -> None:
    """names: of the keys, by the id of the node that has it."""
    write_json(path, {str(node): name for node, name in names.items()})


def read_nodes(path: Path) -> dict[int, str]:
    """The names by node, or nothing where the federation has no keys."""
    return {int(node): str(name) for node, name in read_json(path).items()} if path.exists() else {}


def check_name(name: str, node_id: int, names: Mapping[int, str]) -> None:
    """Raises ReplyRefused when the name is that of a key, and the node's key is another."""
    if name in names.values() and names.get(node_id) != name:
        raise ReplyRefused(f"a client claims the name {name!r}, which is that of another client's key")
