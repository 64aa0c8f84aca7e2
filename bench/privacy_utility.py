"""How well a federation with differential privacy tells strangers apart, by epsilon, people and seed; and who is seen.

    python -m bench.privacy_utility [--people 60 ...] [--epsilons 2 8 ...] [--seeds 1 ...] [--rounds 4] [--device cpu]
    python -m bench.privacy_utility --faces DIR [...]      DIR/celeba and DIR/vggface2 in their layouts, as they are

Two sites of made-up people each (`facefed data synth`), a start trained on other made-up people, whom everybody
may have, then `rounds` rounds with each epsilon and without ("off"). Each row: test AUC over both sites' people whom no
training saw, and the AUC of membership inference (`facefed privacy audit`). bench/results/privacy_utility.json and
.png hold all rows; a row that is there is not made again, so the script can be stopped and goes on.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SITES = {"celeba": 1, "vggface2": 2}  # layout -> of its seed
PUBLIC, PUBLIC_SEED = "public", 99
RESULTS = Path(__file__).parent / "results"


def settings_of(arguments: argparse.Namespace, start: Path | None, epsilon: str, seed: int) -> Any:
    from common import config

    raw = config.to_mapping(config.load(config.find_config("demo")))
    raw["run"]["seed"] = seed
    raw["model"] |= {"backbone": arguments.model, "width": arguments.width, "pretrained": str(start or "none")}
    raw["model"]["embedding_size"] = arguments.embedding_size
    raw["data"]["image_size"] = arguments.size
    raw["training"] |= {"lr": arguments.lr, "threads": arguments.threads, "precision": "float32"}
    raw["federation"] |= {"rounds": arguments.rounds, "local_epochs": arguments.local_epochs}
    raw["federation"]["max_change_factor"] = "off"  # so that a useless model has its row too
    raw["tracking"] |= {"enabled": False, "plots": "none", "tensorboard": "none"}
    if epsilon != "off":
        privacy = {"unit": "person", "epsilon": float(epsilon), "delta": arguments.delta, "clip": arguments.clip}
        raw["privacy"] |= privacy | {"group_people": arguments.group_people}
    return config.from_mapping(raw)


def data_of(arguments: argparse.Namespace, layout: str, people: int, seed: int) -> Path:
    """The folder of made-up people, drawn where it is not there yet; or of those that were given."""
    if arguments.faces and seed != PUBLIC_SEED:
        return Path(arguments.faces).resolve() / layout
    from simulation.data.synthetic import SynthSettings, write_dataset

    folder = arguments.scratch / f"{layout}-{people}-{seed}"
    if not (folder / "whole").exists():
        wanted = SynthSettings(layout=layout, num_people=people, pictures_per_person=arguments.pictures, seed=seed)
        write_dataset(wanted, folder / "data", num_processes=arguments.threads)
        (folder / "whole").touch()
    return folder / "data"


def site_of(arguments: argparse.Namespace, name: str, layout: str, data_dir: Path, run: str) -> Any:
    from clients.policy import OWN_MACHINE
    from clients.site import SiteSettings

    return SiteSettings(
        name=name,
        dataset=layout,
        data_dir=data_dir,
        device=arguments.device,
        state_dir=arguments.scratch / "state" / run / name,
        cache_dir=arguments.scratch / "packs",
        pack_workers=arguments.threads,
        policy=OWN_MACHINE,
    )


def state_of(arguments: argparse.Namespace, settings: Any, name: str, layout: str, data_dir: Path, run: str) -> Any:
    from clients.local_update import open_client_state

    return open_client_state(site_of(arguments, name, layout, data_dir, run), settings)


def federate(
    settings: Any,
    states: Mapping[str, Any],
    run: str,
    threads: int,
    begin: tuple[Any, Any] | None = None,
    after: Callable[[int, Any], object] | None = None,
) -> Any:
    """The rounds in this process, as server and clients do them; returns the recogniser with the last model.

    begin: the first model and its manifest; None: as the settings say.  after: called before the first round, as round
    0, and after each with the recogniser that has the model of then.
    """
    from clients.local_update import train
    from common import config
    from common.models.recogniser import moving_names, trainable_names
    from common.protocol.parameters import Part, flatten, load_shared
    from common.protocol.wire import Task
    from server.aggregate import WeightedChange
    from server.app import initial_model
    from server.global_model import GlobalModel, ServerOptimiser

    recogniser, manifest = begin or initial_model(settings)
    model = GlobalModel(flatten(recogniser.state_dict(), manifest), settings.federation.download_codec)
    trainable = settings.training.trainable
    learned = trainable_names(recogniser, trainable)
    part = Part.of(manifest, moving=moving_names(recogniser, "shared", trainable), trainable=learned)
    optimiser = ServerOptimiser.of(settings.federation, manifest, learned)
    look = after or (lambda *_: None)
    look(0, recogniser)
    for server_round in range(1, settings.federation.rounds + 1):
        total = WeightedChange(part.part.size)
        for state in states.values():
            task = Task(
                kind="train",
                run_id=run,
                server_round=server_round,
                settings=config.to_json(settings),
                manifest=manifest.digest,
                precision="float32",
                memory_format="contiguous",
                threads=threads,
            )
            reply = train(state, task, model.received.copy())
            if reply.change is not None:
                total.add(reply.change, reply.num_examples)
        model.step(optimiser, part.spread(total.mean()))
        load_shared(recogniser, model.received, manifest)
        look(server_round, recogniser)
    return recogniser


def public_start(arguments: argparse.Namespace) -> Path:
    """Weights trained on made-up people of their own, for --public-rounds rounds without privacy."""
    from common.system.checkpoints import write_tensors

    named = ("model", "width", "embedding_size", "size", "public_people", "pictures", "public_rounds", "local_epochs")
    path = arguments.scratch / f"start-{'-'.join(str(getattr(arguments, name)) for name in named)}.safetensors"
    if not path.exists():
        data_dir = data_of(arguments, "celeba", arguments.public_people, PUBLIC_SEED)
        alone = argparse.Namespace(**{**vars(arguments), "rounds": arguments.public_rounds})
        settings = settings_of(alone, None, "off", PUBLIC_SEED)
        state = state_of(arguments, settings, PUBLIC, "celeba", data_dir, PUBLIC)
        recogniser = federate(settings, {PUBLIC: state}, PUBLIC, arguments.threads)
        write_tensors(path, _floats(recogniser), {})
    return path


def _floats(recogniser: Any) -> dict[str, Any]:
    return {name: tensor for name, tensor in recogniser.backbone.state_dict().items() if tensor.is_floating_point()}


def _compute(arguments: argparse.Namespace) -> Any:
    from common.training.loop import Compute

    return Compute(device=arguments.device, precision="float32", memory_format="contiguous", threads=arguments.threads)


def at_site(recogniser: Any, state: Any) -> Any:
    """The model as a site scores it; what heads it has is no matter to people never seen."""
    from common.models.recogniser import with_new_heads

    return with_new_heads(recogniser, state.settings.model, num_people=state.pack.num_classes, head_seed=0)


def test_auc(recogniser: Any, states: Mapping[str, Any], arguments: argparse.Namespace) -> dict[str, float]:
    """By site, over its people whom no training saw."""
    from common.metrics.figures import AUC, known_scores
    from common.training.evaluation import evaluate

    return {
        name: known_scores(evaluate(at_site(recogniser, state), state.pack, "test", _compute(arguments)))[AUC]
        for name, state in states.items()
    }


def scored(recogniser: Any, states: Mapping[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    from simulation.compare.membership import attacked

    aucs, found = test_auc(recogniser, states, arguments), {}
    for name, state in states.items():
        attack = attacked(at_site(recogniser, state), state.pack, _compute(arguments))
        found[name] = {
            "test_auc": aucs[name],
            "membership_auc": [attack.auc.value, attack.auc.low, attack.auc.high],
            "num_members": attack.num_members,
        }
    return {"test_auc": float(np.mean(list(aucs.values()))), "sites": found}


def rows(arguments: argparse.Namespace, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    start = public_start(arguments)
    done = {(row["people"], row["seed"], row["epsilon"]) for row in known}
    for people in arguments.people:
        for seed in arguments.seeds:
            for epsilon in ("start", *arguments.epsilons, "off"):
                if (people, seed, epsilon) in done:
                    continue
                began = time.process_time()
                settings = settings_of(arguments, start, "off" if epsilon == "start" else epsilon, seed)
                run = f"{people}-{seed}-{epsilon}"
                states = {
                    layout: state_of(
                        arguments, settings, layout, layout, data_of(arguments, layout, people, 10 * seed + own), run
                    )
                    for layout, own in SITES.items()
                }
                if epsilon == "start":
                    from server.app import initial_model

                    recogniser, _ = initial_model(settings)
                else:
                    recogniser = federate(settings, states, run, arguments.threads)
                row = {"people": people, "seed": seed, "epsilon": epsilon, **scored(recogniser, states, arguments)}
                yield row | {"cpu_seconds": time.process_time() - began}


def draw(found: list[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    order = ["start", *sorted({r["epsilon"] for r in found} - {"start", "off"}, key=float), "off"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for people in sorted({row["people"] for row in found}):
        places, aucs, seen = [], [], []
        for place, epsilon in enumerate(order):
            here = [row for row in found if row["people"] == people and row["epsilon"] == epsilon]
            if here:
                places.append(place)
                aucs.append(np.mean([row["test_auc"] for row in here]))
                seen.append(np.mean([site["membership_auc"][0] for row in here for site in row["sites"].values()]))
        axes[0].plot(places, aucs, "o-", label=f"{people or 'given'} people a site")
        axes[1].plot(places, seen, "o-", label=f"{people or 'given'} people a site")
    for axis, name in zip(axes, ("test AUC, people never seen", "membership AUC (0.5: chance)"), strict=True):
        axis.set_xticks(range(len(order)), order)
        axis.set_xlabel("epsilon; start: public weights; off: no privacy")
        axis.set_ylabel(name)
        axis.legend()
    figure.savefig(path, dpi=120)


def fill(
    path: Path,
    arguments: argparse.Namespace,
    *,
    varied: Sequence[str],
    rows: Callable[[argparse.Namespace, list[dict[str, Any]]], Iterator[dict[str, Any]]],
) -> None:
    """Make the rows that `path` does not have yet, keep and say each as it comes, and draw all.

    varied: the arguments in which rows of one file may differ; with any other that differs all are made anew.
    """
    asked = {name: value for name, value in vars(arguments).items() if name not in varied}
    asked = json.loads(json.dumps(asked, default=str))
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found = before.get("rows", []) if before.get("arguments") == asked else []
    for row in rows(arguments, found):
        found.append(row)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"arguments": asked, "rows": found}, indent=2) + "\n", encoding="utf-8")
        members = [site["membership_auc"][0] for site in row["sites"].values()]
        print(
            f"{row['people']} people, seed {row['seed']}, epsilon {row['epsilon']}: test AUC {row['test_auc']:.4f},"
            f" membership AUC {np.mean(members):.3f}, {row['cpu_seconds']:.0f} s of CPU",
            flush=True,
        )
    draw(found, path.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, nargs="+", default=[60], help="of each site")
    parser.add_argument("--faces", default="", help="a folder of given faces, in place of drawn ones")
    parser.add_argument("--epsilons", nargs="+", default=["2", "8"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--local-epochs", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=6, help="of each person")
    parser.add_argument("--public-people", type=int, default=60)
    parser.add_argument("--public-rounds", type=int, default=6)
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--embedding-size", type=int, default=256)
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--delta", type=float, default=1e-3)
    parser.add_argument("--clip", type=float, default=0.02)
    parser.add_argument("--group-people", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scratch", type=Path, default=Path(".facefed/bench/privacy_utility"))
    arguments = parser.parse_args()
    arguments.scratch = arguments.scratch.resolve()
    arguments.people = [0] if arguments.faces else arguments.people  # as many as there are
    path = RESULTS / f"privacy_utility{'_faces' * bool(arguments.faces)}.json"
    fill(path, arguments, varied=("people", "epsilons", "seeds"), rows=rows)


if __name__ == "__main__":
    main()
