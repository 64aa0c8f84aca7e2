"""All-pairs verification of many embeddings: our histogram and scores against scikit-learn's roc_curve.

    python -m bench.verification [--pictures 6000] [--people 1000] [--json]

Ours goes from embeddings to AUC, EER and TAR@FAR; scikit-learn's gets the scores of all pairs ready made, and the time
to make them is given apart. Each repeat of each side is a process of its own with one thread; the sides take turns.
Peak memory is that of the whole process, the interpreter and its libraries included, which are also given apart.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

REPEATS = 5
DIMENSION = 512
SIDES = ("ours", "sklearn")


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

    from common.metrics.verification import open_set_scores, pair_histogram

    torch.set_num_threads(1)
    imported = peak_mib()
    embeddings, person = embeddings_and_people(num_pictures, num_people)
    before = peak_mib()
    started = time.perf_counter()
    histogram = pair_histogram(embeddings, person)
    counted = time.perf_counter()
    scores = open_set_scores(histogram)
    ended = time.perf_counter()
    figures = {"seconds": ended - started, "curve_seconds": ended - counted, "auc": scores["roc_auc"]}
    return figures | {
        "mib_imported": imported,
        "mib_before": before,
        "mib_peak": peak_mib(),
        "num_pairs": float(histogram.sum()),
    }


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
    figures = {"seconds": ended - scored, "score_seconds": scored - started, "auc": float(auc(far, tar))}
    return figures | {
        "mib_imported": imported,
        "mib_before": before,
        "mib_peak": peak_mib(),
        "num_pairs": float(num_pairs),
    }


def in_a_process(side: str, num_pictures: int, num_people: int) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.verification", "--side", side]
    sizes = ["--pictures", str(num_pictures), "--people", str(num_people)]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    done = subprocess.run(
        [*command, *sizes], env=os.environ | one_thread, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=6000)
    parser.add_argument("--people", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        work = {"ours": ours, "sklearn": sklearn}[arguments.side]
        print(json.dumps(work(arguments.pictures, arguments.people)))
        return
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(REPEATS):
        for side in SIDES:
            runs[side].append(in_a_process(side, arguments.pictures, arguments.people))
    medians = {
        side: {name: statistics.median(run[name] for run in of_side) for name in of_side[0]}
        for side, of_side in runs.items()
    }
    ratio = medians["sklearn"]["seconds"] / medians["ours"]["seconds"]
    if arguments.json:
        print(json.dumps({"medians": medians, "runs": runs, "times_as_fast": ratio}))
        return
    print(f"{medians['ours']['num_pairs']:,.0f} pairs of {arguments.pictures:,} embeddings; medians of {REPEATS}")
    for side, median in medians.items():
        seconds = sorted(run["seconds"] for run in runs[side])
        apart = f", after {median['score_seconds']:.2f} s for the scores" if side == "sklearn" else " with the scores"
        print(
            f"{side:8} {median['seconds']:6.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f}){apart}; peak"
            f" {median['mib_peak']:,.0f} MiB: {median['mib_imported']:,.0f} libraries, {median['mib_before']:,.0f} with"
            f" the embeddings; AUC {median['auc']:.6f}"
        )
    print(f"ours is {ratio:.1f} times as fast")


if __name__ == "__main__":
    main()
