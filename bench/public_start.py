"""What a public start is worth, and what training only a part of it costs: test AUC and bytes after 0, 5 and 30 rounds.

    python -m bench.public_start [--faces DIR] [--seeds 1 2 3] [--rounds 30]    DIR/celeba and DIR/vggface2, as they are

The public start is what everybody can make: `facefed data synth`, then `facefed train local` on it.  Two sites of other
made-up people, or of the given faces, then train from it, from random weights, and a part of it
(`training.trainable`).  No differential privacy.  A row: test AUC (mean of the sites, people whom no training saw) by
round, and the bytes of a change and of a later download, as the codec makes them.  bench/results/public_start.json
holds all rows; a row that is there is not made again, so the script can be stopped and goes on.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.privacy_utility import PUBLIC_SEED, RESULTS, SITES, data_of, federate, settings_of, state_of, test_auc

CASES = (("random", "all"), ("public", "all"), ("public", "last_block"), ("public", "head_side"))


def public_start(arguments: argparse.Namespace) -> Path:
    """The checkpoint of `facefed train local` on made-up people, made once."""
    runs = arguments.scratch / f"public-{arguments.width}-{arguments.size}-{arguments.public_epochs}"
    if not list(runs.glob("*/metrics.json")):
        data_dir = data_of(arguments, "celeba", arguments.public_people, PUBLIC_SEED)
        command = [sys.executable, "-c", "from simulation.cli import main; raise SystemExit(main())", "train", "local"]
        command += ["--client", f"synth:celeba={data_dir}", "--epochs", str(arguments.public_epochs), "--no-mlflow"]
        command += ["--model", arguments.model, "--out", str(runs), "--cache-dir", str(arguments.scratch / "packs")]
        values = {
            "data.image_size": arguments.size,
            "model.width": arguments.width,
            "model.embedding_size": arguments.embedding_size,
            "training.precision": "float32",
            "training.threads": arguments.threads,
            "tracking.plots": "none",
        }
        command += [word for name, value in values.items() for word in ("--set", f"{name}={value}")]
        subprocess.run(command, check=True, stdout=sys.stderr)
    [done] = runs.glob("*/metrics.json")
    return done.parent / "checkpoints" / "best.safetensors"


def settings_for(arguments: argparse.Namespace, start: Path | None, trainable: str, seed: int) -> Any:
    from common import config

    raw = config.to_mapping(settings_of(arguments, start, "off", seed))
    raw["training"]["trainable"] = trainable
    return config.from_mapping(raw)


def row(arguments: argparse.Namespace, data: str, begun: str, trainable: str, seed: int) -> dict[str, Any]:
    """One federation, scored as it goes."""
    from common.models.recogniser import moving_names, trainable_names
    from common.protocol.codec import num_bytes
    from common.protocol.parameters import Part
    from server.app import initial_model

    began = time.process_time()
    start = public_start(arguments) if begun == "public" else None
    settings = settings_for(arguments, start, trainable, seed)
    given = argparse.Namespace(**{**vars(arguments), "faces": arguments.faces if data == "faces" else ""})
    run = f"{data}-{begun}-{trainable}-{seed}-{time.time_ns()}"
    states = {
        layout: state_of(
            given, settings, layout, layout, data_of(given, layout, arguments.people, 10 * seed + number), run
        )
        for layout, number in SITES.items()
    }
    aucs: dict[int, dict[str, float]] = {}

    def after(server_round: int, recogniser: Any) -> None:
        if server_round in (0, *arguments.at, arguments.rounds):
            aucs[server_round] = test_auc(recogniser, states, arguments)

    federate(settings, states, run, arguments.threads, after=after)
    recogniser, manifest = initial_model(settings)
    moving = moving_names(recogniser, "shared", trainable)
    part = Part.of(manifest, moving=moving, trainable=trainable_names(recogniser, trainable))
    return {
        "data": data,
        "start": begun,
        "trainable": trainable,
        "seed": seed,
        "num_training_people": {name: state.pack.num_classes for name, state in states.items()},
        "test_auc": aucs,
        "bytes_up": num_bytes(settings.federation.upload_codec, part.part.size),
        "bytes_down": num_bytes(settings.federation.download_codec, part.part.size),
        "bytes_down_first": num_bytes(settings.federation.download_codec, manifest.size),
        "cpu_seconds": time.process_time() - began,
    }


def rows(arguments: argparse.Namespace, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each seed is whole before the next begins."""
    done = {(one["data"], one["start"], one["trainable"], one["seed"]) for one in known}
    for seed in arguments.seeds:
        for data in arguments.data:
            for begun, trainable in CASES:
                if (data, begun, trainable, seed) not in done:
                    yield row(arguments, data, begun, trainable, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", default="", help="a folder of given faces, beside the drawn ones")
    parser.add_argument("--people", type=int, default=80, help="made-up ones of each site")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--at", type=int, nargs="+", default=[5], help="rounds that are scored, beside first and last")
    parser.add_argument("--local-epochs", type=int, default=1)
    parser.add_argument("--pictures", type=int, default=4, help="of each made-up person")
    parser.add_argument("--public-people", type=int, default=200)
    parser.add_argument("--public-epochs", type=int, default=30)
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--embedding-size", type=int, default=256)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scratch", type=Path, default=Path(".facefed/bench/privacy_utility"))
    arguments = parser.parse_args()
    arguments.scratch = arguments.scratch.resolve()
    arguments.data = ["faces"] * bool(arguments.faces) + ["synth"]
    path = RESULTS / "public_start.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    for one in rows(arguments, found):
        found.append(one)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(one), flush=True)


if __name__ == "__main__":
    main()
