"""What DCAL costs against the plain ViT (self-attention only): training, inference, memory. ViT-Tiny, 64 px, patch 8.

    python -m bench.dcal [--batch-size 32] [--precision float32|bfloat16] [--threads 1] [--json]

The sides take turns in one process, and medians of CPU time count, which other programs disturb less than wall time.
Peak memory is that of a process of its own for each side: what training adds to the interpreter and its libraries.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.models.recogniser import Recogniser

REPEATS = 9
WARM_UPS = 2
SIDE_PX, PATCH_PX, NUM_PEOPLE = 64, 8, 64
SIDES = ("sa", "glca", "pwca", "dcal")


def built(attention: str, inference: str = "sa") -> "Recogniser":
    from common.models.recogniser import build_recogniser
    from common.settings import ModelSettings

    model = ModelSettings(backbone="vit_tiny", patch_size=PATCH_PX, attention=attention, inference=inference)
    return build_recogniser(model, num_people=NUM_PEOPLE, image_size=SIDE_PX, backbone_seed=1, head_seed=2)


def stepper(attention: str, arguments: argparse.Namespace):
    """A function that trains one step, as every mode of training does."""
    import torch

    from common.faces.batches import Batch
    from common.models.dcal import random_partners
    from common.settings import TrainingSettings
    from common.training.loop import Compute, make_optimiser
    from common.training.step import Stepper

    compute = Compute(
        device="cpu", precision=arguments.precision, memory_format="channels_last", threads=arguments.threads
    )
    recogniser, training, stream = built(attention), TrainingSettings(), torch.Generator().manual_seed(1)
    compute.place(recogniser)
    recogniser.train()
    optimiser = make_optimiser(recogniser, training)
    batch = arguments.batch_size
    pictures, labels = torch.rand(batch, 3, SIDE_PX, SIDE_PX) * 2 - 1, torch.arange(batch) % NUM_PEOPLE

    steps = Stepper(
        recogniser=recogniser,
        optimiser=optimiser,
        training=training,
        compute=compute,
        choose_partners=(lambda part: random_partners(part.labels, stream)) if "pwca" in recogniser.branches else None,
        stream=stream,
    )
    return lambda: steps.step(Batch(pictures, labels, None), where="the bench")


def embedder(attention: str, inference: str, arguments: argparse.Namespace):
    """A function that embeds one batch after training."""
    import torch

    recogniser = built(attention, inference).eval()
    recogniser.to(memory_format=torch.channels_last)
    pictures = torch.rand(arguments.batch_size, 3, SIDE_PX, SIDE_PX).contiguous(memory_format=torch.channels_last)

    def embed() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bfloat16"):
            recogniser.embed(pictures)

    return embed


def cpu_seconds(jobs: dict[str, object], repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(WARM_UPS + repeats):
        names = list(jobs)
        for name in names if number % 2 else reversed(names):  # nobody always runs after the same other one
            started = time.process_time()
            jobs[name]()
            if number >= WARM_UPS:
                seconds[name].append(time.process_time() - started)
    return seconds


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def added_mib(attention: str, arguments: argparse.Namespace) -> float:
    """In a process of its own: the peak after three steps, less what it was before."""
    import torch

    torch.set_num_threads(arguments.threads)
    step = stepper(attention, arguments)
    before = peak_mib()
    for _ in range(3):
        step()
    return peak_mib() - before


def added_in_a_process(attention: str, arguments: argparse.Namespace) -> float:
    given = ["--batch-size", str(arguments.batch_size), "--precision", arguments.precision]
    command = [
        sys.executable,
        "-m",
        "bench.dcal",
        "--memory-of",
        attention,
        "--threads",
        str(arguments.threads),
        *given,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    return float(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)


def measured(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    # First: a process begins with the peak of the one that started it, and this one is still small.
    memory = {side: added_in_a_process(side, arguments) for side in SIDES}

    import torch

    torch.set_num_threads(arguments.threads)
    training = cpu_seconds({side: stepper(side, arguments) for side in SIDES}, REPEATS)
    inference = cpu_seconds(
        {
            "sa": embedder("sa", "sa", arguments),
            "dcal, sa embeds": embedder("dcal", "sa", arguments),
            "dcal, glca embeds": embedder("dcal", "glca", arguments),
            "dcal, both embed": embedder("dcal", "both", arguments),
        },
        3 * REPEATS,
    )
    return {
        "training pictures/s": {n: arguments.batch_size / statistics.median(s) for n, s in training.items()},
        "inference pictures/s": {n: arguments.batch_size / statistics.median(s) for n, s in inference.items()},
        "training adds MiB": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(added_mib(arguments.memory_of, arguments))
        return
    figures = measured(arguments)
    if arguments.json:
        print(json.dumps(figures))
        return
    for title, values in figures.items():
        print(title)
        for name, value in values.items():
            print(f"  {name:20} {value:8.1f}  {value / values['sa']:6.3f} of the plain ViT's")


if __name__ == "__main__":
    main()
