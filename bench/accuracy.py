"""What speed costs in accuracy: one federation in float32 and in bfloat16, with float32 and with int8 on the wire.

    python -m bench.accuracy --celeba DIR --vggface2 DIR [--seeds 1 2 3] [--out DIR] [--set SECTION.NAME=VALUE ...]

Each variant is one `flower-simulation` with the configuration of bench.real_faces. Every model is scored on the same
pairs of people never seen. An interrupted measurement goes on where it was.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from bench.real_faces import CONFIGS, PROGRAMS, newest_run, run
from common.metrics.names import BYTES_DOWN, BYTES_UP

FAST = ("training.precision=bfloat16", "training.memory_format=channels_last")
VARIANTS = {
    "float32, float32 on the wire": ("training.precision=float32", "training.memory_format=contiguous"),
    "bfloat16, float32 on the wire": FAST,
    "bfloat16, int8 on the wire": (*FAST, "federation.upload_codec=int8", "federation.download_codec=int8"),
}
SAME = ("training.threads=1", "tracking.plots=none")


def federated(arguments: argparse.Namespace, variant: str, seed: int) -> dict[str, float]:
    """One run; its test AUC and EER, the bytes of a round and its wall seconds."""
    out = arguments.out / f"{variant.replace(', ', '-').replace(' ', '-')}-{seed}"
    settings = (*SAME, *VARIANTS[variant], *arguments.set)
    command = [
        str(PROGRAMS / "flower-simulation"), "--config", CONFIGS["fedavg"], "--seed", str(seed), "--out", str(out),
        "--client", f"celeba={arguments.celeba}", "--client", f"vggface2={arguments.vggface2}",
        "--cache-dir", str(arguments.out / "packs"), "--no-mlflow", "--device", "cpu",
        *(part for setting in settings for part in ("--set", setting)),
    ]  # fmt: skip
    cost = run(command, out)
    folder = newest_run(out)
    summary = json.loads((folder / "metrics.json").read_text())
    last = json.loads((folder / "checkpoints" / "state.json").read_text())["rounds"][-1]
    return {
        "auc": summary["best"]["roc_auc"],
        "eer": summary["best"]["eer"],
        "untrained_auc": summary["untrained"]["roc_auc"],
        "bytes": last[BYTES_DOWN] + last[BYTES_UP],
        "wall_s": cost["wall_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--celeba", required=True)
    parser.add_argument("--vggface2", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--set", action="append", default=[], help="a setting of all runs")
    parser.add_argument("--out", type=Path, default=Path("bench/results/accuracy"))
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[int, dict[str, float]]] = {name: {} for name in VARIANTS}
    for seed in arguments.seeds:
        for variant in VARIANTS:  # in turn, so that a busy hour hits all of them
            results[variant][seed] = federated(arguments, variant, seed)
            print(variant, "seed", seed, {k: round(v, 4) for k, v in results[variant][seed].items()}, flush=True)
        (arguments.out / "results.json").write_text(json.dumps(results, indent=2))
    whole = next(iter(results.values()))
    columns = f"{'AUC':>7} {'lowest':>7} {'highest':>7} {'EER':>7} {'bytes a round':>14} {'share':>6} {'s':>6}"
    print(f"\n{'variant':32} {columns}")
    for variant, by_seed in results.items():
        aucs = [figures["auc"] for figures in by_seed.values()]
        mean = {key: statistics.mean(f[key] for f in by_seed.values()) for key in ("eer", "bytes", "wall_s")}
        share = mean["bytes"] / statistics.mean(f["bytes"] for f in whole.values())
        print(
            f"{variant:32} {statistics.mean(aucs):7.4f} {min(aucs):7.4f} {max(aucs):7.4f} {mean['eer']:7.4f}"
            f" {mean['bytes']:14,.0f} {share:6.1%} {mean['wall_s']:6.0f}"
        )
    if not all(figures["auc"] > figures["untrained_auc"] for by in results.values() for figures in by.values()):
        sys.exit("a run did not learn, so its accuracy says nothing")


if __name__ == "__main__":
    main()
