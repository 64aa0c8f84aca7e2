"""What differential privacy of people costs a site: CPU-seconds of a round with it beside the same round without.

    python -m bench.privacy_cost [--model resnet18] [--size 64] [--people 96] [--pictures 8] [--group-people 16]

Both train in this process on the same noise pictures, one after the other and several times, one thread; no score is
asked for. The ratio is that of the medians. Where the seconds went is told beside it: training, the noise, the reply
that is kept for the audit (its seconds on the clock too, as it waits for a disk), and the rest (heads, copies of the
model, clipping).
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import numpy as np
import torch


def make_state(arguments: argparse.Namespace, folder: Path, unit: str) -> Any:
    from clients.local_update import state_of_pack
    from clients.policy import OWN_MACHINE
    from clients.site import SiteSettings
    from common import config
    from common.faces.pack import FacePack
    from common.faces.splits import Split

    raw = config.to_mapping(config.load(config.find_config("demo")))
    raw["model"] |= {"backbone": arguments.model, "pretrained": "weights.safetensors", "width": arguments.width}
    raw["data"]["image_size"] = arguments.size
    raw["training"] |= {"precision": "float32", "memory_format": "contiguous", "threads": 1, "head_warmup_epochs": 0}
    raw["federation"] |= {"rounds": 1000, "local_epochs": 1, "max_change_factor": "off"}  # it is noise
    raw["privacy"] = {"unit": unit, "group_people": arguments.group_people, "delta": 1e-3, "epsilon": 8.0}
    settings = config.from_mapping(raw)
    random = np.random.default_rng(1)
    number = arguments.people * arguments.pictures
    pictures = random.integers(0, 256, (number, arguments.size, arguments.size, 3), dtype=np.uint8)
    pack = FacePack(
        pictures=pictures,
        person=np.repeat(np.arange(arguments.people), arguments.pictures),
        people=tuple(f"p{n}" for n in range(arguments.people)),
        split=np.full(number, Split.TRAIN, dtype=np.int8),
        key="bench",
        quarantined=(),
        dataset="folder",
    )
    site = SiteSettings(
        name="bench",
        dataset="folder",
        data_dir=folder / "data",
        device="cpu",
        state_dir=folder / unit,
        cache_dir=folder / "packs",
        policy=OWN_MACHINE,
    )
    return state_of_pack(site, settings, pack)


@contextmanager
def timed(spent: dict[str, float], module: ModuleType, **named: str) -> Iterator[None]:
    """In here CPU-seconds, and seconds, of a module's functions are added up.  named: what they are called here."""

    def watched(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **words: Any) -> Any:
            began, began_wall = time.process_time(), time.perf_counter()
            try:
                return work(*args, **words)
            finally:
                for what, spending in (
                    (named[name], time.process_time() - began),
                    (f"{named[name]}, wall", time.perf_counter() - began_wall),
                ):
                    spent[what] = spent.get(what, 0.0) + spending

        return measured

    usual = {name: getattr(module, name) for name in named}
    for name, work in usual.items():
        setattr(module, name, watched(name, work))
    try:
        yield
    finally:
        for name, work in usual.items():
            setattr(module, name, work)


def one_round(state: Any, server_round: int) -> dict[str, float]:
    from clients import local_update, private_round
    from common import config
    from common.protocol.parameters import flatten
    from common.protocol.wire import Task

    task = Task(
        kind="train",
        run_id="bench",
        server_round=server_round,
        settings=config.to_json(state.settings),
        manifest=state.manifest.digest,
        precision="float32",
        memory_format="contiguous",
    )
    shared = flatten(state.recogniser.state_dict(), state.manifest)
    spent: dict[str, float] = {}
    began, began_wall = time.process_time(), time.perf_counter()
    with (
        timed(spent, private_round, summed_changes="groups", released="noise", spend="spend"),
        timed(spent, local_update, save_reply="kept reply"),
    ):
        local_update.train(state, task, shared)
    return {"all": time.process_time() - began, "all, wall": time.perf_counter() - began_wall, **spent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--people", type=int, default=96)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--group-people", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="facefed-bench-"))
    found: dict[str, list[dict[str, float]]] = {"off": [], "person": []}
    try:
        states = {unit: make_state(arguments, folder, unit) for unit in found}
        for server_round in range(1, arguments.repeats + 2):
            for unit, state in states.items():
                seconds = one_round(state, server_round)
                if server_round > 1:  # the first of each pays for what is made once
                    found[unit].append(seconds)
    finally:
        shutil.rmtree(folder)
    middle = {unit: {part: median(one[part] for one in rounds) for part in rounds[0]} for unit, rounds in found.items()}
    middle["ratio"] = {"all": middle["person"]["all"] / middle["off"]["all"]}
    print(json.dumps({"arguments": vars(arguments), "seconds": middle, "rounds": found}, indent=2))


if __name__ == "__main__":
    main()
