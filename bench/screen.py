"""Which options make the federated model good: each alone against plain FedAvg, on two folders of real faces.

    python -m bench.screen --celeba DIR --vggface2 DIR [--seeds 1] [--variants fedavg fedbn ...] [--out DIR]

Screen all variants at one seed, then the finalists over three. The choice is made by the validation column; the test
column is only reported. A run that is done already is not repeated, so an interrupted screening goes on where it was.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bench.real_faces import COMPUTE, PROGRAMS, newest_run, run

CONFIG = "celeba_vggface2_fedavg"  # 30 rounds of one local epoch
# name -> what differs from the configuration; all process each picture equally often, save the heads' warm-up
VARIANTS: dict[str, dict[str, str]] = {
    "fedavg": {},
    "fedbn": {"model.normalisation": "private"},
    "fedavgm-0.5": {"federation.strategy": "fedavgm", "federation.server_momentum": "0.5"},
    # A steady change is multiplied by lr / (1 - momentum) = 3.
    "fedavgm-0.9": {
        "federation.strategy": "fedavgm",
        "federation.server_momentum": "0.9",
        "federation.server_lr": "0.3",
    },
    "fedadam-0.003": {"federation.strategy": "fedadam", "federation.server_lr": "0.003"},
    "fedadam-0.01": {"federation.strategy": "fedadam", "federation.server_lr": "0.01"},
    "fedyogi-0.003": {"federation.strategy": "fedyogi", "federation.server_lr": "0.003"},
    "fedyogi-0.01": {"federation.strategy": "fedyogi", "federation.server_lr": "0.01"},
    "spreadout-0.1": {"training.spreadout": "0.1"},
    "spreadout-1.0": {"training.spreadout": "1.0"},
    # Unrelated vectors of 512 dimensions are 1.41 apart, so the usual margin of 0.7 asks next to nothing of them.
    "spreadout-10-margin-1.4": {"training.spreadout": "10", "training.spreadout_margin": "1.4"},
    "head_warmup-1": {"training.head_warmup_epochs": "1"},
    "fedprox-0.1": {"federation.strategy": "fedprox", "federation.proximal_mu": "0.1"},
    "epochs-2": {"federation.local_epochs": "2", "federation.rounds": "15"},
    "epochs-3": {"federation.local_epochs": "3", "federation.rounds": "10"},
}
COLUMNS = ("val_auc", "test_auc", "test_eer", "celeba", "vggface2", "best_round", "wall_s")


def overrides_of(arguments: argparse.Namespace, variant: str) -> list[str]:
    """What is laid over the configuration, as SECTION.KEY=VALUE; what the user gave comes last and wins."""
    return [f"{name}={value}" for name, value in VARIANTS[variant].items()] + arguments.set


def keep_or_refuse(out: Path, overrides: list[str]) -> None:
    """Exits when the folder holds a run of other settings under the same name, which would be taken for this one."""
    file = out / "overrides.json"
    if file.exists() and json.loads(file.read_text()) != overrides:
        sys.exit(f"{out} holds a run with {' '.join(json.loads(file.read_text()))}; give another --out.")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(overrides))


def measure(arguments: argparse.Namespace, variant: str, seed: int) -> dict[str, Any]:
    """One federated run through `flower-simulation`: figures of its own summary, or what became of it."""
    out = arguments.out / f"{variant}-seed{seed}"
    overrides = overrides_of(arguments, variant)
    keep_or_refuse(out, overrides)
    command = [
        str(PROGRAMS / "flower-simulation"), "--config", CONFIG, "--seed", str(seed), "--out", str(out),
        "--client", f"celeba={arguments.celeba}", "--client", f"vggface2={arguments.vggface2}",
        "--cache-dir", str(arguments.out / "packs"), "--no-mlflow", "--device", "cpu", "--set", "tracking.plots=none",
        *COMPUTE, *(word for override in overrides for word in ("--set", override)),
    ]  # fmt: skip
    try:
        cost = run(command, out)
    except SystemExit as failed:  # an option may diverge; the others are still worth knowing
        return {"failed": str(failed)}
    summary = json.loads((newest_run(out) / "metrics.json").read_text())
    return {
        "val_auc": summary["best_val_auc"],
        "test_auc": summary["best"]["roc_auc"],
        "test_eer": summary["best"]["eer"],
        "untrained": summary["untrained"].get("roc_auc"),
        "best_round": summary["best_round"],
        "rounds": summary["rounds"],
        **{name: figures["test_roc_auc"] for name, figures in summary["clients"].items()},
        **cost,
    }


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Markdown: for each variant the mean over its seeds, and each seed's validation and test AUC."""
    lines = ["| variant | seeds | " + " | ".join(COLUMNS) + " | each (val, test) |"]
    lines.append("|---" * (len(COLUMNS) + 3) + "|")
    for variant, by_seed in results.items():
        done = [figures for figures in by_seed.values() if "failed" not in figures]
        seeds = " ".join(seed if "failed" not in figures else f"{seed} (failed)" for seed, figures in by_seed.items())
        cells = [
            f"{np.mean([f[c] for f in done]):.{1 if c in ('wall_s', 'best_round') else 4}f}" for c in COLUMNS if done
        ]
        each = ", ".join(f"({f['val_auc']:.4f}, {f['test_auc']:.4f})" for f in done)
        lines.append("| " + " | ".join([variant, seeds, *(cells or ["-"] * len(COLUMNS)), each]) + " |")
    return "\n".join(lines) + "\n"


def write_results(out: Path, results: dict[str, dict[str, dict[str, Any]]]) -> None:
    (out / "screen.json").write_text(json.dumps(results, indent=2) + "\n")
    (out / "screen.md").write_text(table(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--celeba", required=True)
    parser.add_argument("--vggface2", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("bench/results/screen"))
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for all variants")
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "screen.json"
    results: dict[str, dict[str, dict[str, Any]]] = json.loads(file.read_text()) if file.exists() else {}
    for seed in arguments.seeds:
        for variant in arguments.variants:
            figures = measure(arguments, variant, seed)
            results.setdefault(variant, {})[str(seed)] = figures
            print(variant, "seed", seed, {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()},
                  flush=True)  # fmt: skip
            write_results(arguments.out, results)
    print("\n" + table(results))


if __name__ == "__main__":
    main()
