"""Workload W through `flwr run` of this checkout: a stock SuperLink and two stock SuperNodes, as Flower ships them.

    python -m bench.our_stock --workload FOLDER --rounds 3 [--load tiny]

Started as a program by bench.deployment; prints the run's figures as one JSON object. Runs in the current folder.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from bench.our_run import figures, newest_run
from bench.stock_flower import Node, federate
from bench.workload import CLIENTS, LOADS, Workload, settings_of
from common import config
from common.system.events import OUTCOME_FILE

ROOT = Path(__file__).parent.parent
PARTS = ("common", "server", "clients", "configs", "pyproject.toml", "README.md", "LICENSE")


def copy_app(folder: Path) -> Path:
    """The app as Flower bundles it: without what else lies in a checkout, which it would look through."""
    folder.mkdir()
    for name in PARTS:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    return folder


def run_config(rounds: int, load: str) -> str:
    values = settings_of(load) | {"federation.rounds": str(rounds)}
    return " ".join(f"{name}={json.dumps(config.value_of(name, text))}" for name, text in values.items())


def node_of(client: str, workload: Workload) -> Node:
    site = {"dataset": "folder", "name": client, "data-dir": str(workload.pictures(client))}
    given = " ".join(f'{key}="{value}"' for key, value in (site | {"cache-dir": str(workload.cache)}).items())
    return Node(given, {"BENCH_PART": "client"})


def run_ended() -> bool:
    return any(Path("runs").glob(f"*/{OUTCOME_FILE}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load", choices=LOADS, default="workload", help="whose settings")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as aside:
        app, workload = copy_app(Path(aside) / "facefed"), Workload(folder=arguments.workload)
        nodes = [node_of(client, workload) for client in CLIENTS]
        federate(
            app, Path(aside), nodes, run_ended, run_config=run_config(arguments.rounds, arguments.load), cwd=Path.cwd()
        )
    print(json.dumps(figures(newest_run(Path()))))


if __name__ == "__main__":
    main()
