"""What alignment is worth: the same federation on centre squares of photographs and on the faces that `facefed data
align` finds in them, over several seeds.

    python -m bench.alignment --photos DIR [--seeds 1 2 3] [--out DIR]

DIR: one folder a person (or train/ and test/ around them), photographs that are not aligned.  Two holders have every
second person each.  Both federations have the same people, pictures, splits and settings; only their cut differs.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np

from bench.real_faces import COMPUTE, PROGRAMS, newest_run, run
from common.faces.index import read_index

SQUARES, ALIGNED = "squares", "aligned"
SMALL = (
    "--config", "celeba_vggface2_fedavg", "--rounds", "8", "--local-epochs", "2",
    "--set", "data.image_size=64", "--set", "model.width=0.5",
)  # fmt: skip


def holders(photos: Path, faces: Path, out: Path) -> None:
    """Links to the people's folders, every second person to each holder: OUT/KIND/HOLDER/PERSON."""
    index = read_index("folder", photos)
    folder_of: dict[str, str] = {}
    for path, person in zip(index.paths, index.person.tolist(), strict=True):
        folder_of.setdefault(index.people[person], path.rpartition("/")[0])
    for kind, root in ((SQUARES, photos), (ALIGNED, faces)):
        shutil.rmtree(out / kind, ignore_errors=True)
        for number, (person, folder) in enumerate(sorted(folder_of.items())):
            link = out / kind / ("north", "south")[number % 2] / person
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(root / folder, target_is_directory=True)


def federated(kind: str, seed: int, out: Path) -> dict[str, float]:
    """One federation of the two holders; pooled test figures of its best round."""
    clients = [
        word for name in ("north", "south") for word in ("--client", f"{name}:folder={out / kind / name}")
    ]  # fmt: skip
    folder = out / f"{kind}-{seed}"
    command = [
        str(PROGRAMS / "flower-simulation"), *SMALL, *clients, "--seed", str(seed), "--out", str(folder), "--cache-dir",
        str(out / "packs"), "--no-mlflow", "--device", "cpu", "--set", "tracking.plots=none", *COMPUTE,
    ]  # fmt: skip
    cost = run(command, folder)
    summary = json.loads((newest_run(folder) / "metrics.json").read_text())
    best = {name: summary["best"][name] for name in ("roc_auc", "eer")}
    return {**best, "untrained": summary["untrained"]["roc_auc"], "best_round": summary["best_round"], **cost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("bench/results/alignment"))
    arguments = parser.parse_args()
    photos, out = arguments.photos.resolve(), arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    align = [str(PROGRAMS / "facefed"), "data", "align", str(photos), str(out / "faces")]
    print("data align", run(align, out / "align"), flush=True)
    holders(photos, out / "faces", out)
    results: dict[str, dict[int, dict[str, float]]] = {SQUARES: {}, ALIGNED: {}}
    for seed in arguments.seeds:
        for kind, by_seed in results.items():
            by_seed[seed] = federated(kind, seed, out)
            print(kind, "seed", seed, {name: round(value, 4) for name, value in by_seed[seed].items()}, flush=True)
    (out / "results.json").write_text(json.dumps(results, indent=2))
    for figure in ("roc_auc", "eer"):
        values = {kind: [by_seed[seed][figure] for seed in arguments.seeds] for kind, by_seed in results.items()}
        gaps = np.subtract(values[ALIGNED], values[SQUARES])
        for kind, each in values.items():
            print(f"{figure} {kind}: {np.mean(each):.4f} ({', '.join(f'{value:.4f}' for value in each)})")
        print(f"{figure} gap: {gaps.mean():+.4f} ({', '.join(f'{gap:+.4f}' for gap in gaps)})")


if __name__ == "__main__":
    sys.exit(main())
