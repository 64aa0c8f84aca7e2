"""All-pairs verification of many embeddings: our histogram and scores against scikit-learn's roc_curve.

    python -m bench.verification [--pictures 3000] [--people 1000]

Ours goes from embeddings to AUC, EER and TAR@FAR; scikit-learn's gets the scores of all pairs ready made, and the time
to make them is not counted. Each side is a process of its own with one thread; the sides take turns. Memory is what
the process needs above its libraries and the embeddings; of scikit-learn's side the scores are part of that.
"""

import argparse
import json
import resource
import sys
import time
from functools import partial

from bench.comparison import Claim, Comparison, Figures, Place, measure, table
from bench.sides import ROOT, environment
from bench.watch import run_side

REPEATS = 5
DIMENSION = 512
FARS = (1e-1, 1e-2, 1e-3)
NUM_PICTURES, NUM_PEOPLE = 3000, 500  # 4.5 million pairs


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def embeddings_and_people(num_pictures: int, num_people: int):
    """Unit vectors around a mean for each person, like those of a model that has learned something."""
    import numpy as np

    random = np.random.default_rng(1)
    person = random.integers(0, num_people, num_pictures)
    means = random.normal(size=(num_people, DIMENSION)).astype(np.float32)
    embeddings = 0.5 * means[person] + random.normal(size=(num_pictures, DIMENSION)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings, person


def ours(num_pictures: int, num_people: int) -> dict[str, float]:
    import torch

    from common.metrics.figures import open_set_scores
    from common.metrics.pairs import pair_histogram

    torch.set_num_threads(1)
    imported = peak_mib()
    embeddings, person = embeddings_and_people(num_pictures, num_people)
    before = peak_mib()
    started = time.perf_counter()
    histogram = pair_histogram(embeddings, person)
    counted = time.perf_counter()
    scores = open_set_scores(histogram)
    ended = time.perf_counter()
    figures = {"seconds": ended - started, "curve_seconds": ended - counted, "num_pairs": float(histogram.sum())}
    figures |= {"roc_auc": scores["roc_auc"], "eer": scores["eer"]}
    figures |= {f"tar_{far:g}": scores[f"tar_at_far_{far:.0e}".replace("e-0", "e-")] for far in FARS}
    return figures | {"mib_imported": imported, "mib_above": peak_mib() - before}


def sklearn(num_pictures: int, num_people: int) -> dict[str, float]:
    import numpy as np
    from sklearn.metrics import auc, roc_curve

    imported = peak_mib()
    embeddings, person = embeddings_and_people(num_pictures, num_people)
    num_pairs = num_pictures * (num_pictures - 1) // 2
    before = peak_mib()
    started = time.perf_counter()
    scores, same, end = np.empty(num_pairs, dtype=np.float32), np.empty(num_pairs, dtype=np.bool_), 0
    for row in range(num_pictures - 1):  # row by row, so that nothing but the scores themselves takes memory
        start, end = end, end + num_pictures - row - 1
        np.matmul(embeddings[row + 1 :], embeddings[row], out=scores[start:end])
        np.equal(person[row + 1 :], person[row], out=same[start:end])
    scored = time.perf_counter()
    far, tar, _ = roc_curve(same, scores)
    ended = time.perf_counter()
    figures = {"seconds": ended - scored, "score_seconds": scored - started, "num_pairs": float(num_pairs)}
    above = 1.0 - tar - far  # falls from 1 to -1; where it is 0, as linear between two points of the curve, is the EER
    after = int(np.argmax(above <= 0.0))
    eer = np.interp(0.0, above[[after, after - 1]], far[[after, after - 1]])
    figures |= {"roc_auc": float(auc(far, tar)), "eer": float(eer)}
    figures |= {f"tar_{limit:g}": float(tar[far <= limit].max()) for limit in FARS}
    return figures | {"mib_imported": imported, "mib_above": peak_mib() - before}


def error(num_pictures: int, num_people: int) -> dict[str, float]:
    """How far our figures are from scikit-learn's on the same pairs, the largest of all."""
    found, exact = ours(num_pictures, num_people), sklearn(num_pictures, num_people)
    names = ("roc_auc", "eer", *(f"tar_{far:g}" for far in FARS))
    apart = {f"{name}_error": abs(found[name] - exact[name]) for name in names}
    tar = max(apart[f"tar_{far:g}_error"] for far in FARS)
    return {"error": max(apart["roc_auc_error"], apart["eer_error"]), "tar_error": tar, **apart}


SIDES = {"sklearn": sklearn, "ours": ours, "error": error}


def in_a_process(_: Place, *, side: str, num_pictures: int = NUM_PICTURES, num_people: int = NUM_PEOPLE) -> Figures:
    command = [sys.executable, "-m", "bench.verification", "--side", side]
    sizes = ["--pictures", str(num_pictures), "--people", str(num_people)]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return run_side([*command, *sizes], cwd=ROOT, environment=environment(**one_thread))


def comparison(num_pictures: int = NUM_PICTURES, num_people: int = NUM_PEOPLE) -> Comparison:
    what = f"{num_pictures * (num_pictures - 1) / 2e6:.1f} M pairs: AUC, EER, TAR"
    sizes = {"num_pictures": num_pictures, "num_people": num_people}
    return Comparison(
        name="verification",
        what=f"{what}; one thread. sklearn: roc_curve on ready scores.",
        sides={side: partial(in_a_process, side=side, **sizes) for side in SIDES},
        claims=(
            Claim(what=what, ours="ours", figure="seconds", peer="sklearn", goal=0.1),
            Claim(what=f"{what}, memory", ours="ours", figure="mib_above", peer="sklearn", goal=0.1, unit="MiB"),
            Claim(what="larger error of AUC and EER", ours="error", figure="error", unit="", goal=2e-5, of="ours"),
            Claim(what="largest error of TAR", ours="error", figure="tar_error", unit="", goal=2e-5, of="ours"),
        ),
        repeats=REPEATS,
    )


COMPARISON = comparison()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=NUM_PICTURES)
    parser.add_argument("--people", type=int, default=NUM_PEOPLE)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](arguments.pictures, arguments.people)))
        return
    wanted = comparison(arguments.pictures, arguments.people)
    result = measure(wanted, Place(scratch=ROOT, quick=False), lambda text: print(text, file=sys.stderr))
    print(table({wanted.name: result.to_json()}))


if __name__ == "__main__":
    main()
