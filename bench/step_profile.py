"""Where the seconds of a client's training go: torch's profiler over one epoch of workload W, in one process.

    python -m bench.step_profile [--threads 1] [--precision bfloat16] [--memory-format channels_last] [--rows 16]

Without a precision and a format those that `auto` chooses on this machine are used.
"""

import argparse
import dataclasses
import time
from functools import partial
from pathlib import Path

from bench.workload import CLIENTS, SIDE_PX, prepare, settings

KINDS = {
    "convolution": ("convolution",),
    "normalisation": ("batch_norm",),
    "optimiser and clipping": ("sgd", "_foreach", "fused", "linalg_vector_norm", "aten::mul_", "aten::add_"),
    "copies and casts": ("copy_", "_to_copy", "clone", "contiguous"),
    "activations and sums": ("clamp_min", "threshold", "aten::add", "relu"),
}


def kind_of(operator: str) -> str:
    """The first kind with a word that is in the operator's name."""
    return next((kind for kind, words in KINDS.items() if any(word in operator.lower() for word in words)), "other")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, default=Path(".facefed/bench"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision")
    parser.add_argument("--memory-format")
    parser.add_argument("--rows", type=int, default=16)
    arguments = parser.parse_args()
    import torch

    from common.faces.pack import open_pack
    from common.models.recogniser import build_recogniser
    from common.training.autotune import resolve_compute
    from common.training.loop import make_optimiser, train_epochs

    arguments.scratch.mkdir(parents=True, exist_ok=True)
    workload, chosen = prepare(arguments.scratch), settings()
    pack = open_pack("folder", workload.pictures(CLIENTS[0]), chosen.data, workload.cache, workers=1)
    compute = resolve_compute(chosen, device="cpu", threads=arguments.threads, cache_dir=workload.cache)
    wanted = {"precision": arguments.precision, "memory_format": arguments.memory_format}
    compute = dataclasses.replace(compute, **{name: value for name, value in wanted.items() if value})
    recogniser = build_recogniser(
        chosen.model, num_people=pack.num_classes, image_size=SIDE_PX, backbone_seed=1, head_seed=2
    )
    compute.place(recogniser)
    optimiser = make_optimiser(recogniser, chosen.training)
    epoch = partial(
        train_epochs, recogniser, optimiser, pack, settings=chosen, compute=compute, total_epochs=3,
        stream_name=CLIENTS[0],
    )  # fmt: skip
    epoch(epochs=range(1))
    began, cpu = time.perf_counter(), time.process_time()
    epoch(epochs=range(1, 2))
    print(f"{compute}: {time.perf_counter() - began:.2f} s, {time.process_time() - cpu:.2f} CPU-s without the profiler")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        epoch(epochs=range(2, 3))
    events = profiler.key_averages()
    total, by_kind = sum(event.self_cpu_time_total for event in events), dict.fromkeys((*KINDS, "other"), 0.0)
    for event in events:
        by_kind[kind_of(event.key)] += event.self_cpu_time_total
    for kind, microseconds in by_kind.items():
        print(f"{kind:24} {microseconds / 1e6:6.2f} s  {100 * microseconds / total:5.1f} %")
    print(events.table(sort_by="self_cpu_time_total", row_limit=arguments.rows, max_name_column_width=50))


if __name__ == "__main__":
    main()
