"""What secure aggregation costs a round, with words of 32 and of 16 bits, beside the same round without it; and whether
the model is as good.

    python -m bench.secagg_rounds cost [--sites 3 10] [--rounds 3] [--width 0.5]
    python -m bench.secagg_rounds auc --data DIR [--seeds 1 2 3] [--rounds 8] [--width 0.5]
    python -m bench.secagg_rounds control --data DIR [--lr X] ...

Server and sites are one process here, one after the other, so CPU time is what all of them take together; messages are
counted as they are handed over, each array and value as the ledger counts it.  `cost` trains one batch a round on
noise, so that the rest shows.  `auc` trains on what `facefed data synth` drew: DIR/NAME is a site's folder in celeba's
layout.  `control` adds a plain run whose first model is one step of float32 away: how far apart runs come to lie that
nothing but rounding tells apart.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

IN_ROUNDS = ("train", "keys", "shares", "unmask")
WAYS: dict[str, dict[str, dict[str, Any]]] = {"plain": {}, "masked": {"secagg": {"enabled": True}}}
WAYS["masked, 16 bits"] = WAYS["masked"] | {"federation": {"upload_codec": "int8"}}


def settings_of(arguments: argparse.Namespace, *, num_sites: int, seed: int, way: str) -> Any:
    """The demo's settings, changed as the command line says.  way: of WAYS."""
    from common import config

    raw = config.to_mapping(config.load(config.find_config("demo")))
    raw["run"]["seed"] = seed
    raw["model"]["width"] = arguments.width
    raw["training"] |= {"threads": 1, "precision": "float32"} | ({"lr": arguments.lr} if arguments.lr else {})
    raw["federation"] |= {"rounds": arguments.rounds, "min_clients": num_sites, "test_every_rounds": 1}
    raw["tracking"] |= {"enabled": False, "plots": "none", "tensorboard": "none", "system_metrics_s": "off"}
    for section, values in WAYS[way].items():
        raw[section] |= values
    if arguments.what == "cost":
        raw["federation"] |= {"local_epochs": "off", "local_steps": 1}
    return config.from_mapping(raw)


class CountingMailbox:
    """A Mailbox whose nodes are sites in this process; counts what goes each way, and the CPU seconds of each kind."""

    def __init__(self, sites: Sequence[Any]) -> None:
        """sites: their settings."""
        self._sites = dict(enumerate(sites, start=100))
        self._sent: list[Any] = []
        self.num_bytes: Counter[tuple[str, str]] = Counter()  # (kind of task, "down" or "up") -> bytes
        self.seconds: Counter[str] = Counter()  # kind of task -> CPU seconds of the sites

    def node_ids(self) -> list[int]:
        """All sites."""
        return sorted(self._sites)

    def send(self, messages: Iterable[Any]) -> list[str]:
        """Keep them until they are asked for."""
        first = len(self._sent)
        for message in messages:
            self._sent.append(message)
            self._count(message, message.content["task"]["kind"], "down")
        return [str(number) for number in range(first, len(self._sent))]

    def receive(self, message_id: str, deadline: float | None = None) -> Any:  # noqa: ARG002
        """The site's answer, worked out now."""
        from clients.message_handler import handle

        message, self._sent[int(message_id)] = self._sent[int(message_id)], None
        kind, began = str(message.content["task"]["kind"]), time.process_time()
        reply = handle(self._sites[message.metadata.dst_node_id], message)
        self.seconds[kind] += time.process_time() - began
        if reply.has_error():
            raise SystemExit(reply.error.reason)
        self._count(reply, kind, "up")
        return reply

    def is_short(self, _message_id: str) -> bool:
        """Unknown."""
        return False

    def _count(self, message: Any, kind: str, way: str) -> None:
        from common.protocol.ledger import parts_of

        self.num_bytes[kind, way] += sum(part["num_bytes"] for part in parts_of(message.content))


def one_step_up(buffer: Any) -> Any:
    """Each number that is not 0 as the next larger float32.  buffer: [size] float32."""
    return np.where(buffer == 0, buffer, np.nextafter(buffer, np.float32(np.inf)))


def federated(
    settings: Any, sites: Sequence[Any], folder: Path, start: Callable[[Any], Any] = lambda buffer: buffer
) -> tuple[dict[str, Any], CountingMailbox]:
    """A whole run; returns its summary and its mailbox.

    start: of the first model's numbers, [size] float32, those that the run begins with.
    """
    import clients.message_handler
    import server.app
    from common.protocol.parameters import flatten
    from server.app import Surroundings, federate

    server.app.flatten = lambda state, manifest: start(flatten(state, manifest))  # type: ignore[attr-defined]
    clients.message_handler._workplaces.clear()  # noqa: SLF001 - a run of its own
    mailbox = CountingMailbox(sites)
    folder.mkdir(parents=True)
    around = Surroundings(
        run_folder=folder, stopped=lambda: False, all_nodes_are_here=lambda: True, git_commit="none", program="bench"
    )
    federate(settings, mailbox, around)
    outcome = json.loads((folder / "outcome.json").read_text())
    if outcome["exit_code"]:
        raise SystemExit(outcome["line"])
    return json.loads((folder / "metrics.json").read_text()), mailbox


def sites_of(folder: Path, data: Mapping[str, Path], cache: Path, *, secure: bool) -> list[Any]:
    """Their settings; with keys of each other, where they need them."""
    from clients.policy import OWN_MACHINE
    from clients.site import OF_RUN, SiteSettings
    from simulation.engine.run import made_keys

    keys = made_keys(list(data)) if secure else {}
    return [
        SiteSettings(
            name=name,
            dataset="celeba",
            data_dir=path,
            device="cpu",
            state_dir=folder / name,
            cache_dir=cache,
            policy=dataclasses.replace(OWN_MACHINE, first_model=False),  # `control` begins a step beside it
            seed=OF_RUN,
            keys=keys.get(name),
        )
        for name, path in data.items()
    ]


def noise_pack(name: str, side: int) -> Any:
    """Pictures of noise: 8 people to train on, 4 others to score, 4 pictures each."""
    from common.faces.pack import FacePack
    from common.faces.splits import Split

    kinds = [Split.TRAIN, Split.TRAIN, Split.VAL_PICTURES, Split.TEST_PICTURES]
    rows = [(who, kind) for who in range(8) for kind in kinds]
    rows += [(who, Split.VAL_PEOPLE if who < 10 else Split.TEST_PEOPLE) for who in range(8, 12) for _ in range(4)]
    random = np.random.default_rng(sum(name.encode()))
    return FacePack(
        pictures=random.integers(0, 256, (len(rows), side, side, 3), dtype=np.uint8),
        person=np.array([who for who, _ in rows], dtype=np.int64),
        people=tuple(f"{name}-{who}" for who in range(12)),
        split=np.array([kind for _, kind in rows], dtype=np.int8),
        key=f"noise of {name}",
        quarantined=(),
        dataset="folder",
    )


def cost(arguments: argparse.Namespace, scratch: Path) -> None:
    """Rows for each number of sites, without and with secure aggregation."""
    import clients.packs

    def open_noise(_dataset: str, data_dir: Path, data: Any, *_args: object, **_named: object) -> Any:
        return noise_pack(data_dir.name, data.image_size)

    clients.packs.open_pack = open_noise  # type: ignore[assignment]
    for number in arguments.sites:
        for way in WAYS:
            folder = scratch / f"{number}-{way}"
            data = {f"site-{index:02d}": folder / f"site-{index:02d}" for index in range(number)}
            sites = sites_of(folder, data, scratch / "packs", secure=way != "plain")
            settings = settings_of(arguments, num_sites=number, seed=1, way=way)
            _, mailbox = federated(settings, sites, folder / "run-1")
            rounds = arguments.rounds
            ways = {way: sum(mailbox.num_bytes[kind, way] for kind in IN_ROUNDS) for way in ("down", "up")}
            seconds = {kind: mailbox.seconds[kind] / rounds / number for kind in IN_ROUNDS if mailbox.seconds[kind]}
            told = ", ".join(f"{kind} {value:.2f}" for kind, value in seconds.items())
            print(
                f"{number} sites, {way}: of a site in a round CPU-s {told};"
                f" {ways['down'] / rounds / number / 1e6:.3f} MB down, {ways['up'] / rounds / number / 1e6:.3f} MB up"
            )


def auc(arguments: argparse.Namespace, scratch: Path) -> None:
    """Rows for each seed: all runs' AUC, and how far each was from the plain one in any round."""
    data = {path.name: path for path in sorted(arguments.data.resolve().iterdir()) if path.is_dir()}
    kinds = (*WAYS, "nudged") if arguments.what == "control" else tuple(WAYS)
    for seed in arguments.seeds:
        curves, tested, up = {}, {}, {}
        for kind in kinds:
            folder, way = scratch / f"{seed}-{kind}", kind if kind in WAYS else "plain"
            sites = sites_of(folder, data, scratch / "packs", secure=way != "plain")
            settings = settings_of(arguments, num_sites=len(sites), seed=seed, way=way)
            start = one_step_up if kind == "nudged" else lambda buffer: buffer
            summary, mailbox = federated(settings, sites, folder / "run-1", start)
            rows = summary["rounds_table"]
            curves[kind] = np.array([[row["val_roc_auc"], row["round_test_roc_auc"]] for row in rows])
            tested[kind] = summary["last"]["roc_auc"]
            up[kind] = sum(mailbox.num_bytes[task, "up"] for task in IN_ROUNDS) / arguments.rounds / len(sites) / 1e6
        print(
            f"seed {seed}: test AUC after {arguments.rounds} rounds {tested['plain']:.5f} plain,"
            f" {up['plain']:.3f} MB up",
            flush=True,
        )
        for kind in kinds[1:]:
            apart = np.abs(curves[kind] - curves["plain"])
            print(
                f"  {tested[kind]:.5f} {kind}, {up[kind]:.3f} MB up; apart by {apart[-1, 0]:.6f} (validation),"
                f" {apart[-1, 1]:.6f} (test) after the last round, {apart[:, 0].max():.6f} and"
                f" {apart[:, 1].max():.6f} in any",
                flush=True,
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("cost", "auc", "control"))
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 10])
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--lr", type=float, default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args(argv)
    arguments.rounds = arguments.rounds or (3 if arguments.what == "cost" else 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Flower's typer asks click for a name that click will drop
        import typer  # noqa: F401
    import torch
    from flwr.supercore.task_identity import TaskIdentity

    torch.set_num_threads(1)
    for name in ("_run_id", "_node_id", "_task_id"):  # Flower's Message asks which run it is made in
        setattr(TaskIdentity, name, 1)
    with tempfile.TemporaryDirectory(prefix="facefed-secagg-") as scratch:
        {"cost": cost, "auc": auc, "control": auc}[arguments.what](arguments, Path(scratch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
