"""How a client computes: device, precision, memory format, threads; nothing here is 'auto' any more."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.runtime import use_threads

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
