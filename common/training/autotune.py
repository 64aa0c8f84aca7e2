"""`auto` precision, memory format, threads and compiling -> what a short trial finds fastest on this machine.

The result is kept per machine, torch version, model and size, so that every client of one machine, and the next run
on it, uses the same.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from common.errors import CheckpointError, UserError
from common.faces.batches import num_batches
from common.models.recogniser import Recogniser, build_recogniser
from common.models.table import BACKBONES
from common.settings import Settings
from common.system.files import read_json, write_json
from common.system.runtime import machine_digest
from common.training.compute import Compute, compiled, eager, give_up
from common.training.optimiser import flat, make_optimiser, settle

TRIAL_BATCH = 16
TRIAL_PEOPLE = 64
TRIAL_STEPS = 3
CANDIDATES = (("float32", "contiguous"), ("float32", "channels_last"), ("bfloat16", "channels_last"))
CUDA_CANDIDATES = (("tf32", "contiguous"), ("tf32", "channels_last"), ("bfloat16", "channels_last"))
CUDA_ONLY = ("tf32", "float16")
# Compiling is not even tried where it could not pay: by what the best and the quickest that we saw would give.
MOST_SAVED = 0.3  # of a step
LEAST_COMPILE_S = 20.0


def threads_for(settings: Settings, num_clients_there: int, cores: int) -> int:
    """CPU threads of each client when so many share a machine's cores: as set, or the cores divided, at least one."""
    threads = settings.training.threads
    return threads if isinstance(threads, int) else max(1, cores // max(1, num_clients_there))


def _candidates(settings: Settings, device: str) -> list[tuple[str, str]]:
    """What may be chosen. `auto` is never full float32 on CUDA, where TF32 is, nor float16 where bfloat16 works."""
    wanted = (settings.training.precision, settings.training.memory_format)
    known: tuple[tuple[str, str], ...] = CANDIDATES
    if device.startswith("cuda"):
        half = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        known = tuple((half if number == "bfloat16" else number, layout) for number, layout in CUDA_CANDIDATES)
    elif wanted[0] in CUDA_ONLY:
        raise UserError(
            f"training.precision = {wanted[0]!r} needs a CUDA device, and this client's is {device}; choose float32,"
            " bfloat16 or auto."
        )
    fits = [c for c in known if all(want in ("auto", have) for want, have in zip(wanted, c, strict=True))]
    if device.startswith("mps"):  # autocast to bfloat16 is not complete there
        fits = [c for c in fits if c[0] == "float32"] or [CANDIDATES[0]]
    if fits or wanted[0] == "auto":
        return fits or [("float32", wanted[1])]
    return [(wanted[0], "channels_last" if wanted[1] == "auto" else wanted[1])]


def _clock(device: str) -> float:
    """CPU time on the CPU, which other programs on the machine disturb least; wall time elsewhere."""
    return time.process_time() if device == "cpu" else time.perf_counter()


def _one_step(
    recogniser: Recogniser,
    optimiser: torch.optim.Optimizer,
    pictures: Tensor,
    compute: Compute,
) -> float:
    """Seconds of one training step."""
    labels = torch.arange(len(pictures), device=compute.device) % TRIAL_PEOPLE
    start = _clock(compute.device)
    partners = torch.arange(len(pictures), device=compute.device).roll(1)
    network = compiled() if compute.compiled else eager
    with compute.autocast():
        embeddings = network(recogniser, compute.laid_out(pictures), partners)
    loss = recogniser.combined(
        {name: recogniser.branch_logits(name, e.float(), labels).logsumexp(1).mean() for name, e in embeddings.items()}
    )
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    with flat(optimiser):
        optimiser.step()
    loss.item()  # waits for the device
    return _clock(compute.device) - start


def measure(settings: Settings, candidates: list[tuple[str, str]], *, device: str, threads: int) -> dict[str, float]:
    """Seconds of one training step for each candidate, as {"bfloat16/channels_last": 0.2, ...}.

    The candidates take turns and the smallest time of each counts, so that a busy moment hits none of them alone; the
    first turn warms up.
    """
    with torch.random.fork_rng():
        pictures = _trial_pictures(settings, device)
        entrants = []
        for precision, memory_format in candidates:
            compute = Compute(device=device, precision=precision, memory_format=memory_format, threads=threads)
            entrants.append((*_trial_model(settings, compute), compute))
        seconds = {f"{compute.precision}/{compute.memory_format}": float("inf") for _, _, compute in entrants}
        for _ in range(1 + TRIAL_STEPS):
            for recogniser, optimiser, compute in entrants:
                name = f"{compute.precision}/{compute.memory_format}"
                compute.place(recogniser)  # TF32 is a switch of the whole process
                seconds[name] = min(seconds[name], _one_step(recogniser, optimiser, pictures, compute))
    return seconds


def _trial_pictures(settings: Settings, device: str) -> Tensor:
    side = settings.data.image_size
    return torch.rand(TRIAL_BATCH, 3, side, side, device=device) * 2 - 1


def _trial_model(settings: Settings, compute: Compute) -> tuple[Recogniser, torch.optim.Optimizer]:
    recogniser = build_recogniser(
        dataclasses.replace(settings.model, pretrained="none"),
        num_people=TRIAL_PEOPLE,
        image_size=settings.data.image_size,
        backbone_seed=0,
        head_seed=0,
    )
    compute.place(recogniser)
    recogniser.train()
    optimiser = make_optimiser(recogniser, settings.training)
    settle(optimiser)
    return recogniser, optimiser


def measure_compiling(settings: Settings, compute: Compute) -> dict[str, float]:
    """Seconds that torch.compile takes, and of one step with it: {"compile": 80.0, "compiled": 0.2}.

    A machine that cannot compile has both infinite.
    """
    compute = dataclasses.replace(compute, compiled=True)
    with torch.random.fork_rng():
        pictures = _trial_pictures(settings, compute.device)
        recogniser, optimiser = _trial_model(settings, compute)
        start = time.perf_counter()
        try:
            _one_step(recogniser, optimiser, pictures, compute)
            took = time.perf_counter() - start
            steps = [_one_step(recogniser, optimiser, pictures, compute) for _ in range(TRIAL_STEPS)]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler may end with
            give_up(error)
            return {"compile": math.inf, "compiled": math.inf}
    return {"compile": took, "compiled": min(steps)}


def _trial_key(settings: Settings, device: str, threads: int) -> str:
    model, data = settings.model, settings.data
    return "/".join(
        str(part)
        for part in (
            machine_digest(), torch.__version__, device, threads, model.backbone, model.width, model.embedding_size,
            data.image_size, settings.training.precision, settings.training.memory_format,
            *((model.norm,) if model.norm != "batch" else ()),
            *((model.patch_size, model.depth, model.attention) if BACKBONES[model.backbone].is_vit else ()),
        )
    )  # fmt: skip


def resolve_compute(
    settings: Settings, *, device: str, threads: int, cache_dir: Path, num_training_pictures: int = 0
) -> Compute:
    """How to compute: as set, or for `auto` the fastest of a trial of a few seconds.

    num_training_pictures: of the client; what compiling would save in the whole run grows with them.
    Raises UserError for a precision that the device does not have.
    """
    candidates = _candidates(settings, device)
    precision, memory_format = candidates[0]
    trials = _Trials(cache_dir / "trials.json")
    key = _trial_key(settings, device, threads)
    if len(candidates) > 1:
        seconds = trials.get(key, lambda: measure(settings, candidates, device=device, threads=threads))
        precision, memory_format = min(seconds, key=lambda name: seconds[name]).split("/")
    compute = Compute(device=device, precision=precision, memory_format=memory_format, threads=threads)
    num_steps = settings.total_steps(num_batches(num_training_pictures, settings.training.batch_size))
    return dataclasses.replace(compute, compiled=_is_compiled(settings, compute, trials, key, num_steps))


class _Trials:
    """The measurements that were made on this machine, by what was measured."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, key: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """A former measurement, or a new one, which is kept."""
        try:
            known: dict[str, dict[str, float]] = read_json(self._path)
        except CheckpointError:
            known = {}
        if key not in known:
            known[key] = make()
            write_json(self._path, known)
        return known[key]


def _is_compiled(settings: Settings, compute: Compute, trials: _Trials, key: str, num_steps: int) -> bool:
    """Whether to compile: as set; for `auto` whether that saves more, in so many steps, than compiling takes.

    Not with activation checkpointing, which exchanges parts of the network as it goes.
    """
    training = settings.training
    if training.compile == "off" or training.activation_checkpointing:
        return False
    if training.compile == "on":
        return True
    name = f"{compute.precision}/{compute.memory_format}"
    chosen = [(compute.precision, compute.memory_format)]
    eager_s = trials.get(
        f"{key}/{name}", lambda: measure(settings, chosen, device=compute.device, threads=compute.threads)
    )[name]
    steps = num_steps * training.batch_size / TRIAL_BATCH  # as long as those of the trial
    if MOST_SAVED * eager_s * steps < LEAST_COMPILE_S:
        return False
    found = trials.get(f"{key}/{name}/compile", lambda: measure_compiling(settings, compute))
    return (eager_s - found["compiled"]) * steps > found["compile"]
