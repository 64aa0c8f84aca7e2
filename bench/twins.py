"""What DCAL gains on identical twins over the same ViT with self-attention alone, at equal steps, on synthetic twins.

    python -m bench.twins [--seeds 1 2 3] [--families 60] [--further 100] [--config twins_dcal] [--out DIR]

Trains both through `facefed train twins` with one thread each, two at a time, and scores them on further families,
drawn with another seed and used for nothing else. Intervals are of 95 %, from drawing families; those of gaps from the
same draws for both models, and the mean gap over the seeds within each draw.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.real_faces import newest_run, run
from common import config
from common.checkpoints import read_tensors
from common.evaluation import embed
from common.faces.pack import FacePack, open_pack
from common.faces.synthetic import SynthSettings, write_dataset
from common.metrics.twin_report import mean_paired_gap, twin_figures
from common.metrics.twins import KINDS
from common.models.recogniser import build_recogniser
from common.runtime import num_cores
from common.settings import Settings
from common.training import Compute

PROGRAMS = Path(sys.executable).parent
MODELS = {"dcal": (), "sa": ("--set", "model.attention=sa", "--set", "model.inference=sa")}
FURTHER_SEED = 1_001
NUM_REPLICATES = 2_000


def train(arguments: argparse.Namespace, model: str, seed: int) -> None:
    """One run of `facefed train twins`, or what is left of the time it took when it was run before."""
    out = arguments.out / f"{model}-{seed}"
    command = [
        str(PROGRAMS / "facefed"), "train", "twins", "--config", arguments.config, "--seed", str(seed), "--out",
        str(out), "--data-dir", str(arguments.out / "twins"), "--cache-dir", str(arguments.out / "packs"), "--device",
        "cpu", "--no-mlflow", "--set", "tracking.plots=none", "--set", "tracking.tensorboard=none",
        "--set", "training.precision=bfloat16", "--set", "training.memory_format=contiguous",
        "--set", "training.threads=1", *MODELS[model],
    ]  # fmt: skip
    cost = run(command, out)
    print(f"{model} seed {seed}: {cost['wall_s'] / 60:.1f} min", flush=True)


def further_families(arguments: argparse.Namespace, settings: Settings) -> FacePack:
    """Families that no model saw, neither in training nor in validation."""
    root = arguments.out / "further"
    drawn = SynthSettings(
        layout="twins",
        num_people=2 * arguments.further,
        pictures_per_person=10,
        seed=FURTHER_SEED,
        closeness=arguments.closeness,
    )
    write_dataset(drawn, root)
    return open_pack("twins", root, settings.data, arguments.out / "packs", workers=num_cores())


def embeddings_of(run_folder: Path, pack: FacePack, inference: str) -> torch.Tensor:
    """The best model's embeddings of all pictures, [N, D] float32.  inference: sa, glca or both; "": the run's own."""
    settings = config.load(run_folder / "config.toml")
    if inference:
        settings = config.with_value(settings, "model", "inference", inference)
    tensors, _ = read_tensors(run_folder / "checkpoints" / "best.safetensors")
    recogniser = build_recogniser(
        settings.model,
        num_people=tensors["head.weight"].shape[0],
        image_size=settings.data.image_size,
        backbone_seed=0,
        head_seed=0,
    )
    recogniser.load_state_dict(tensors)
    compute = Compute(device="cpu", precision="float32", memory_format="contiguous", threads=num_cores())
    return embed(recogniser, pack, np.arange(len(pack)), compute)


def main() -> None:
    """Train what is not trained yet, score, print and write results.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--families", type=int, default=60)
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("--further", type=int, default=100)
    parser.add_argument("--closeness", type=float, default=SynthSettings().closeness)
    parser.add_argument("--config", default="twins_dcal")
    parser.add_argument("--out", type=Path, default=Path("bench/results/twins"))
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = config.load(config.find_config(arguments.config))
    drawn = SynthSettings(
        layout="twins",
        num_people=2 * arguments.families,
        pictures_per_person=arguments.pictures,
        closeness=arguments.closeness,
    )
    write_dataset(drawn, arguments.out / "twins")
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(train, arguments, model, seed) for model in MODELS for seed in arguments.seeds]:
            done.result()
    report(arguments, further_families(arguments, settings))


def report(arguments: argparse.Namespace, pack: FacePack) -> None:
    """Score every model on the further families."""
    if pack.family is None:
        sys.exit("the further families are no twins")
    person, family = pack.person, pack.family[pack.person]
    shown: dict[str, list[torch.Tensor]] = {}
    for label, model, inference in (("dcal", "dcal", ""), ("dcal, sa inference", "dcal", "sa"), ("sa", "sa", "")):
        folders = [newest_run(arguments.out / f"{model}-{seed}") for seed in arguments.seeds]
        shown[label] = [embeddings_of(folder, pack, inference) for folder in folders]
    results: dict[str, Any] = {}
    for label, models in shown.items():
        results[label] = [
            twin_figures(e, person, family, threshold=0.0, num_replicates=NUM_REPLICATES, seed=1) for e in models
        ]
        for kind in KINDS:
            values = [figures[kind]["roc_auc"]["value"] for figures in results[label]]
            each = ", ".join(f"{value:.4f}" for value in values)
            print(f"{label:20} {kind:10} AUC {np.mean(values):.4f} ({each})", flush=True)
    for label in ("dcal", "dcal, sa inference"):
        for kind in ("twins", "strangers"):
            gap = mean_paired_gap(
                shown[label], shown["sa"], person, family, kind, "roc_auc", num_replicates=NUM_REPLICATES, seed=1
            )
            results[f"{label} - sa, {kind}"] = gap._asdict()
            print(f"{label} - sa, {kind}: {gap.gap:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]", flush=True)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
