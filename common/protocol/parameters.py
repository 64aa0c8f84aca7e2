"""Named tensors <-> one flat float32 buffer with a manifest that both ends check.

Flower's transfer cost follows the number of objects, not their bytes, so a model travels as one.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import CheckpointError

FLOAT32_BYTES = 4
Span = tuple[slice, bool]  # elements of the flat model, and whether they are trainable


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of the buffer: its name, shape and first element (`offset`, in elements)."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Manifest:
    """What lies where in the buffer; all tensors are float32."""

    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        """Number of elements of the whole buffer."""
        return self.entries[-1].offset + self.entries[-1].size if self.entries else 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole buffer."""
        return self.size * FLOAT32_BYTES

    def to_json(self) -> str:
        """One line of JSON: names, shapes, dtypes and offsets."""
        rows = [{"name": e.name, "shape": e.shape, "dtype": "float32", "offset": e.offset} for e in self.entries]
        return json.dumps(rows, separators=(",", ":"))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the manifest in hexadecimal; equal digests mean equal layouts."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def manifest_of(state: Mapping[str, Tensor]) -> Manifest:
    """The manifest of float32 tensors in the mapping's order.  Raises ValueError for another dtype."""
    entries, offset = [], 0
    for name, tensor in state.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype}, only float32 tensors are shared")
        entry = Entry(name=name, shape=tuple(tensor.shape), offset=offset)
        entries.append(entry)
        offset += entry.size
    return Manifest(tuple(entries))


def trainable_spans(manifest: Manifest, trainable: Collection[str]) -> tuple[Span, ...]:
    """The flat model as the longest runs of elements that are all trainable or all not.

    trainable: names, as of `common.models.recogniser.trainable_names`.
    """
    spans: list[Span] = []
    for entry in manifest.entries:
        is_trainable, end = entry.name in trainable, entry.offset + entry.size
        if spans and spans[-1][1] == is_trainable:
            spans[-1] = (slice(spans[-1][0].start, end), is_trainable)
        else:
            spans.append((slice(entry.offset, end), is_trainable))
    return tuple(spans)


@dataclass(frozen=True, kw_only=True)
class Part:
    """What of the flat model training can move, and so what of a change and of a model travels each round."""

    whole: Manifest
    part: Manifest
    spans: tuple[Span, ...]  # of the part
    frozen: Manifest = Manifest(())  # the rest, which stays as it is for the whole run

    @classmethod
    def of(cls, whole: Manifest, *, moving: Collection[str], trainable: Collection[str]) -> "Part":
        """moving, trainable: names, as of `common.models.recogniser.moving_names` and `trainable_names`."""
        part = _close(entry for entry in whole.entries if entry.name in moving)
        frozen = _close(entry for entry in whole.entries if entry.name not in moving)
        part = part if frozen.entries else whole
        return cls(whole=whole, part=part, spans=trainable_spans(part, trainable), frozen=frozen)

    def _places(self, some: Manifest) -> list[tuple[slice, slice]]:
        """Of each tensor of the part or the rest, where it is in the whole and there."""
        offsets = {entry.name: entry.offset for entry in self.whole.entries}
        return [
            (slice(offsets[e.name], offsets[e.name] + e.size), slice(e.offset, e.offset + e.size)) for e in some.entries
        ]

    def taken(self, buffer: NDArray[np.float32]) -> NDArray[np.float32]:
        """The part of a buffer: [part.size]; the buffer itself where all of it moves.  buffer: [whole.size]."""
        if self.part is self.whole:
            return buffer
        return np.concatenate([buffer[there] for there, _ in self._places(self.part)])

    def left(self, buffer: NDArray[np.float32]) -> NDArray[np.float32]:
        """The rest of a buffer: [frozen.size].  buffer: [whole.size]."""
        return np.concatenate([_NOTHING, *(buffer[there] for there, _ in self._places(self.frozen))])

    def joined(self, part: NDArray[np.float32], frozen: NDArray[np.float32]) -> NDArray[np.float32]:
        """The inverse of `taken` and `left`: [whole.size]."""
        if self.part is self.whole:
            return part
        whole = np.empty(self.whole.size, dtype=np.float32)
        for some, values in ((self.part, part), (self.frozen, frozen)):
            for there, here in self._places(some):
                whole[there] = values[here]
        return whole

    def spread(self, part: NDArray[np.float32]) -> NDArray[np.float32]:
        """A change of the whole, [whole.size], which leaves the bits of all else as they are."""
        if self.part is self.whole:
            return part
        # x + (-0.0) is x, also where x is -0.0, which + 0.0 would make another number of.
        return self.joined(part, np.full(self.frozen.size, -0.0, dtype=np.float32))


_NOTHING = np.empty(0, dtype=np.float32)


def _close(entries: Iterable[Entry]) -> Manifest:
    """A manifest of these tensors, one behind the other."""
    kept, offset = [], 0
    for entry in entries:
        kept.append(Entry(name=entry.name, shape=entry.shape, offset=offset))
        offset += entry.size
    return Manifest(tuple(kept))


def flatten(state: Mapping[str, Tensor], manifest: Manifest) -> NDArray[np.float32]:
    """Copy the named tensors into one buffer.

    state: tensors of any device, at least the manifest's names.  Returns [manifest.size] float32.
    Raises CheckpointError naming the first tensor that is missing or of another shape.
    """
    buffer = np.empty(manifest.size, dtype=np.float32)
    for entry in manifest.entries:
        tensor = state.get(entry.name)
        if tensor is None or tuple(tensor.shape) != entry.shape:
            seen = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise CheckpointError(f"{entry.name} is {seen}; the model needs it with shape {entry.shape}.")
        part = torch.from_numpy(buffer[entry.offset : entry.offset + entry.size])
        part.copy_(tensor.detach().reshape(-1))
    return buffer


def views(buffer: NDArray[np.float32], manifest: Manifest) -> dict[str, Tensor]:
    """The tensors of a buffer as views of it (nothing is copied).

    buffer: [manifest.size] float32.  Raises CheckpointError for another length or dtype.
    """
    if buffer.dtype != np.float32 or buffer.shape != (manifest.size,):
        raise CheckpointError(
            f"a buffer of {buffer.dtype} {buffer.shape} is not this model's, which has float32 ({manifest.size},)."
        )
    flat = torch.from_numpy(buffer)
    return {e.name: flat[e.offset : e.offset + e.size].view(e.shape) for e in manifest.entries}


def load_shared(module: torch.nn.Module, buffer: NDArray[np.float32], manifest: Manifest) -> None:
    """Copy a buffer into the module's tensors of the manifest's names; all others stay as they are."""
    state: dict[str, Any] = module.state_dict()
    with torch.no_grad():
        for name, tensor in views(buffer, manifest).items():
            state[name].copy_(tensor)


def buffer_sha256(buffer: NDArray[np.float32]) -> str:
    """SHA-256 of the buffer's little-endian bytes in hexadecimal: the identity of a global model."""
    return hashlib.sha256(np.ascontiguousarray(buffer, dtype="<f4").data).hexdigest()  # its memory, not a copy of it
