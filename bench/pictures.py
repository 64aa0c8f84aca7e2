"""The input pipeline: packed batches, augmented in torch, against ImageFolder + PIL + DataLoader on the same pictures.

    python -m bench.pictures --side SIDE --workload FOLDER

Both sides give float batches of 32 augmented pictures of 64 px: flip, crop, colour. The peer decodes JPEG files each
epoch, as its users have it; ours decoded them once, when the pack was made, and that is not in these figures.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from bench.comparison import Claim, Comparison, Figures, Place
from bench.sides import ROOT, describe_workload, environment, workload_of
from bench.watch import run_side
from bench.workload import BATCH, CLIENTS, NUM_TRAINING, SIDE_PX, Workload, settings

EPOCHS = 3
CLIENT = CLIENTS[0]
CORES = len(os.sched_getaffinity(0))


def _speed(epochs: Iterable[Callable[[], Iterable]], count: Callable[[object], int]) -> list[float]:
    """Pictures a second of each epoch; the first one warms up and is left out."""
    speeds = []
    for epoch in epochs:
        began = time.perf_counter()
        num_pictures = sum(count(batch) for batch in epoch())
        speeds.append(num_pictures / (time.perf_counter() - began))
    return speeds[1:]


def image_folder(workload: Workload, workers: int) -> Figures:
    import torch
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    torch.set_num_threads(1)
    augmented = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIDE_PX, scale=(0.8, 1.0)), transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.2, 0.2, 0.2), transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.5,) * 3),
        ]
    )  # fmt: skip
    data = ImageFolder(str(workload.pictures(CLIENT)), augmented)
    more = {"persistent_workers": True} if workers else {}
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, num_workers=workers, **more)
    epochs = [lambda: loader] * (1 + EPOCHS)
    return {"images_per_second": _speed(epochs, lambda batch: len(batch[1]))}


def ours(workload: Workload, threads: int) -> Figures:
    import torch

    from common.faces.batches import epoch_batches
    from common.faces.pack import open_pack

    torch.set_num_threads(threads)
    chosen = settings()
    pack = open_pack("folder", workload.pictures(CLIENT), chosen.data, workload.cache, workers=1)
    batches = partial(epoch_batches, pack, chosen, device="cpu", stream_name=CLIENT)
    epochs = [partial(batches, epoch=number) for number in range(1 + 4 * EPOCHS)]  # they are short
    return {"images_per_second": _speed(epochs, lambda batch: len(batch.labels))}


def share(workload: Workload) -> Figures:
    """The part of a training epoch of W, one thread, that making its batches takes, made alone in the same process."""
    from common.faces.batches import epoch_batches
    from common.faces.pack import open_pack
    from common.models.recogniser import build_recogniser
    from common.training.autotune import resolve_compute
    from common.training.loop import make_optimiser, train_epochs

    chosen = settings()
    compute = resolve_compute(chosen, device="cpu", threads=1, cache_dir=workload.cache)
    pack = open_pack("folder", workload.pictures(CLIENT), chosen.data, workload.cache, workers=1)
    recogniser = build_recogniser(
        chosen.model, num_people=pack.num_classes, image_size=SIDE_PX, backbone_seed=1, head_seed=2
    )
    compute.place(recogniser)
    optimiser = make_optimiser(recogniser, chosen.training)
    seconds = []  # of the CPU, which other programs on the machine disturb least
    for number in range(2):
        began = time.process_time()
        train_epochs(
            recogniser, optimiser, pack, settings=chosen, compute=compute, epochs=range(number, number + 1),
            total_epochs=2, stream_name=CLIENT,
        )  # fmt: skip
        seconds.append(time.process_time() - began)
    batches = partial(epoch_batches, pack, chosen, device="cpu", stream_name=CLIENT)
    alone = []
    for number in range(EPOCHS):
        began = time.process_time()
        num_pictures = sum(len(batch.labels) for batch in batches(epoch=number))
        alone.append(time.process_time() - began)
    if num_pictures != NUM_TRAINING:
        raise ValueError(f"an epoch has {num_pictures} pictures, not W's {NUM_TRAINING}")
    return {"percent_of_training": [100 * one / seconds[-1] for one in alone], "training_cpu_s": seconds[-1]}


SIDES: dict[str, Callable[[Workload], Figures]] = {
    "ImageFolder, 0 workers": partial(image_folder, workers=0),
    "ours, 1 thread": partial(ours, threads=1),
    f"ImageFolder, {CORES} workers": partial(image_folder, workers=CORES),
    f"ours, {CORES} threads": partial(ours, threads=CORES),
    "training": share,
}


def in_a_process(place: Place, *, side: str) -> Figures:
    folder = str(workload_of(place).folder)
    command = [sys.executable, "-m", "bench.pictures", "--side", side, "--workload", folder]
    return run_side(command, cwd=ROOT, environment=environment())


WHAT = "augmented pictures a second"
COMPARISON = Comparison(
    name="input",
    what=f"Batches of {BATCH} augmented pictures of {SIDE_PX} px; flip, crop, colour.",
    prepare=describe_workload,
    sides={side: partial(in_a_process, side=side) for side in SIDES},
    claims=(
        *(
            Claim(what=f"{WHAT}, {ours}", ours=ours, figure="images_per_second", peer=peer, goal=8.0, at_least=True,
                  unit="img/s")
            for ours, peer in (
                ("ours, 1 thread", "ImageFolder, 0 workers"),
                (f"ours, {CORES} threads", f"ImageFolder, {CORES} workers"),
            )
        ),
        Claim(what="share of W's training step that its batches take", ours="training", figure="percent_of_training",
              unit="%", goal=3.0, of="ours"),
    ),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES, required=True)
    parser.add_argument("--workload", type=Path, required=True)
    arguments = parser.parse_args()
    print(json.dumps(SIDES[arguments.side](Workload(folder=arguments.workload))))


if __name__ == "__main__":
    main()
