"""`auto` precision, memory format and threads -> what a short measured trial finds fastest on this machine.

The result is kept per machine, torch version, model and size, so that every client of one machine, and the next run
on it, uses the same.
"""

import dataclasses
import time
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoints import read_json, write_json
from common.errors import CheckpointError
from common.models.recogniser import Recogniser, build_recogniser
from common.runtime import machine_digest
from common.settings import VITS, Settings
from common.training import Compute, make_optimiser

TRIAL_BATCH = 16
TRIAL_PEOPLE = 64
TRIAL_STEPS = 3
CANDIDATES = (("float32", "contiguous"), ("float32", "channels_last"), ("bfloat16", "channels_last"))


def threads_for(settings: Settings, num_clients_there: int, cores: int) -> int:
    """CPU threads of each client when so many share a machine's cores: as set, or the cores divided, at least one."""
    threads = settings.training.threads
    return threads if isinstance(threads, int) else max(1, cores // max(1, num_clients_there))


def _candidates(settings: Settings, device: str) -> list[tuple[str, str]]:
    wanted = (settings.training.precision, settings.training.memory_format)
    fits = [c for c in CANDIDATES if all(want in ("auto", have) for want, have in zip(wanted, c, strict=True))]
    if device.startswith("mps"):  # autocast to bfloat16 is not complete there
        fits = [c for c in fits if c[0] == "float32"] or [CANDIDATES[0]]
    return fits or [(wanted[0], wanted[1])]


def _clock(device: str) -> float:
    """CPU time on the CPU, which other programs on the machine disturb least; wall time elsewhere."""
    return time.process_time() if device == "cpu" else time.perf_counter()


def _one_step(recogniser: Recogniser, optimiser: torch.optim.Optimizer, pictures: Tensor, compute: Compute) -> float:
    """Seconds of one training step."""
    labels = torch.arange(len(pictures), device=compute.device) % TRIAL_PEOPLE
    start = _clock(compute.device)
    partners = torch.arange(len(pictures), device=compute.device).roll(1)
    with compute.autocast():
        embeddings = recogniser.branch_embeddings(compute.laid_out(pictures), partners)
    loss = recogniser.combined(
        {name: recogniser.branch_logits(name, e.float(), labels).logsumexp(1).mean() for name, e in embeddings.items()}
    )
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    loss.item()  # waits for the device
    return _clock(compute.device) - start


def measure(settings: Settings, candidates: list[tuple[str, str]], *, device: str, threads: int) -> dict[str, float]:
    """Seconds of one training step for each candidate, as {"bfloat16/channels_last": 0.2, ...}.

    The candidates take turns and the smallest time of each counts, so that a busy moment hits none of them alone; the
    first turn warms up.
    """
    side = settings.data.image_size
    entrants = []
    with torch.random.fork_rng():
        pictures = torch.rand(TRIAL_BATCH, 3, side, side, device=device) * 2 - 1
        for precision, memory_format in candidates:
            recogniser = build_recogniser(
                dataclasses.replace(settings.model, pretrained="none"),
                num_people=TRIAL_PEOPLE,
                image_size=side,
                backbone_seed=0,
                head_seed=0,
            )
            compute = Compute(device=device, precision=precision, memory_format=memory_format, threads=threads)
            compute.place(recogniser)
            recogniser.train()
            entrants.append((recogniser, make_optimiser(recogniser, settings.training), compute))
        seconds = {f"{compute.precision}/{compute.memory_format}": float("inf") for _, _, compute in entrants}
        for _ in range(1 + TRIAL_STEPS):
            for recogniser, optimiser, compute in entrants:
                name = f"{compute.precision}/{compute.memory_format}"
                seconds[name] = min(seconds[name], _one_step(recogniser, optimiser, pictures, compute))
    return seconds


def _trial_key(settings: Settings, device: str, threads: int) -> str:
    model, data = settings.model, settings.data
    return "/".join(
        str(part)
        for part in (
            machine_digest(), torch.__version__, device, threads, model.backbone, model.width, model.embedding_size,
            data.image_size, settings.training.precision, settings.training.memory_format,
            *((model.patch_size, model.depth, model.attention) if model.backbone in VITS else ()),
        )
    )  # fmt: skip


def resolve_compute(settings: Settings, *, device: str, threads: int, cache_dir: Path) -> Compute:
    """The precision and memory format to use: as set, or for `auto` the fastest of a trial of a few seconds."""
    candidates = _candidates(settings, device)
    precision, memory_format = candidates[0]
    if len(candidates) > 1:
        path = cache_dir / "trials.json"
        try:
            known = read_json(path)
        except CheckpointError:
            known = {}
        key = _trial_key(settings, device, threads)
        if key not in known:
            known[key] = measure(settings, candidates, device=device, threads=threads)
            write_json(path, known)
        precision, memory_format = min(known[key], key=known[key].get).split("/")
    return Compute(device=device, precision=precision, memory_format=memory_format, threads=threads)
