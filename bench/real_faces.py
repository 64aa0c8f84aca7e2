"""What federation buys, and what privacy costs, on two folders of real faces: FedAvg and FedProx against each holder's
own local-only model and against training on all pictures in one place.

    python -m bench.real_faces --celeba DIR --vggface2 DIR [--seeds 1 2 3] [--out DIR]

Every model is scored on the same pairs: the test people of both data sets, pairs within each data set, pooled. Each
picture is processed equally often.
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from clients.local_update import open_client_state
from clients.site import SiteSettings
from common import config
from common.metrics.figures import open_set_scores
from common.settings import Settings
from common.system.checkpoints import read_tensors
from common.system.runtime import num_cores, use_threads
from common.training.evaluation import evaluate
from common.training.loop import Compute

CONFIGS = {"fedavg": "celeba_vggface2_fedavg", "fedprox": "celeba_vggface2_fedprox"}
# Fixed, not left to the trial, so that all runs compute alike.
COMPUTE = (
    "--set", "training.precision=bfloat16", "--set", "training.memory_format=channels_last",
    "--set", "training.threads=1",
)  # fmt: skip
PROGRAMS = Path(sys.executable).parent


def run(command: list[str], out: Path) -> dict[str, float]:
    """Run a program to its end; returns its wall seconds and a bound of its CPU seconds. Exits when it fails."""
    if (out / "cost.json").exists():  # an interrupted measurement goes on where it was
        return json.loads((out / "cost.json").read_text())
    out.mkdir(parents=True, exist_ok=True)
    log, started = out / "log.txt", time.monotonic()
    with log.open("wb") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}; see {log}")
    wall_s = time.monotonic() - started
    # Ray's workers are not our children, so their CPU time cannot be summed; the cores bound it.
    cost = {"wall_s": wall_s, "cpu_s_at_most": wall_s * num_cores()}
    (out / "cost.json").write_text(json.dumps(cost))
    return cost


def newest_run(out: Path) -> Path:
    """The run folder that was made last."""
    return max((path for path in out.iterdir() if (path / "config.toml").exists()), key=lambda path: path.name)


def pooled_auc_of_local(settings: Settings, sites: dict[str, SiteSettings], run_folder: Path) -> dict[str, float]:
    """Score a local-only model's backbone on the test people of every site, with its own normalisation."""
    tensors, _ = read_tensors(run_folder / "checkpoints" / "best.safetensors")
    use_threads(num_cores())
    total = np.zeros((2, 8192), dtype=np.int64)
    figures = {}
    for name, site in sites.items():
        state = open_client_state(site, settings)
        shared = {key: tensors[key] for key in state.recogniser.state_dict() if key.startswith("backbone.")}
        state.recogniser.load_state_dict(shared, strict=False)
        compute = Compute(device="cpu", precision="bfloat16", memory_format="channels_last", threads=num_cores())
        pairs = evaluate(state.recogniser, state.pack, "test", compute).pairs
        figures[name] = open_set_scores(pairs)["roc_auc"]
        total += pairs
    return {"pooled": open_set_scores(total)["roc_auc"], **figures}


def federated(arguments: argparse.Namespace, strategy: str, seed: int) -> dict[str, Any]:
    """One federated run through `flower-simulation`; its own summary's figures."""
    out = arguments.out / f"{strategy}-{seed}"
    command = [
        str(PROGRAMS / "flower-simulation"), "--config", CONFIGS[strategy], "--seed", str(seed),
        "--out", str(out), "--client", f"celeba={arguments.celeba}", "--client", f"vggface2={arguments.vggface2}",
        "--cache-dir", str(arguments.out / "packs"), "--no-mlflow", "--device", "cpu", "--set", "tracking.plots=final",
        *COMPUTE,
    ]  # fmt: skip
    cost = run(command, out)
    summary = json.loads((newest_run(out) / "metrics.json").read_text())
    return {
        "pooled": summary["best"]["roc_auc"],
        "untrained": summary["untrained"]["roc_auc"],
        "eer": summary["best"]["eer"],
        "best_round": summary["best_round"],
        **{name: figures["test_roc_auc"] for name, figures in summary["clients"].items()},
        **cost,
    }


def local(arguments: argparse.Namespace, owner: str, seed: int) -> dict[str, Any]:
    """One local-only run through `facefed train local`, then scored on both holders' test people."""
    out = arguments.out / f"local-{owner}-{seed}"
    folders = {"celeba": arguments.celeba, "vggface2": arguments.vggface2}
    command = [
        str(PROGRAMS / "facefed"), "train", "local", "--client", owner, "--data-dir", folders[owner],
        "--config", CONFIGS["fedavg"], "--seed", str(seed), "--out", str(out), "--device", "cpu",
        "--cache-dir", str(arguments.out / "packs"), "--no-mlflow", "--set", "tracking.plots=final",
        *COMPUTE,
    ]  # fmt: skip
    cost = run(command, out)
    settings = config.with_value(config.load(config.find_config(CONFIGS["fedavg"])), "run", "seed", seed)
    sites = {
        name: SiteSettings(
            name=name,
            dataset=name,
            data_dir=Path(folder).resolve(),
            device="cpu",
            state_dir=out / "state",
            cache_dir=(arguments.out / "packs").resolve(),
        )
        for name, folder in folders.items()
    }
    return {**pooled_auc_of_local(settings, sites, newest_run(out)), **cost}


def centralized(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One run of `facefed train centralized`; its own summary's figures."""
    out = arguments.out / f"centralized-{seed}"
    command = [
        str(PROGRAMS / "facefed"), "train", "centralized", "--config", CONFIGS["fedavg"], "--seed", str(seed),
        "--data-dir", f"celeba={arguments.celeba}", "--data-dir", f"vggface2={arguments.vggface2}", "--out", str(out),
        "--device", "cpu", "--cache-dir", str(arguments.out / "packs"), "--no-mlflow", "--set", "tracking.plots=final",
        *COMPUTE,
    ]  # fmt: skip
    cost = run(command, out)
    summary = json.loads((newest_run(out) / "metrics.json").read_text())
    clients = {name: figures["roc_auc"] for name, figures in summary["clients"].items()}
    return {"pooled": summary["test"]["roc_auc"], "eer": summary["test"]["eer"], **clients, **cost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--celeba", required=True)
    parser.add_argument("--vggface2", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("bench/results/real_faces"))
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[int, dict[str, Any]]] = {}
    jobs = [("fedavg", lambda seed: federated(arguments, "fedavg", seed))]
    jobs += [(f"local {name}", lambda seed, name=name: local(arguments, name, seed)) for name in ("celeba", "vggface2")]
    jobs += [("centralized", lambda seed: centralized(arguments, seed))]
    jobs += [("fedprox", lambda seed: federated(arguments, "fedprox", seed))]
    for seed in arguments.seeds:
        with ThreadPoolExecutor(2) as pool:  # runs of one thread share the machine as two clients do
            made = {name: pool.submit(job, seed) for name, job in jobs if name.startswith(("local", "central"))}
        figures_of = {name: made[name].result() if name in made else job(seed) for name, job in jobs}
        for name, figures in figures_of.items():
            results.setdefault(name, {})[seed] = figures
            print(name, "seed", seed, {k: round(v, 4) for k, v in figures.items()}, flush=True)
        (arguments.out / "results.json").write_text(json.dumps(results, indent=2))
    print(f"\n{'model':16} pooled test AUC over seeds {arguments.seeds}: mean (each)")
    untrained = [figures["untrained"] for figures in results["fedavg"].values()]
    rows = {"untrained": untrained} | {name: [f["pooled"] for f in by.values()] for name, by in results.items()}
    for name, values in rows.items():
        print(f"{name:16} {np.mean(values):.4f}  ({', '.join(f'{value:.4f}' for value in values)})")


if __name__ == "__main__":
    main()
