"""What DCAL gains on identical twins over the same ViT with self-attention alone, at equal steps, on synthetic twins.

    python -m bench.twins [--seeds 1 2 3] [--families 60] [--further 300] [--out DIR]

Each model is first trained on 400 people who are no twins, as a face model is in practice (`facefed train local`; with
GLCA's branch for the one and without for the other, PWCA for neither), then with each seed on the twins (`facefed train
twins`). All runs have one thread, two at a time. They are scored on further families, drawn with another seed and used
for nothing else. Intervals are of 95 %, from drawing families; those of gaps from the same draws for both models, and
the mean gap over the seeds within each draw.
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
from common.faces.pack import FacePack, open_pack
from common.metrics.bootstrap import Drawn, paired_gap, twin_figures
from common.metrics.figures import KINDS
from common.models.recogniser import build_recogniser
from common.settings import Settings
from common.system.checkpoints import read_tensors
from common.system.runtime import num_cores
from common.training.evaluation import embed
from common.training.loop import Compute
from simulation.data.synthetic import SynthSettings, write_dataset

PROGRAMS = Path(sys.executable).parent
PLAIN = ("--set", "model.attention=sa", "--set", "model.inference=sa")
BEFORE = {"dcal": ("--set", "model.attention=glca", "--set", "model.inference=sa"), "sa": PLAIN}
AFTER = {"dcal": (), "sa": PLAIN}
STRANGERS_SEED, FURTHER_SEED = 2_001, 3_001
NUM_REPLICATES = 2_000


def common_flags(arguments: argparse.Namespace, out: Path) -> list[str]:
    """What all runs have alike."""
    return [
        "--out", str(out), "--cache-dir", str(arguments.out / "packs"), "--device", "cpu", "--no-mlflow",
        "--set", "tracking.plots=none", "--set", "tracking.tensorboard=none", "--set", "training.precision=bfloat16",
        "--set", "training.memory_format=contiguous", "--set", "training.threads=1",
    ]  # fmt: skip


def pretrain(arguments: argparse.Namespace, model: str) -> None:
    """Train on people who are no twins; a run that was made before is taken as it is."""
    out = arguments.out / f"strangers-{model}"
    command = [
        str(PROGRAMS / "facefed"), "train", "local", "--config", "twins_dcal", "--seed", "1", "--epochs", "20",
        "--client", f"strangers:twins={arguments.out / 'strangers'}", *BEFORE[model], *common_flags(arguments, out),
    ]  # fmt: skip
    print(f"{model} on strangers: {run(command, out)['wall_s'] / 60:.1f} min", flush=True)


def train(arguments: argparse.Namespace, model: str, seed: int) -> None:
    """Train on the twins; a run that was made before is taken as it is."""
    out = arguments.out / f"{model}-{seed}"
    weights = newest_run(arguments.out / f"strangers-{model}") / "checkpoints" / "best.safetensors"
    command = [
        str(PROGRAMS / "facefed"), "train", "twins", "--config", "twins_finetune", "--seed", str(seed),
        "--data-dir", str(arguments.out / "twins"), "--set", f"model.pretrained={weights}", *AFTER[model],
        *common_flags(arguments, out),
    ]  # fmt: skip
    print(f"{model} seed {seed}: {run(command, out)['wall_s'] / 60:.1f} min", flush=True)


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
        num_people=2,  # the head embeds nobody
        image_size=settings.data.image_size,
        backbone_seed=0,
        head_seed=0,
    )
    weights = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    recogniser.backbone.load_state_dict(weights)
    compute = Compute(device="cpu", precision="float32", memory_format="contiguous", threads=num_cores())
    return embed(recogniser, pack, np.arange(len(pack)), compute)


def draw(arguments: argparse.Namespace, name: str, *, num_people: int, seed: int, closeness: float) -> None:
    """A data set in the layout of twins; what was drawn before is taken as it is."""
    drawn = SynthSettings(
        layout="twins",
        num_people=num_people,
        pictures_per_person=arguments.pictures,
        seed=seed,
        closeness=closeness,
    )
    write_dataset(drawn, arguments.out / name)


def main() -> None:
    """Train what is not trained yet, score, print and write results.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--families", type=int, default=60)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--further", type=int, default=300)
    parser.add_argument("--closeness", type=float, default=0.8)
    parser.add_argument("--out", type=Path, default=Path("bench/results/twins"))
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw(arguments, "strangers", num_people=400, seed=STRANGERS_SEED, closeness=0.0)
    draw(arguments, "twins", num_people=2 * arguments.families, seed=1, closeness=arguments.closeness)
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(pretrain, arguments, model) for model in BEFORE]:
            done.result()
        for done in [pool.submit(train, arguments, model, seed) for model in AFTER for seed in arguments.seeds]:
            done.result()
    report(arguments, further_families(arguments, config.load(config.find_config("twins_finetune"))))


def report(arguments: argparse.Namespace, pack: FacePack) -> None:
    """Score every model on the further families."""
    person, family = pack.person, pack.families[pack.person]
    shown: dict[str, list[torch.Tensor]] = {}
    for label, model, inference in (("dcal", "dcal", ""), ("dcal, sa inference", "dcal", "sa"), ("sa", "sa", "")):
        folders = [newest_run(arguments.out / f"{model}-{seed}") for seed in arguments.seeds]
        shown[label] = [embeddings_of(folder, pack, inference) for folder in folders]
    results: dict[str, Any] = {}
    for label, models in shown.items():
        results[label] = [
            twin_figures(Drawn.by_seed(e, person, family, num_replicates=NUM_REPLICATES, seed=1), 0.0) for e in models
        ]
        for kind in KINDS:
            values = [figures[kind]["roc_auc"]["value"] for figures in results[label]]
            each = ", ".join(f"{value:.4f}" for value in values)
            print(f"{label:20} {kind:10} AUC {np.mean(values):.4f} ({each})", flush=True)
    for label in ("dcal", "dcal, sa inference"):
        for kind in ("twins", "strangers"):
            gap = paired_gap(
                shown[label], shown["sa"], person, family, kind, "roc_auc", num_replicates=NUM_REPLICATES, seed=1
            )
            results[f"{label} - sa, {kind}"] = vars(gap)
            print(f"{label} - sa, {kind}: {gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]", flush=True)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
