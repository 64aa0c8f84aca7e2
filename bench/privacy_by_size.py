"""From how many people on privacy leaves something of what training gives: test AUC by epsilon, people and seed.

    python -m bench.privacy_by_size [--people 500 2000 4000 8000] [--epsilons 2 4 8 16] [--seeds 1 2 3]

Made-up people are drawn once (`facefed data synth`) and divided among two sites: `--held` people of each set the
audit's threshold, as many are the test, and of the others each seed takes a choice of its own, the fewer among the
more.  `--sites 1` is one site with all of them.  The start is a model of other made-up people, whom
everybody may have.  With `--trainable head_side` the trunk is worked out once a picture (`bench/frozen_trunk.py`);
nothing is augmented, whatever is trained.  A row: test AUC and the AUC of membership inference, with intervals, at each
site.  bench/results/privacy_by_size.json and .png hold all rows; a row that is there is not made again, so the script
can be stopped and goes on.
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.frozen_trunk import FeaturesByRow, manifest_behind, numbered
from bench.privacy_utility import RESULTS, data_of, federate, fill, public_start, scored, settings_of, site_of

HEAD_SIDE, LAYOUT = "head_side", "celeba"


def settings_for(arguments: argparse.Namespace, start: Path, epsilon: str, seed: int) -> Any:
    from common import config

    raw = config.to_mapping(settings_of(arguments, start, epsilon, seed))
    raw["training"] |= {"trainable": arguments.trainable, "head_warmup_epochs": arguments.warmup_epochs}
    raw["training"]["batch_size"] = arguments.batch_size
    raw["augmentation"] |= {"flip": 0.0, "crop": 0.0, "rotation_rad": 0.0, "colour": 0.0}
    return config.from_mapping(raw)


def whole_pack(arguments: argparse.Namespace, settings: Any) -> Any:
    """Everybody who was drawn, as the site at the door would pack them."""
    from clients.packs import open_site_pack

    folder = data_of(arguments, LAYOUT, arguments.drawn, arguments.drawing)
    return open_site_pack(site_of(arguments, LAYOUT, LAYOUT, folder, "whole"), settings.data)


def features_of(start: Path, settings: Any, pack: Any) -> Any:
    """The start's features of a whole pack, worked out once and kept beside the start."""
    import torch

    from bench.frozen_trunk import features
    from server.app import initial_model

    file = start.with_name(f"{start.stem}-{pack.key[:12]}-{len(pack)}.npy")
    if not file.exists():
        np.save(file, features(initial_model(settings)[0].backbone, pack).numpy())
    return torch.from_numpy(np.load(file))


class Sites:
    """The drawn people divided among sites; where they are trained behind the trunk only, what the trunk gives."""

    def __init__(self, arguments: argparse.Namespace, start: Path) -> None:
        self._arguments, settings = arguments, settings_for(arguments, start, "off", 1)
        pack, self._table = whole_pack(arguments, settings), None
        if arguments.trainable == HEAD_SIDE:
            self._table = features_of(start, settings, pack)
            pack = dataclasses.replace(pack, pictures=numbered(np.arange(len(pack))))
        self._pack = pack

    def _of(self, number: int, people: int, seed: int) -> Any:
        """A site's pack: so many people to train on, and those held out, who are the same for every seed and size."""
        from common.faces.partition import part_of
        from common.faces.splits import Split

        own = np.arange(number, self._arguments.drawn, self._arguments.sites)
        held = self._arguments.held
        chosen = np.random.default_rng([seed, number]).permutation(own[2 * held :])[:people]
        pack, person = self._pack, self._pack.person
        if len(chosen) < people:
            raise SystemExit(
                f"{len(own) - 2 * held} people are there to train on at each site, {people} were asked for"
            )
        split = np.full(len(pack), Split.UNUSED, dtype=np.int8)
        for code, whom in (
            (Split.VAL_PEOPLE, own[:held]),
            (Split.TEST_PEOPLE, own[held : 2 * held]),
            (Split.TRAIN, chosen),
        ):
            split[np.isin(person, whom)] = code
        return part_of(dataclasses.replace(pack, split=split), np.flatnonzero(split != Split.UNUSED))

    def states(self, settings: Any, people: int, seed: int, run: str) -> dict[str, Any]:
        """Each site's state with so many people to train on, chosen by the seed."""
        from clients.local_update import state_of_pack
        from common.models.recogniser import private_names

        found = {}
        for number in range(self._arguments.sites):
            name = f"site-{number}"
            site = site_of(self._arguments, name, LAYOUT, Path(name), run)
            state = state_of_pack(site, settings, self._of(number, people, seed))
            if self._table is not None:
                state.recogniser.backbone.trunk = FeaturesByRow(self._table)
                manifest, private = manifest_behind(state.recogniser), private_names(state.recogniser, "shared")
                state = dataclasses.replace(state, manifest=manifest, private=private, fresh={})
            found[name] = state
        return found

    def begin(self, settings: Any) -> tuple[Any, Any]:
        """The first model and its manifest."""
        from server.app import initial_model

        recogniser, manifest = initial_model(settings)
        if self._table is None:
            return recogniser, manifest
        recogniser.backbone.trunk = FeaturesByRow(self._table)
        return recogniser, manifest_behind(recogniser)


def rows(arguments: argparse.Namespace, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each size is whole with one seed before the next seed begins."""
    start = public_start(arguments)
    sites = Sites(arguments, start)
    done = {(row["people"], row["seed"], row["epsilon"]) for row in known}
    for seed in arguments.seeds:
        for people in arguments.people:
            for epsilon in ("start", *arguments.epsilons, "off"):
                if (people, seed, epsilon) in done:
                    continue
                began = time.process_time()
                settings = settings_for(arguments, start, "off" if epsilon == "start" else epsilon, seed)
                run = f"{people}-{seed}-{epsilon}-{time.time_ns()}"  # a row that was cut off has spent its budget
                states = sites.states(settings, people, seed, run)
                begin = sites.begin(settings)
                recogniser = begin[0]
                if epsilon != "start":
                    recogniser = federate(settings, states, run, arguments.threads, begin)
                row = {"people": people, "seed": seed, "epsilon": epsilon, **scored(recogniser, states, arguments)}
                yield row | {"cpu_seconds": time.process_time() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--people", type=int, nargs="+", default=[500, 2000, 4000, 8000], help="to train on at each site"
    )
    parser.add_argument("--epsilons", nargs="+", default=["8", "2", "16", "4"], help="in this order")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--trainable", default=HEAD_SIDE, choices=("all", "last_block", HEAD_SIDE, "norm"))
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--drawn", type=int, default=16800, help="people, of all sites")
    parser.add_argument("--drawing", type=int, default=11, help="names the people")
    parser.add_argument("--held", type=int, default=200, help="people of a site for the test, and as many to calibrate")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--local-epochs", type=int, default=2)
    parser.add_argument("--warmup-epochs", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=4, help="of each person")
    parser.add_argument("--public-people", type=int, default=200)
    parser.add_argument("--public-rounds", type=int, default=20)
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--embedding-size", type=int, default=64)
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--clip", type=float, default=0.3)
    parser.add_argument("--group-people", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scratch", type=Path, default=Path(".facefed/bench/privacy_utility"))
    parser.add_argument("--name", default="privacy_by_size", help="of the two files of results")
    arguments = parser.parse_args()
    arguments.scratch, arguments.faces = arguments.scratch.resolve(), ""
    path = RESULTS / f"{arguments.name}.json"
    fill(path, arguments, varied=("people", "epsilons", "seeds", "name", "scratch"), rows=rows)


if __name__ == "__main__":
    main()
