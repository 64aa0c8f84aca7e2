"""Honest runs under the built-in policy, whose refusals are all false: strategies, codecs, models, many clients.

    python -m tests.hostile.honest_runs          # all of them, some minutes; the tests run a few

Each run is a whole federation in this process over the clients' own message handler.  Sites have random faces of six
people; what the built-in policy wants of data alone, which they are too few for, is left out (min_pairs).
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from flwr.supercore.task_identity import TaskIdentity

import clients.message_handler
import clients.packs
from clients.past_tasks import FOLDER
from clients.policy import DEFAULT
from common.settings import CODECS
from common.strategies import STRATEGIES
from common.system.runtime import use_threads
from server.app import Surroundings, federate
from tests.tiny_federation import InProcessMailbox, settings_with, tiny_pack

POLICY = dataclasses.replace(DEFAULT, min_pairs=0)
FEWEST = 5  # clients that krum wants with one liar
ROUNDS = 6


class Honest(NamedTuple):
    """One run: settings beside the usual ones, section__key, and how many clients take part."""

    name: str
    values: Mapping[str, Any]
    num_clients: int = 3


class Found(NamedTuple):
    """What came of it."""

    code: int
    num_refusals: int  # by all sites
    most_models: int  # beyond the run's rounds, at any site
    line: str  # of the run's end; empty: it went well


def coded(codec: str) -> dict[str, Any]:
    """Settings of both ways in a codec."""
    return {"federation__upload_codec": codec, "federation__download_codec": codec}


def every_run() -> Iterator[Honest]:
    """All that are looked at; the first of each kind are cheap."""
    for strategy in STRATEGIES:
        for codec in CODECS:
            yield Honest(f"{strategy}, {codec}", {"federation__strategy": strategy, **coded(codec)}, FEWEST)
    for codec in CODECS:
        yield Honest(f"fedbn, {codec}", {"model__normalisation": "private", **coded(codec)})
    for backbone in ("resnet18", "mobilenet_v2", "vit_tiny"):
        yield Honest(backbone, {"model__backbone": backbone, "model__patch_size": 8, "model__depth": 2})
    yield Honest("steps", {"federation__local_epochs": "off", "federation__local_steps": 3})
    yield Honest("high rate", {"training__lr": 0.5, "federation__local_epochs": 5})
    yield Honest("adamw", {"training__optimiser": "adamw", "training__lr": 0.01})
    yield Honest("long", {"federation__rounds": 40})
    yield Honest("50 clients", {}, 50)
    sampled = {"federation__clients_per_round": 10, "federation__rounds": 30}
    yield Honest("1000 clients, of which ten are sampled", sampled, 1000)


def run(honest: Honest, folder: Path) -> Found:
    """Play one run in an empty folder."""
    clients.message_handler._workplaces.clear()
    packs: dict[str, Any] = {}

    def open_pack(_dataset: str, data_dir: Path, *_rest: object, **_options: object) -> object:
        name = data_dir.parent.name
        return packs.setdefault(name, tiny_pack(name))

    settings = settings_with(
        **{"federation__rounds": ROUNDS, "federation__join_timeout_s": 600.0, "federation__round_timeout_s": 600.0}
        | {"federation__min_clients": min(honest.num_clients, FEWEST)}
        | honest.values
    )
    names = [f"site-{number:04d}" for number in range(honest.num_clients)]
    mailbox = InProcessMailbox(names, folder / "sites")
    mailbox.sites = {node: dataclasses.replace(site, policy=POLICY) for node, site in mailbox.sites.items()}
    (folder / "run-1").mkdir(parents=True)
    with patch.object(clients.packs, "open_pack", open_pack):
        surroundings = Surroundings(
            run_folder=folder / "run-1", stopped=lambda: False, all_nodes_are_here=lambda: True, git_commit="none"
        )
        federate(settings, mailbox, surroundings)
    records = [json.loads(path.read_text()) for path in folder.glob(f"sites/*/{FOLDER}/*.json")]
    outcome = json.loads((folder / "run-1" / "outcome.json").read_text())
    return Found(
        outcome["exit_code"],
        sum(record["num_refusals"] for record in records),
        max(len(record["models"]) for record in records) - settings.federation.rounds,
        outcome["line"],
    )


def main() -> int:
    """Play all, and say what was refused."""
    use_threads(1)
    refusals = 0
    for name in ("_run_id", "_node_id", "_task_id"):
        setattr(TaskIdentity, name, 1)
    for honest in every_run():
        with tempfile.TemporaryDirectory() as folder:
            found = run(honest, Path(folder))
        refusals += found.num_refusals
        sys.stdout.write(f"{honest.name}: {found}\n")
        sys.stdout.flush()
    sys.stdout.write(f"refused in all: {refusals}\n")
    return int(refusals > 0)


if __name__ == "__main__":
    sys.exit(main())
