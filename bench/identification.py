"""`identify` in a gallery of real people, one enrolled picture each: rank-1, and FNIR at given FPIR, with intervals.

    python -m bench.identification --celeba DIR --vggface2 DIR --work DIR [--gallery 100] [--epochs 40] [--width 1]
        [--model NAME] [--image-size 64]

The people of both folders are divided by a hash of their names: those of the gallery are never trained or validated on.
Every photograph is detected and aligned as `facefed enrol` does it.  A model is trained by `facefed train local` on the
others.  Each further picture of somebody in the gallery is a search.  As in NIST's 1:N evaluations (IR 8271, section
3): FNIR counts mated searches whose person is not first, or below the threshold; FPIR counts searches, with the person
taken out of the gallery, in which somebody reaches it.  Intervals: 95 %, people drawn (bootstrap, 2,000 replicates).
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.errors import DataError
from common.faces.index import read_index
from simulation.recognition.photographs import Photographs, whose

PROGRAMS = Path(sys.executable).parent
REPLICATES = 2000
RATES = (0.1, 0.03, 0.01)  # FPIR


def people_of(celeba: Path, vggface2: Path) -> dict[str, list[Path]]:
    """Person -> pictures, of both folders; those with two at least."""
    found: dict[str, list[Path]] = {}
    for name, root in (("celeba", celeba), ("vggface2", vggface2)):
        index = read_index(name, root)
        for path, person in zip(index.paths, index.person.tolist(), strict=True):
            picture = root / path
            found.setdefault(f"{name}-{index.people[person]}", []).append(picture)
    return {person: sorted(paths) for person, paths in sorted(found.items()) if len(paths) > 1}


def prepare(people: dict[str, list[Path]], out: Path, image_size: int) -> dict[str, int]:
    """Aligned faces, one folder a person; returns how many pictures were left out, by reason.

    OUT.jsonl has a line for each picture that was looked at, so that an interrupted measurement goes on where it was
    and still knows what it left out before.
    """
    photographs, record = Photographs(image_size), out.with_suffix(".jsonl")
    known = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    seen = {one["target"] for one in known}
    with record.open("a") as told:
        for person, paths in people.items():
            (out / person).mkdir(parents=True, exist_ok=True)
            for path in paths:
                target = f"{person}/{path.stem}.png"
                if target in seen:
                    continue
                one = {"target": target, "left_out": _aligned(photographs, path, out / target)}
                told.write(f"{json.dumps(one)}\n")
                told.flush()
                known.append(one)
    return dict(Counter(one["left_out"] for one in known if one["left_out"]))


def _aligned(photographs: Photographs, path: Path, target: Path) -> str:
    """Write the face; returns why there is none, "" where there is."""
    try:
        face, reason = whose(photographs.faces(path))
    except DataError as error:
        return str(error).removeprefix(f"{path}: ").partition(";")[0]
    if face is None:
        return reason.partition("(")[0].strip()
    Image.fromarray(face.picture).save(target)
    return ""


def templates_of(folder: Path, run: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Templates [N, D] of aligned faces, and whose each is [N]."""
    from common.settings import Settings
    from simulation.recognition.model import load_model

    model = load_model(str(run), Settings())
    pictures, owner = [], []
    with_faces = {path.parent for path in folder.glob("*/*.png")}  # of somebody nothing may have been taken
    for number, person in enumerate(sorted(with_faces)):
        for path in sorted(person.glob("*.png")):
            pictures.append(np.asarray(Image.open(path)))
            owner.append(number)
    return model.embed(np.stack(pictures)), np.array(owner)


def searches(templates: NDArray[np.float32], owner: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """Each search: whose it is, the mate's score, the best other's.  The first picture of each person is enrolled."""
    _, first = np.unique(owner, return_index=True)
    probes = np.setdiff1d(np.arange(len(owner)), first)
    scores = (templates[probes] @ templates[first].T).astype(np.float64)
    who = owner[probes]
    mate = scores[np.arange(len(probes)), who].copy()
    scores[np.arange(len(probes)), who] = -np.inf
    return {"who": who.astype(np.float64), "mate": mate, "other": scores.max(axis=1)}


def figures(found: dict[str, NDArray[np.float64]]) -> dict[str, float]:
    """Rank-1 and FNIR at each FPIR."""
    mate, other = found["mate"], found["other"]
    values = {"rank-1": float((mate > other).mean())}
    for rate in RATES:
        # the lowest threshold that at most so many of the searches without a mate reach
        threshold = np.sort(other)[::-1][int(np.floor(rate * len(other)))]
        missed = (mate <= threshold) | (mate <= other)
        values[f"FNIR at FPIR {rate:g}"] = float(missed.mean())
    return values


def with_intervals(found: dict[str, NDArray[np.float64]]) -> dict[str, tuple[float, float, float]]:
    """Each figure with its 95 % interval, people drawn."""
    stream, who = np.random.default_rng(0), found["who"]
    people = np.unique(who)
    rows_of = {person: np.flatnonzero(who == person) for person in people}
    drawn = []
    for _ in range(REPLICATES):
        rows = np.concatenate([rows_of[person] for person in stream.choice(people, len(people))])
        drawn.append(figures({name: values[rows] for name, values in found.items()}))
    return {
        name: (value, *np.percentile([one[name] for one in drawn], [2.5, 97.5]).tolist())
        for name, value in figures(found).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--celeba", type=Path, required=True)
    parser.add_argument("--vggface2", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--gallery", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--width", type=float, default=1.0, help="of the backbone's layers, of the usual 1")
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--image-size", type=int, default=64)
    arguments = parser.parse_args()
    people = people_of(arguments.celeba, arguments.vggface2)
    order = sorted(people, key=lambda person: hashlib.sha256(person.encode()).hexdigest())
    parts = {"gallery": order[: arguments.gallery], "train": order[arguments.gallery :]}
    work: Path = arguments.work
    for part, names in parts.items():
        left_out = prepare({name: people[name] for name in sorted(names)}, work / part, arguments.image_size)
        num_pictures = sum(len(people[name]) for name in names)
        print(f"{part}: {len(names)} people, {num_pictures:,} pictures; left out: {left_out}", flush=True)
    runs = work / "runs"
    if not any(runs.glob("*/metrics.json")):
        command = [
            PROGRAMS / "facefed", "train", "local", "--client", f"real:folder={work / 'train'}", "--no-mlflow",
            "--model", arguments.model, "--epochs", str(arguments.epochs), "--out", runs, "--cache-dir", work / "packs",
            "--set", f"data.image_size={arguments.image_size}", "--set", "tracking.plots=none",
            "--set", f"model.width={arguments.width}",
        ]  # fmt: skip
        subprocess.run([str(word) for word in command], check=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"training: {used.ru_utime + used.ru_stime:.0f} CPU-s", flush=True)
    run = max(path.parent for path in runs.glob("*/metrics.json"))
    templates, owner = templates_of(work / "gallery", run)
    found = searches(templates, owner)
    print(
        f"{len(np.unique(owner))} people enrolled, one picture each; {len(found['who']):,} searches, of"
        f" {len(np.unique(found['who']))} of them"
    )
    for name, (value, low, high) in with_intervals(found).items():
        print(f"{name}: {value:.3f} (95 % interval {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
