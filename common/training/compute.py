"""How a client computes: device, precision, memory format, threads, and whether torch.compile helps.

Nothing here is 'auto' any more. A compiled network is not wrapped: its names, copies and exports are those of one that
was never compiled; where the machine cannot compile it is eager again.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.models.recogniser import Recogniser
from common.system.runtime import use_threads

logger = logging.getLogger("facefed.training")
BranchEmbeddings = Callable[[Recogniser, Tensor, Tensor | None], dict[str, Tensor]]
_gave_up = False  # in this process, for good: what failed once takes as long to fail again
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}  # what autocast computes in, by precision


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How to compute, resolved.

    precision: float32 | tf32 | bfloat16 | float16; parameters are float32 with all of them. tf32 is float32 whose
    products have 10 bits of mantissa, on CUDA only; float16 needs its losses scaled (`training_step`).
    """

    device: str
    precision: str
    memory_format: str  # contiguous | channels_last
    threads: int
    compiled: bool = False  # the network's forward and backward pass by torch.compile
    others: tuple[str, ...] = ()  # further devices that train the same model, a process each; see `ranks`

    @property
    def devices(self) -> str:
        """All devices as one word: "cuda:0,cuda:1"."""
        return ",".join((self.device, *self.others))

    def of_rank(self, rank: int) -> "Compute":
        """How one of those processes trains: on its device alone, eagerly, with its part of the threads."""
        every = (self.device, *self.others)
        threads = max(1, self.threads // len(every))
        return dataclasses.replace(self, device=every[rank], threads=threads, compiled=False, others=())

    @property
    def device_kind(self) -> str:
        """The device without its number: cpu, cuda or mps."""
        return self.device.split(":")[0]

    def autocast(self) -> torch.autocast:
        """The context in which forward passes run."""
        half = HALVES.get(self.precision)
        return torch.autocast(
            self.device_kind, dtype=half or torch.bfloat16, enabled=half is not None, cache_enabled=True
        )

    def laid_out(self, pictures: Tensor) -> Tensor:
        """The batch in the chosen memory format."""
        layout = torch.channels_last if self.memory_format == "channels_last" else torch.contiguous_format
        return pictures.contiguous(memory_format=layout)

    def place(self, module: nn.Module) -> None:
        """Move a module to the device, in the chosen memory format; set this process's threads and, on CUDA, TF32."""
        use_threads(self.threads)
        if self.device_kind == "cuda":
            # cuDNN would use it for float32 convolutions unless told not to
            products = "tf32" if self.precision == "tf32" else "ieee"
            torch.backends.cuda.matmul.fp32_precision = products
            torch.backends.cudnn.conv.fp32_precision = products  # type: ignore[attr-defined]
        if self.memory_format == "channels_last":
            module.to(memory_format=torch.channels_last)
        module.to(self.device)


def on_devices(compute: Compute, devices: Sequence[str]) -> Compute:
    """The same with further devices to train on.  devices: all of them, the one of `compute` first."""
    if len(devices) > 1 and compute.compiled:
        logger.info("%d devices train without torch.compile", len(devices))
    return dataclasses.replace(
        compute, others=tuple(devices[1:]), compiled=compute.compiled and len(devices) == 1, device=devices[0]
    )


def eager(recogniser: Recogniser, pictures: Tensor, partners: Tensor | None) -> dict[str, Tensor]:
    """`Recogniser.branch_embeddings` as it is."""
    return recogniser.branch_embeddings(pictures, partners)


@functools.cache
def compiled() -> BranchEmbeddings:
    """The same compiled; the first pictures of a size wait for the compiler."""
    return torch.compile(eager)


def is_given_up() -> bool:
    """Whether compiling has failed in this process."""
    return _gave_up


def give_up(error: BaseException) -> None:
    """Compute eagerly from here on, and say so once."""
    global _gave_up
    if not _gave_up:
        line = str(error).strip().splitlines() or [type(error).__name__]
        logger.warning("torch.compile failed, so this process computes without it: %s", line[0][:300])
    _gave_up = True
