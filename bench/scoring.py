"""What official size costs a client beside its pictures: closed and open scores, and a step of a large head.

    python -m bench.scoring closed [--pictures 276323] [--people 7595]
    python -m bench.scoring pairs [--pictures 378660] [--people 1036] [--max-pairs 1000000000]
    python -m bench.scoring intervals [--pictures 40000] [--people 500]
    python -m bench.scoring head [--people 360000] [--batch 32] [--side 112] [--head cosface] [--head-sample 1.0]

Sizes are those of VGGFace2's validation pictures and of Glint360K's people. Each case is one process with one thread;
told are its CPU-seconds and its peak resident memory, `mib_above` without what stood before: libraries and model, of
`closed` the embeddings too. `bench.run scoring` runs them all, the heads beside one of 10,000 people.
"""

import argparse
import json
import resource
import sys
import time
from functools import partial

from bench.comparison import Claim, Comparison, Figures, Place
from bench.sides import ROOT, environment
from bench.watch import run_side

DIMENSION = 512
PICTURES, PEOPLE = 276_323, 7_595  # VGGFace2's: validation pictures of its training people
MANY, FEW = 360_000, 10_000  # identities of a head: Glint360K's, CASIA-WebFace's


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def closed(options: argparse.Namespace) -> dict[str, float]:
    """The closed set's sums of random embeddings, without the backbone."""
    from types import SimpleNamespace

    import numpy as np
    import torch

    from common.models.recogniser import build_recogniser
    from common.settings import ModelSettings
    from common.system.progress import no_tick
    from common.training import evaluation
    from common.training.loop import Compute

    torch.set_num_threads(1)
    model = ModelSettings(backbone="cnn", width=0.25, embedding_size=DIMENSION, head=options.head)
    recogniser = build_recogniser(model, num_people=options.people, image_size=32, backbone_seed=1, head_seed=2)
    embeddings = torch.randn(options.pictures, DIMENSION)
    labels = np.random.default_rng(1).integers(0, options.people, options.pictures)
    vars(evaluation)["embed"] = lambda *_: embeddings
    pack = SimpleNamespace(indices=lambda _: np.arange(options.pictures), training_labels=labels)
    compute = Compute(device="cpu", precision="float32", memory_format="contiguous", threads=1)
    before, began = peak_mib(), time.process_time()
    sums, _ = vars(evaluation)["_closed_set"](recogniser, pack, evaluation.Split.VAL_PICTURES, compute, no_tick)
    cpu_s = time.process_time() - began
    return {"seconds": cpu_s, "mib_above": peak_mib() - before, "loss": sums.loss_sum / options.pictures}


def head(options: argparse.Namespace) -> dict[str, float]:
    """The last of a few training steps of a ResNet-18 with that many people."""
    import torch

    from common.faces.batches import Batch
    from common.models.recogniser import build_recogniser
    from common.settings import ModelSettings, TrainingSettings
    from common.training.loop import Compute, make_optimiser
    from common.training.sampled_head import HeadSample
    from common.training.step import Stepper

    torch.set_num_threads(1)
    torch.manual_seed(1)
    model, training = ModelSettings(embedding_size=DIMENSION, head=options.head), TrainingSettings()
    recogniser = build_recogniser(
        model, num_people=options.people, image_size=options.side, backbone_seed=1, head_seed=2
    ).train()
    compute = Compute(device="cpu", precision="float32", memory_format="contiguous", threads=1)
    built = peak_mib()
    sample = None
    if options.head_sample < 1.0:
        sample = HeadSample(fraction=options.head_sample, stream=torch.Generator().manual_seed(1))
    stepper = Stepper(
        recogniser=recogniser,
        optimiser=make_optimiser(recogniser, training),
        training=training,
        compute=compute,
        sample=sample,
    )
    cpu_s = []
    for number in range(3):
        pictures = torch.rand(options.batch, 3, options.side, options.side) * 2 - 1
        batch = Batch(pictures, torch.randint(0, options.people, (options.batch,)), None)
        began = time.process_time()
        stepper.step(batch, where=f"step {number}")
        cpu_s.append(time.process_time() - began)
    weights = sum(p.numel() * p.element_size() for p in recogniser.parameters()) / 2**20
    return {"seconds": min(cpu_s), "peak": peak_mib(), "mib_above": peak_mib() - built, "mib_weights": weights}


def _faces(options: argparse.Namespace):
    import numpy as np
    import torch

    torch.set_num_threads(1)
    person = np.sort(np.random.default_rng(1).integers(0, options.people, options.pictures))
    means = torch.randn(options.people, DIMENSION)
    return torch.randn(options.pictures, DIMENSION).add_(means[torch.from_numpy(person)], alpha=0.5), person


def pairs(options: argparse.Namespace) -> dict[str, float]:
    """The open set's histogram by the design of a round."""
    from common.metrics.design import auc_half_width, pair_design
    from common.metrics.figures import open_set_scores
    from common.metrics.pairs import designed_histogram, pair_histogram

    embeddings, person = _faces(options)
    before, began = peak_mib(), time.process_time()
    design = pair_design(person, most=options.max_pairs, seed=1)
    histogram = pair_histogram(embeddings, person) if design is None else designed_histogram(embeddings, person, design)
    cpu_s, auc = time.process_time() - began, open_set_scores(histogram)["roc_auc"]
    told = {"roc_auc": auc, "half_width": 0.0 if design is None else auc_half_width(auc, options.max_pairs)}
    return {"seconds": cpu_s, "mib_above": peak_mib() - before, "num_pairs": float(histogram.sum()), **told}


def intervals(options: argparse.Namespace) -> dict[str, float]:
    """Histogram and 1,000 replicates of `facefed evaluate`, by each person's sums and by another look at all pairs."""
    from common.metrics.bootstrap import (
        bootstrap_histograms,
        coarse_bins,
        interval,
        person_weights,
        replicates,
        unit_sums,
    )
    from common.metrics.figures import AUC, PAIRS
    from common.metrics.pairs import pair_histogram

    embeddings, person = _faces(options)
    weights = person_weights(options.people, 1000, 1)
    before, began = peak_mib(), time.process_time()
    sums = unit_sums(embeddings, person)
    linear = sums.counts(weights, coarse_bins(sums.histogram))
    told = {"seconds": time.process_time() - began, "mib_above": peak_mib() - before}
    began = time.process_time()
    histogram = pair_histogram(embeddings, person)
    exact = bootstrap_histograms(embeddings, person, weights, coarse_bins(histogram))
    told["exact_seconds"] = time.process_time() - began
    for name, counts in (("", linear), ("exact_", exact)):
        told[f"{name}low"], told[f"{name}high"] = interval(replicates({PAIRS: counts})[AUC])
    return told


CASES = {"closed": closed, "head": head, "pairs": pairs, "intervals": intervals}
USUAL_PICTURES = {"closed": PICTURES, "pairs": 378_660, "intervals": 40_000}
USUAL_PEOPLE = {"closed": PEOPLE, "head": MANY, "pairs": 1_036, "intervals": 500}


def in_a_process(_: Place, *, case: str, people: int) -> Figures:
    command = [sys.executable, "-m", "bench.scoring", case, "--people", str(people)]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return run_side(command, cwd=ROOT, environment=environment(**one_thread))


COMPARISON = Comparison(
    name="scoring",
    what=f"closed set {PICTURES} x {PEOPLE}; a step of ResNet-18, 112 px, 32 pictures, with {MANY} and {FEW} people",
    sides={
        "closed": partial(in_a_process, case="closed", people=PEOPLE),
        "pairs": partial(in_a_process, case="pairs", people=USUAL_PEOPLE["pairs"]),
        "many": partial(in_a_process, case="head", people=MANY),
        "few": partial(in_a_process, case="head", people=FEW),
    },
    claims=(
        Claim(what="closed set, memory", ours="closed", figure="mib_above", unit="MiB", goal=500, of="ours"),
        Claim(what="closed set", ours="closed", figure="seconds", unit="CPU-s"),
        Claim(what="validation people's pairs of a round", ours="pairs", figure="seconds", unit="CPU-s"),
        Claim(what="a step", ours="many", figure="seconds", peer="few", unit="CPU-s"),
        Claim(what="a step, peak memory", ours="many", figure="peak", peer="few", unit="MiB", goal=3584, of="ours"),
    ),
    in_all=False,  # a few minutes, and 4 GiB
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--pictures", type=int)
    parser.add_argument("--max-pairs", type=int, default=10**9)
    parser.add_argument("--people", type=int)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--side", type=int, default=112)
    parser.add_argument("--head", default="cosface")
    parser.add_argument("--head-sample", type=float, default=1.0)
    options = parser.parse_args()
    options.people = options.people or USUAL_PEOPLE[options.case]
    options.pictures = options.pictures or USUAL_PICTURES.get(options.case, 0)
    print(json.dumps(CASES[options.case](options)))


if __name__ == "__main__":
    main()
